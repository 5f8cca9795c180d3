/* What the files of the probe share. */
#ifndef PROBE_H
#define PROBE_H

/* Ends the probe with what errno says of WHAT. */
_Noreturn void fail(const char *what);

/* Attaches BPF programs to functions that churn goes through; how many there are. */
int attach_bpf(void);
/* Runs a BPF program for ever; the body of a thread. */
void *run_bpf(void *unused);

#endif
