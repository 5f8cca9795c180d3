/* The part of probe that gets into functions of the kernel which run where not every function may; see probe.c. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/futex.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

static unsigned long calls_each;
static atomic_ulong calls_made;

static int report(const char *what, unsigned long count, unsigned long threads, void *(*body)(void *))
{
	calls_each = count;
	on_threads(threads, body);
	printf("%s: %lu\n", what, atomic_load(&calls_made));
	return 0;
}

/* A socket that is connected to itself. */
static int mirror(void)
{
	struct sockaddr_in own = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof own;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&own, length) || getsockname(fd, (struct sockaddr *)&own, &length) ||
	    connect(fd, (struct sockaddr *)&own, length))
		fail("socket");
	return fd;
}

static void *send_datagrams(void *index)
{
	int fd = mirror();
	pin((uintptr_t)index);
	for (unsigned long n = 0; n < calls_each; n++) {
		unsigned long got = -1UL;
		if (send(fd, &n, sizeof n, 0) != sizeof n || recv(fd, &got, sizeof got, 0) != sizeof got || got != n)
			fail("datagram");
		atomic_fetch_add(&calls_made, 1);
	}
	close(fd);
	return NULL;
}

int datagrams(unsigned long count, unsigned long threads)
{
	return report("datagrams", count, threads, send_datagrams);
}

static void *raise_signals(void *index)
{
	pin((uintptr_t)index);
	for (unsigned long n = 0; n < calls_each; n++) {
		if (raise(SIGUSR2))
			fail("raise");
		atomic_fetch_add(&calls_made, 1);
	}
	return NULL;
}

static void on_signal(int signal)
{
	(void)signal;
}

int signals(unsigned long count, unsigned long threads)
{
	struct sigaction heed = { .sa_handler = on_signal };
	if (sigaction(SIGUSR2, &heed, NULL))
		fail("sigaction");
	return report("signals", count, threads, raise_signals);
}

static void *wake_futexes(void *index)
{
	uint32_t words[2] = { 0 };
	pin((uintptr_t)index);
	for (unsigned long n = 0; n < calls_each; n++) {
		uint32_t operand = (uint32_t)(n * 7 + 1) & 0x7ff;
		uint32_t operation = FUTEX_OP(FUTEX_OP_SET, operand, FUTEX_OP_CMP_EQ, 0);
		words[1] = ~operand;
		if (syscall(SYS_futex, &words[0], FUTEX_WAKE_OP_PRIVATE, operand, 0UL, &words[1], operation) || words[1] != operand)
			fail("futex");
		atomic_fetch_add(&calls_made, 1);
	}
	return NULL;
}

int futexes(unsigned long count, unsigned long threads)
{
	return report("futexes", count, threads, wake_futexes);
}

enum kind { PRESENT, ABSENT, READ_ONLY, NOWHERE, KERNEL, KINDS };
static const char *const kind_names[KINDS] = { "present", "absent", "read-only", "nowhere", "kernel" };
enum { ANSWERS = 4096, OTHER_OK = ANSWERS - 1, PAGE = 4096 };
static atomic_ulong mark_answers[KINDS][ANSWERS];

static int *page(int protection)
{
	int *at = mmap(NULL, PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

/* Asks once, and looks whether what is at @number, read before as @before, is as the answer says. Who answers OK without adding one is not the edition. */
static void mark(int fd, enum kind kind, int *number, int before)
{
	int answer = ioctl(fd, SIOCATMARK, number) ? errno : 0;
	if (kind <= READ_ONLY && !answer && *number != before + 1)
		answer = OTHER_OK;
	if (kind <= READ_ONLY && answer && answer != OTHER_OK && *number != before) {
		fprintf(stderr, "probe: %s: %d became %d, and %s was answered\n", kind_names[kind], before, *number, answer_name(answer));
		exit(1);
	}
	atomic_fetch_add(&mark_answers[kind][answer], 1);
}

static void *ask_marks(void *index)
{
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("socket");
	pin((uintptr_t)index);
	int *read_only = page(PROT_READ), *nowhere = page(PROT_NONE), here = 0;
	for (unsigned long n = 0; n < calls_each; n++) {
		int *fresh = page(PROT_READ | PROT_WRITE);
		here = (int)n;
		mark(fd, PRESENT, &here, here);
		mark(fd, ABSENT, fresh, 0);
		mark(fd, READ_ONLY, read_only, 0);
		mark(fd, NOWHERE, nowhere, 0);
		mark(fd, KERNEL, (int *)0xffffffff81000000, 0);
		munmap(fresh, PAGE);
	}
	close(fd);
	return NULL;
}

int marks(unsigned long count, unsigned long threads)
{
	calls_each = count;
	on_threads(threads, ask_marks);
	for (int kind = 0; kind < KINDS; kind++) {
		printf("marks: %s", kind_names[kind]);
		for (int answer = 0; answer < ANSWERS; answer++)
			if (atomic_load(&mark_answers[kind][answer]))
				printf(" %s %lu", answer_name(answer), atomic_load(&mark_answers[kind][answer]));
		printf("\n");
	}
	return 0;
}
