/* Records what a process does to the files below one folder: loaded with LD_PRELOAD, read back by recorder.py.
 *
 * CUTS_FOLDER: the folder, without symbolic links; CUTS_TRACE: the file that gets the records. Each call that changes
 * something, and each fsync, becomes one record once it has succeeded. One lock is held around call and record, so
 * that records have the order of the calls. What would change files in a way that is not recorded becomes a record of
 * kind '?', which the reader refuses. The trace is written by system calls of its own: nothing recurses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define REAL(name) ((__typeof__(&name))real(#name))

struct header {
  uint32_t kind, path_bytes, second_bytes, data_bytes;
  int64_t offset;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int trace = -1;
static char folder[PATH_MAX];
static size_t folder_bytes;

__attribute__((constructor)) static void begin(void) {
  const char *where = getenv("CUTS_FOLDER"), *path = getenv("CUTS_TRACE");
  if (where == NULL || path == NULL) return;
  folder_bytes = strlen(where);
  memcpy(folder, where, folder_bytes + 1);
  trace = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void *real(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (found == NULL) abort();
  return found;
}

static int is_below(const char *path) {
  return trace >= 0 && strncmp(path, folder, folder_bytes) == 0 && (path[folder_bytes] == '/' || !path[folder_bytes]);
}

/* The present path of a descriptor; 0 where it is not below the folder, or was unlinked. */
static int path_of(int descriptor, char *path) {
  char link[64];
  if (trace < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, PATH_MAX - 1);
  if (size < 0) return 0;
  path[size] = 0;
  static const char gone[] = " (deleted)";
  size_t tail = sizeof gone - 1;
  if ((size_t)size > tail && strcmp(path + size - tail, gone) == 0) return 0;
  return is_below(path);
}

static int path_at(int directory, const char *name, char *path) {
  if (trace < 0) return 0;
  if (name[0] == '/') {
    path[0] = 0;
  } else if (directory == AT_FDCWD) {
    if (getcwd(path, PATH_MAX) == NULL) return 0;
    strcat(path, "/");
  } else {
    if (!path_of(directory, path)) return 0;
    strcat(path, "/");
  }
  if (strlen(path) + strlen(name) >= PATH_MAX) return 0;
  strcat(path, name);
  return is_below(path);
}

static void record(char kind, const char *path, const char *second, int64_t offset, const void *data, size_t size) {
  struct header header = {(uint32_t)kind, (uint32_t)strlen(path), (uint32_t)strlen(second), (uint32_t)size, offset};
  struct iovec parts[] = {{&header, sizeof header},
                          {(void *)path, header.path_bytes},
                          {(void *)second, header.second_bytes},
                          {(void *)data, size}};
  int saved = errno;
  ssize_t whole = (ssize_t)(sizeof header + header.path_bytes + header.second_bytes + size);
  if (syscall(SYS_writev, trace, parts, 4) != whole) abort();
  errno = saved;
}

static int open_at(int directory, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  int saved = errno, existed = 1;
  pthread_mutex_lock(&lock);
  int ours = path_at(directory, name, path);
  if (ours && (flags & O_CREAT)) existed = faccessat(directory, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
  errno = saved;
  int got = (int)syscall(SYS_openat, directory, name, flags | O_LARGEFILE, mode);
  if (got < 0) {
    saved = (int)errno;
  } else if (ours && path_of(got, path)) {
    if ((flags & O_TMPFILE) == O_TMPFILE) record('?', path, "O_TMPFILE", 0, "", 0);
    if (!existed) record('c', path, "", 0, "", 0);
    else if ((flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY) record('t', path, "", 0, "", 0);
  }
  pthread_mutex_unlock(&lock);
  errno = saved;
  return got;
}

#define WITH_MODE(flags)                                        \
  mode_t mode = 0;                                              \
  if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list more;                                               \
    va_start(more, flags);                                      \
    mode = va_arg(more, mode_t);                                \
    va_end(more);                                               \
  }

EXPORTED int open(const char *name, int flags, ...) { WITH_MODE(flags) return open_at(AT_FDCWD, name, flags, mode); }
EXPORTED int open64(const char *name, int flags, ...) { WITH_MODE(flags) return open_at(AT_FDCWD, name, flags, mode); }
EXPORTED int openat(int at, const char *name, int flags, ...) { WITH_MODE(flags) return open_at(at, name, flags, mode); }
EXPORTED int openat64(int at, const char *name, int flags, ...) { WITH_MODE(flags) return open_at(at, name, flags, mode); }
EXPORTED int __open_2(const char *name, int flags) { return open_at(AT_FDCWD, name, flags, 0); }
EXPORTED int __open64_2(const char *name, int flags) { return open_at(AT_FDCWD, name, flags, 0); }
EXPORTED int creat(const char *name, mode_t mode) { return open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
EXPORTED int creat64(const char *name, mode_t mode) { return creat(name, mode); }

static ssize_t write_at(int descriptor, const struct iovec *parts, int count, off_t offset) {
  char path[PATH_MAX];
  pthread_mutex_lock(&lock);
  int ours = path_of(descriptor, path);
  off_t place = offset;
  if (ours && offset < 0) {
    struct stat status;
    int flags = fcntl(descriptor, F_GETFL);
    place = (flags & O_APPEND) && fstat(descriptor, &status) == 0 ? status.st_size : lseek(descriptor, 0, SEEK_CUR);
  }
  ssize_t wrote = offset < 0 ? syscall(SYS_writev, descriptor, parts, count)
                             : syscall(SYS_pwritev, descriptor, parts, count, (long)offset, 0L);
  int saved = errno;
  ssize_t left = ours ? wrote : 0;
  for (int index = 0; index < count && left > 0; index++) {
    size_t size = parts[index].iov_len < (size_t)left ? parts[index].iov_len : (size_t)left;
    if (size) record('w', path, "", place, parts[index].iov_base, size);
    place += (off_t)size;
    left -= (ssize_t)size;
  }
  pthread_mutex_unlock(&lock);
  errno = saved;
  return wrote;
}

EXPORTED ssize_t write(int descriptor, const void *data, size_t size) {
  struct iovec part = {(void *)data, size};
  return write_at(descriptor, &part, 1, -1);
}
EXPORTED ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  struct iovec part = {(void *)data, size};
  return write_at(descriptor, &part, 1, offset);
}
EXPORTED ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  return pwrite(descriptor, data, size, offset);
}
EXPORTED ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  return write_at(descriptor, parts, count, -1);
}
EXPORTED ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) {
  return write_at(descriptor, parts, count, offset);
}
EXPORTED ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
  return write_at(descriptor, parts, count, offset);
}

/* What is done to one open file. */
#define ON_DESCRIPTOR(descriptor, call, kind, second, offset, data, size)                  \
  char path[PATH_MAX];                                                                     \
  pthread_mutex_lock(&lock);                                                               \
  int ours = path_of(descriptor, path);                                                    \
  __typeof__(call) got = call;                                                             \
  if (ours && got == 0) record(kind, path, second, offset, data, size);                    \
  pthread_mutex_unlock(&lock);                                                             \
  return got;

EXPORTED int ftruncate(int descriptor, off_t size) {
  ON_DESCRIPTOR(descriptor, REAL(ftruncate)(descriptor, size), 't', "", size, "", 0)
}
EXPORTED int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }
EXPORTED int posix_fallocate(int descriptor, off_t offset, off_t size) {
  ON_DESCRIPTOR(descriptor, REAL(posix_fallocate)(descriptor, offset, size), 'a', "", offset + size, "", 0)
}
EXPORTED int posix_fallocate64(int descriptor, off64_t offset, off64_t size) {
  return posix_fallocate(descriptor, offset, size);
}
EXPORTED int fallocate(int descriptor, int mode, off_t offset, off_t size) {
  ON_DESCRIPTOR(descriptor, REAL(fallocate)(descriptor, mode, offset, size), mode ? '?' : 'a', "", offset + size, "", 0)
}
EXPORTED int fallocate64(int descriptor, int mode, off64_t offset, off64_t size) {
  return fallocate(descriptor, mode, offset, size);
}
EXPORTED int fsync(int descriptor) { ON_DESCRIPTOR(descriptor, REAL(fsync)(descriptor), 's', "", 0, "", 0) }
EXPORTED int fdatasync(int descriptor) { ON_DESCRIPTOR(descriptor, REAL(fdatasync)(descriptor), 's', "", 0, "", 0) }
EXPORTED int fsetxattr(int descriptor, const char *name, const void *value, size_t size, int flags) {
  ON_DESCRIPTOR(descriptor, REAL(fsetxattr)(descriptor, name, value, size, flags), 'x', name, 0, value, size)
}
/* Bytes that the kernel copies are not seen here. */
static void record_copy(int to, const char *call, ssize_t copied) {
  char path[PATH_MAX];
  int saved = errno;
  pthread_mutex_lock(&lock);
  if (copied > 0 && path_of(to, path)) record('?', path, call, 0, "", 0);
  pthread_mutex_unlock(&lock);
  errno = saved;
}

EXPORTED ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  ssize_t copied = REAL(sendfile)(to, from, offset, size);
  record_copy(to, "sendfile", copied);
  return copied;
}
EXPORTED ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
  return sendfile(to, from, offset, size);
}
EXPORTED ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags) {
  ssize_t copied = REAL(copy_file_range)(from, at, to, to_at, size, flags);
  record_copy(to, "copy_file_range", copied);
  return copied;
}

/* What is done to names. */
#define ON_PATH(at, name, call, kind, second, data, size)               \
  char path[PATH_MAX];                                                  \
  pthread_mutex_lock(&lock);                                            \
  int ours = path_at(at, name, path);                                   \
  int got = call;                                                       \
  if (ours && got == 0) record(kind, path, second, 0, data, size);      \
  pthread_mutex_unlock(&lock);                                          \
  return got;

EXPORTED int unlinkat(int at, const char *name, int flags) {
  ON_PATH(at, name, REAL(unlinkat)(at, name, flags), flags & AT_REMOVEDIR ? 'R' : 'u', "", "", 0)
}
EXPORTED int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
EXPORTED int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
EXPORTED int mkdirat(int at, const char *name, mode_t mode) {
  ON_PATH(at, name, REAL(mkdirat)(at, name, mode), 'd', "", "", 0)
}
EXPORTED int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
EXPORTED int truncate(const char *name, off_t size) {
  ON_PATH(AT_FDCWD, name, REAL(truncate)(name, size), '?', "truncate", "", 0)
}
EXPORTED int setxattr(const char *name, const char *attribute, const void *value, size_t size, int flags) {
  ON_PATH(AT_FDCWD, name, REAL(setxattr)(name, attribute, value, size, flags), 'x', attribute, value, size)
}
EXPORTED int truncate64(const char *name, off64_t size) { return truncate(name, size); }
EXPORTED int symlink(const char *target, const char *name) {
  ON_PATH(AT_FDCWD, name, REAL(symlink)(target, name), '?', "symlink", "", 0)
}

/* What has two names; one that leads in or out of the folder is not recorded. */
#define ON_TWO_PATHS(from_at, from, to_at, to, call, kind)                        \
  char first[PATH_MAX], second[PATH_MAX];                                         \
  pthread_mutex_lock(&lock);                                                      \
  int ours = path_at(from_at, from, first), theirs = path_at(to_at, to, second);  \
  int got = call;                                                                 \
  if ((ours || theirs) && got == 0) record(ours && theirs ? kind : '?', first, second, 0, "", 0); \
  pthread_mutex_unlock(&lock);                                                    \
  return got;

EXPORTED int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
  ON_TWO_PATHS(from_at, from, to_at, to, REAL(renameat2)(from_at, from, to_at, to, flags),
               flags & ~(unsigned)RENAME_NOREPLACE ? '?' : 'r')
}
EXPORTED int renameat(int from_at, const char *from, int to_at, const char *to) {
  return renameat2(from_at, from, to_at, to, 0);
}
EXPORTED int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
EXPORTED int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  ON_TWO_PATHS(from_at, from, to_at, to, REAL(linkat)(from_at, from, to_at, to, flags), 'l')
}
EXPORTED int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
