/*
 * probe: what a test guest does to show how its kernel behaves. One static program, one subcommand a question.
 *
 *   siocatmark [COUNT] [INTERVAL_MS]  ask SIOCATMARK of an AF_UNIX datagram socket; "siocatmark: N RESULT ERRNONAME" a try
 *                                     (COUNT 0, the default: for ever; INTERVAL_MS default 100)
 *   siocatmark-loop SECONDS THREADS   the same without pause from threads pinned to CPUs; counts each answer and its changes
 *   answers THREADS                   the same for ever; a line "answer ERRNONAME at SEQ thread T" for a thread's first answer
 *                                     and whenever its answer changes (SEQ: that thread's calls so far)
 *   tally COUNT THREADS [TYPE [REST]] the same COUNT times a thread (0: until SIGUSR2) of a socket of that type (default 2, datagrams), with a rest of so many
 *                                     microseconds after each, on threads pinned to CPUs, or without any (THREADS 0); "tally: thread T: ERRNONAME N ERRNONAME N ..." a thread
 *   calls COUNT                       the same COUNT times as fast as it can; "calls: COUNT in NS ns"
 *   as UID COMMAND...                 run a command as another user
 *   heartbeat SECONDS                 a thread on each CPU wakes every millisecond; "heartbeat: cpu C wakes N largest_gap_us G"
 *   clock                             "clock: realtime NS monotonic NS boottime NS"
 *   kexec KERNEL INITRD CMDLINE       load a kernel with kexec_file_load and start it
 *   devmem ADDRESS LENGTH             try to read and to map physical memory through /dev/mem
 *   busy THREADS                      spin for ever
 *   churn THREADS                     go through the kernel in many ways for ever: calls, faults, pipes, sockets, signals, timers, forks
 *   sleepers COUNT                    threads that sleep in one of several system calls each; "sleepers: COUNT" when all are there
 *   bpf THREADS                       attach BPF programs to what churn goes through ("bpf: N programs"), then churn, and run another program
 *   datagrams COUNT THREADS           send so many UDP datagrams to oneself on each thread, and receive each; "datagrams: N" is all of them
 *   signals COUNT THREADS             the same with SIGUSR2; "signals: N"
 *   futexes COUNT THREADS             the same with FUTEX_WAKE_OP, whose operand (the third argument, and part of the seventh) must be found in memory
 *                                     after the call; "futexes: N"
 *   marks COUNT THREADS               ask SIOCATMARK with memory that is there, that a fault must bring, that is read-only, that is not there, and
 *                                     that is the kernel's; "marks: KIND ERRNONAME N ..." a kind: what was answered, and how often. An answer of OK must
 *                                     have added one to the number there, and any other have left it
 *   entries                           list a directory into memory that is not there, and into memory that is; "entries: ERRNONAME, then some"
 *   steps COUNT                       step a child through COUNT instructions; "steps: made N of COUNT"
 *   breakpoint SECONDS                call a function on which a hardware breakpoint is set; "breakpoint: calls N hits N"
 *   power-button                      open the power button, go to the background, power off when it is pressed
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <linux/hw_breakpoint.h>
#include <linux/input.h>
#include <linux/perf_event.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"

enum { MAX_THREADS = 1024, MAX_SLEEPERS = 30000, ERRNO_MAX = 4096 };

_Noreturn void fail(const char *what)
{
	fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
	exit(1);
}

static _Noreturn void usage(void)
{
	fprintf(stderr, "usage: probe siocatmark|siocatmark-loop|answers|tally|calls|as|heartbeat|clock|kexec|devmem|busy|churn|bpf|sleepers|datagrams|signals|futexes|marks|steps|breakpoint|power-button|entries ...\n");
	exit(2);
}

static unsigned long number(const char *text, unsigned long max)
{
	char *end;
	errno = 0;
	unsigned long value = strtoul(text, &end, 0);
	if (errno || end == text || *end || value > max) {
		fprintf(stderr, "probe: '%s' is not a number up to %lu\n", text, max);
		exit(2);
	}
	return value;
}

static uint64_t now_ns(clockid_t clock)
{
	struct timespec t;
	if (clock_gettime(clock, &t))
		fail("clock_gettime");
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void pin(unsigned long index)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(index % (unsigned long)sysconf(_SC_NPROCESSORS_ONLN), &set);
	if (sched_setaffinity(0, sizeof set, &set))
		fail("sched_setaffinity");
}

void on_threads(unsigned long threads, void *(*body)(void *))
{
	static pthread_t thread[MAX_THREADS];
	for (unsigned long i = 0; i < threads; i++)
		if ((errno = pthread_create(&thread[i], NULL, body, (void *)i)))
			fail("pthread_create");
	for (unsigned long i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
}

/* SIOCATMARK: 0, or the errno it failed with. */
static int ask(int socket_fd)
{
	int mark = 0;
	return ioctl(socket_fd, SIOCATMARK, &mark) ? errno : 0;
}

static int unix_socket(int type)
{
	int fd = socket(AF_UNIX, type, 0);
	if (fd < 0)
		fail("socket");
	return fd;
}

static int dgram_socket(void)
{
	return unix_socket(SOCK_DGRAM);
}

const char *answer_name(int answer)
{
	const char *name = answer ? strerrorname_np(answer) : "OK";
	return name ? name : "?";
}

static int siocatmark(unsigned long count, unsigned long interval_ms)
{
	int fd = dgram_socket();
	for (unsigned long n = 1; !count || n <= count; n++) {
		int answer = ask(fd);
		printf("siocatmark: %lu %d %s\n", n, answer ? -1 : 0, answer_name(answer));
		if (n != count)
			usleep((useconds_t)interval_ms * 1000);
	}
	return 0;
}

static int time_calls(unsigned long count)
{
	int fd = dgram_socket();
	uint64_t start = now_ns(CLOCK_MONOTONIC);
	/* Whatever the kernel answers. */
	for (unsigned long n = 0; n < count; n++)
		ask(fd);
	printf("calls: %lu in %" PRIu64 " ns\n", count, now_ns(CLOCK_MONOTONIC) - start);
	return 0;
}

static uint64_t loop_end_ns;
static uint64_t loop_counts[ERRNO_MAX];
static uint64_t loop_changes;
static pthread_mutex_t loop_lock = PTHREAD_MUTEX_INITIALIZER;

static void *siocatmark_loop(void *index)
{
	static __thread uint64_t counts[ERRNO_MAX];
	uint64_t changes = 0;
	int fd = dgram_socket(), last = -1;
	pin((unsigned long)index);
	while (now_ns(CLOCK_MONOTONIC) < loop_end_ns) {
		for (int i = 0; i < 64; i++) {
			int answer = ask(fd);
			counts[answer]++;
			changes += last >= 0 && answer != last;
			last = answer;
		}
	}
	pthread_mutex_lock(&loop_lock);
	loop_changes += changes;
	for (int i = 0; i < ERRNO_MAX; i++)
		loop_counts[i] += counts[i];
	pthread_mutex_unlock(&loop_lock);
	return NULL;
}

static int report_loop(unsigned long seconds, unsigned long threads)
{
	loop_end_ns = now_ns(CLOCK_MONOTONIC) + seconds * 1000000000u;
	on_threads(threads, siocatmark_loop);
	for (int i = 0; i < ERRNO_MAX; i++)
		if (loop_counts[i])
			printf("siocatmark-loop: %s %lu\n", answer_name(i), loop_counts[i]);
	printf("siocatmark-loop: changes %lu\n", loop_changes);
	return 0;
}

static void *answers(void *index)
{
	int fd = dgram_socket(), last = -1;
	pin((unsigned long)index);
	for (uint64_t n = 1;; n++) {
		int answer = ask(fd);
		if (answer != last)
			printf("answer %s at %lu thread %lu\n", answer_name(answer), n, (unsigned long)index);
		last = answer;
	}
	return NULL;
}

static void on_signal(int signal)
{
	(void)signal;
}

static uint64_t tally_count;
static int tally_type = SOCK_DGRAM;
static useconds_t tally_rest;
static volatile sig_atomic_t tally_over;

static void end_tally(int signal)
{
	(void)signal;
	tally_over = 1;
}

static void *tally_calls(void *index)
{
	uint64_t *counts = calloc(ERRNO_MAX, sizeof *counts);
	int fd = unix_socket(tally_type);
	if (!counts)
		fail("calloc");
	for (uint64_t n = 0; !tally_over && (!tally_count || n < tally_count); n++) {
		counts[ask(fd)]++;
		if (tally_rest)
			usleep(tally_rest);
	}
	flockfile(stdout);
	printf("tally: thread %lu:", (unsigned long)index);
	for (int i = 0; i < ERRNO_MAX; i++)
		if (counts[i])
			printf(" %s %lu", answer_name(i), counts[i]);
	printf("\n");
	funlockfile(stdout);
	free(counts);
	return NULL;
}

static void *tally_pinned(void *index)
{
	pin((unsigned long)index);
	return tally_calls(index);
}

static int tally(unsigned long count, unsigned long threads, unsigned long type, unsigned long rest)
{
	tally_count = count;
	tally_type = (int)type;
	tally_rest = (useconds_t)rest;
	/* One that comes in the middle of a call has it answer, not start anew. */
	struct sigaction end = { .sa_handler = end_tally }, wake = { .sa_handler = on_signal };
	if (sigaction(SIGUSR2, &end, NULL) || sigaction(SIGUSR1, &wake, NULL))
		fail("sigaction");
	if (threads)
		on_threads(threads, tally_pinned);
	else
		tally_calls(NULL);
	return 0;
}

static _Noreturn void run_as(unsigned long user, char **command)
{
	if (setuid((uid_t)user))
		fail("setuid");
	execvp(command[0], command);
	fail(command[0]);
}

struct beats {
	uint64_t wakes, largest_gap_ns;
};
static struct beats beats[MAX_THREADS];

static void *heartbeat(void *index)
{
	struct beats mine = { 0 };
	pin((unsigned long)index);
	uint64_t last = now_ns(CLOCK_MONOTONIC);
	while (last < loop_end_ns) {
		struct timespec tick = { .tv_nsec = 1000000 };
		clock_nanosleep(CLOCK_MONOTONIC, 0, &tick, NULL);
		uint64_t now = now_ns(CLOCK_MONOTONIC);
		if (now - last > mine.largest_gap_ns)
			mine.largest_gap_ns = now - last;
		last = now;
		mine.wakes++;
	}
	beats[(unsigned long)index] = mine;
	return NULL;
}

static int report_heartbeat(unsigned long seconds)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (cpus > MAX_THREADS)
		cpus = MAX_THREADS;
	loop_end_ns = now_ns(CLOCK_MONOTONIC) + seconds * 1000000000u;
	on_threads((unsigned long)cpus, heartbeat);
	for (long i = 0; i < cpus; i++)
		printf("heartbeat: cpu %ld wakes %lu largest_gap_us %lu\n", i, beats[i].wakes, beats[i].largest_gap_ns / 1000);
	return 0;
}

static int print_clock(void)
{
	printf("clock: realtime %lu monotonic %lu boottime %lu\n", now_ns(CLOCK_REALTIME), now_ns(CLOCK_MONOTONIC),
	       now_ns(CLOCK_BOOTTIME));
	return 0;
}

static int start_kernel(const char *kernel, const char *initrd, const char *cmdline)
{
	int kernel_fd = open(kernel, O_RDONLY | O_CLOEXEC), initrd_fd = open(initrd, O_RDONLY | O_CLOEXEC);
	if (kernel_fd < 0)
		fail(kernel);
	if (initrd_fd < 0)
		fail(initrd);
	if (syscall(SYS_kexec_file_load, kernel_fd, initrd_fd, strlen(cmdline) + 1, cmdline, 0UL))
		fail("kexec_file_load");
	sync();
	reboot((int)0x45584543 /* LINUX_REBOOT_CMD_KEXEC */);
	fail("reboot");
}

/* Prints what reading, then mapping, gave; a mapping is read through, which raises SIGBUS where nothing answers. */
static int devmem(unsigned long address, unsigned long length)
{
	int fd = open("/dev/mem", O_RDONLY);
	if (fd < 0)
		fail("/dev/mem");
	unsigned char *buffer = malloc(length ? length : 1);
	if (!buffer)
		fail("malloc");
	ssize_t got = pread(fd, buffer, length, (off_t)address);
	printf("devmem: read %zd %s\n", got, got < 0 ? answer_name(errno) : "OK");
	unsigned char *map = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, (off_t)address);
	if (map == MAP_FAILED) {
		printf("devmem: mmap -1 %s\n", answer_name(errno));
		return 0;
	}
	printf("devmem: mmap 0 OK\n");
	printf("devmem: mapped byte 0x%02x\n", *(volatile unsigned char *)map);
	return 0;
}

static void *busy(void *index)
{
	pin((unsigned long)index);
	for (volatile uint64_t n = 0;; n++)
		;
	return NULL;
}

/* A child that ends at once. */
static void fork_once(void)
{
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (!child)
		_exit(0);
	if (waitpid(child, NULL, 0) != child)
		fail("waitpid");
}

/* Pages that are touched for the first time, from files and not. */
static void fault(size_t pages)
{
	char *map = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	for (size_t i = 0; i < pages; i++)
		map[i * 4096] = 1;
	if (munmap(map, pages * 4096))
		fail("munmap");
}

static void read_all(const char *path)
{
	char buffer[4096];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail(path);
	while (read(fd, buffer, sizeof buffer) > 0)
		;
	close(fd);
}

/* There and back through a pipe or a socket. */
static void echo(const int fds[2])
{
	char buffer[2048] = { 0 };
	if (write(fds[1], buffer, sizeof buffer) != sizeof buffer || read(fds[0], buffer, sizeof buffer) < 1)
		fail("echo");
}

static void *churn(void *index)
{
	int pipes[2], sockets[2], datagrams = dgram_socket();
	if (pipe(pipes) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
		fail("pipe");
	struct timespec moment = { .tv_nsec = 20000 };
	for (uint64_t n = (uintptr_t)index;; n++)
		switch (n % 8) {
		case 0:
			fork_once();
			break;
		case 1:
			fault(64);
			break;
		case 2:
			echo(pipes);
			break;
		case 3:
			echo(sockets);
			break;
		case 4:
			nanosleep(&moment, NULL);
			break;
		case 5:
			raise(SIGUSR1);
			break;
		case 6:
			read_all(n % 16 < 8 ? "/proc/self/stat" : "/proc/self/maps");
			break;
		case 7:
			for (int i = 0; i < 64; i++)
				ask(datagrams);
			break;
		}
	return NULL;
}

/* What sleepers sleep on: nothing ever comes. */
static int sleep_pipe[2], sleep_sockets[2], sleep_epoll;
static uint32_t sleep_word;
static atomic_ulong sleepers_begun;

/* Without the C library's threads: its stacks would take more memory than the kernel's. All share one errno, so nobody looks at it. */
static int sleeper(void *index)
{
	char byte;
	struct pollfd poll_pipe = { .fd = sleep_pipe[0], .events = POLLIN };
	struct epoll_event event;
	struct timespec long_time = { .tv_sec = 1000000 };
	sigset_t signals;
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR2);
	atomic_fetch_add(&sleepers_begun, 1);
	for (;;)
		switch ((uintptr_t)index % 7) {
		case 0:
			syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &long_time, NULL);
			break;
		case 1:
			syscall(SYS_read, sleep_pipe[0], &byte, 1);
			break;
		case 2:
			syscall(SYS_poll, &poll_pipe, 1, -1);
			break;
		case 3:
			syscall(SYS_futex, &sleep_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
			break;
		case 4:
			syscall(SYS_epoll_wait, sleep_epoll, &event, 1, -1);
			break;
		case 5:
			syscall(SYS_recvfrom, sleep_sockets[0], &byte, 1, 0, NULL, NULL);
			break;
		case 6:
			syscall(SYS_rt_sigtimedwait, &signals, NULL, NULL, 8);
			break;
		}
	return 0;
}

/* Raises the kernel's limit of threads, which it takes from its memory, to this. */
static void allow_threads(unsigned long wanted)
{
	char text[32] = "";
	int fd = open("/proc/sys/kernel/threads-max", O_RDWR | O_CLOEXEC);
	if (fd < 0 || read(fd, text, sizeof text - 1) < 1)
		fail("threads-max");
	if (strtoul(text, NULL, 10) < wanted) {
		int length = snprintf(text, sizeof text, "%lu", wanted);
		if (pwrite(fd, text, (size_t)length, 0) != length)
			fail("threads-max");
	}
	close(fd);
}

static _Noreturn void sleepers(unsigned long count)
{
	enum { STACK = 2048 };
	char *stacks = mmap(NULL, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	allow_threads(count + 1000);
	sleep_epoll = epoll_create1(EPOLL_CLOEXEC);
	if (stacks == MAP_FAILED || sleep_epoll < 0 || pipe(sleep_pipe) || socketpair(AF_UNIX, SOCK_STREAM, 0, sleep_sockets))
		fail("sleepers");
	for (unsigned long i = 0; i < count; i++)
		if (clone(sleeper, stacks + (i + 1) * STACK, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD, (void *)i) < 0)
			fail("clone");
	while (atomic_load(&sleepers_begun) < count)
		usleep(1000);
	printf("sleepers: %lu\n", count);
	for (;;)
		pause();
}

static int churn_traced(unsigned long threads)
{
	pthread_t runner;
	printf("bpf: %d programs\n", attach_bpf());
	if ((errno = pthread_create(&runner, NULL, run_bpf, NULL)))
		fail("pthread_create");
	on_threads(threads, churn);
	return 0;
}

static void expect_signals(void)
{
	if (signal(SIGUSR1, on_signal) == SIG_ERR)
		fail("signal");
}

/* Steps a child that spins, one instruction at a time. */
static int steps(unsigned long count)
{
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
			_exit(1);
		raise(SIGSTOP);
		for (volatile uint64_t n = 0;; n++)
			;
	}
	int status;
	if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
		fail("a child that stops");
	unsigned long made = 0;
	for (unsigned long n = 0; n < count; n++) {
		if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) || waitpid(child, &status, 0) != child)
			fail("a step");
		made += WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
	}
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	printf("steps: made %lu of %lu\n", made, count);
	return 0;
}

static __attribute__((noinline)) void watched(void)
{
	__asm__ volatile("" ::: "memory");
}

/* Calls a function on which a breakpoint of this thread's is. */
static int breakpoint(unsigned long seconds)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_BREAKPOINT,
		.size = sizeof attr,
		.bp_type = HW_BREAKPOINT_X,
		.bp_addr = (uintptr_t)watched,
		.bp_len = sizeof(long),
		.sample_period = 1,
		.exclude_kernel = 1,
	};
	int fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0UL);
	if (fd < 0)
		fail("perf_event_open");
	printf("breakpoint: set\n");
	uint64_t calls = 0, hits, end = now_ns(CLOCK_MONOTONIC) + seconds * 1000000000u;
	for (; now_ns(CLOCK_MONOTONIC) < end; calls++)
		watched();
	if (read(fd, &hits, sizeof hits) != sizeof hits)
		fail("read");
	printf("breakpoint: calls %lu hits %lu\n", calls, hits);
	return 0;
}

/* Opens every input device that is a power button before going to the background, so that no press is lost once this returns. */
static int power_button(void)
{
	struct pollfd fds[16];
	nfds_t count = 0;
	glob_t found;
	if (glob("/dev/input/event*", 0, NULL, &found) == 0)
		for (size_t i = 0; i < found.gl_pathc && count < 16; i++) {
			char name[64] = "";
			int fd = open(found.gl_pathv[i], O_RDONLY | O_CLOEXEC);
			if (fd < 0)
				continue;
			if (ioctl(fd, EVIOCGNAME(sizeof name - 1), name) > 0 && strstr(name, "Power Button"))
				fds[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
			else
				close(fd);
		}
	if (!count) {
		fprintf(stderr, "probe: this guest has no power button\n");
		return 1;
	}
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child)
		return 0;
	setsid();
	while (poll(fds, count, -1) > 0 || errno == EINTR)
		for (nfds_t i = 0; i < count; i++) {
			struct input_event event;
			if (!(fds[i].revents & POLLIN) || read(fds[i].fd, &event, sizeof event) != sizeof event)
				continue;
			if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
				printf("exopatch-guest: power button\n");
				sync();
				reboot(RB_POWER_OFF);
			}
		}
	fail("poll");
}

static int entries(void)
{
	int dir = open("/", O_RDONLY | O_DIRECTORY);
	if (dir < 0)
		fail("open");
	char room[4096];
	long nowhere = syscall(SYS_getdents64, dir, (void *)8, sizeof(room));
	const char *why = nowhere < 0 ? strerrorname_np(errno) : "nothing";
	long bytes = syscall(SYS_getdents64, dir, room, sizeof(room));
	printf("entries: %s, then %s\n", why, bytes > 0 ? "some" : "none");
	return 0;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc < 2)
		usage();
	const char *name = argv[1];
	char **arg = argv + 2;
	int args = argc - 2;
	if (!strcmp(name, "siocatmark") && args <= 2)
		return siocatmark(args > 0 ? number(arg[0], -1UL) : 0, args > 1 ? number(arg[1], 1000000) : 100);
	if (!strcmp(name, "siocatmark-loop") && args == 2)
		return report_loop(number(arg[0], 1000000), number(arg[1], MAX_THREADS));
	if (!strcmp(name, "answers") && args == 1)
		return on_threads(number(arg[0], MAX_THREADS), answers), 0;
	if (!strcmp(name, "tally") && args >= 2 && args <= 4)
		return tally(number(arg[0], -1UL), number(arg[1], MAX_THREADS), args > 2 ? number(arg[2], 255) : SOCK_DGRAM,
			     args > 3 ? number(arg[3], 1000000) : 0);
	if (!strcmp(name, "calls") && args == 1)
		return time_calls(number(arg[0], -1UL));
	if (!strcmp(name, "as") && args >= 2)
		run_as(number(arg[0], UINT32_MAX), arg + 1);
	if (!strcmp(name, "heartbeat") && args == 1)
		return report_heartbeat(number(arg[0], 1000000));
	if (!strcmp(name, "clock") && args == 0)
		return print_clock();
	if (!strcmp(name, "kexec") && args == 3)
		return start_kernel(arg[0], arg[1], arg[2]);
	if (!strcmp(name, "devmem") && args == 2)
		return devmem(number(arg[0], -1UL), number(arg[1], 1UL << 30));
	if (!strcmp(name, "busy") && args == 1)
		return on_threads(number(arg[0], MAX_THREADS), busy), 0;
	if (!strcmp(name, "sleepers") && args == 1)
		sleepers(number(arg[0], MAX_SLEEPERS));
	if (!strcmp(name, "churn") && args == 1)
		return expect_signals(), on_threads(number(arg[0], MAX_THREADS), churn), 0;
	if (!strcmp(name, "bpf") && args == 1)
		return expect_signals(), churn_traced(number(arg[0], MAX_THREADS));
	if (!strcmp(name, "datagrams") && args == 2)
		return datagrams(number(arg[0], -1UL), number(arg[1], MAX_THREADS));
	if (!strcmp(name, "signals") && args == 2)
		return signals(number(arg[0], -1UL), number(arg[1], MAX_THREADS));
	if (!strcmp(name, "futexes") && args == 2)
		return futexes(number(arg[0], -1UL), number(arg[1], MAX_THREADS));
	if (!strcmp(name, "marks") && args == 2)
		return marks(number(arg[0], -1UL), number(arg[1], MAX_THREADS));
	if (!strcmp(name, "steps") && args == 1)
		return steps(number(arg[0], 1000000000));
	if (!strcmp(name, "breakpoint") && args == 1)
		return breakpoint(number(arg[0], 1000000));
	if (!strcmp(name, "power-button") && args == 0)
		return power_button();
	if (!strcmp(name, "entries") && args == 0)
		return entries();
	usage();
}
