/*
 * BPF programs for the probe, loaded and attached by the system call alone: there is no compiler and no library in the guest.
 *
 * They do a little work of their own in a loop, with calls of a subprogram and of the kernel, and change nothing. Tracing programs are
 * attached to functions by the type that the kernel's own BTF gives those.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof *attr);
}

/* The kernel's BTF, whole. */
static unsigned char *read_btf(void)
{
	struct stat stat;
	int fd = open("/sys/kernel/btf/vmlinux", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &stat))
		fail("/sys/kernel/btf/vmlinux");
	unsigned char *btf = malloc((size_t)stat.st_size);
	if (!btf)
		fail("malloc");
	for (off_t at = 0; at < stat.st_size;) {
		ssize_t got = read(fd, btf + at, (size_t)(stat.st_size - at));
		if (got <= 0)
			fail("/sys/kernel/btf/vmlinux");
		at += got;
	}
	close(fd);
	return btf;
}

/* Bytes of what follows a type's common part. */
static size_t rest_of(const struct btf_type *type)
{
	size_t vlen = BTF_INFO_VLEN(type->info);
	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
		return 12;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_DATASEC:
	case BTF_KIND_ENUM64:
		return vlen * 12;
	case BTF_KIND_ENUM:
	case BTF_KIND_FUNC_PROTO:
		return vlen * 8;
	default:
		return 0;
	}
}

/* The number of the function's type. */
static uint32_t function_type(const unsigned char *btf, const char *name)
{
	const struct btf_header *header = (const void *)btf;
	const unsigned char *types = btf + header->hdr_len + header->type_off;
	const char *strings = (const char *)btf + header->hdr_len + header->str_off;
	uint32_t id = 1;
	for (size_t at = 0; at < header->type_len; id++) {
		const struct btf_type *type = (const void *)(types + at);
		if (BTF_INFO_KIND(type->info) == BTF_KIND_FUNC && !strcmp(strings + type->name_off, name))
			return id;
		at += sizeof *type + rest_of(type);
	}
	errno = ENOENT;
	fail(name);
}

#define INSN(c, d, s, o, i) ((struct bpf_insn){ .code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i) })
#define MOV(d, i) INSN(BPF_ALU64 | BPF_MOV | BPF_K, d, 0, 0, i)
#define EXIT INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
enum { ROUNDS = 16, SUBPROGRAM = BPF_PSEUDO_CALL };

/* A program that returns ANSWER. */
static int load(uint32_t type, uint32_t attach_type, uint32_t function, int answer, const char *name)
{
	struct bpf_insn program[] = {
		MOV(BPF_REG_6, ROUNDS),
		INSN(BPF_ALU64 | BPF_MOV | BPF_X, BPF_REG_1, BPF_REG_6, 0, 0),
		INSN(BPF_JMP | BPF_CALL, 0, SUBPROGRAM, 0, 5),
		INSN(BPF_ALU64 | BPF_SUB | BPF_K, BPF_REG_6, 0, 0, 1),
		INSN(BPF_JMP | BPF_JNE | BPF_K, BPF_REG_6, 0, -4, 0),
		INSN(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_ktime_get_ns),
		MOV(BPF_REG_0, answer),
		EXIT,
		/* The subprogram: it keeps its argument on its stack while it asks the kernel something. */
		INSN(BPF_STX | BPF_MEM | BPF_DW, BPF_REG_10, BPF_REG_1, -8, 0),
		INSN(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_get_smp_processor_id),
		INSN(BPF_LDX | BPF_MEM | BPF_DW, BPF_REG_1, BPF_REG_10, -8, 0),
		INSN(BPF_ALU64 | BPF_ADD | BPF_X, BPF_REG_0, BPF_REG_1, 0, 0),
		EXIT,
	};
	union bpf_attr attr = {
		.prog_type = type,
		.expected_attach_type = attach_type,
		.attach_btf_id = function,
		.insns = (uintptr_t)program,
		.insn_cnt = sizeof program / sizeof *program,
		.license = (uintptr_t)"GPL",
	};
	strncpy(attr.prog_name, name, sizeof attr.prog_name - 1);
	int fd = bpf(BPF_PROG_LOAD, &attr);
	if (fd < 0)
		fail(name);
	return fd;
}

/* A tracing program knows where it belongs; a raw tracepoint is named. What was attached stays so as long as this process runs. */
static void attach(int program, const char *tracepoint)
{
	union bpf_attr attr = { .raw_tracepoint = { .prog_fd = (uint32_t)program, .name = (uintptr_t)tracepoint } };
	if (bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0)
		fail(tracepoint ? tracepoint : "attach");
}

int attach_bpf(void)
{
	static const struct {
		const char *function;
		enum bpf_attach_type how;
	} traced[] = {
		{ "vfs_read", BPF_TRACE_FENTRY },	   { "vfs_read", BPF_TRACE_FEXIT },
		{ "vfs_write", BPF_TRACE_FEXIT },	   { "unix_ioctl", BPF_TRACE_FENTRY },
		{ "handle_mm_fault", BPF_TRACE_FEXIT },	   { "hrtimer_nanosleep", BPF_TRACE_FEXIT },
		{ "security_file_permission", BPF_MODIFY_RETURN },
	};
	enum { COUNT = sizeof traced / sizeof *traced };
	unsigned char *btf = read_btf();
	for (size_t i = 0; i < COUNT; i++)
		attach(load(BPF_PROG_TYPE_TRACING, traced[i].how, function_type(btf, traced[i].function), 0, "probe_traces"), NULL);
	free(btf);
	attach(load(BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0, 0, "probe_enters"), "sys_enter");
	return COUNT + 1;
}

/* Many runs of a program in one system call go by way of a dispatcher. */
void *run_bpf(void *unused)
{
	unsigned char packet[64] = { 0 };
	int program = load(BPF_PROG_TYPE_XDP, 0, 0, XDP_PASS, "probe_packets");
	(void)unused;
	for (;;) {
		union bpf_attr attr = {
			.test = {
				.prog_fd = (uint32_t)program,
				.data_in = (uintptr_t)packet,
				.data_size_in = sizeof packet,
				.repeat = 10000,
			},
		};
		if (bpf(BPF_PROG_TEST_RUN, &attr) && errno != EINTR)
			fail("BPF_PROG_TEST_RUN");
	}
	return NULL;
}
