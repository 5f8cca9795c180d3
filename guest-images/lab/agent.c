/*
 * The agent: first process of the emulated machine. It loads the modules that KVM and the two virtio ports need, says BOOTED, and waits;
 * here the machine may be saved, and started again from the saved state any number of times. At GO it takes the time and fresh randomness
 * from outside, mounts the files of the machine outside as its root, says READY, and then runs commands and connects to unix sockets as
 * the frames from outside ask.
 *
 * One poll loop; a thread each way moves FUSE messages between /dev/fuse and their port. A command is a process group of its own. When
 * it ends, what it has written is sent, then its status; what it left behind runs on without our pipes.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/if.h>
#include <linux/random.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct stream {
	bool used, exited, input_ended;
	uint32_t id;
	pid_t process; /* 0: a connection */
	int in, out, err, status; /* descriptors, -1 when closed; a connection or terminal has in == out */
	uint32_t credit; /* bytes of output that may be sent */
	struct buffer input;
};

static struct stream streams[MAX_STREAMS];
static struct buffer from_host, to_host;

/* There is nowhere to report to but the console, which the host keeps; QEMU ends instead of rebooting, and with it the lab. */
static _Noreturn void give_up(const char *what)
{
	fprintf(stderr, "lab: %s: %s\n", what, strerror(errno));
	for (;;)
		reboot(RB_AUTOBOOT);
}

static void mount_or_give_up(const char *type, const char *where, unsigned long flags, const char *data)
{
	mkdir(where, 0755);
	if (mount("lab", where, type, flags, data))
		give_up(where);
}

static void write_setting(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		give_up(path);
	close(fd);
}

/* The image names them in the order in which they depend on each other: /modules/NN-name.ko. */
static void load_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, NULL, alphasort);
	if (count < 0)
		give_up("/modules");
	for (int i = 0; i < count; i++) {
		char path[300];
		if (names[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			give_up(path);
		close(fd);
	}
}

/* The name that QEMU gave a port, from its entry in sysfs. */
static bool port_is(const char *port, const char *wanted)
{
	char path[300], name[32] = "";
	snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, name, sizeof name - 1);
	if (fd >= 0)
		close(fd);
	return length > 0 && !strncmp(name, wanted, strlen(wanted));
}

/* Ports appear a moment after their driver. */
static int open_port(const char *wanted)
{
	for (int tries = 0; tries < 10000; tries++) {
		DIR *ports = opendir("/sys/class/virtio-ports");
		for (struct dirent *port; ports && (port = readdir(ports));) {
			char path[300];
			snprintf(path, sizeof path, "/dev/%s", port->d_name);
			int fd = port_is(port->d_name, wanted) ? open(path, O_RDWR | O_CLOEXEC) : -1;
			if (fd < 0)
				continue;
			closedir(ports);
			return fd;
		}
		if (ports)
			closedir(ports);
		usleep(1000);
	}
	give_up("no virtio port");
}

static int fuse_fd, fuse_port, window_fd;
static pthread_mutex_t fuse_port_lock = PTHREAD_MUTEX_INITIALIZER;

static void send_request(const char *request, size_t length)
{
	pthread_mutex_lock(&fuse_port_lock);
	for (size_t done = 0; done < length;) {
		ssize_t put = write(fuse_port, request + done, length - done);
		if (put < 0 && errno != EINTR)
			give_up("file port");
		done += put > 0 ? (size_t)put : 0;
	}
	pthread_mutex_unlock(&fuse_port_lock);
}

static void *fuse_requests(void *unused)
{
	static char request[SLOT_SIZE + 65536];
	for (;;) {
		ssize_t length = read(fuse_fd, request, sizeof request);
		if (length < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue; /* ENOENT: the request was interrupted before it was read */
		if (length <= 0)
			give_up("/dev/fuse");
		send_request(request, (size_t)length);
	}
	return unused;
}

/* ENOENT: nobody waits for this reply any more. */
static void give_reply(const struct iovec *parts, int count)
{
	if (writev(fuse_fd, parts, count) < 0 && errno != ENOENT)
		give_up("/dev/fuse reply");
}

/* Reads a reply's body from the window, past the page cache: what a slot holds changes from outside. */
static void reply_from_slot(struct fuse_out_header header, uint32_t slot)
{
	static _Alignas(4096) char body[SLOT_SIZE];
	header.len &= ~(uint32_t)IN_SLOT;
	size_t length = header.len - sizeof header, whole = (length + 511) & ~(size_t)511;
	if (whole > sizeof body || pread(window_fd, body, whole, (off_t)slot * SLOT_SIZE) != (ssize_t)whole)
		give_up("/dev/vda");
	struct fuse_in_header back = { .len = sizeof back, .opcode = SLOT_BACK, .unique = slot };
	send_request((const char *)&back, sizeof back);
	give_reply((struct iovec[]){ { &header, sizeof header }, { body, length } }, 2);
}

static void *fuse_replies(void *unused)
{
	struct buffer buffer = { 0 };
	for (;;) {
		if (buffer_fill(&buffer, fuse_port, 65536) <= 0 && errno != EINTR)
			give_up("file port");
		struct fuse_out_header header;
		while (buffer.length >= sizeof header) {
			char *start = buffer.bytes + buffer.start;
			uint32_t slot;
			memcpy(&header, start, sizeof header);
			size_t length = header.len & IN_SLOT ? sizeof header + sizeof slot : header.len;
			if (buffer.length < length)
				break;
			if (header.len & IN_SLOT) {
				memcpy(&slot, start + sizeof header, sizeof slot);
				reply_from_slot(header, slot);
			} else {
				give_reply(&(struct iovec){ start, length }, 1);
			}
			buffer_consume(&buffer, length);
		}
	}
	return unused;
}

static void mount_files(void)
{
	char options[128];
	pthread_t thread;
	fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (fuse_fd < 0)
		give_up("/dev/fuse");
	window_fd = open("/dev/vda", O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (window_fd < 0)
		give_up("/dev/vda");
	mkdir("/files", 0755);
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse_fd);
	if (mount("files", "/files", "fuse", MS_NODEV, options))
		give_up("/files");
	if (pthread_create(&thread, NULL, fuse_requests, NULL) || pthread_create(&thread, NULL, fuse_replies, NULL))
		give_up("pthread_create");
	/* A request takes long whatever its size: read far ahead. */
	struct stat st;
	char path[64];
	if (stat("/files", &st))
		give_up("/files");
	snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/read_ahead_kb", major(st.st_dev), minor(st.st_dev));
	write_setting(path, "512");
	/* A program that writes through a mapping is held up once a hundredth of memory waits to be written, which is few pages here. */
	snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/max_ratio", major(st.st_dev), minor(st.st_dev));
	write_setting(path, "100");
}

/* Makes /files the root, with file systems of this kernel where they must be its own. */
static void enter_files(void)
{
	static const char *const own[] = { "/proc", "/sys", "/dev" };
	for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
		char target[32];
		snprintf(target, sizeof target, "/files%s", own[i]);
		if (mount(own[i], target, NULL, MS_MOVE, NULL))
			give_up(target);
	}
	mount_or_give_up("tmpfs", "/files/run", MS_NOSUID | MS_NODEV, "mode=755");
	if (chdir("/files") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		give_up("entering the files");
	mount_or_give_up("devpts", "/dev/pts", 0, "mode=620,ptmxmode=666");
	mount_or_give_up("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
}

static void lo_up(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request))
		give_up("lo");
	close(fd);
}

/* Says BOOTED and waits for GO: until then this machine's clock and random numbers are those of every machine started from its state. */
static void wait_for_go(int port)
{
	const struct frame *frame;
	const char *body;
	struct go go;
	struct {
		struct rand_pool_info info;
		unsigned char bytes[sizeof go.random];
	} entropy = { .info = { .entropy_count = 8 * sizeof go.random, .buf_size = sizeof go.random } };
	frame_append(&to_host, 0, BOOTED, NULL, 0);
	while (to_host.length)
		if (buffer_drain(&to_host, port, to_host.length) < 0 && errno != EINTR)
			give_up("port");
	while (!(frame = frame_first(&from_host, &body)))
		/* Without a host at the other end, as while being saved, a read ends at once. */
		if (buffer_fill(&from_host, port, 4096) <= 0)
			usleep(1000);
	if (frame->type != GO || frame->length != sizeof go)
		give_up("not GO");
	memcpy(&go, body, sizeof go);
	buffer_consume(&from_host, sizeof *frame + frame->length);
	struct timespec time = { (time_t)(go.realtime_ns / 1000000000), (long)(go.realtime_ns % 1000000000) };
	if (clock_settime(CLOCK_REALTIME, &time))
		give_up("clock_settime");
	memcpy(entropy.bytes, go.random, sizeof go.random);
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, RNDADDENTROPY, &entropy) || ioctl(fd, RNDRESEEDCRNG))
		give_up("/dev/urandom");
	close(fd);
}

static struct stream *find_stream(uint32_t id)
{
	for (int i = 0; i < MAX_STREAMS; i++)
		if (streams[i].used && streams[i].id == id)
			return &streams[i];
	return NULL;
}

static struct stream *new_stream(uint32_t id)
{
	for (int i = 0; i < MAX_STREAMS; i++)
		if (!streams[i].used) {
			streams[i] = (struct stream){ .used = true, .id = id, .in = -1, .out = -1, .err = -1, .credit = WINDOW };
			return &streams[i];
		}
	return NULL;
}

static void close_input(struct stream *s)
{
	if (s->in < 0)
		return;
	if (!s->process)
		shutdown(s->in, SHUT_WR);
	if (s->in != s->out)
		close(s->in);
	s->in = -1;
}

static void close_output(struct stream *s)
{
	if (s->out < 0)
		return;
	if (s->in == s->out)
		s->in = -1;
	close(s->out);
	s->out = -1;
}

static void end_stream(struct stream *s)
{
	close_output(s);
	if (s->in >= 0)
		close(s->in);
	if (s->err >= 0)
		close(s->err);
	free(s->input.bytes);
	s->used = false;
}

static void refuse(uint32_t id, const char *what)
{
	char text[4200];
	int length = snprintf(text, sizeof text, "%s: %s", what, strerror(errno));
	frame_append(&to_host, id, FAILED, text, (size_t)length);
	frame_append_number(&to_host, id, EXIT, errno == ENOENT ? 127 : 126);
}

static void set_terminal_size(int fd, const struct exec_request *request)
{
	struct winsize size = { .ws_row = request->rows, .ws_col = request->columns };
	ioctl(fd, TIOCSWINSZ, &size);
}

/* The new process: its descriptors are in place, *failed_fd tells the agent why it could not become the command. */
static _Noreturn void become(char **argv, char **envp, const char *cwd, const int fds[3], bool tty, int failed_fd)
{
	sigset_t none;
	sigemptyset(&none);
	setsid();
	if (tty)
		ioctl(fds[0], TIOCSCTTY, 0);
	for (int i = 0; i < 3; i++)
		dup2(fds[i], i);
	signal(SIGPIPE, SIG_DFL);
	sigprocmask(SIG_SETMASK, &none, NULL);
	const char *path = NULL;
	for (char **variable = envp; *variable; variable++)
		if (!strncmp(*variable, "PATH=", 5))
			path = *variable + 5;
	if (path)
		setenv("PATH", path, 1);
	if (!chdir(cwd))
		execvpe(argv[0], argv, envp);
	int error = errno;
	(void)!write(failed_fd, &error, sizeof error);
	_exit(127);
}

/* Pipes, or one terminal, between the agent (ours) and the command (theirs). */
static int make_descriptors(const struct exec_request *request, int ours[3], int theirs[3])
{
	if (request->tty) {
		char name[64];
		int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
		if (fd < 0 || grantpt(fd) || unlockpt(fd) || ptsname_r(fd, name, sizeof name))
			return -1;
		set_terminal_size(fd, request);
		theirs[0] = theirs[1] = theirs[2] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
		ours[0] = ours[1] = fd;
		ours[2] = -1;
		return theirs[0] < 0 ? -1 : 0;
	}
	for (int i = 0; i < 3; i++) {
		int ends[2];
		if (pipe2(ends, O_CLOEXEC))
			return -1;
		ours[i] = ends[i == 0];
		theirs[i] = ends[i != 0];
	}
	return 0;
}

static void start_process(uint32_t id, const struct exec_request *request, const char *cwd, char **argv, char **envp)
{
	int ours[3], theirs[3], failed[2], error = 0;
	struct stream *s = new_stream(id);
	if (!s) {
		errno = EAGAIN;
		refuse(id, "too many commands at once");
		return;
	}
	if (make_descriptors(request, ours, theirs) || pipe2(failed, O_CLOEXEC)) {
		refuse(id, "descriptors");
		s->used = false;
		return;
	}
	pid_t process = fork();
	if (process == 0)
		become(argv, envp, cwd, theirs, request->tty, failed[1]);
	close(failed[1]);
	for (int i = 0; i < (request->tty ? 1 : 3); i++)
		close(theirs[i]);
	s->process = process;
	s->in = ours[0];
	s->out = ours[1];
	s->err = ours[2];
	if (process > 0 && read(failed[0], &error, sizeof error) == sizeof error)
		process = -1, errno = error;
	close(failed[0]);
	if (process < 0) {
		refuse(id, argv[0]);
		end_stream(s);
		return;
	}
	set_nonblocking(s->in);
	set_nonblocking(s->out);
	if (s->err >= 0)
		set_nonblocking(s->err);
}

static void start_command(const struct frame *frame, const char *body)
{
	struct exec_request request;
	static char *words[16384];
	uint32_t count = 0;
	memcpy(&request, body, sizeof request);
	char *text = malloc(frame->length + 1);
	if (!text)
		give_up("malloc");
	memcpy(text, body, frame->length);
	text[frame->length] = 0;
	for (char *word = text + sizeof request; word < text + frame->length && count < 16380; word += strlen(word) + 1)
		words[count++] = word;
	if (request.arguments < 1 || count != 1 + request.arguments + request.environment) {
		errno = E2BIG;
		refuse(frame->stream, "malformed request");
	} else {
		char **argv = words + 1, **envp = words + 1 + request.arguments;
		/* Both lists end in NULL: the environment moves up by one. */
		memmove(envp + 1, envp, request.environment * sizeof *envp);
		*envp++ = NULL;
		envp[request.environment] = NULL;
		start_process(frame->stream, &request, words[0], argv, envp);
	}
	free(text);
}

static void start_connection(const struct frame *frame, const char *body)
{
	char path[128];
	snprintf(path, sizeof path, "%.*s", (int)frame->length, body);
	int fd = unix_connect(path);
	struct stream *s = fd < 0 ? NULL : new_stream(frame->stream);
	if (!s) {
		refuse(frame->stream, path);
		return;
	}
	set_nonblocking(fd);
	s->in = s->out = fd;
}

static void handle(const struct frame *frame, const char *body)
{
	struct stream *s = find_stream(frame->stream);
	if (frame->type == EXEC && frame->length >= sizeof(struct exec_request))
		start_command(frame, body);
	else if (frame->type == CONNECT)
		start_connection(frame, body);
	if (!s)
		return; /* what was under way when it ended */
	switch (frame->type) {
	case INPUT:
		if (frame->length)
			buffer_append(&s->input, body, frame->length);
		else
			s->input_ended = true;
		break;
	case OUTPUT_CREDIT:
		s->credit += frame_number(frame, body);
		break;
	case SIGNAL:
		if (s->process)
			kill(-s->process, (int)frame_number(frame, body));
		break;
	case RESIZE: {
		struct exec_request request = { 0 };
		memcpy(&request, body, frame->length < sizeof request ? frame->length : sizeof request);
		set_terminal_size(s->out, &request);
		break;
	}
	case HANGUP:
		if (s->process)
			kill(-s->process, SIGKILL);
		end_stream(s);
		break;
	default:
		break;
	}
}

/* Sends what can be read now, within the credit; false at its end. */
static bool pass_output(struct stream *s, int fd, enum frame_type type)
{
	static char bytes[65536];
	if (!s->credit)
		return true;
	ssize_t got = read(fd, bytes, s->credit < sizeof bytes ? s->credit : sizeof bytes);
	if (got < 0)
		return errno == EAGAIN || errno == EINTR; /* EIO: a terminal whose users are gone */
	if (got > 0) {
		frame_append(&to_host, s->id, type, bytes, (size_t)got);
		s->credit -= (uint32_t)got;
	}
	return got > 0;
}

static void pass_input(struct stream *s)
{
	if (s->in >= 0 && s->input.length) {
		size_t before = s->input.length;
		if (buffer_drain(&s->input, s->in, before) < 0 && errno != EAGAIN && errno != EINTR) {
			buffer_consume(&s->input, before); /* it reads no more */
			close_input(s);
		}
		if (before != s->input.length)
			frame_append_number(&to_host, s->id, INPUT_CREDIT, (uint32_t)(before - s->input.length));
	}
	if (s->input_ended && !s->input.length)
		close_input(s);
}

static bool readable_now(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	return fd >= 0 && poll(&poll_fd, 1, 0) > 0 && poll_fd.revents & POLLIN;
}

/* A command has ended when it has exited and all that it wrote is sent; a connection when the other side has closed. */
static void end_if_done(struct stream *s)
{
	if (!s->used || (s->process ? !s->exited : s->out >= 0))
		return;
	if (s->process && (readable_now(s->out) || readable_now(s->err)))
		return;
	frame_append_number(&to_host, s->id, EXIT, (uint32_t)s->status);
	end_stream(s);
}

static void reap(int signal_fd)
{
	struct signalfd_siginfo info;
	int status;
	pid_t process;
	(void)!read(signal_fd, &info, sizeof info);
	while ((process = waitpid(-1, &status, WNOHANG)) > 0)
		for (int i = 0; i < MAX_STREAMS; i++)
			if (streams[i].used && streams[i].process == process) {
				streams[i].exited = true;
				streams[i].status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
			}
}

static int watch_signals(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	signal(SIGPIPE, SIG_IGN);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* What to wait for: the port, the end of a child, and each stream's three descriptors at 2 + 3 * i. */
static void fill_poll(struct pollfd *fds, int port, int signal_fd)
{
	fds[0] = (struct pollfd){ .fd = port, .events = (short)(POLLIN | (to_host.length ? POLLOUT : 0)) };
	fds[1] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
	for (int i = 0; i < MAX_STREAMS; i++) {
		struct stream *s = &streams[i];
		struct pollfd *p = &fds[2 + 3 * i];
		bool room = s->used && s->credit && to_host.length < 4 * WINDOW;
		p[0] = (struct pollfd){ .fd = s->used && s->input.length ? s->in : -1, .events = POLLOUT };
		p[1] = (struct pollfd){ .fd = room ? s->out : -1, .events = POLLIN };
		p[2] = (struct pollfd){ .fd = room ? s->err : -1, .events = POLLIN };
	}
}

static void serve_streams(const struct pollfd *fds)
{
	for (int i = 0; i < MAX_STREAMS; i++) {
		struct stream *s = &streams[i];
		const struct pollfd *p = &fds[2 + 3 * i];
		if (!s->used)
			continue;
		pass_input(s);
		if (p[1].fd >= 0 && p[1].fd == s->out && p[1].revents && !pass_output(s, s->out, OUTPUT)) {
			if (!s->process)
				frame_append(&to_host, s->id, OUTPUT, NULL, 0);
			close_output(s);
		}
		if (p[2].fd >= 0 && p[2].fd == s->err && p[2].revents && !pass_output(s, s->err, ERROUT)) {
			close(s->err);
			s->err = -1;
		}
		end_if_done(s);
	}
}

int agent_main(void)
{
	mount_or_give_up("devtmpfs", "/dev", 0, NULL);
	int console = open("/dev/console", O_RDWR);
	for (int i = 0; i < 3 && console >= 0; i++)
		dup2(console, i);
	if (console > 2)
		close(console);
	mount_or_give_up("proc", "/proc", 0, NULL);
	mount_or_give_up("sysfs", "/sys", 0, NULL);
	load_modules();
	lo_up();
	write_setting("/proc/sys/vm/overcommit_memory", "1"); /* guests may be larger than this machine, as long as they do not use it */
	if (access("/dev/kvm", R_OK | W_OK))
		give_up("/dev/kvm");
	int port = open_port("mux"), signal_fd = watch_signals();
	fuse_port = open_port("fs");
	wait_for_go(port);
	mount_files();
	enter_files();

	frame_append(&to_host, 0, READY, NULL, 0);
	set_nonblocking(port);
	static struct pollfd fds[2 + 3 * MAX_STREAMS];
	for (;;) {
		fill_poll(fds, port, signal_fd);
		if (poll(fds, 2 + 3 * MAX_STREAMS, -1) < 0 && errno != EINTR)
			give_up("poll");
		if (fds[1].revents)
			reap(signal_fd);
		if (fds[0].revents & POLLIN && buffer_fill(&from_host, port, 65536) < 0 && errno != EAGAIN && errno != EINTR)
			give_up("port");
		const char *body;
		for (const struct frame *frame; (frame = frame_first(&from_host, &body));) {
			struct frame copy = *frame;
			handle(&copy, body);
			buffer_consume(&from_host, sizeof copy + copy.length);
		}
		serve_streams(fds);
		if (to_host.length && buffer_drain(&to_host, port, 32768) < 0 && errno != EAGAIN && errno != EINTR)
			give_up("port");
	}
}
