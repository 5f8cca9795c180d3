/*
 * The lab's program. Outside it is the host (which supervises QEMU), the file server and the client; inside the emulated machine it is
 * the first process. They talk in frames, over a unix socket between client and host and over a virtio port between host and agent:
 *
 *   client --ctl.sock-- host --virtio port "mux"-- agent -- the command's pipes
 *                       fs   --virtio port "fs"--- agent -- /dev/fuse
 *
 * A port moves 4 KiB at a time. So what files hold goes another way: the file server writes it into a slot of the file DIR/window,
 * which is a disk of the emulated machine, and only says on the port which slot it is; the agent gives the slot back.
 *
 * A stream is one command, or one connection to a unix socket inside. Who sends data holds credit for it: WINDOW bytes at first, more
 * as the other side passes them on. So a slow reader holds up its own stream alone, and no buffer grows without bound.
 */
#ifndef LAB_H
#define LAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { WINDOW = 256 * 1024, MAX_FRAME = WINDOW + 1024 * 1024, MAX_STREAMS = 256 };

enum {
	SLOT_SIZE = 1024 * 1024,
	SLOTS = 48,
	IN_SLOT = 1 << 30, /* set in the length of a FUSE reply whose body is in the slot whose number follows the header */
	SLOT_BACK = 0x4c414200, /* the opcode of a request of the agent's own: slot "unique" is free */
};

enum frame_type {
	BOOTED = 1, /* agent to host: it waits for GO */
	GO, /* host to agent: struct go */
	READY, /* agent to host: it takes commands */
	EXEC, /* opens: struct exec_request, then NUL-ended cwd, arguments, environment */
	CONNECT, /* opens: path of a unix socket inside */
	INPUT, /* bytes for the command or socket; an empty one is the end */
	OUTPUT, /* bytes from it; of a socket an empty one is the end */
	ERROUT, /* bytes of its standard error */
	INPUT_CREDIT, /* u32 bytes */
	OUTPUT_CREDIT, /* u32 bytes, standard error included */
	SIGNAL, /* u32 number, for the command's process group */
	RESIZE, /* struct exec_request: its terminal's new size */
	HANGUP, /* the client is gone: kill the command, close the socket */
	FAILED, /* text: it could not be started */
	EXIT, /* u32 exit status; the stream's last frame */
};

struct frame {
	uint32_t stream, type, length;
};

struct go {
	uint64_t realtime_ns;
	unsigned char random[32];
};

struct exec_request {
	uint32_t arguments, environment;
	uint16_t tty, rows, columns, unused;
};

/* A queue of bytes. */
struct buffer {
	char *bytes;
	size_t start, length, capacity;
};

void buffer_append(struct buffer *buffer, const void *bytes, size_t length);
void buffer_consume(struct buffer *buffer, size_t length);
/* Reads once; what read(2) gave. */
long buffer_fill(struct buffer *buffer, int fd, size_t most);
/* Writes once; what write(2) gave. */
long buffer_drain(struct buffer *buffer, int fd, size_t most);

void frame_append(struct buffer *buffer, uint32_t stream, enum frame_type type, const void *body, size_t length);
void frame_append_number(struct buffer *buffer, uint32_t stream, enum frame_type type, uint32_t number);
/* The first whole frame, its body at *body, or NULL; the caller consumes sizeof(struct frame) + length. */
const struct frame *frame_first(const struct buffer *buffer, const char **body);
uint32_t frame_number(const struct frame *frame, const char *body);

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void set_nonblocking(int fd);
uint64_t now_ms(void);
int unix_listen(const char *path);
int unix_connect(const char *path);

int agent_main(void);
int fs_main(int fd, const char *window);
int host_main(int argc, char **argv);
int run_main(int argc, char **argv);

#endif
