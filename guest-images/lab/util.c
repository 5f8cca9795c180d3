/* What all parts of the lab's program share: queues of bytes, frames, sockets. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

void fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fputs("lab: error: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(125);
}

static void buffer_reserve(struct buffer *buffer, size_t length)
{
	if (buffer->start) {
		memmove(buffer->bytes, buffer->bytes + buffer->start, buffer->length);
		buffer->start = 0;
	}
	if (buffer->length + length <= buffer->capacity)
		return;
	size_t capacity = buffer->capacity ? buffer->capacity : 65536;
	while (capacity < buffer->length + length)
		capacity *= 2;
	buffer->bytes = realloc(buffer->bytes, capacity);
	if (!buffer->bytes)
		fail("no memory for %zu bytes", capacity);
	buffer->capacity = capacity;
}

void buffer_append(struct buffer *buffer, const void *bytes, size_t length)
{
	if (!length)
		return;
	if (buffer->start + buffer->length + length > buffer->capacity)
		buffer_reserve(buffer, length);
	memcpy(buffer->bytes + buffer->start + buffer->length, bytes, length);
	buffer->length += length;
}

void buffer_consume(struct buffer *buffer, size_t length)
{
	buffer->start += length;
	buffer->length -= length;
	if (!buffer->length)
		buffer->start = 0;
}

long buffer_fill(struct buffer *buffer, int fd, size_t most)
{
	if (buffer->start + buffer->length + most > buffer->capacity)
		buffer_reserve(buffer, most);
	ssize_t got = read(fd, buffer->bytes + buffer->start + buffer->length, most);
	if (got > 0)
		buffer->length += (size_t)got;
	return got;
}

long buffer_drain(struct buffer *buffer, int fd, size_t most)
{
	ssize_t put = write(fd, buffer->bytes + buffer->start, buffer->length < most ? buffer->length : most);
	if (put > 0)
		buffer_consume(buffer, (size_t)put);
	return put;
}

void frame_append(struct buffer *buffer, uint32_t stream, enum frame_type type, const void *body, size_t length)
{
	struct frame frame = { stream, type, (uint32_t)length };
	buffer_append(buffer, &frame, sizeof frame);
	buffer_append(buffer, body, length);
}

void frame_append_number(struct buffer *buffer, uint32_t stream, enum frame_type type, uint32_t number)
{
	frame_append(buffer, stream, type, &number, sizeof number);
}

const struct frame *frame_first(const struct buffer *buffer, const char **body)
{
	static struct frame frame; /* a copy: the buffer is not aligned */
	if (buffer->length < sizeof frame)
		return NULL;
	memcpy(&frame, buffer->bytes + buffer->start, sizeof frame);
	if (frame.length > MAX_FRAME)
		fail("a frame of %u bytes: the two sides do not understand each other", frame.length);
	if (buffer->length < sizeof frame + frame.length)
		return NULL;
	*body = buffer->bytes + buffer->start + sizeof frame;
	return &frame;
}

uint32_t frame_number(const struct frame *frame, const char *body)
{
	uint32_t number = 0;
	if (frame->length >= sizeof number)
		memcpy(&number, body, sizeof number);
	return number;
}

void set_nonblocking(int fd)
{
	if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK))
		fail("fcntl: %s", strerror(errno));
}

uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int unix_socket(const char *path, struct sockaddr_un *address)
{
	*address = (struct sockaddr_un){ .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof address->sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address->sun_path, path);
	return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

int unix_listen(const char *path)
{
	struct sockaddr_un address;
	int fd = unix_socket(path, &address);
	if (fd < 0)
		fail("%s: %s", path, strerror(errno));
	unlink(path);
	mode_t mask = umask(0177);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 16))
		fail("%s: %s", path, strerror(errno));
	umask(mask);
	return fd;
}

int unix_connect(const char *path)
{
	struct sockaddr_un address;
	int fd = unix_socket(path, &address);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address)) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}
