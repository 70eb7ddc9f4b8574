/* Preloaded into a process, this writes down what the process does to the files of one folder: a line for each call that
 * succeeded, in order. disk.py reads it.
 *
 *   operation <tab> absolute path <tab> argument, if any
 *
 * FILE_LOG names the log, FILE_LOG_FOLDER the folder. C programs that write by stdio are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define SHOWN_BYTES 4000

static int real_open(const char *path, int flags, int mode) {
    static __typeof__(&open) function;
    if (!function) function = REAL(open);
    return function(path, flags, mode);
}

static void append(const char *operation, const char *path, const char *argument) {
    static int log = -1;
    const char *folder = getenv("FILE_LOG_FOLDER"), *name = getenv("FILE_LOG");
    if (!folder || !name || strncmp(path, folder, strlen(folder)) != 0) return;
    int error = errno;
    if (log < 0) {
        int low = real_open(name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
        log = fcntl(low, F_DUPFD_CLOEXEC, 500);
        close(low);
    }
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", operation, path, argument);
    static ssize_t (*function)(int, const void *, size_t);
    if (!function) function = (ssize_t (*)(int, const void *, size_t))REAL(write);
    if (function(log, line, length) != length) abort();
    errno = error;
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    char parent[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent)) parent[0] = 0;
    } else {
        path_of(folder, parent);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", parent, name) >= PATH_MAX) abort();
}

static void append_descriptor(const char *operation, int descriptor, const char *argument) {
    char path[PATH_MAX];
    path_of(descriptor, path);
    append(operation, path, argument);
}

static void append_opened(int folder, const char *name, int flags) {
    char path[PATH_MAX], argument[3] = {0};
    path_at(folder, name, path);
    if (flags & O_CREAT) strcat(argument, "c");
    if (flags & O_TRUNC) strcat(argument, "t");
    if (argument[0]) append("open", path, argument);
}

static void append_written(int descriptor, const unsigned char *data, ssize_t length) {
    char text[2 * SHOWN_BYTES + 1] = {0};
    for (ssize_t at = 0; at < length && at < SHOWN_BYTES; at++) sprintf(text + 2 * at, "%02x", data[at]);
    char argument[2 * SHOWN_BYTES + 32];
    snprintf(argument, sizeof argument, "%zd\t%s", length, text);
    append_descriptor("write", descriptor, argument);
}

#define MODE(flags)                      \
    int mode = 0;                        \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest;                    \
        va_start(rest, flags);           \
        mode = va_arg(rest, int);        \
        va_end(rest);                    \
    }

#define OPEN(name)                                        \
    int name(const char *path, int flags, ...) {          \
        MODE(flags)                                       \
        int result = REAL(name)(path, flags, mode);       \
        if (result >= 0) append_opened(AT_FDCWD, path, flags); \
        return result;                                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                            \
    int name(int folder, const char *path, int flags, ...) {    \
        MODE(flags)                                             \
        int result = REAL(name)(folder, path, flags, mode);     \
        if (result >= 0) append_opened(folder, path, flags);    \
        return result;                                          \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                          \
    int name(const char *path, mode_t mode) {                                \
        int result = REAL(name)(path, mode);                                 \
        if (result >= 0) append_opened(AT_FDCWD, path, O_CREAT | O_TRUNC);   \
        return result;                                                       \
    }
CREAT(creat)
CREAT(creat64)

ssize_t write(int descriptor, const void *data, size_t size) {
    ssize_t result = REAL(write)(descriptor, data, size);
    if (result >= 0) append_written(descriptor, data, result);
    return result;
}

#define PWRITE(name, offset_type)                                                        \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type offset) {    \
        ssize_t result = REAL(name)(descriptor, data, size, offset);                     \
        if (result >= 0) append_written(descriptor, data, result);                       \
        return result;                                                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    ssize_t result = REAL(writev)(descriptor, parts, count);
    if (result >= 0) append_written(descriptor, NULL, 0);
    return result;
}

#define TRUNCATE(name, offset_type)                                    \
    int name(int descriptor, offset_type size) {                       \
        int result = REAL(name)(descriptor, size);                     \
        if (result == 0) append_descriptor("truncate", descriptor, ""); \
        return result;                                                 \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                 \
    int name(int descriptor) {                                     \
        int result = REAL(name)(descriptor);                       \
        if (result == 0) append_descriptor("sync", descriptor, ""); \
        return result;                                             \
    }
SYNC(fsync)
SYNC(fdatasync)

static int moved(int result, int old_folder, const char *old_name, int new_folder, const char *new_name) {
    char old_path[PATH_MAX], new_path[PATH_MAX];
    if (result == 0) {
        path_at(old_folder, old_name, old_path);
        path_at(new_folder, new_name, new_path);
        append("rename", old_path, new_path);
    }
    return result;
}
int rename(const char *from, const char *to) {
    return moved(REAL(rename)(from, to), AT_FDCWD, from, AT_FDCWD, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return moved(REAL(renameat)(from_folder, from, to_folder, to), from_folder, from, to_folder, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    return moved(REAL(renameat2)(from_folder, from, to_folder, to, flags), from_folder, from, to_folder, to);
}

static int changed(int result, const char *operation, int folder, const char *name) {
    char path[PATH_MAX];
    if (result == 0) {
        path_at(folder, name, path);
        append(operation, path, "");
    }
    return result;
}
int mkdir(const char *path, mode_t mode) { return changed(REAL(mkdir)(path, mode), "mkdir", AT_FDCWD, path); }
int mkdirat(int folder, const char *path, mode_t mode) {
    return changed(REAL(mkdirat)(folder, path, mode), "mkdir", folder, path);
}
int unlink(const char *path) { return changed(REAL(unlink)(path), "remove", AT_FDCWD, path); }
int rmdir(const char *path) { return changed(REAL(rmdir)(path), "remove", AT_FDCWD, path); }
int unlinkat(int folder, const char *path, int flags) {
    return changed(REAL(unlinkat)(folder, path, flags), "remove", folder, path);
}
int link(const char *from, const char *to) { return changed(REAL(link)(from, to), "link", AT_FDCWD, to); }
int symlink(const char *to, const char *path) { return changed(REAL(symlink)(to, path), "link", AT_FDCWD, path); }
