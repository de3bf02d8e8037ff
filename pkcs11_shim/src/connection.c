#include "connection.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "diagnostics.h"

#define GREETING 0x81u   /* the native dialect, version 1 */
#define OPTION_DEADLINE 1 /* u16 type, u16 length, u32 milliseconds */
#define OPTION_SIZE 8u
#define FIRST_ROOM 4096u
#define LOOK_NS 60000 /* how long a reply is looked for before the thread sleeps */
#define PATIENCE 32u  /* calls that sleep at once after one that was looked for in vain */

static bool set_deadline(int fd, unsigned ms)
{
    struct timeval time = {.tv_sec = ms / 1000, .tv_usec = (ms % 1000) * 1000};
    return !setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) && !setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

static bool send_all(int fd, const uint8_t *data, size_t length)
{
    while (length) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        data += sent;
        length -= (size_t)sent;
    }
    return true;
}

static bool receive_all(int fd, uint8_t *data, size_t length)
{
    while (length) {
        ssize_t got = recv(fd, data, length, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            if (!got)
                errno = ECONNRESET;
            return false;
        }
        data += got;
        length -= (size_t)got;
    }
    return true;
}

/* A descriptor of 0-2 in a daemon that closed its standard streams would receive what it prints. */
static int above_standard(int fd)
{
    if (fd < 0 || fd > 2)
        return fd;
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    close(fd);
    return moved;
}

bool connection_open(struct connection *c, const struct address *address, unsigned deadline_ms)
{
    connection_close(c);
    if (!c->in) {
        c->in = malloc(FIRST_ROOM);
        c->in_room = c->in ? FIRST_ROOM : 0;
        if (!c->in)
            return false;
    }
    int fd = above_standard(socket(address->to.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (fd < 0)
        return false;
    uint8_t greeting = GREETING;
    bool good = set_deadline(fd, deadline_ms) && !connect(fd, &address->to.any, address->size) && send_all(fd, &greeting, 1) &&
                receive_all(fd, &greeting, 1);
    if (good && greeting != GREETING) {
        errno = EPROTO;
        good = false;
    }
    if (!good) {
        int reason = errno;
        close(fd);
        errno = reason;
        return false;
    }
    c->fd = fd;
    return true;
}

void connection_close(struct connection *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

void connection_free(struct connection *c)
{
    connection_close(c);
    free(c->out.data);
    free(c->in);
    free(c);
}

void connection_begin(struct connection *c, uint32_t call)
{
    c->out.length = 0;
    c->out.failed = false;
    put_u32(&c->out, 0); /* the header, filled in by connection_exchange */
    put_u64(&c->out, 0);
    put_u32(&c->out, call);
}

static void store_u32(uint8_t *at, uint32_t value)
{
    value = htobe32(value);
    memcpy(at, &value, 4);
}

static uint32_t load_u32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return be32toh(value);
}

static bool send_message(struct connection *c, uint32_t option_ms)
{
    uint8_t *frame = c->out.data;
    store_u32(frame, ++c->last_id);
    store_u32(frame + 8, (uint32_t)(c->out.length - HEADER_SIZE));
    if (!option_ms) {
        store_u32(frame + 4, 0);
        return send_all(c->fd, frame, c->out.length);
    }
    uint8_t head[HEADER_SIZE + OPTION_SIZE] = {0};
    memcpy(head, frame, HEADER_SIZE);
    store_u32(head + 4, OPTION_SIZE);
    store_u32(head + HEADER_SIZE, OPTION_DEADLINE << 16 | 4);
    store_u32(head + HEADER_SIZE + 4, option_ms);
    return send_all(c->fd, head, sizeof head) && send_all(c->fd, frame + HEADER_SIZE, c->out.length - HEADER_SIZE);
}

static enum exchange lost(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK ? EXCHANGE_OVERDUE : EXCHANGE_LOST;
}

static int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Looks for the reply a little while before the thread sleeps: on a virtual machine to be woken costs more than a signature.
 * Only where the last answer came quickly; returns what recv does, -1 with EAGAIN when nothing came. */
static ssize_t look(struct connection *c)
{
    int64_t began = now_ns();
    ssize_t got;
    do {
        for (int i = 0; i < 8; i++) {
            got = recv(c->fd, c->in, c->in_room, MSG_DONTWAIT);
            if (got >= 0 || (errno != EAGAIN && errno != EINTR))
                return got;
        }
    } while (now_ns() - began < LOOK_NS);
    c->patience = 0; /* not worth it now; tried again after some calls */
    return -1;
}

enum exchange connection_exchange(struct connection *c, uint32_t option_ms, struct reader *reply)
{
    if (!send_message(c, option_ms))
        return lost();
    size_t have = 0, whole = HEADER_SIZE;
    bool look_first = c->alone && ++c->patience > PATIENCE;
    while (have < whole) {
        ssize_t got = look_first ? look(c) : -1;
        if (got < 0 && (!look_first || errno == EAGAIN || errno == EINTR))
            got = recv(c->fd, c->in + have, c->in_room - have, 0);
        look_first = false;
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            if (!got)
                errno = ECONNRESET;
            return lost();
        }
        have += (size_t)got;
        if (have >= HEADER_SIZE && whole == HEADER_SIZE) {
            uint32_t length = load_u32(c->in + 8);
            if (load_u32(c->in) != c->last_id || load_u32(c->in + 4) || length > MAX_REPLY)
                return EXCHANGE_BROKEN;
            whole = HEADER_SIZE + length;
            if (whole > c->in_room) {
                uint8_t *larger = realloc(c->in, whole);
                if (!larger)
                    return EXCHANGE_BROKEN;
                c->in = larger;
                c->in_room = whole;
            }
        }
    }
    if (have != whole)
        return EXCHANGE_BROKEN; /* more than was asked for */
    *reply = (struct reader){c->in + HEADER_SIZE, whole - HEADER_SIZE, false};
    return EXCHANGE_DONE;
}

CK_RV reply_head(struct reader *reply, uint32_t call)
{
    uint32_t answered = get_u32(reply);
    if (answered == call && !reply->failed)
        return CKR_OK;
    CK_RV rv = answered ? CKR_OK : get_ulong(reply);
    return reply->failed || rv == CKR_OK ? CKR_DEVICE_ERROR : rv;
}
