#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEW_MODE 0644

bool file_exists(const char *path)
{
    return !access(path, F_OK);
}

bool file_holds(const char *path, const char *text, size_t length)
{
    char *have = malloc(length + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 || !have ? -1 : read(fd, have, length + 1);
    bool equal = got == (ssize_t)length && !memcmp(have, text, length);
    if (fd >= 0)
        close(fd);
    free(have);
    return equal;
}

static bool sync_directory(const char *path)
{
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = fd >= 0 && !fsync(fd);
    if (fd >= 0)
        close(fd);
    return good;
}

static bool write_all(int fd, const char *text, size_t length)
{
    while (length) {
        ssize_t written = write(fd, text, length);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return false;
        text += written;
        length -= (size_t)written;
    }
    return true;
}

/* Owner first: chown may take bits of the mode away. */
static bool take_after(int fd, const struct stat *old)
{
    if ((old->st_uid != geteuid() || old->st_gid != getegid()) && fchown(fd, old->st_uid, old->st_gid) && errno != EPERM)
        return false;
    return !fchmod(fd, old->st_mode & 07777);
}

static bool write_new(const char *path, const char *text, size_t length, const struct stat *old)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, NEW_MODE);
    if (fd < 0)
        return false;
    bool good = write_all(fd, text, length) && (old ? take_after(fd, old) : !fchmod(fd, NEW_MODE)) && !fsync(fd);
    int reason = errno;
    if (close(fd) && good) {
        good = false;
        reason = errno;
    }
    errno = reason;
    return good;
}

bool file_replace(const char *path, const char *text, size_t length)
{
    char target[PATH_MAX], beside[PATH_MAX];
    struct stat old;
    bool existed = realpath(path, target) && !stat(target, &old);
    if (!existed && snprintf(target, sizeof target, "%s", path) >= (int)sizeof target) {
        errno = ENAMETOOLONG;
        return false;
    }
    if (snprintf(beside, sizeof beside, "%s.hsmvisor-new", target) >= (int)sizeof beside) {
        errno = ENAMETOOLONG;
        return false;
    }
    unlink(beside); /* of a run that was killed */
    if (write_new(beside, text, length, existed ? &old : NULL) && !rename(beside, target))
        return sync_directory(target);
    int reason = errno;
    unlink(beside);
    errno = reason;
    return false;
}
