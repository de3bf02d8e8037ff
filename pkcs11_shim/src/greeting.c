#include "greeting.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "calls.h"
#include "diagnostics.h"
#include "session.h"

#define TICKET_SIZE 16u
#define MOST_CONNECTIONS 64u

enum mode { MODE_NEW, MODE_JOIN, MODE_FORK, MODE_RESUME };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;     /* of the ticket; held for no longer than a copy */
static pthread_mutex_t renewing = PTHREAD_MUTEX_INITIALIZER; /* one thread at a time makes a new application on the module */
static uint8_t ticket[TICKET_SIZE];
static bool ticket_valid;
static _Atomic unsigned current;
static _Atomic uint64_t watermark;
static _Atomic unsigned most = MOST_CONNECTIONS;
static _Atomic uint32_t largest = LEAST_REQUEST;

void greeting_lock(void)
{
    pthread_mutex_lock(&lock);
}

void greeting_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void greeting_child(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&renewing, NULL);
    current = 0; /* the parent's application; its ticket stays, for MODE_FORK */
}

unsigned incarnation(void)
{
    return current;
}

void saw_watermark(uint64_t seen)
{
    uint64_t known = watermark;
    while (known < seen && !atomic_compare_exchange_weak(&watermark, &known, seen))
        ;
}

unsigned most_connections(void)
{
    return most;
}

uint32_t largest_request(void)
{
    return largest;
}

void forget_ticket(void)
{
    pthread_mutex_lock(&lock);
    ticket_valid = false;
    pthread_mutex_unlock(&lock);
    current = 0;
    watermark = 0;
}

struct answer {
    uint8_t ticket[TICKET_SIZE];
    bool joined;
    uint64_t watermark;
};

static CK_RV hello(struct connection *c, enum mode mode, struct answer *answer)
{
    uint8_t own[TICKET_SIZE];
    pthread_mutex_lock(&lock);
    bool tell = ticket_valid && mode != MODE_NEW;
    memcpy(own, ticket, sizeof own);
    pthread_mutex_unlock(&lock);
    connection_begin(c, CALL_HELLO);
    put_u8(&c->out, sizeof(CK_ULONG));
    put_u8(&c->out, (uint8_t)mode);
    put_bytes(&c->out, tell ? own : NULL, tell ? sizeof own : 0);
    put_u64(&c->out, mode == MODE_NEW ? 0 : watermark);
    put_text(&c->out, program_invocation_short_name, strnlen(program_invocation_short_name, 64));
    put_u64(&c->out, (uint64_t)getpid());
    struct reader reply;
    if (connection_exchange(c, 0, &reply) != EXCHANGE_DONE)
        return CKR_DEVICE_ERROR;
    CK_RV rv = reply_head(&reply, CALL_HELLO);
    if (rv != CKR_OK)
        return rv;
    bool valid = get_u8(&reply);
    const uint8_t *given = get_raw(&reply, get_u32(&reply) == TICKET_SIZE ? TICKET_SIZE : SIZE_MAX);
    answer->joined = get_u8(&reply);
    get_u64(&reply); /* epoch: `joined` says as much */
    answer->watermark = get_u64(&reply);
    uint64_t message = get_u64(&reply);
    uint64_t connections = get_u64(&reply);
    if (reply.failed || reply.length || !valid || !given)
        return CKR_DEVICE_ERROR;
    memcpy(answer->ticket, given, TICKET_SIZE);
    largest = message < LEAST_REQUEST ? LEAST_REQUEST : message < MAX_REQUEST ? (uint32_t)message : MAX_REQUEST;
    most = connections && connections < MOST_CONNECTIONS ? (unsigned)connections : MOST_CONNECTIONS;
    return CKR_OK;
}

/* Opens this application's sessions in a new one on the module; those that it refuses are closed. */
static CK_RV restore_sessions(struct connection *c, unsigned next)
{
    connection_begin(c, CALL_RESTORE_SESSIONS);
    size_t start = c->out.length;
    uint32_t count = sessions_write(&c->out, next);
    if (!count)
        return CKR_OK;
    struct reader reply, told = {c->out.data + start, c->out.length - start, c->out.failed};
    if (c->out.failed || connection_exchange(c, 0, &reply) != EXCHANGE_DONE)
        return CKR_DEVICE_ERROR;
    CK_RV rv = reply_head(&reply, CALL_RESTORE_SESSIONS);
    if (rv != CKR_OK)
        return rv;
    bool valid = get_u8(&reply);
    if (get_u32(&reply) != count || !valid)
        return CKR_DEVICE_ERROR;
    get_u8(&told);
    get_u32(&told);
    uint32_t refused = 0;
    for (uint32_t i = 0; i < count && !reply.failed; i++) {
        CK_SESSION_HANDLE handle = get_ulong(&told);
        get_u64(&told);
        get_u64(&told);
        struct session *s = get_u64(&reply) ? session_find(handle) : NULL;
        if (s) {
            session_remove(s);
            refused++;
        }
    }
    if (reply.failed || reply.length)
        return CKR_DEVICE_ERROR;
    diagnose("restored %u sessions, %u were refused", count - refused, refused);
    return CKR_OK;
}

/* The ticket is this process's only once the sessions are restored: no other connection joins before. */
static CK_RV renew(struct connection *c, enum mode mode)
{
    struct answer answer;
    CK_RV rv = hello(c, mode, &answer);
    if (rv != CKR_OK)
        return rv;
    if (!answer.joined) {
        rv = restore_sessions(c, current + 1);
        if (rv != CKR_OK)
            return rv;
        pthread_mutex_lock(&lock);
        memcpy(ticket, answer.ticket, TICKET_SIZE);
        ticket_valid = true;
        pthread_mutex_unlock(&lock);
        if (mode == MODE_NEW || mode == MODE_FORK)
            watermark = answer.watermark;
        current = current + 1;
    }
    c->incarnation = current;
    return CKR_OK;
}

static CK_RV join(struct connection *c, unsigned to)
{
    struct answer answer;
    CK_RV rv = hello(c, MODE_JOIN, &answer);
    if (rv == CKR_OK)
        c->incarnation = to;
    return rv;
}

CK_RV greet(struct connection *c)
{
    unsigned before = current;
    if (before && c->incarnation != before) { /* a new connection, or one from before the last reconnect */
        CK_RV rv = join(c, before);
        if (rv != CKR_SESSION_CLOSED)
            return rv;
    }
    pthread_mutex_lock(&renewing);
    CK_RV rv;
    if (current != before) /* another thread was faster */
        rv = join(c, current);
    else if (before)
        rv = renew(c, MODE_RESUME);
    else
        rv = renew(c, ticket_valid ? MODE_FORK : MODE_NEW); /* before its first greeting only a child has a ticket: its parent's */
    pthread_mutex_unlock(&renewing);
    return rv;
}
