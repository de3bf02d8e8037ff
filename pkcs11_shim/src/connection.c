#include "connection.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "descriptors.h"
#include "usb.h"

#define GREETING 0x81u    /* the native dialect, version 1 */
#define OPTION_DEADLINE 1 /* u16 type, u16 length, u32 milliseconds */
#define OPTION_SIZE 8u
#define FIRST_ROOM 4096u
#define LOOK_NS 60000 /* how long a reply is looked for before the thread sleeps, at least */
#define MOST_LOOK_NS 400000 /* and at most: replies that take longer are not looked for longer */
#define LATE_NS 20000       /* a reply may come this much later than usual */
#define MOST_VAIN 6u  /* looks in vain in a row that still make the pause before the next one longer: 62 ms */
#define PAUSE_NS 1000000 /* after the second look in vain it is two of them, and then doubles */

struct connection *connection_new(void)
{
    struct connection *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->fd = -1;
    c->in = malloc(FIRST_ROOM);
    c->in_room = FIRST_ROOM;
    if (!c->in) {
        free(c);
        return NULL;
    }
    return c;
}

void connection_free(struct connection *c)
{
    connection_close(c);
    free(c->out.data);
    free(c->in);
    free(c);
}

static bool make_socket(struct connection *c, int family)
{
    descriptors_lock();
    bool stopped = descriptors_stopped();
    c->fd = stopped ? -1 : above_standard(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (stopped)
        errno = ECANCELED;
    descriptors_unlock();
    return c->fd >= 0;
}

void connection_close(struct connection *c)
{
    descriptors_lock();
    struct usb *usb = usb_ours(c->usb) ? c->usb : NULL;
    if (usb && c->fd >= 0)
        shutdown(c->fd, SHUT_RDWR); /* a child may have the socket, too, and then a close alone says nothing */
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->usb = NULL;
    descriptors_unlock();
    if (usb)
        usb_close(usb);
}

void connection_interrupt(struct connection *c)
{
    descriptors_lock();
    if (c->fd >= 0)
        shutdown(c->fd, SHUT_RDWR);
    descriptors_unlock();
}

void connection_deadline(struct connection *c, unsigned ms)
{
    struct timeval time = {.tv_sec = ms / 1000, .tv_usec = (ms % 1000) * 1000};
    c->deadline_ms = ms;
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

static bool connect_to(int fd, const struct address *address)
{
    int result;
    do
        result = connect(fd, &address->to.any, address->size);
    while (result && errno == EINTR);
    return !result;
}

static bool exchange_greeting(int fd)
{
    uint8_t greeting = GREETING;
    ssize_t done;
    do
        done = send(fd, &greeting, 1, MSG_NOSIGNAL);
    while (done < 0 && errno == EINTR);
    if (done != 1)
        return false;
    do
        done = recv(fd, &greeting, 1, 0);
    while (done < 0 && errno == EINTR);
    if (done == 0)
        errno = ECONNRESET;
    else if (done == 1 && greeting != GREETING)
        errno = EPROTO;
    return done == 1 && greeting == GREETING;
}

static bool reach(struct connection *c, const struct address *address, unsigned ms)
{
    if (address->usb) {
        if (!usb_open(address->serial, &c->usb, &c->fd, c->why, sizeof c->why))
            return false;
        connection_deadline(c, ms);
    } else {
        if (!make_socket(c, address->to.any.sa_family))
            return connection_failed(c, errno);
        connection_deadline(c, ms);
        if (!connect_to(c->fd, address))
            return connection_failed(c, errno);
    }
    return exchange_greeting(c->fd) || connection_failed(c, errno);
}

bool connection_open(struct connection *c, const struct address *address, unsigned ms)
{
    connection_close(c);
    if (reach(c, address, ms))
        return true;
    connection_close(c);
    return false;
}

bool connection_failed(struct connection *c, int reason)
{
    snprintf(c->why, sizeof c->why, "%s", strerror(reason));
    return false;
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

/* A whole frame is one system call, unless the socket is full. */
static bool send_parts(int fd, struct iovec *parts, size_t count)
{
    while (count) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return false;
        while (count && (size_t)sent >= parts->iov_len) {
            sent -= (ssize_t)parts->iov_len;
            parts++;
            count--;
        }
        if (count) {
            parts->iov_base = (uint8_t *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
    }
    return true;
}

static bool send_message(struct connection *c, uint32_t option_ms)
{
    uint8_t *frame = c->out.data, option[OPTION_SIZE];
    store_u32(frame, ++c->last_id);
    store_u32(frame + 4, option_ms ? OPTION_SIZE : 0);
    store_u32(frame + 8, (uint32_t)(c->out.length - HEADER_SIZE));
    store_u32(option, OPTION_DEADLINE << 16 | 4);
    store_u32(option + 4, option_ms);
    struct iovec parts[] = {{frame, HEADER_SIZE}, {option, OPTION_SIZE}, {frame + HEADER_SIZE, c->out.length - HEADER_SIZE}};
    if (option_ms)
        return send_parts(c->fd, parts, 3);
    struct iovec whole = {frame, c->out.length};
    return send_parts(c->fd, &whole, 1);
}

static int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* How long a look is worth while: until the reply should have come, by the replies before it. */
static int64_t patience(const struct connection *c)
{
    int64_t enough = c->usual_ns + c->usual_ns / 4 + LATE_NS;
    return enough < LOOK_NS || enough > MOST_LOOK_NS ? LOOK_NS : enough;
}

/* Looks for the reply a little while before the thread sleeps: on a virtual machine to be woken costs more than a signature.
 * Each look in vain is followed by a longer pause without (a look may be what keeps the module from its work, when both have the
 * same processor).  Returns what recv does, -1 with EAGAIN when nothing came. */
static ssize_t look(struct connection *c)
{
    int64_t until = now_ns() + patience(c);
    do {
        for (int i = 0; i < 8; i++) {
            ssize_t got = recv(c->fd, c->in, c->in_room, MSG_DONTWAIT);
            if (got >= 0 || (errno != EAGAIN && errno != EINTR)) {
                c->vain = 0;
                return got;
            }
        }
    } while (now_ns() < until);
    if (c->vain < MOST_VAIN)
        c->vain++;
    c->look_at_ns = now_ns() + PAUSE_NS * ((1 << c->vain) - 2);
    errno = EAGAIN;
    return -1;
}

/* Over USB it never is: another thread of this process brings the reply, and should have the processor. */
static bool worth_a_look(struct connection *c)
{
    return !c->in_used && c->alone && !c->usb && now_ns() >= c->look_at_ns;
}

/* Sleeps until there is something to receive: false with EAGAIN after the deadline.  Not in recv, which on a unix socket is woken
 * once more for each request, when the module takes it (unix_write_space in the kernel). */
static bool await(const struct connection *c)
{
    struct pollfd poll_in = {.fd = c->fd, .events = POLLIN};
    int timeout = !c->deadline_ms ? -1 : c->deadline_ms > INT_MAX ? INT_MAX : (int)c->deadline_ms, ready;
    do
        ready = poll(&poll_in, 1, timeout);
    while (ready < 0 && errno == EINTR);
    if (!ready)
        errno = EAGAIN;
    return ready > 0;
}

/* Receives more of a reply, as recv does. */
static ssize_t receive(struct connection *c)
{
    if (worth_a_look(c)) {
        ssize_t got = look(c);
        if (got >= 0 || errno != EAGAIN)
            return got;
    }
    ssize_t got;
    if (!await(c))
        return -1;
    do
        got = recv(c->fd, c->in + c->in_used, c->in_room - c->in_used, 0);
    while (got < 0 && errno == EINTR);
    return got;
}

enum exchange connection_exchange(struct connection *c, uint32_t option_ms, struct reader *reply)
{
    if (!send_message(c, option_ms))
        return errno == EAGAIN || errno == EWOULDBLOCK ? EXCHANGE_OVERDUE : EXCHANGE_UNSENT;
    size_t whole = HEADER_SIZE;
    int64_t sent = now_ns();
    c->in_used = 0;
    while (c->in_used < whole) {
        ssize_t got = receive(c);
        if (got <= 0)
            return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? EXCHANGE_OVERDUE : EXCHANGE_LOST;
        c->in_used += (size_t)got;
        if (c->in_used >= HEADER_SIZE && whole == HEADER_SIZE) {
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
    if (c->in_used != whole)
        return EXCHANGE_BROKEN; /* more than was asked for */
    c->usual_ns += (now_ns() - sent - c->usual_ns) / 8;
    *reply = (struct reader){c->in + HEADER_SIZE, whole - HEADER_SIZE, false};
    return EXCHANGE_DONE;
}

void connection_wipe(struct connection *c)
{
    explicit_bzero(c->in, c->in_used);
    if (c->out.data)
        explicit_bzero(c->out.data, c->out.room);
}

CK_RV reply_head(struct reader *reply, uint32_t call)
{
    uint32_t answered = get_u32(reply);
    if (answered == call && !reply->failed)
        return CKR_OK;
    CK_RV rv = answered ? CKR_OK : get_ulong(reply);
    return reply->failed || reply->length || rv == CKR_OK ? CKR_DEVICE_ERROR : rv;
}
