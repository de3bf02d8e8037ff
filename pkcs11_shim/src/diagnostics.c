#include "diagnostics.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int log_fd = -1;

void diagnostics_open(void)
{
    const char *where = secure_getenv("HSMVISOR_PKCS11_DEBUG");
    if (log_fd >= 0 || !where || !*where || !strcmp(where, "0"))
        return;
    if (strchr(where, '/'))
        log_fd = open(where, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    else
        log_fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
}

void diagnostics_close(void)
{
    if (log_fd >= 0)
        close(log_fd);
    log_fd = -1;
}

bool diagnostics_on(void)
{
    return log_fd >= 0;
}

void diagnose(const char *format, ...)
{
    if (log_fd < 0)
        return;
    char line[512];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int head = snprintf(line, sizeof line, "hsmvisor-pkcs11[%d] %lld.%03ld ", (int)getpid(), (long long)now.tv_sec, now.tv_nsec / 1000000);
    va_list arguments;
    va_start(arguments, format);
    int body = vsnprintf(line + head, sizeof line - (size_t)head - 1, format, arguments);
    va_end(arguments);
    size_t length = (size_t)head + (size_t)(body < 0 ? 0 : body);
    if (length > sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    ssize_t written = write(log_fd, line, length);
    (void)written; /* a full disk must not fail the application */
}
