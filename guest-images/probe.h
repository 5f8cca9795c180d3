/* What the files of the probe share. */
#ifndef PROBE_H
#define PROBE_H

/* Ends the probe with what errno says of WHAT. */
_Noreturn void fail(const char *what);

/* Runs body(0..threads) on threads of their own; returns when all have ended. */
void on_threads(unsigned long threads, void *(*body)(void *));
/* Keeps this thread on a CPU; they are taken in turn. */
void pin(unsigned long index);
/* What a call answered: the name of an errno, or OK. */
const char *answer_name(int answer);

/* Ways into functions of the kernel that run where not every function may; see probe.c. */
int datagrams(unsigned long count, unsigned long threads);
int signals(unsigned long count, unsigned long threads);
int futexes(unsigned long count, unsigned long threads);
int marks(unsigned long count, unsigned long threads);

/* Attaches BPF programs to functions that churn goes through; how many there are. */
int attach_bpf(void);
/* Runs a BPF program for ever; the body of a thread. */
void *run_bpf(void *unused);

#endif
