/*
 * The host: one process a lab, outside. It starts QEMU and the file server, waits for the agent's READY, and then passes frames between
 * clients (DIR/ctl.sock) and the agent, and bytes between DIR/api.sock and a unix socket inside. All three processes end together.
 *
 * DIR/lock holds its process id and is locked while it lives, so a lab that died is never taken for one that runs. One that ends without
 * having been asked to says why in DIR/host.log and leaves the logs behind.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { NOT_READY_STATUS = 75, ONCE_PATIENCE_MS = 60000 };

struct peer {
	bool used, proxy; /* proxy: speaks plain bytes for a socket inside, not frames */
	bool ended, input_ended, output_ended; /* ended: the agent has closed the stream */
	int fd;
	uint32_t stream;
	uint32_t credit; /* of a proxy: bytes of input that may be sent */
	struct buffer from, to;
};

static struct {
	const char *dir, *api;
	const char *save; /* save the machine's state there instead of using it */
	const char *load; /* start from that state */
	bool once; /* end, and leave nothing behind, after the first command */
	unsigned long ready_seconds;
	char **qemu;
} options = { .api = "/run/exopatch.sock", .ready_seconds = 30 };

static struct peer peers[MAX_STREAMS];
static struct buffer from_agent, to_agent;
static uint32_t last_stream;

static char *path_in_dir(const char *name)
{
	char *path;
	if (asprintf(&path, "%s/%s", options.dir, name) < 0)
		fail("no memory");
	return path;
}

static void parse_options(int argc, char **argv)
{
	int i = 1;
	for (; i < argc && strcmp(argv[i], "--"); i++) {
		if (!strcmp(argv[i], "--once"))
			options.once = true;
		else if (i + 1 < argc && !strcmp(argv[i], "--dir"))
			options.dir = argv[++i];
		else if (i + 1 < argc && !strcmp(argv[i], "--api"))
			options.api = argv[++i];
		else if (i + 1 < argc && !strcmp(argv[i], "--save"))
			options.save = argv[++i];
		else if (i + 1 < argc && !strcmp(argv[i], "--load"))
			options.load = argv[++i];
		else if (i + 1 < argc && !strcmp(argv[i], "--ready-seconds"))
			options.ready_seconds = strtoul(argv[++i], NULL, 10);
		else
			fail("host: unknown option %s", argv[i]);
	}
	if (!options.dir || i + 1 >= argc)
		fail("usage: lab host --dir DIR [--api PATH] [--save FILE | --load FILE] [--once] [--ready-seconds N] -- QEMU ARG...");
	options.qemu = argv + i + 1;
}

static void take_lock(void)
{
	int fd = open(path_in_dir("lock"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB))
		fail("%s: %s", path_in_dir("lock"), errno == EWOULDBLOCK ? "this lab runs already" : strerror(errno));
	if (ftruncate(fd, 0) || dprintf(fd, "%d\n", getpid()) < 0)
		fail("%s: %s", path_in_dir("lock"), strerror(errno));
}

/* Forks a process that ends when this one does. */
static pid_t fork_with_us(void)
{
	pid_t parent = getpid(), process = fork();
	if (process < 0)
		fail("fork: %s", strerror(errno));
	if (process == 0) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		signal(SIGPIPE, SIG_DFL);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
	}
	return process;
}

/* Starts QEMU, whose monitor reads what is written to *monitor. */
static pid_t start_qemu(int *monitor)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC))
		fail("pipe: %s", strerror(errno));
	pid_t process = fork_with_us();
	if (process) {
		close(ends[0]);
		*monitor = ends[1];
		return process;
	}
	dup2(ends[0], 0);
	/* The monitor echoes each keystroke; what QEMU itself complains of stands apart. */
	dup2(open(path_in_dir("monitor.log"), O_WRONLY | O_CREAT | O_TRUNC, 0600), 1);
	dup2(open(path_in_dir("qemu.log"), O_WRONLY | O_CREAT | O_TRUNC, 0600), 2);
	execvp(options.qemu[0], options.qemu);
	fail("%s: %s", options.qemu[0], strerror(errno));
}

/* Waits for QEMU to connect a port, which it does before the machine starts. */
static int accept_port(int listener, uint64_t deadline)
{
	struct pollfd p = { .fd = listener, .events = POLLIN };
	uint64_t now = now_ms();
	if (poll(&p, 1, deadline > now ? (int)(deadline - now) : 0) <= 0)
		return -1;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	close(listener);
	return fd;
}

static void new_peer(int listener, bool proxy)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0)
		return;
	for (int i = 0; i < MAX_STREAMS; i++)
		if (!peers[i].used) {
			peers[i] = (struct peer){ .used = true, .proxy = proxy, .fd = fd, .stream = ++last_stream, .credit = WINDOW };
			if (proxy)
				frame_append(&to_agent, last_stream, CONNECT, options.api, strlen(options.api));
			return;
		}
	close(fd); /* too many at once */
}

static void end_peer(struct peer *peer)
{
	if (!peer->ended)
		frame_append(&to_agent, peer->stream, HANGUP, NULL, 0);
	close(peer->fd);
	free(peer->from.bytes);
	free(peer->to.bytes);
	peer->used = false;
}

static void from_agent_to_proxy(struct peer *peer, const struct frame *frame, const char *body)
{
	if (frame->type == OUTPUT && frame->length)
		buffer_append(&peer->to, body, frame->length);
	else if (frame->type == OUTPUT)
		peer->output_ended = true;
	else if (frame->type == INPUT_CREDIT)
		peer->credit += frame_number(frame, body);
	else if (frame->type == EXIT)
		peer->ended = true;
}

static void from_agent_to_peers(void)
{
	const char *body;
	for (const struct frame *frame; (frame = frame_first(&from_agent, &body));) {
		for (int i = 0; i < MAX_STREAMS; i++) {
			struct peer *peer = &peers[i];
			if (!peer->used || peer->stream != frame->stream)
				continue;
			if (peer->proxy) {
				from_agent_to_proxy(peer, frame, body);
			} else {
				frame_append(&peer->to, 0, frame->type, body, frame->length);
				peer->ended |= frame->type == EXIT;
			}
		}
		buffer_consume(&from_agent, sizeof *frame + frame->length);
	}
}

static bool readable(const struct peer *peer)
{
	return !peer->ended && !peer->input_ended && to_agent.length < 4 * WINDOW && (!peer->proxy || peer->credit);
}

/* What a peer sent, on to the agent; false when the peer is gone. */
static bool from_peer(struct peer *peer)
{
	size_t most = peer->proxy && peer->credit < 65536 ? peer->credit : 65536;
	long got = buffer_fill(&peer->from, peer->fd, most);
	if (got < 0)
		return errno == EAGAIN || errno == EINTR;
	if (peer->proxy) {
		frame_append(&to_agent, peer->stream, INPUT, peer->from.bytes + peer->from.start, peer->from.length);
		peer->credit -= (uint32_t)peer->from.length;
		buffer_consume(&peer->from, peer->from.length);
		peer->input_ended = got == 0;
		return true;
	}
	const char *body;
	for (const struct frame *frame; (frame = frame_first(&peer->from, &body));) {
		frame_append(&to_agent, peer->stream, frame->type, body, frame->length);
		buffer_consume(&peer->from, sizeof *frame + frame->length);
	}
	return got > 0;
}

/* What is queued for a peer; false when the peer is gone or has all it will get. */
static bool to_peer(struct peer *peer)
{
	if (peer->to.length) {
		long put = buffer_drain(&peer->to, peer->fd, 65536);
		if (put < 0 && errno != EAGAIN && errno != EINTR)
			return false;
		if (put > 0 && peer->proxy)
			frame_append_number(&to_agent, peer->stream, OUTPUT_CREDIT, (uint32_t)put);
	}
	if (!peer->to.length && peer->output_ended && !peer->ended)
		shutdown(peer->fd, SHUT_WR);
	return peer->to.length || !peer->ended;
}

static void serve_peers(const struct pollfd *fds, bool *had_one)
{
	for (int i = 0; i < MAX_STREAMS; i++) {
		struct peer *peer = &peers[i];
		const struct pollfd *p = &fds[i];
		if (!peer->used || p->fd != peer->fd)
			continue;
		bool alive = true;
		if (p->revents & (POLLIN | POLLHUP) && readable(peer))
			alive = from_peer(peer);
		else if (p->revents & (POLLHUP | POLLERR) && !peer->to.length)
			alive = false;
		if (!alive || !to_peer(peer)) {
			*had_one |= !peer->proxy;
			end_peer(peer);
		}
	}
}

/* One of the processes that a lab is made of. */
struct part {
	const char *name;
	pid_t process; /* 0 once it has ended */
};

/* Whether a part has ended by itself within some milliseconds; the log then says how. */
static bool has_ended(struct part *part, int within_ms)
{
	int status;
	for (; part->process; within_ms -= 10, usleep(10000)) {
		if (waitpid(part->process, &status, WNOHANG) != part->process) {
			if (within_ms <= 0)
				return false;
			continue;
		}
		part->process = 0;
		if (WIFSIGNALED(status))
			fprintf(stderr, "lab: %s was ended by signal %d (%s)\n", part->name, WTERMSIG(status), strsignal(WTERMSIG(status)));
		else
			fprintf(stderr, "lab: %s ended with status %d\n", part->name, WEXITSTATUS(status));
	}
	return true;
}

/* What a signal asks for: true when the lab is to end because of SIGTERM. */
static bool asked_to_end(int signals)
{
	struct signalfd_siginfo info;
	return read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGTERM;
}

/*
 * Passes frames until somebody asks us to end or, with --once, the first command has ended: true. False when the machine, its agent or
 * the file server ends first.
 */
static bool serve(int port, int ctl, int api, int signals)
{
	static struct pollfd fds[4 + MAX_STREAMS];
	bool had_one = false;
	uint64_t started = now_ms();
	set_nonblocking(port);
	while (!(options.once && had_one)) {
		fds[0] = (struct pollfd){ .fd = port, .events = (short)(POLLIN | (to_agent.length ? POLLOUT : 0)) };
		fds[1] = (struct pollfd){ .fd = ctl, .events = POLLIN };
		fds[2] = (struct pollfd){ .fd = api, .events = POLLIN };
		fds[3] = (struct pollfd){ .fd = signals, .events = POLLIN };
		for (int i = 0; i < MAX_STREAMS; i++)
			fds[4 + i] = (struct pollfd){ .fd = peers[i].used ? peers[i].fd : -1,
						      .events = (short)((readable(&peers[i]) ? POLLIN : 0) |
									(peers[i].to.length ? POLLOUT : 0)) };
		if (poll(fds, 4 + MAX_STREAMS, options.once ? 1000 : -1) < 0 && errno != EINTR)
			fail("poll: %s", strerror(errno));
		if (fds[3].revents)
			return asked_to_end(signals);
		if (fds[0].revents & (POLLIN | POLLHUP)) {
			long got = buffer_fill(&from_agent, port, 65536);
			if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
				return false;
			from_agent_to_peers();
		}
		serve_peers(fds + 4, &had_one);
		if (fds[1].revents)
			new_peer(ctl, false);
		if (fds[2].revents)
			new_peer(api, true);
		if (to_agent.length && buffer_drain(&to_agent, port, 65536) < 0 && errno != EAGAIN && errno != EINTR)
			return false;
		if (options.once && !last_stream && now_ms() - started > ONCE_PATIENCE_MS)
			return true;
	}
	return true;
}

/* Waits for a frame that the agent sends while it starts; false when it does not come. */
static bool wait_for(enum frame_type type, int port, int signals, uint64_t deadline)
{
	const char *body;
	for (;;) {
		const struct frame *frame = frame_first(&from_agent, &body);
		if (frame) {
			bool wanted = frame->type == type;
			buffer_consume(&from_agent, sizeof *frame + frame->length);
			return wanted;
		}
		struct pollfd fds[2] = { { .fd = port, .events = POLLIN }, { .fd = signals, .events = POLLIN } };
		uint64_t now = now_ms();
		int ready = now < deadline ? poll(fds, 2, (int)(deadline - now)) : 0;
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready <= 0 || fds[1].revents || buffer_fill(&from_agent, port, 4096) <= 0)
			return false;
	}
}

static bool say_go(int port)
{
	struct go go;
	struct timespec time;
	clock_gettime(CLOCK_REALTIME, &time);
	go.realtime_ns = (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
	if (getrandom(go.random, sizeof go.random, 0) != sizeof go.random)
		fail("getrandom: %s", strerror(errno));
	frame_append(&to_agent, 0, GO, &go, sizeof go);
	long length = (long)to_agent.length;
	return buffer_drain(&to_agent, port, to_agent.length) == length;
}

/*
 * Has the machine's devices saved to a file and QEMU end; its memory is a shared file already, hence x-ignore-shared. It is not stopped
 * before, because one that was would be started stopped.
 */
static bool save_state(int monitor, struct part *qemu)
{
	int status;
	dprintf(monitor, "migrate_set_capability x-ignore-shared on\nmigrate \"exec:cat >%s\"\nquit\n", options.save);
	bool ended = waitpid(qemu->process, &status, 0) == qemu->process;
	qemu->process = 0;
	return ended && WIFEXITED(status) && !WEXITSTATUS(status) && access(options.save, R_OK) == 0;
}

/* From QEMU's start to the agent's READY. */
static bool bring_up(int port, int signals, int monitor, struct part *qemu, uint64_t deadline)
{
	if (options.load)
		dprintf(monitor, "migrate_set_capability x-ignore-shared on\nmigrate_incoming \"exec:cat %s\"\n", options.load);
	else if (!wait_for(BOOTED, port, signals, deadline))
		return false;
	if (options.save)
		return save_state(monitor, qemu);
	return say_go(port) && wait_for(READY, port, signals, deadline);
}

/* Removes the sockets, and of a lab that nobody will ask about also the logs and the directory. */
static void clean_up(bool all)
{
	static const char *const names[] = { "fs.sock", "mux.sock", "ctl.sock", "api.sock",
					     "window",  "lock",	"qemu.log", "host.log", "console.log", "monitor.log" };
	for (size_t i = 0; i < (all ? 10 : 5); i++)
		unlink(path_in_dir(names[i]));
	if (all)
		rmdir(options.dir);
}

static void make_window(void)
{
	int fd = open(path_in_dir("window"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)SLOTS * SLOT_SIZE))
		fail("%s: %s", path_in_dir("window"), strerror(errno));
	close(fd);
}

static int daemon_main(int told)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	int signals = signalfd(-1, &set, SFD_CLOEXEC);

	take_lock();
	int fs_listener = unix_listen(path_in_dir("fs.sock")), mux_listener = unix_listen(path_in_dir("mux.sock"));
	make_window();
	uint64_t started = now_ms(), deadline = started + options.ready_seconds * 1000;
	int monitor;
	struct part qemu = { "QEMU", start_qemu(&monitor) }, files = { "the file server", 0 };
	int fs = accept_port(fs_listener, started + 5000), port = accept_port(mux_listener, started + 5000);
	bool ready = false;
	if (fs >= 0 && port >= 0) {
		files.process = fork_with_us();
		if (files.process == 0) {
			close(told);
			_exit(fs_main(fs, path_in_dir("window")));
		}
		close(fs);
		ready = bring_up(port, signals, monitor, &qemu, deadline);
	}
	int ctl = unix_listen(path_in_dir("ctl.sock")), api = unix_listen(path_in_dir("api.sock"));
	if (ready && dprintf(told, "%lu\n", now_ms() - started) < 0)
		ready = false; /* whoever wanted it is gone */
	close(told);
	bool lost = ready && !options.save && !serve(port, ctl, api, signals);
	/* A machine that panics closes its ports a moment before QEMU ends; the file server ends because QEMU has. */
	if (lost && !has_ended(&qemu, 2000) && !has_ended(&files, 0))
		fprintf(stderr, "lab: the agent inside has ended\n");
	if (qemu.process > 0 && !kill(qemu.process, SIGKILL))
		waitpid(qemu.process, NULL, 0);
	clean_up(ready && options.once && !lost);
	return ready ? 0 : NOT_READY_STATUS;
}

/* Prints how many milliseconds it took, once the lab is ready, and leaves it running; NOT_READY_STATUS when it did not come up. */
int host_main(int argc, char **argv)
{
	int told[2];
	char text[128] = "";
	size_t length = 0;
	ssize_t got;
	parse_options(argc, argv);
	if (pipe2(told, O_CLOEXEC))
		fail("pipe: %s", strerror(errno));
	pid_t process = fork();
	if (process < 0)
		fail("fork: %s", strerror(errno));
	if (process == 0) {
		int null = open("/dev/null", O_RDWR | O_CLOEXEC);
		setsid();
		close(told[0]);
		int log = open(path_in_dir("host.log"), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
		dup2(null, 0);
		dup2(null, 1);
		dup2(log < 0 ? null : log, 2); /* not the caller's, whose reader would wait for us to end */
		return daemon_main(told[1]);
	}
	close(told[1]);
	while (length < sizeof text - 1 && (got = read(told[0], text + length, sizeof text - 1 - length)) > 0)
		length += (size_t)got;
	if (!length) {
		int status = 0;
		waitpid(process, &status, 0);
		return WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : NOT_READY_STATUS;
	}
	fputs(text, stdout);
	return 0;
}
