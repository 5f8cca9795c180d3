/*
 * The file server: answers the FUSE requests of the kernel inside with the files of this machine, as the user who started the lab. The
 * agent passes the messages of /dev/fuse through unread, so this is a FUSE file system whose kernel is on the other end of a socket.
 *
 * A node is an O_PATH descriptor, known by device and inode number, that lives until the kernel forgets it; a handle is an open file.
 * Names and attributes are believed for VALID_MS, so that what is built outside shows inside almost at once; those below the directories
 * of the system's own programs, which change only when packages do, for SYSTEM_VALID_S.
 * Protocol: linux/fuse.h, and Documentation/filesystems/fuse.rst of the kernel.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum { VALID_MS = 300, SYSTEM_VALID_S = 60, MAX_TRANSFER = SLOT_SIZE, WORTH_A_SLOT = 8192, BUCKETS = 65536 };

struct node {
	int fd;
	dev_t dev;
	ino_t ino;
	uint64_t lookups;
	bool system; /* below a directory of the system's own */
	struct node *next;
};

static struct node *buckets[BUCKETS], *root;
static int out_fd, window_fd;
static bool slot_taken[SLOTS];
static char reply_space[MAX_TRANSFER + 4096];

static struct node **bucket(dev_t dev, ino_t ino)
{
	return &buckets[(ino * 0x9e3779b97f4a7c15u + dev) >> 48];
}

static struct node *node_of(uint64_t id)
{
	return id == FUSE_ROOT_ID ? root : (struct node *)id; /* NOLINT: ids are ours, from node_id() */
}

static uint64_t node_id(struct node *node)
{
	return node == root ? FUSE_ROOT_ID : (uint64_t)node;
}

/* Takes over fd, an O_PATH descriptor. */
static struct node *node_get(int fd, const struct stat *st, bool system)
{
	struct node **head = bucket(st->st_dev, st->st_ino);
	for (struct node *node = *head; node; node = node->next)
		if (node->dev == st->st_dev && node->ino == st->st_ino) {
			close(fd);
			node->lookups++;
			return node;
		}
	struct node *node = malloc(sizeof *node);
	if (!node)
		fail("no memory");
	*node = (struct node){ fd, st->st_dev, st->st_ino, 1, system, *head };
	return *head = node;
}

static void node_forget(struct node *node, uint64_t lookups)
{
	if (node == root || (node->lookups -= lookups))
		return;
	struct node **at = bucket(node->dev, node->ino);
	while (*at != node)
		at = &(*at)->next;
	*at = node->next;
	close(node->fd);
	free(node);
}

/* The path under which an O_PATH descriptor can be opened, or changed in ways that need a path. */
static const char *path_of(const struct node *node)
{
	static char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", node->fd);
	return path;
}

static void send_parts(struct iovec *part, int count)
{
	while (count) {
		ssize_t put = writev(out_fd, part, count);
		if (put < 0) {
			if (errno == EINTR)
				continue;
			exit(0); /* the machine is gone */
		}
		while (count && (size_t)put >= part->iov_len) {
			put -= (ssize_t)part->iov_len;
			part++;
			count--;
		}
		if (count) {
			part->iov_base = (char *)part->iov_base + put;
			part->iov_len -= (size_t)put;
		}
	}
}

static void reply(uint64_t unique, int error, const void *body, size_t length)
{
	struct fuse_out_header header = { (uint32_t)(sizeof header + length), -error, unique };
	struct iovec parts[2] = { { &header, sizeof header }, { (void *)body, length } };
	send_parts(parts, length ? 2 : 1);
}

/* Puts a reply's body into a free slot; its number, or -1. */
static int fill_slot(const void *body, size_t length)
{
	for (int slot = 0; slot < SLOTS; slot++)
		if (!slot_taken[slot]) {
			if (pwrite(window_fd, body, length, (off_t)slot * SLOT_SIZE) != (ssize_t)length)
				return -1;
			slot_taken[slot] = true;
			return slot;
		}
	return -1;
}

static void reply_data(uint64_t unique, const void *body, size_t length)
{
	int32_t slot = length < WORTH_A_SLOT ? -1 : fill_slot(body, length);
	if (slot < 0) {
		reply(unique, 0, body, length);
		return;
	}
	struct {
		struct fuse_out_header header;
		int32_t slot;
	} __attribute__((packed)) message = { { (uint32_t)(sizeof message.header + length) | IN_SLOT, 0, unique }, slot };
	send_parts(&(struct iovec){ &message, sizeof message }, 1);
}

static void set_attr(struct fuse_attr *attr, const struct stat *st)
{
	*attr = (struct fuse_attr){
		.ino = st->st_ino,
		.size = (uint64_t)st->st_size,
		.blocks = (uint64_t)st->st_blocks,
		.atime = (uint64_t)st->st_atim.tv_sec,
		.mtime = (uint64_t)st->st_mtim.tv_sec,
		.ctime = (uint64_t)st->st_ctim.tv_sec,
		.atimensec = (uint32_t)st->st_atim.tv_nsec,
		.mtimensec = (uint32_t)st->st_mtim.tv_nsec,
		.ctimensec = (uint32_t)st->st_ctim.tv_nsec,
		.mode = st->st_mode,
		.nlink = (uint32_t)st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.rdev = (uint32_t)st->st_rdev,
		.blksize = (uint32_t)st->st_blksize,
	};
}

static bool is_system(const struct node *dir, const char *name)
{
	static const char *const names[] = { "usr", "bin", "sbin", "lib", "lib64", "etc", "opt" };
	for (size_t i = 0; dir == root && i < sizeof names / sizeof *names; i++)
		if (!strcmp(name, names[i]))
			return true;
	return dir->system;
}

static struct fuse_entry_out entry_believed(bool system)
{
	return (struct fuse_entry_out){
		.entry_valid = system ? SYSTEM_VALID_S : 0,
		.attr_valid = system ? SYSTEM_VALID_S : 0,
		.entry_valid_nsec = VALID_MS * 1000000,
		.attr_valid_nsec = VALID_MS * 1000000,
	};
}

/* Fills in the entry for a name of a directory, and counts the lookup; an errno on failure. */
static int entry_for(struct node *dir, const char *name, struct fuse_entry_out *entry)
{
	struct stat st;
	int fd = openat(dir->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return errno;
	if (fstatat(fd, "", &st, AT_EMPTY_PATH)) {
		int error = errno;
		close(fd);
		return error;
	}
	struct node *node = node_get(fd, &st, is_system(dir, name));
	*entry = entry_believed(node->system);
	entry->nodeid = node_id(node);
	set_attr(&entry->attr, &st);
	return 0;
}

static void reply_entry(const struct fuse_in_header *in, int failed, const char *name)
{
	struct fuse_entry_out entry;
	int error = failed ? errno : entry_for(node_of(in->nodeid), name, &entry);
	if (error == ENOENT && in->opcode == FUSE_LOOKUP) {
		entry = entry_believed(is_system(node_of(in->nodeid), name)); /* without a node: "no such name" is believed as long */
		error = 0;
	}
	reply(in->unique, error, &entry, error ? 0 : sizeof entry);
}

static void reply_result(const struct fuse_in_header *in, int failed)
{
	reply(in->unique, failed ? errno : 0, NULL, 0);
}

static void do_init(const struct fuse_in_header *in, const struct fuse_init_in *init)
{
	uint32_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_AUTO_INVAL_DATA | FUSE_PARALLEL_DIROPS |
			  FUSE_ATOMIC_O_TRUNC | FUSE_CACHE_SYMLINKS;
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = FUSE_KERNEL_MINOR_VERSION < init->minor ? FUSE_KERNEL_MINOR_VERSION : init->minor,
		.max_readahead = MAX_TRANSFER,
		.flags = init->flags & wanted,
		.max_background = 32,
		.congestion_threshold = 24,
		.max_write = MAX_TRANSFER,
		.time_gran = 1,
		.max_pages = MAX_TRANSFER / 4096,
	};
	reply(in->unique, 0, &out, sizeof out);
}

static void do_getattr(const struct fuse_in_header *in)
{
	struct stat st;
	struct node *node = node_of(in->nodeid);
	struct fuse_attr_out out = { .attr_valid = node->system ? SYSTEM_VALID_S : 0, .attr_valid_nsec = VALID_MS * 1000000 };
	if (fstatat(node->fd, "", &st, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW)) {
		reply_result(in, 1);
		return;
	}
	set_attr(&out.attr, &st);
	reply(in->unique, 0, &out, sizeof out);
}

static struct timespec time_to_set(uint32_t valid, uint32_t bit, uint32_t now_bit, uint64_t seconds, uint32_t nanoseconds)
{
	if (!(valid & bit))
		return (struct timespec){ .tv_nsec = UTIME_OMIT };
	if (valid & now_bit)
		return (struct timespec){ .tv_nsec = UTIME_NOW };
	return (struct timespec){ (time_t)seconds, (long)nanoseconds };
}

static void do_setattr(const struct fuse_in_header *in, const struct fuse_setattr_in *set)
{
	struct node *node = node_of(in->nodeid);
	const char *path = path_of(node);
	int failed = 0;
	if (set->valid & FATTR_MODE)
		failed = chmod(path, set->mode & 07777);
	if (!failed && set->valid & (FATTR_UID | FATTR_GID))
		failed = fchownat(node->fd, "", set->valid & FATTR_UID ? set->uid : (uid_t)-1,
				  set->valid & FATTR_GID ? set->gid : (gid_t)-1, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW);
	if (!failed && set->valid & FATTR_SIZE)
		failed = set->valid & FATTR_FH ? ftruncate((int)set->fh, (off_t)set->size) : truncate(path, (off_t)set->size);
	if (!failed && set->valid & (FATTR_ATIME | FATTR_MTIME)) {
		struct timespec times[2] = {
			time_to_set(set->valid, FATTR_ATIME, FATTR_ATIME_NOW, set->atime, set->atimensec),
			time_to_set(set->valid, FATTR_MTIME, FATTR_MTIME_NOW, set->mtime, set->mtimensec),
		};
		failed = utimensat(AT_FDCWD, path, times, 0);
	}
	if (failed)
		reply_result(in, 1);
	else
		do_getattr(in);
}

/* The flags with which to open here: the kernel inside has created, followed and positioned already. */
static int flags_here(uint32_t flags)
{
	return ((int)flags & ~(O_CREAT | O_EXCL | O_NOFOLLOW | O_APPEND | O_DIRECT | O_NOCTTY)) | O_CLOEXEC | O_NONBLOCK;
}

static void reply_open(const struct fuse_in_header *in, int fd)
{
	struct fuse_open_out out = { .fh = (uint64_t)fd, .open_flags = FOPEN_KEEP_CACHE };
	if (fd < 0)
		reply_result(in, 1);
	else
		reply(in->unique, 0, &out, sizeof out);
}

static void do_create(const struct fuse_in_header *in, const struct fuse_create_in *create, const char *name)
{
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} out = { .open.open_flags = FOPEN_KEEP_CACHE };
	int flags = flags_here(create->flags) | O_CREAT | (int)(create->flags & O_EXCL) | O_NOFOLLOW;
	umask(create->umask & 0777);
	int fd = openat(node_of(in->nodeid)->fd, name, flags, create->mode & 07777);
	umask(0);
	if (fd < 0) {
		reply_result(in, 1);
		return;
	}
	int error = entry_for(node_of(in->nodeid), name, &out.entry);
	if (error)
		close(fd);
	out.open.fh = (uint64_t)fd;
	reply(in->unique, error, &out, error ? 0 : sizeof out);
}

static void do_read(const struct fuse_in_header *in, const struct fuse_read_in *args)
{
	size_t size = args->size < MAX_TRANSFER ? args->size : MAX_TRANSFER;
	ssize_t got = pread((int)args->fh, reply_space, size, (off_t)args->offset);
	if (got < 0)
		reply_result(in, 1);
	else
		reply_data(in->unique, reply_space, (size_t)got);
}

static void do_write(const struct fuse_in_header *in, const struct fuse_write_in *args)
{
	size_t done = 0;
	while (done < args->size) {
		ssize_t put = pwrite((int)args->fh, (const char *)(args + 1) + done, args->size - done, (off_t)(args->offset + done));
		if (put <= 0) {
			if (done)
				break;
			reply_result(in, 1);
			return;
		}
		done += (size_t)put;
	}
	struct fuse_write_out out = { .size = (uint32_t)done };
	reply(in->unique, 0, &out, sizeof out);
}

static void do_readdir(const struct fuse_in_header *in, const struct fuse_read_in *args)
{
	DIR *dir = (DIR *)args->fh; /* NOLINT: handles of directories are ours */
	size_t room = args->size < MAX_TRANSFER ? args->size : MAX_TRANSFER, used = 0;
	seekdir(dir, (long)args->offset);
	for (;;) {
		errno = 0;
		struct dirent *found = readdir(dir);
		if (!found) {
			if (errno && !used) {
				reply_result(in, 1);
				return;
			}
			break;
		}
		size_t length = strlen(found->d_name), size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
		if (used + size > room)
			break;
		struct fuse_dirent entry = { found->d_ino, (uint64_t)found->d_off, (uint32_t)length, found->d_type };
		memset(reply_space + used, 0, size);
		memcpy(reply_space + used, &entry, FUSE_NAME_OFFSET);
		memcpy(reply_space + used + FUSE_NAME_OFFSET, found->d_name, length);
		used += size;
	}
	reply_data(in->unique, reply_space, used);
}

static void do_opendir(const struct fuse_in_header *in)
{
	int fd = openat(node_of(in->nodeid)->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct fuse_open_out out = { .fh = (uint64_t)dir };
	if (!dir)
		reply_result(in, 1);
	else
		reply(in->unique, 0, &out, sizeof out);
}

static void do_statfs(const struct fuse_in_header *in)
{
	struct statvfs st;
	if (fstatvfs(node_of(in->nodeid)->fd, &st)) {
		reply_result(in, 1);
		return;
	}
	struct fuse_statfs_out out = { .st = { .blocks = st.f_blocks,
					       .bfree = st.f_bfree,
					       .bavail = st.f_bavail,
					       .files = st.f_files,
					       .ffree = st.f_ffree,
					       .bsize = (uint32_t)st.f_bsize,
					       .namelen = (uint32_t)st.f_namemax,
					       .frsize = (uint32_t)st.f_frsize } };
	reply(in->unique, 0, &out, sizeof out);
}

static void do_readlink(const struct fuse_in_header *in)
{
	ssize_t length = readlinkat(node_of(in->nodeid)->fd, "", reply_space, 4096);
	if (length < 0)
		reply_result(in, 1);
	else
		reply(in->unique, 0, reply_space, (size_t)length);
}

static void do_link(const struct fuse_in_header *in, const struct fuse_link_in *args)
{
	const char *name = (const char *)(args + 1);
	reply_entry(in, linkat(AT_FDCWD, path_of(node_of(args->oldnodeid)), node_of(in->nodeid)->fd, name, AT_SYMLINK_FOLLOW), name);
}

static void do_mknod(const struct fuse_in_header *in, const struct fuse_mknod_in *args)
{
	const char *name = (const char *)(args + 1);
	umask(args->umask & 0777);
	int failed = mknodat(node_of(in->nodeid)->fd, name, args->mode, args->rdev);
	umask(0);
	reply_entry(in, failed, name);
}

static void do_mkdir(const struct fuse_in_header *in, const struct fuse_mkdir_in *args)
{
	const char *name = (const char *)(args + 1);
	umask(args->umask & 0777);
	int failed = mkdirat(node_of(in->nodeid)->fd, name, args->mode & 07777);
	umask(0);
	reply_entry(in, failed, name);
}

static void do_rename(const struct fuse_in_header *in, uint64_t new_dir, uint32_t flags, const char *name)
{
	const char *new_name = name + strlen(name) + 1;
	reply_result(in, renameat2(node_of(in->nodeid)->fd, name, node_of(new_dir)->fd, new_name, flags));
}

static void do_batch_forget(const struct fuse_batch_forget_in *args)
{
	const struct fuse_forget_one *one = (const struct fuse_forget_one *)(args + 1);
	for (uint32_t i = 0; i < args->count; i++)
		node_forget(node_of(one[i].nodeid), one[i].nlookup);
}

static void serve(const struct fuse_in_header *in, const void *body)
{
	struct node *node = in->opcode == SLOT_BACK ? NULL : node_of(in->nodeid);
	const char *name = body;
	switch (in->opcode) {
	case FUSE_INIT: return do_init(in, body);
	case FUSE_LOOKUP: return reply_entry(in, 0, name);
	case FUSE_FORGET: return node_forget(node, ((const struct fuse_forget_in *)body)->nlookup);
	case FUSE_BATCH_FORGET: return do_batch_forget(body);
	case FUSE_GETATTR: return do_getattr(in);
	case FUSE_SETATTR: return do_setattr(in, body);
	case FUSE_READLINK: return do_readlink(in);
	case FUSE_SYMLINK: return reply_entry(in, symlinkat(name + strlen(name) + 1, node->fd, name), name);
	case FUSE_MKNOD: return do_mknod(in, body);
	case FUSE_MKDIR: return do_mkdir(in, body);
	case FUSE_UNLINK: return reply_result(in, unlinkat(node->fd, name, 0));
	case FUSE_RMDIR: return reply_result(in, unlinkat(node->fd, name, AT_REMOVEDIR));
	case FUSE_RENAME: {
		const struct fuse_rename_in *args = body;
		return do_rename(in, args->newdir, 0, (const char *)(args + 1));
	}
	case FUSE_RENAME2: {
		const struct fuse_rename2_in *args = body;
		return do_rename(in, args->newdir, args->flags, (const char *)(args + 1));
	}
	case FUSE_LINK: return do_link(in, body);
	case FUSE_OPEN: return reply_open(in, open(path_of(node), flags_here(((const struct fuse_open_in *)body)->flags)));
	case FUSE_CREATE: return do_create(in, body, (const char *)((const struct fuse_create_in *)body + 1));
	case FUSE_READ: return do_read(in, body);
	case FUSE_WRITE: return do_write(in, body);
	case FUSE_FLUSH: return reply(in->unique, 0, NULL, 0);
	case FUSE_FSYNC: return reply_result(in, fdatasync((int)((const struct fuse_fsync_in *)body)->fh));
	case FUSE_RELEASE: return reply_result(in, close((int)((const struct fuse_release_in *)body)->fh));
	case FUSE_OPENDIR: return do_opendir(in);
	case FUSE_READDIR: return do_readdir(in, body);
	case FUSE_RELEASEDIR: return reply_result(in, closedir((DIR *)((const struct fuse_release_in *)body)->fh)); /* NOLINT */
	case FUSE_FSYNCDIR: return reply(in->unique, 0, NULL, 0);
	case FUSE_STATFS: return do_statfs(in);
	case FUSE_FALLOCATE: {
		const struct fuse_fallocate_in *args = body;
		return reply_result(in, fallocate((int)args->fh, (int)args->mode, (off_t)args->offset, (off_t)args->length));
	}
	case FUSE_INTERRUPT: return; /* nothing here waits */
	case SLOT_BACK: slot_taken[in->unique % SLOTS] = false; return;
	case FUSE_DESTROY: return reply(in->unique, 0, NULL, 0);
	default: return reply(in->unique, ENOSYS, NULL, 0); /* the kernel does without, and does not ask again */
	}
}

int fs_main(int fd, const char *window)
{
	/* A descriptor for each inode that the kernel inside remembers: as many as root, or else this user, may have. */
	struct rlimit files = { 1 << 20, 1 << 20 };
	if (setrlimit(RLIMIT_NOFILE, &files) && !getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	umask(0);
	out_fd = fd;
	window_fd = open(window, O_WRONLY | O_CLOEXEC);
	if (window_fd < 0)
		fail("%s: %s", window, strerror(errno));
	int root_fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	struct stat st;
	if (root_fd < 0 || fstat(root_fd, &st))
		fail("/: %s", strerror(errno));
	root = node_get(root_fd, &st, false);

	struct buffer buffer = { 0 };
	static _Alignas(8) char request[MAX_TRANSFER + 65536];
	while (buffer_fill(&buffer, fd, sizeof request) > 0)
		while (buffer.length >= sizeof(struct fuse_in_header)) {
			struct fuse_in_header in;
			memcpy(&in, buffer.bytes + buffer.start, sizeof in);
			if (in.len < sizeof in || in.len > sizeof request)
				fail("a FUSE request of %u bytes", in.len);
			if (buffer.length < in.len)
				break;
			memcpy(request, buffer.bytes + buffer.start, in.len);
			buffer_consume(&buffer, in.len);
			serve((struct fuse_in_header *)request, request + sizeof in);
		}
	return 0;
}
