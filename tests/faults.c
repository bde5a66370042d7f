/* Counts the file operations of a process below one folder, and lets one of them fail. See faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, TORN, LOST, FULL, ERROR };
static int fault = NONE, counting = 0;
static long at = -1, seen = 0;
static char root[4096];

/* Files with content that no fsync has covered, by a descriptor of our own; kept: their size before it. */
static struct { dev_t dev; ino_t ino; int fd; off_t kept; } dirty[4096];
static int dirty_count = 0;

#define REAL(name, type) static __typeof__(type) real; if (!real) real = (__typeof__(type))dlsym(RTLD_NEXT, name)

void faults_arm(const char *folder, long operation, int kind) {
    strncpy(root, folder, sizeof root - 1);
    at = operation; fault = kind; seen = 0; counting = 1;
}
long faults_seen(void) { counting = 0; return seen; }

static int below(int dirfd, const char *path) {
    char full[8192], link[64];
    if (!counting) return 0;
    if (!path || path[0] != '/') {
        ssize_t n;
        if (dirfd == AT_FDCWD) { if (!getcwd(full, 4096)) return 0; n = strlen(full); }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            n = readlink(link, full, 4096);
            if (n < 0) return 0;
        }
        snprintf(full + n, sizeof full - n, "/%s", path ? path : "");
    } else snprintf(full, sizeof full, "%s", path);
    return strncmp(full, root, strlen(root)) == 0;
}

/* The power fails. */
void faults_lose(void) {
    counting = 0;
    for (int i = 0; i < dirty_count; i++) {
        struct stat s;
        if (dirty[i].fd < 0 || fstat(dirty[i].fd, &s) || s.st_size <= dirty[i].kept) continue;
        if (ftruncate(dirty[i].fd, (dirty[i].kept + s.st_size) / 2)) {}
    }
}

static void die(void) {
    if (fault == LOST) faults_lose();
    kill(getpid(), SIGKILL);
}

/* One operation; grows: it needs room on the disk. 0, or the error that it ends with. */
static int operation(int grows) {
    long n = seen++;
    if (fault == FULL && n >= at && at >= 0 && grows) return ENOSPC;
    if (n != at) return 0;
    if (fault == KILL || fault == LOST) die();
    return fault == ERROR ? EIO : 0;
}

static int torn(void) { return fault == TORN && seen - 1 == at; }

static void mark(int fd) {
    struct stat s;
    char link[64];
    if (fault != LOST || fstat(fd, &s) || !S_ISREG(s.st_mode)) return;
    for (int i = 0; i < dirty_count; i++)
        if (dirty[i].fd >= 0 && dirty[i].dev == s.st_dev && dirty[i].ino == s.st_ino) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    REAL("open", int (*)(const char *, int, ...));
    if (dirty_count < 4096) {
        dirty[dirty_count].dev = s.st_dev; dirty[dirty_count].ino = s.st_ino; dirty[dirty_count].kept = s.st_size;
        dirty[dirty_count++].fd = real(link, O_RDWR);
    }
}

static void clean(int fd) {
    struct stat s;
    if (fstat(fd, &s)) return;
    for (int i = 0; i < dirty_count; i++)
        if (dirty[i].fd >= 0 && dirty[i].dev == s.st_dev && dirty[i].ino == s.st_ino) { close(dirty[i].fd); dirty[i].fd = -1; }
}

#define FAIL(condition, grows) do { int e_; if ((condition) && (e_ = operation(grows))) { errno = e_; return -1; } } while (0)

#define OPEN(name) \
int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
    REAL(#name, int (*)(const char *, int, ...)); \
    FAIL((flags & (O_CREAT | O_TRUNC)) && below(AT_FDCWD, path), 1); \
    return real(path, flags, mode); \
}
#define OPENAT(name) \
int name(int dir, const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
    REAL(#name, int (*)(int, const char *, int, ...)); \
    FAIL((flags & (O_CREAT | O_TRUNC)) && below(dir, path), 1); \
    return real(dir, path, flags, mode); \
}
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t));
    if (below(fd, NULL)) {
        FAIL(1, 1);
        mark(fd);
        if (torn()) { if (real(fd, data, size / 2)) {} die(); }
    }
    return real(fd, data, size);
}
#define PWRITE(name) \
ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
    REAL(#name, ssize_t (*)(int, const void *, size_t, off_t)); \
    if (below(fd, NULL)) { \
        FAIL(1, 1); \
        mark(fd); \
        if (torn()) { if (real(fd, data, size / 2, offset)) {} die(); } \
    } \
    return real(fd, data, size, offset); \
}
PWRITE(pwrite) PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL("writev", ssize_t (*)(int, const struct iovec *, int));
    if (below(fd, NULL)) {
        FAIL(1, 1);
        mark(fd);
        if (torn()) { if (real(fd, parts, count / 2)) {} die(); }
    }
    return real(fd, parts, count);
}
#define TRUNCATE(name) \
int name(int fd, off_t size) { \
    REAL(#name, int (*)(int, off_t)); \
    FAIL(below(fd, NULL), 1); \
    return real(fd, size); \
}
TRUNCATE(ftruncate) TRUNCATE(ftruncate64)
#define SYNC(name) \
int name(int fd) { \
    REAL(#name, int (*)(int)); \
    FAIL(below(fd, NULL), 0); \
    int result = real(fd); \
    if (!result) clean(fd); \
    return result; \
}
SYNC(fsync) SYNC(fdatasync)
#define PATH(name, grows) \
int name(const char *path) { \
    REAL(#name, int (*)(const char *)); \
    FAIL(below(AT_FDCWD, path), grows); \
    return real(path); \
}
PATH(unlink, 0) PATH(rmdir, 0)
int unlinkat(int dir, const char *path, int flags) {
    REAL("unlinkat", int (*)(int, const char *, int));
    FAIL(below(dir, path), 0);
    return real(dir, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int (*)(const char *, mode_t));
    FAIL(below(AT_FDCWD, path), 1);
    return real(path, mode);
}
int mkdirat(int dir, const char *path, mode_t mode) {
    REAL("mkdirat", int (*)(int, const char *, mode_t));
    FAIL(below(dir, path), 1);
    return real(dir, path, mode);
}
int rename(const char *from, const char *to) {
    REAL("rename", int (*)(const char *, const char *));
    FAIL(below(AT_FDCWD, to), 0);
    return real(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    REAL("renameat", int (*)(int, const char *, int, const char *));
    FAIL(below(to_dir, to), 0);
    return real(from_dir, from, to_dir, to);
}
int link(const char *from, const char *to) {
    REAL("link", int (*)(const char *, const char *));
    FAIL(below(AT_FDCWD, to), 1);
    return real(from, to);
}
int symlink(const char *from, const char *to) {
    REAL("symlink", int (*)(const char *, const char *));
    FAIL(below(AT_FDCWD, to), 1);
    return real(from, to);
}
