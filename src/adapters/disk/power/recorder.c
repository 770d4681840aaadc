/* Records what a process writes to files below RECORD_ROOT, and what it syncs, into RECORD_TO: preloaded (LD_PRELOAD).
 * A write is recorded when it is done, a sync when it begins and when it ends: what a sync covers is what was recorded
 * before it began. One record: op, two path lengths, offset, data length, paths, data; see mod.rs. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC_BEGIN, SYNC_END, RENAME, UNLINK, MKDIR };

struct __attribute__((packed)) head {
    uint8_t op;
    uint16_t path, other;
    uint64_t offset, data;
};

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int out = -1;
static char root[PATH_MAX];
static uint64_t syncs;

__attribute__((constructor)) static void start(void) {
    const char *to = getenv("RECORD_TO"), *below = getenv("RECORD_ROOT");
    if (!to || !below || !realpath(below, root)) return;
    out = (int)syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void all(const void *data, size_t length) {
    for (const char *at = data; length > 0;) {
        ssize_t n = syscall(SYS_write, out, at, length);
        if (n < 0) abort();
        at += n, length -= (size_t)n;
    }
}

static void record(int op, const char *path, const char *other, uint64_t offset, const void *data, size_t length) {
    int before = errno;
    struct head head = {(uint8_t)op, (uint16_t)strlen(path), (uint16_t)strlen(other), offset, length};
    all(&head, sizeof head), all(path, head.path), all(other, head.other), all(data, length);
    errno = before;
}

/* The part of an absolute path below the root; null for any other path. */
static const char *below(const char *path) {
    size_t n = strlen(root);
    return out >= 0 && n > 0 && strncmp(path, root, n) == 0 && path[n] == '/' ? path + n + 1 : NULL;
}

/* The same for an open file; directories too, the root itself as "". */
static const char *file(int fd, char *room) {
    char link[64];
    if (out < 0 || fd == out) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, room, PATH_MAX - 1);
    if (n <= 0) return NULL;
    room[n] = 0;
    return strcmp(room, root) == 0 ? "" : below(room);
}

static const char *at(int dir, const char *path, char *room) {
    char base[PATH_MAX];
    if (path[0] == '/') return below(path);
    if (dir == AT_FDCWD) return NULL;
    const char *parent = file(dir, base);
    if (!parent) return NULL;
    snprintf(room, PATH_MAX, "%s%s%s", parent, *parent ? "/" : "", path);
    return room;
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
    char room[PATH_MAX];
    const char *name = (flags & (O_CREAT | O_TRUNC)) ? at(dir, path, room) : NULL;
    if (!name) return (int)syscall(SYS_openat, dir, path, flags, mode);
    pthread_mutex_lock(&turn);
    int there = syscall(SYS_faccessat, dir, path, F_OK) == 0;
    int fd = (int)syscall(SYS_openat, dir, path, flags, mode);
    if (fd >= 0 && !there) record(CREATE, name, "", 0, "", 0);
    if (fd >= 0 && there && (flags & O_TRUNC)) record(TRUNCATE, name, "", 0, "", 0);
    pthread_mutex_unlock(&turn);
    return fd;
}

#define OPEN(name, ...)                                                                                                \
    {                                                                                                                  \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list rest;                                                                                              \
            va_start(rest, flags), mode = va_arg(rest, mode_t), va_end(rest);                                          \
        }                                                                                                              \
        return opened(__VA_ARGS__, flags, mode);                                                                       \
    }
int open(const char *path, int flags, ...) OPEN(open, AT_FDCWD, path)
int open64(const char *path, int flags, ...) OPEN(open64, AT_FDCWD, path)
int openat(int dir, const char *path, int flags, ...) OPEN(openat, dir, path)
int openat64(int dir, const char *path, int flags, ...) OPEN(openat64, dir, path)

static ssize_t written(int fd, const void *data, size_t length, off_t offset, int here) {
    char room[PATH_MAX];
    const char *name = file(fd, room);
    if (!name) return here ? syscall(SYS_write, fd, data, length) : syscall(SYS_pwrite64, fd, data, length, offset);
    pthread_mutex_lock(&turn);
    ssize_t n = here ? syscall(SYS_write, fd, data, length) : syscall(SYS_pwrite64, fd, data, length, offset);
    if (n > 0) {
        off_t first = here ? syscall(SYS_lseek, fd, 0, SEEK_CUR) - n : offset;
        record(WRITE, name, "", (uint64_t)first, data, (size_t)n);
    }
    pthread_mutex_unlock(&turn);
    return n;
}

ssize_t write(int fd, const void *data, size_t length) { return written(fd, data, length, 0, 1); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset, 0); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset, 0); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    char room[PATH_MAX];
    if (!file(fd, room)) return syscall(SYS_writev, fd, parts, count);
    return count > 0 ? write(fd, parts[0].iov_base, parts[0].iov_len) : 0;
}

static int cut(int fd, off_t length) {
    char room[PATH_MAX];
    const char *name = file(fd, room);
    if (!name) return (int)syscall(SYS_ftruncate, fd, length);
    pthread_mutex_lock(&turn);
    int done = (int)syscall(SYS_ftruncate, fd, length);
    if (done == 0) record(TRUNCATE, name, "", (uint64_t)length, "", 0);
    pthread_mutex_unlock(&turn);
    return done;
}
int ftruncate(int fd, off_t length) { return cut(fd, length); }
int ftruncate64(int fd, off_t length) { return cut(fd, length); }

static int synced(int fd, long call) {
    char room[PATH_MAX];
    const char *name = file(fd, room);
    if (!name) return (int)syscall(call, fd);
    pthread_mutex_lock(&turn);
    uint64_t id = ++syncs;
    record(SYNC_BEGIN, name, "", id, "", 0);
    pthread_mutex_unlock(&turn);
    int done = (int)syscall(call, fd);
    pthread_mutex_lock(&turn);
    if (done == 0) record(SYNC_END, name, "", id, "", 0);
    pthread_mutex_unlock(&turn);
    return done;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

#define NAMED(call, op, path, other)                                                                                   \
    {                                                                                                                  \
        const char *name = below(path), *second = *(other) ? below(other) : "";                                        \
        pthread_mutex_lock(&turn);                                                                                     \
        int done = (int)(call);                                                                                        \
        if (done == 0 && name && second) record(op, name, second, 0, "", 0);                                           \
        pthread_mutex_unlock(&turn);                                                                                   \
        return done;                                                                                                   \
    }
int rename(const char *from, const char *to) NAMED(syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to), RENAME, from, to)
int unlink(const char *path) NAMED(syscall(SYS_unlinkat, AT_FDCWD, path, 0), UNLINK, path, "")
int rmdir(const char *path) NAMED(syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR), UNLINK, path, "")
int mkdir(const char *path, mode_t mode) NAMED(syscall(SYS_mkdirat, AT_FDCWD, path, mode), MKDIR, path, "")
int unlinkat(int dir, const char *path, int flags) {
    char room[PATH_MAX];
    const char *name = at(dir, path, room);
    pthread_mutex_lock(&turn);
    int done = (int)syscall(SYS_unlinkat, dir, path, flags);
    if (done == 0 && name) record(UNLINK, name, "", 0, "", 0);
    pthread_mutex_unlock(&turn);
    return done;
}
