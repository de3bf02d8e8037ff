/* Commands that nobody has to look at, without the interpreter: received, answered by libtpms, sent.
 *
 * Which ones need the interpreter (plain.py): those of codes that it follows, and all whose first handle is the platform's.  What
 * does not come alone and whole goes to it too.  A plain library, which plain.py opens: no Python in it. */
#define _GNU_SOURCE /* RUSAGE_THREAD, sendmmsg */
#include "plain.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD 10 /* bytes: tag, size of all, code */
#define MAX_COMMAND PLAIN_COMMAND
#define MAX_FOLLOWED 16
#define PLATFORM 0x4000000Cu /* TPM_RH_PLATFORM */
#define LOOKS 8
#define SHARED_NS 50000000 /* for so long it sleeps before it looks again */
#define SLEEP_MS 100       /* at once */

struct plain {
    process_fn *process;
    unsigned char *response;
    uint32_t size, room; /* of it */
    uint32_t followed[MAX_FOLLOWED];
    uint32_t followed_count;
    _Atomic int waiting; /* threads */
    uint8_t command[MAX_COMMAND];
    size_t length, sent;
    uint32_t result;
    int wake; /* an eventfd: somebody waits */
    unsigned looks; /* takes since `switches` was read */
    long switches;
    int64_t sleeps_until; /* as `now` has it */
};

struct plain *plain_new(process_fn *process, const uint32_t *followed, uint32_t count)
{
    struct plain *plain = count <= MAX_FOLLOWED ? calloc(1, sizeof *plain) : NULL;
    if (!plain)
        return NULL;
    plain->process = process;
    memcpy(plain->followed, followed, count * sizeof *followed);
    plain->followed_count = count;
    plain->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (plain->wake >= 0)
        return plain;
    free(plain);
    return NULL;
}

/* Its response is libtpms' own memory, made with malloc. */
void plain_free(struct plain *plain)
{
    close(plain->wake);
    free(plain->response);
    free(plain);
}

static uint32_t number(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static bool is_plain(const struct plain *plain)
{
    if (plain->length < HEAD || number(plain->command + 2) != plain->length)
        return false;
    for (uint32_t i = 0; i < plain->followed_count; i++)
        if (number(plain->command + 6) == plain->followed[i])
            return false;
    return plain->length < HEAD + 4 || number(plain->command + HEAD) != PLATFORM;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Of this thread: how often another one has run in its place. */
static long switches(void)
{
    struct rusage used;
    getrusage(RUSAGE_THREAD, &used);
    return used.ru_nvcsw + used.ru_nivcsw;
}

/* To be woken on another processor takes longer than to look for what comes.  But who looks on the processor of who is to send has
 * half of it: so where somebody else ran at each of LOOKS takes, it sleeps for a while. */
static void notice(struct plain *plain, int64_t at)
{
    if (at < plain->sleeps_until) {
        plain->looks = 0;
    } else if (plain->looks == 0) {
        plain->looks = 1;
        plain->switches = switches();
    } else if (plain->looks++ == LOOKS) {
        plain->looks = 0;
        if (switches() - plain->switches >= LOOKS)
            plain->sleeps_until = at + SHARED_NS;
    }
}

static void sleep_until_it_comes(const struct plain *plain, int fd)
{
    struct pollfd coming[] = {{.fd = fd, .events = POLLIN}, {.fd = plain->wake, .events = POLLIN}};
    poll(coming, 2, SLEEP_MS);
}

/* Returns whether something came. */
static bool take(struct plain *plain, int fd, uint8_t *page, int64_t look_ns)
{
    int64_t at = now(), until = at + look_ns;
    bool sleeps = at < plain->sleeps_until;
    do {
        if (sleeps)
            sleep_until_it_comes(plain, fd);
        if (atomic_load(&plain->waiting))
            return false;
        ssize_t got = recv(fd, page, MAX_COMMAND, MSG_DONTWAIT);
        if (got > 0) {
            memcpy(plain->command, page, (size_t)got);
            plain->length = (size_t)got;
            page[0] = 1;
            memset(page + 1, 0, (size_t)got - 1); /* passwords are nobody else's */
            notice(plain, at);
            return true;
        }
        if (got == 0 || errno != EAGAIN)
            return false;
        if (!sleeps)
            sched_yield();
    } while ((at = now()) < until || (sleeps && at < until + SLEEP_MS * 1000000));
    return false;
}

/* Behind the command in a page: what is sent, and how much of it the kernel has sent, which it writes in the system call that sends.
 * Whoever ends this process by a signal does so before both or after both. */
struct sending {
    struct mmsghdr message;
    struct iovec response;
};

_Static_assert(sizeof(struct sending) <= PLAIN_PAGE - PLAIN_COMMAND, "the page has room for it");

/* Says whether somebody waits for the answer to a command that this page's process has taken. */
bool plain_owes(const uint8_t *page)
{
    const struct sending *sending = (const struct sending *)(page + PLAIN_COMMAND);
    size_t size = sending->response.iov_len;
    return page[0] && !(size && sending->message.msg_len == size);
}

/* Sends a response, and notes that nothing is owed any more, or `more`; returns how much of it is sent, and where that is not all
 * nothing is noted. */
size_t plain_send(int fd, uint8_t *page, const uint8_t *response, size_t size, bool more)
{
    struct sending *sending = (struct sending *)(page + PLAIN_COMMAND);
    *sending = (struct sending){.response = {(void *)(uintptr_t)response, size}};
    sending->message.msg_hdr.msg_iov = &sending->response;
    sending->message.msg_hdr.msg_iovlen = 1;
    if (sendmmsg(fd, &sending->message, 1, MSG_DONTWAIT | MSG_NOSIGNAL) != 1)
        return 0;
    size_t sent = sending->message.msg_len;
    if (sent == size) {
        ((volatile uint8_t *)page)[0] = more;
        atomic_signal_fence(memory_order_seq_cst); /* only then is it forgotten that it was sent */
        memset(sending, 0, sizeof *sending);
    }
    return sent;
}

/* `page`: PLAIN_PAGE bytes, which say whether an answer is owed (plain_owes). */
enum outcome plain_serve(struct plain *plain, int fd, uint8_t *page, int64_t look_ns)
{
    while (take(plain, fd, page, look_ns)) {
        if (!is_plain(plain))
            return TAKEN;
        plain->result = plain->process(&plain->response, &plain->size, &plain->room, plain->command, (uint32_t)plain->length);
        if (plain->result)
            return FAULT;
        plain->sent = plain_send(fd, page, plain->response, plain->size, false);
        if (plain->sent != plain->size)
            return UNSENT;
    }
    return NOTHING;
}

const uint8_t *plain_taken(const struct plain *plain, size_t *length)
{
    *length = plain->length;
    return plain->command;
}

const uint8_t *plain_unsent(const struct plain *plain, size_t *length)
{
    *length = plain->size - plain->sent;
    return plain->response + plain->sent;
}

uint32_t plain_result(const struct plain *plain)
{
    return plain->result;
}

/* Answers a command that the interpreter has looked at. */
const uint8_t *plain_answer(struct plain *plain, unsigned char *command, uint32_t length, uint32_t *size)
{
    plain->result = plain->process(&plain->response, &plain->size, &plain->room, command, length);
    *size = plain->size;
    return plain->result ? NULL : plain->response;
}

/* `more`: 1, a thread that waits; -1, that has waited. */
void plain_wait(struct plain *plain, int more)
{
    uint64_t one = 1;
    ssize_t ignored = 0;
    int before = atomic_fetch_add(&plain->waiting, more);
    if (more > 0 && before == 0)
        ignored = write(plain->wake, &one, sizeof one);
    else if (more < 0 && before == 1)
        ignored = read(plain->wake, &one, sizeof one);
    (void)ignored;
}

/* ---- what libtpms asks at each command, or at each start (tpm_library.h) ------------------------------------------------- */

uint32_t plain_locality;

uint32_t plain_nothing(void)
{
    return 0;
}

uint32_t plain_forget(uint32_t tpm, const char *name, unsigned char must_exist)
{
    (void)tpm, (void)name, (void)must_exist;
    return 0;
}

uint32_t plain_tell_locality(uint32_t *locality, uint32_t tpm)
{
    (void)tpm;
    *locality = plain_locality;
    return 0;
}

uint32_t plain_tell_presence(unsigned char *present, uint32_t tpm)
{
    (void)tpm;
    *present = 0;
    return 0;
}
