/*
 * stream_echo - sends a pattern over a stream that somebody echoes and compares every byte of what comes back.
 *
 *   stream_echo transfer ADDRESS MEBIBYTES STREAMS    as many streams at once, each of them MEBIBYTES there and back
 *   stream_echo ping ADDRESS BYTES COUNT              one message of BYTES after the other, each awaited
 *   stream_echo serve ADDRESS                         echoes whatever connects, until it is killed
 *   stream_echo echo [DAMAGED [END]]                  echoes the socket that is its standard input; it alters byte number
 *                                                     DAMAGED, if one is given, and ends before byte number END
 *
 * ADDRESS is vsock:CID:PORT or tcp:A.B.C.D:PORT.  The result is one line of JSON; "serve" writes "ready" when it listens.
 * Exit status: 0, 1 for what is wrong about the stream or its bytes, 2 for what cannot be set up; the reason is on stderr.
 *
 * Build: cc -O2 -Wall -Wextra -pthread -o stream_echo stream_echo.c
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PIECE (128u << 10) /* bytes of one read or write */
#define MOST_STREAMS 1024u
#define MOST_PINGS 1000000u

#define FAIL(status, ...) (fprintf(stderr, "stream_echo: " __VA_ARGS__), fputc('\n', stderr), exit(status))

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static unsigned long number(const char *text, unsigned long least, unsigned long most)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || end == text || *end || value < least || value > most)
        FAIL(2, "%s is no number from %lu to %lu", text, least, most);
    return value;
}

/* -------------------------------------------------------------- addresses */

union address {
    struct sockaddr any;
    struct sockaddr_vm vm;
    struct sockaddr_in in;
};

static socklen_t address_of(const char *text, union address *out)
{
    unsigned cid, port;
    char host[16];
    memset(out, 0, sizeof *out);
    if (sscanf(text, "vsock:%u:%u", &cid, &port) == 2) {
        out->vm = (struct sockaddr_vm){.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
        return sizeof out->vm;
    }
    if (sscanf(text, "tcp:%15[0-9.]:%u", host, &port) == 2 && inet_pton(AF_INET, host, &out->in.sin_addr) == 1) {
        out->in.sin_family = AF_INET;
        out->in.sin_port = htons((uint16_t)port);
        return sizeof out->in;
    }
    FAIL(2, "%s is no address", text);
}

/* Small messages leave at once. */
static void hurry(int fd, const union address *address)
{
    int on = 1;
    if (address->any.sa_family == AF_INET)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static int connected(const char *text)
{
    union address address;
    socklen_t size = address_of(text, &address);
    int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, &address.any, size) < 0)
        FAIL(1, "%s: %s", text, strerror(errno));
    hurry(fd, &address);
    return fd;
}

static bool send_all(int fd, const unsigned char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0)
            return false;
        data += sent;
        size -= (size_t)sent;
    }
    return true;
}

/* ------------------------------------------------------------------- echo */

static void echo(int fd, uint64_t damaged, uint64_t end)
{
    static __thread unsigned char piece[PIECE];
    uint64_t place = 0;
    while (place < end) {
        ssize_t got = recv(fd, piece, end - place < sizeof piece ? end - place : sizeof piece, 0);
        if (got <= 0)
            return;
        if (damaged >= place && damaged - place < (uint64_t)got)
            piece[damaged - place] ^= 1;
        if (!send_all(fd, piece, (size_t)got))
            return;
        place += (uint64_t)got;
    }
}

static void *echo_in_thread(void *argument)
{
    int fd = (int)(intptr_t)argument;
    echo(fd, UINT64_MAX, UINT64_MAX);
    close(fd);
    return NULL;
}

static void serve(const char *text)
{
    union address address;
    socklen_t size = address_of(text, &address);
    int on = 1, listener = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (listener < 0 || bind(listener, &address.any, size) < 0 || listen(listener, 128) < 0)
        FAIL(2, "%s: %s", text, strerror(errno));
    puts("ready");
    fflush(stdout);
    for (;;) {
        pthread_t thread;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            FAIL(2, "accept: %s", strerror(errno));
        hurry(fd, &address);
        if (pthread_create(&thread, NULL, echo_in_thread, (void *)(intptr_t)fd))
            FAIL(2, "no thread");
        pthread_detach(thread);
    }
}

/* --------------------------------------------------------------- transfer */

struct stream {
    pthread_t sender, reader;
    int fd;
    unsigned index;
    uint64_t size;
};

/* The words of each stream are its own, and no two of them are alike: splitmix64 of their number. */
static void fill(unsigned char *piece, unsigned index, uint64_t place)
{
    uint64_t first = ((uint64_t)index << 40) + place / 8;
    for (unsigned i = 0; i < PIECE / 8; i++) {
        uint64_t z = (first + i) * 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        memcpy(piece + 8 * i, &z, 8);
    }
}

static void *send_pattern(void *argument)
{
    struct stream *stream = argument;
    unsigned char *piece = malloc(PIECE);
    if (!piece)
        FAIL(2, "out of memory");
    for (uint64_t place = 0; place < stream->size; place += PIECE) {
        fill(piece, stream->index, place);
        if (!send_all(stream->fd, piece, PIECE))
            FAIL(1, "stream %u: sending from byte %llu on: %s", stream->index, (unsigned long long)place, strerror(errno));
    }
    free(piece);
    shutdown(stream->fd, SHUT_WR);
    return NULL;
}

static void *read_pattern(void *argument)
{
    struct stream *stream = argument;
    unsigned char *piece = malloc(PIECE), *wanted = malloc(PIECE);
    if (!piece || !wanted)
        FAIL(2, "out of memory");
    for (uint64_t place = 0; place < stream->size; place += PIECE) {
        size_t got = 0;
        while (got < PIECE) {
            ssize_t more = recv(stream->fd, piece + got, PIECE - got, 0);
            if (more <= 0)
                FAIL(1, "stream %u: it ends at byte %llu of %llu: %s", stream->index, (unsigned long long)(place + got),
                     (unsigned long long)stream->size, more ? strerror(errno) : "closed");
            got += (size_t)more;
        }
        fill(wanted, stream->index, place);
        for (size_t i = 0; i < PIECE && memcmp(piece, wanted, PIECE); i++)
            if (piece[i] != wanted[i])
                FAIL(1, "stream %u: byte %llu is 0x%02x, not 0x%02x", stream->index, (unsigned long long)(place + i), piece[i],
                     wanted[i]);
    }
    if (recv(stream->fd, piece, 1, 0) > 0)
        FAIL(1, "stream %u: more than was sent", stream->index);
    free(piece);
    free(wanted);
    return NULL;
}

static void transfer(const char *text, unsigned long mebibytes, unsigned count)
{
    struct stream *streams = calloc(count, sizeof *streams);
    if (!streams)
        FAIL(2, "out of memory");
    for (unsigned n = 0; n < count; n++)
        streams[n] = (struct stream){.fd = connected(text), .index = n, .size = (uint64_t)mebibytes << 20};
    uint64_t begin = now_ns();
    for (unsigned n = 0; n < count; n++)
        if (pthread_create(&streams[n].sender, NULL, send_pattern, &streams[n]) ||
            pthread_create(&streams[n].reader, NULL, read_pattern, &streams[n]))
            FAIL(2, "no thread");
    for (unsigned n = 0; n < count; n++) {
        pthread_join(streams[n].sender, NULL);
        pthread_join(streams[n].reader, NULL);
        close(streams[n].fd);
    }
    double seconds = (double)(now_ns() - begin) / 1e9;
    printf("{\"bytes\":%llu,\"streams\":%u,\"seconds\":%.4f}\n", (unsigned long long)count * (mebibytes << 20), count, seconds);
    free(streams);
}

/* ------------------------------------------------------------------- ping */

static int compare(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static void ping(const char *text, size_t size, size_t count)
{
    static unsigned char message[PIECE], reply[PIECE];
    uint64_t *took = malloc(count * sizeof *took);
    int fd = connected(text);
    if (!took)
        FAIL(2, "out of memory");
    for (size_t n = 0; n < count; n++) {
        memset(message, (int)n, size);
        uint64_t begin = now_ns();
        if (!send_all(fd, message, size) || recv(fd, reply, size, MSG_WAITALL) != (ssize_t)size)
            FAIL(1, "message %zu has no reply: %s", n, strerror(errno));
        took[n] = now_ns() - begin;
        if (memcmp(message, reply, size))
            FAIL(1, "message %zu has come back as another", n);
    }
    close(fd);
    qsort(took, count, sizeof *took, compare);
    printf("{\"count\":%zu,\"bytes\":%zu,\"p50_us\":%.1f,\"p99_us\":%.1f}\n", count, size, (double)took[count / 2] / 1e3,
           (double)took[(count - 1) * 99 / 100] / 1e3);
    free(took);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(what, "transfer") && argc == 5)
        transfer(argv[2], number(argv[3], 1, 65536), (unsigned)number(argv[4], 1, MOST_STREAMS));
    else if (!strcmp(what, "ping") && argc == 5)
        ping(argv[2], number(argv[3], 1, PIECE), number(argv[4], 1, MOST_PINGS));
    else if (!strcmp(what, "serve") && argc == 3)
        serve(argv[2]);
    else if (!strcmp(what, "echo") && argc <= 4)
        echo(0, argc > 2 ? number(argv[2], 0, UINT64_MAX) : UINT64_MAX, argc > 3 ? number(argv[3], 0, UINT64_MAX) : UINT64_MAX);
    else
        FAIL(2, "usage: transfer ADDRESS MEBIBYTES STREAMS | ping ADDRESS BYTES COUNT | serve ADDRESS | echo [DAMAGED [END]]");
    return 0;
}
