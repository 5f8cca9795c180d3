/*
 * The client: runs one command in a lab. Its standard streams, signals, terminal and exit status are those of the command, whose
 * working directory and environment are the client's own.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

enum { TIMED_OUT_STATUS = 124, LOST_STATUS = 125, GRACE_MS = 3000 };

extern char **environ;

static struct termios saved_terminal;
static bool terminal_changed;
static struct buffer from_lab, to_lab, output, errors;
static uint32_t input_credit = WINDOW;
static bool input_ended;
static int exit_status = -1;

static void restore_terminal(void)
{
	if (terminal_changed)
		tcsetattr(0, TCSADRAIN, &saved_terminal);
	terminal_changed = false;
}

static void raw_terminal(void)
{
	if (tcgetattr(0, &saved_terminal))
		return;
	struct termios raw = saved_terminal;
	cfmakeraw(&raw);
	terminal_changed = !tcsetattr(0, TCSADRAIN, &raw);
	atexit(restore_terminal);
}

static struct exec_request terminal_request(bool tty)
{
	struct winsize size = { 0 };
	struct exec_request request = { .tty = tty };
	if (tty && !ioctl(0, TIOCGWINSZ, &size)) {
		request.rows = size.ws_row;
		request.columns = size.ws_col;
	}
	return request;
}

static void request_command(char **argv, bool tty)
{
	struct exec_request request = terminal_request(tty);
	struct buffer body = { 0 };
	char *cwd = getcwd(NULL, 0);
	if (!cwd)
		fail("the current directory: %s", strerror(errno));
	for (char **word = argv; *word; word++)
		request.arguments++;
	for (char **word = environ; *word; word++)
		request.environment++;
	buffer_append(&body, &request, sizeof request);
	buffer_append(&body, cwd, strlen(cwd) + 1);
	for (char **word = argv; *word; word++)
		buffer_append(&body, *word, strlen(*word) + 1);
	for (char **word = environ; *word; word++)
		buffer_append(&body, *word, strlen(*word) + 1);
	if (body.length > MAX_FRAME)
		fail("the command line and environment are too long");
	frame_append(&to_lab, 0, EXEC, body.bytes, body.length);
	free(body.bytes);
	free(cwd);
}

static void handle_frames(void)
{
	const char *body;
	for (const struct frame *frame; (frame = frame_first(&from_lab, &body));) {
		if (frame->type == OUTPUT)
			buffer_append(&output, body, frame->length);
		else if (frame->type == ERROUT)
			buffer_append(&errors, body, frame->length);
		else if (frame->type == INPUT_CREDIT)
			input_credit += frame_number(frame, body);
		else if (frame->type == EXIT)
			exit_status = (int)frame_number(frame, body);
		else if (frame->type == FAILED)
			fprintf(stderr, "lab: error: %.*s\n", (int)frame->length, body);
		buffer_consume(&from_lab, sizeof *frame + frame->length);
	}
}

static void read_input(void)
{
	static char bytes[65536];
	ssize_t got = read(0, bytes, input_credit < sizeof bytes ? input_credit : sizeof bytes);
	if (got < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (got < 0)
		got = 0; /* a background process may not read its terminal: no input */
	frame_append(&to_lab, 0, INPUT, bytes, (size_t)got);
	input_credit -= (uint32_t)got;
	input_ended = got == 0;
}

/* Writes some of a queue on. When nobody reads it any more the command hears of it as it would here: by SIGPIPE. */
static void write_output(struct buffer *buffer, int fd)
{
	long put = buffer_drain(buffer, fd, 4096); /* a pipe that polls writable takes this much at once */
	if (put < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (put < 0) {
		frame_append_number(&to_lab, 0, SIGNAL, SIGPIPE);
		put = (long)buffer->length;
		buffer_consume(buffer, buffer->length);
	}
	frame_append_number(&to_lab, 0, OUTPUT_CREDIT, (uint32_t)put);
}

/* Passes a signal on; false when it is the second and the command still runs. */
static bool handle_signal(int signals, bool tty)
{
	static int received;
	struct signalfd_siginfo info;
	if (read(signals, &info, sizeof info) != sizeof info)
		return true;
	if (info.ssi_signo == SIGWINCH) {
		struct exec_request request = terminal_request(tty);
		frame_append(&to_lab, 0, RESIZE, &request, sizeof request);
		return true;
	}
	frame_append_number(&to_lab, 0, SIGNAL, info.ssi_signo);
	if (received++)
		exit_status = 128 + (int)info.ssi_signo;
	return received == 1;
}

/* Shows the end of one of the lab's logs. */
static void show_end(const char *dir, const char *name)
{
	char path[4096], bytes[4096];
	snprintf(path, sizeof path, "%s/%s", dir, name);
	FILE *log = fopen(path, "r");
	if (!log)
		return;
	if (!fseek(log, 0, SEEK_END) && ftell(log) > (long)sizeof bytes)
		fseek(log, -(long)sizeof bytes, SEEK_END);
	else
		rewind(log);
	size_t got = fread(bytes, 1, sizeof bytes, log);
	fclose(log);
	if (got)
		fprintf(stderr, "lab: the end of %s:\r\n%.*s\r\n", path, (int)got, bytes);
}

/* The lab has closed its end, which it does last: its logs are complete. */
static int lost(const char *dir)
{
	static const char *const names[] = { "qemu.log", "console.log", "host.log" };
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		show_end(dir, names[i]);
	fprintf(stderr, "lab: error: the lab ended while the command ran\r\n");
	return LOST_STATUS;
}

static int serve(const char *dir, int lab, int signals, bool tty, uint64_t deadline)
{
	bool timed_out = false;
	while (exit_status < 0 || output.length || errors.length) {
		struct pollfd fds[] = {
			{ .fd = lab, .events = (short)(POLLIN | (to_lab.length ? POLLOUT : 0)) },
			{ .fd = signals, .events = POLLIN },
			{ .fd = input_ended || !input_credit || exit_status >= 0 ? -1 : 0, .events = POLLIN },
			{ .fd = output.length ? 1 : -1, .events = POLLOUT },
			{ .fd = errors.length ? 2 : -1, .events = POLLOUT },
		};
		uint64_t now = now_ms();
		if (now >= deadline && timed_out)
			return TIMED_OUT_STATUS; /* our going makes the host kill it */
		if (now >= deadline) {
			fprintf(stderr, "lab: the time limit is over; ending the command\r\n");
			frame_append_number(&to_lab, 0, SIGNAL, SIGTERM);
			timed_out = true;
			deadline = now + GRACE_MS;
			continue;
		}
		int wait = deadline - now > 1000000 ? 1000000 : (int)(deadline - now);
		if (poll(fds, 5, wait) < 0 && errno != EINTR)
			fail("poll: %s", strerror(errno));
		if (fds[1].revents && !handle_signal(signals, tty))
			return exit_status;
		if (fds[0].revents & (POLLIN | POLLHUP) && exit_status < 0) {
			if (buffer_fill(&from_lab, lab, 65536) <= 0 && errno != EINTR)
				return lost(dir);
			handle_frames();
		}
		if (fds[2].revents)
			read_input();
		if (fds[3].revents)
			write_output(&output, 1);
		if (fds[4].revents)
			write_output(&errors, 2);
		if (to_lab.length && exit_status < 0 && buffer_drain(&to_lab, lab, 65536) < 0 && errno != EINTR && errno != EPIPE)
			fail("the lab: %s", strerror(errno));
	}
	return timed_out ? TIMED_OUT_STATUS : exit_status;
}

int run_main(int argc, char **argv)
{
	unsigned long seconds = 0;
	int i = 1;
	if (i + 1 < argc && !strcmp(argv[i], "--timeout")) {
		seconds = strtoul(argv[i + 1], NULL, 10);
		i += 2;
	}
	if (argc < i + 3 || strcmp(argv[i + 1], "--"))
		fail("usage: lab run [--timeout SECONDS] DIR -- COMMAND ARG...");
	char path[4096];
	snprintf(path, sizeof path, "%s/ctl.sock", argv[i]);
	int lab = unix_connect(path);
	if (lab < 0)
		fail("%s: %s; is the lab up?", path, strerror(errno));

	sigset_t set;
	sigemptyset(&set);
	static const int passed[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH };
	for (size_t s = 0; s < sizeof passed / sizeof *passed; s++)
		sigaddset(&set, passed[s]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	bool tty = isatty(0) && isatty(1);
	request_command(argv + i + 2, tty);
	if (tty)
		raw_terminal();
	int status = serve(argv[i], lab, signalfd(-1, &set, SFD_CLOEXEC), tty, seconds ? now_ms() + seconds * 1000 : UINT64_MAX);
	restore_terminal();
	return status;
}
