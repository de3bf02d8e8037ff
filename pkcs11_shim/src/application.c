#include "application.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"
#include "diagnostics.h"
#include "session.h"

#define TICKET_SIZE 16u
#define MOST_CONNECTIONS 64u
#define HOT_PAUSE_MS 2u   /* between attempts to reconnect: at first, then doubled */
#define LONG_PAUSE_MS 200u
#define GREET_MS 3000u    /* for the first contact, so that an absent module delays nobody for long */

enum mode { MODE_NEW, MODE_JOIN, MODE_FORK, MODE_RESUME };
enum state { CLOSED, OPEN, CLOSING, FORKED };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;       /* a connection came back, or the state changed */
    pthread_mutex_t greeting;     /* one thread at a time makes a new application on the module */
    _Atomic int state; /* enum state */
    struct address address;
    struct connection *idle, *all;
    unsigned count, most, busy;
    uint8_t ticket[TICKET_SIZE];
    bool have_ticket;
    unsigned incarnation;         /* how many applications on the module this process has been */
    uint64_t watermark;
} app = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .greeting = PTHREAD_MUTEX_INITIALIZER};

/* ---- fork ---- */

static void before_fork(void)
{
    pthread_mutex_lock(&app.lock);
    sessions_lock();
}

static void after_fork_parent(void)
{
    sessions_unlock();
    pthread_mutex_unlock(&app.lock);
}

static void after_fork_child(void)
{
    pthread_mutex_init(&app.lock, NULL);
    pthread_cond_init(&app.changed, NULL);
    pthread_mutex_init(&app.greeting, NULL);
    sessions_child();
    if (app.state != CLOSED)
        app.state = FORKED;
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* Closes every connection; sends nothing, so that a parent's application is not touched. */
static void drop_connections(void)
{
    while (app.all) {
        struct connection *c = app.all;
        app.all = c->next_of_all;
        connection_free(c);
    }
    app.idle = NULL;
    app.count = app.busy = 0;
}

/* ---- greeting ---- */

static CK_RV hello(struct connection *c, enum mode mode)
{
    char program[64] = "";
    strncpy(program, program_invocation_short_name, sizeof program - 1);
    connection_begin(c, CALL_HELLO);
    put_u8(&c->out, sizeof(CK_ULONG));
    put_u8(&c->out, (uint8_t)mode);
    put_bytes(&c->out, app.have_ticket && mode != MODE_NEW ? app.ticket : NULL, app.have_ticket && mode != MODE_NEW ? TICKET_SIZE : 0);
    put_u64(&c->out, mode == MODE_NEW ? 0 : app.watermark);
    put_text(&c->out, program, strlen(program));
    put_u64(&c->out, (uint64_t)getpid());
    struct reader reply;
    if (connection_exchange(c, 0, &reply) != EXCHANGE_DONE)
        return CKR_DEVICE_ERROR;
    CK_RV rv = reply_head(&reply, CALL_HELLO);
    if (rv != CKR_OK)
        return rv;
    bool valid = get_u8(&reply);
    const uint8_t *ticket = get_raw(&reply, get_u32(&reply) == TICKET_SIZE ? TICKET_SIZE : SIZE_MAX);
    bool joined = get_u8(&reply);
    get_u64(&reply); /* epoch: the ticket says as much */
    uint64_t watermark = get_u64(&reply);
    get_u64(&reply); /* the module's largest message: ours are smaller */
    uint64_t most = get_u64(&reply);
    if (reply.failed || !valid)
        return CKR_DEVICE_ERROR;
    pthread_mutex_lock(&app.lock);
    app.watermark = watermark;
    app.most = most && most < MOST_CONNECTIONS ? (unsigned)most : MOST_CONNECTIONS;
    if (!joined) {
        memcpy(app.ticket, ticket, TICKET_SIZE);
        app.have_ticket = true;
        app.incarnation++;
    }
    c->incarnation = app.incarnation;
    pthread_mutex_unlock(&app.lock);
    return joined ? CKR_OK : CKR_SESSION_CLOSED; /* the caller restores sessions into a new application */
}

static CK_RV restore_sessions(struct connection *c)
{
    uint32_t count = 0;
    sessions_lock();
    for (struct session *s = sessions_first(); s; s = sessions_next(s)) {
        session_interrupted(s);
        count += 3;
    }
    connection_begin(c, CALL_RESTORE_SESSIONS);
    put_u8(&c->out, 1);
    put_u32(&c->out, count);
    for (struct session *s = sessions_first(); s; s = sessions_next(s)) {
        put_ulong(&c->out, s->handle);
        put_ulong(&c->out, s->slot);
        put_ulong(&c->out, s->flags);
    }
    sessions_unlock();
    if (!count)
        return CKR_OK;
    struct reader reply;
    if (c->out.failed || connection_exchange(c, 0, &reply) != EXCHANGE_DONE)
        return CKR_DEVICE_ERROR;
    diagnose("restored %u sessions", count / 3);
    return reply_head(&reply, CALL_RESTORE_SESSIONS);
}

/* Connects `c` and makes it part of this application: joins, or begins anew and restores the sessions. */
static bool attach(struct connection *c, enum mode first, unsigned deadline_ms)
{
    unsigned seen = c->incarnation;
    if (!connection_open(c, &app.address, deadline_ms))
        return false;
    CK_RV rv = CKR_SESSION_CLOSED;
    pthread_mutex_lock(&app.greeting);
    if (first == MODE_JOIN && seen != app.incarnation) /* the application has gone on since this connection was made */
        rv = hello(c, MODE_JOIN);
    if (rv == CKR_SESSION_CLOSED) {
        enum mode mode = first == MODE_JOIN ? MODE_RESUME : first;
        rv = hello(c, mode);
        if (rv == CKR_SESSION_CLOSED)
            rv = restore_sessions(c);
    }
    pthread_mutex_unlock(&app.greeting);
    if (rv != CKR_OK) {
        connection_close(c);
        errno = rv == CKR_HOST_MEMORY ? EUSERS : EPROTO;
    }
    return rv == CKR_OK;
}

static void pause_ms(unsigned ms)
{
    struct timespec time = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&time, NULL);
}

static bool reattach(struct connection *c)
{
    unsigned waited = 0, pause = HOT_PAUSE_MS;
    while (!attach(c, MODE_JOIN, app.address.deadline_ms)) {
        if (waited >= app.address.reconnect_ms || app.state != OPEN) {
            diagnose("no connection to %s: %s", app.address.text, strerror(errno));
            return false;
        }
        if (!waited)
            diagnose("connection to %s lost: trying again", app.address.text);
        pause_ms(pause);
        waited += pause;
        pause = pause * 2 > LONG_PAUSE_MS ? LONG_PAUSE_MS : pause * 2;
    }
    return true;
}

/* ---- initialise, finalise ---- */

static struct connection *new_connection(void)
{
    struct connection *c = calloc(1, sizeof *c);
    if (c) {
        c->fd = -1;
        c->next_of_all = app.all;
        app.all = c;
        app.count++;
    }
    return c;
}

CK_RV application_initialize(void)
{
    pthread_mutex_lock(&app.lock);
    if (app.state == OPEN || app.state == CLOSING) {
        pthread_mutex_unlock(&app.lock);
        return CKR_CRYPTOKI_ALREADY_INITIALIZED;
    }
    diagnostics_open();
    drop_connections();
    sessions_clear(0, true);
    proofs_clear();
    if (!address_find(&app.address)) {
        diagnose("%s", app.address.text);
        pthread_mutex_unlock(&app.lock);
        return CKR_GENERAL_ERROR;
    }
    enum mode mode = app.have_ticket ? MODE_FORK : MODE_NEW; /* only a child has its parent's ticket */
    app.most = MOST_CONNECTIONS;
    app.state = OPEN;
    struct connection *c = new_connection();
    pthread_mutex_unlock(&app.lock);
    if (!c)
        return CKR_HOST_MEMORY;
    /* An absent module is no error: an application with several tokens must not lose the others.  The slot list stays empty until it is
     * there. */
    if (!attach(c, mode, GREET_MS))
        diagnose("the module at %s is not there: %s; its slot appears when it is", app.address.text, strerror(errno));
    else
        diagnose("connected to %s", app.address.text);
    pthread_mutex_lock(&app.lock);
    c->next = app.idle;
    app.idle = c;
    pthread_mutex_unlock(&app.lock);
    return CKR_OK;
}

CK_RV application_finalize(void)
{
    pthread_mutex_lock(&app.lock);
    if (app.state == CLOSED || app.state == CLOSING) {
        pthread_mutex_unlock(&app.lock);
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    }
    bool child = app.state == FORKED;
    if (!child) {
        app.state = CLOSING;
        for (struct connection *c = app.all; c; c = c->next_of_all)
            if (c->fd >= 0)
                shutdown(c->fd, SHUT_RDWR); /* ends calls that wait; the module ends the application with its last connection */
        pthread_cond_broadcast(&app.changed);
        while (app.busy)
            pthread_cond_wait(&app.changed, &app.lock);
        app.have_ticket = false;
        app.incarnation = 0;
        app.watermark = 0;
    }
    drop_connections();
    sessions_clear(0, true);
    proofs_clear();
    app.state = CLOSED;
    pthread_mutex_unlock(&app.lock);
    diagnostics_close();
    return CKR_OK;
}

__attribute__((destructor)) static void unload(void)
{
    if (app.state == OPEN || app.state == FORKED) {
        drop_connections();
        diagnostics_close();
    }
}

CK_RV application_check(void)
{
    return app.state == OPEN ? CKR_OK : CKR_CRYPTOKI_NOT_INITIALIZED;
}

bool application_connected(void)
{
    return app.incarnation != 0;
}

/* ---- calls ---- */

static struct connection *take(void)
{
    pthread_mutex_lock(&app.lock);
    struct connection *c = NULL;
    while (app.state == OPEN && !(c = app.idle)) {
        if (app.count < app.most) {
            c = new_connection();
            break;
        }
        pthread_cond_wait(&app.changed, &app.lock);
    }
    if (c && app.state == OPEN) {
        if (c == app.idle)
            app.idle = c->next;
        app.busy++;
        c->alone = app.busy == 1;
    } else {
        c = NULL;
    }
    pthread_mutex_unlock(&app.lock);
    return c;
}

static void give(struct connection *c)
{
    pthread_mutex_lock(&app.lock);
    c->next = app.idle;
    app.idle = c;
    app.busy--;
    pthread_cond_broadcast(&app.changed);
    pthread_mutex_unlock(&app.lock);
}

CK_RV call_begin(struct call *call, uint32_t id)
{
    call->connection = app.state == OPEN ? take() : NULL;
    call->id = id;
    call->reply = (struct reader){NULL, 0, false};
    if (!call->connection)
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    call->out = &call->connection->out;
    connection_begin(call->connection, id);
    return CKR_OK;
}

/* The message of a call is kept while its connection greets anew. */
static bool reattach_keeping(struct connection *c)
{
    struct writer message = c->out;
    c->out = (struct writer){0};
    bool good = reattach(c);
    free(c->out.data);
    c->out = message;
    return good;
}

CK_RV call_run(struct call *call, enum replay replay)
{
    struct connection *c = call->connection;
    if (c->out.failed)
        return CKR_ARGUMENTS_BAD; /* a count or length past what a message may hold */
    bool sent = false;
    for (;;) {
        if (c->fd < 0 && !reattach_keeping(c))
            return app.state == OPEN ? CKR_DEVICE_ERROR : CKR_CRYPTOKI_NOT_INITIALIZED;
        if (sent && replay == ONCE_ONLY)
            return CKR_DEVICE_ERROR;
        switch (connection_exchange(c, 0, &call->reply)) {
        case EXCHANGE_DONE:
            return reply_head(&call->reply, call->id);
        case EXCHANGE_LOST:
            sent = true;
            connection_close(c);
            if (app.state != OPEN)
                return CKR_CRYPTOKI_NOT_INITIALIZED;
            break;
        case EXCHANGE_OVERDUE:
            diagnose("call %u: no answer within %u ms", call->id, app.address.deadline_ms);
            connection_close(c);
            return CKR_DEVICE_ERROR;
        case EXCHANGE_BROKEN:
            diagnose("call %u: the answer is malformed", call->id);
            connection_close(c);
            return CKR_DEVICE_ERROR;
        }
    }
}

CK_RV call_end(struct call *call, CK_RV rv)
{
    if (!call->connection)
        return rv;
    if (call->reply.failed || (rv == CKR_OK && call->reply.length)) {
        diagnose("call %u: the answer does not have the form that it should", call->id);
        connection_close(call->connection);
        rv = CKR_DEVICE_ERROR;
    }
    if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL && diagnostics_on())
        diagnose("call %u: 0x%lx", call->id, rv);
    give(call->connection);
    call->connection = NULL;
    return rv;
}

CK_RV call_parked(uint32_t id, CK_ULONG field, CK_ULONG timeout_ms, CK_ULONG *result)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    pthread_mutex_lock(&app.lock);
    struct connection *c = new_connection();
    if (c)
        app.busy++;
    pthread_mutex_unlock(&app.lock);
    if (!c)
        return CKR_HOST_MEMORY;
    rv = CKR_DEVICE_ERROR;
    while (app.state == OPEN && reattach(c)) {
        struct timeval forever = {0, 0};
        setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
        connection_begin(c, id);
        put_ulong(&c->out, field);
        struct reader reply;
        enum exchange exchange = connection_exchange(c, timeout_ms > UINT32_MAX ? UINT32_MAX : (uint32_t)timeout_ms, &reply);
        if (exchange == EXCHANGE_LOST) {
            connection_close(c);
            continue;
        }
        if (exchange == EXCHANGE_DONE && (rv = reply_head(&reply, id)) == CKR_OK) {
            *result = get_ulong(&reply);
            if (reply.failed || reply.length)
                rv = CKR_DEVICE_ERROR;
        }
        break;
    }
    if (app.state != OPEN)
        rv = CKR_CRYPTOKI_NOT_INITIALIZED;
    pthread_mutex_lock(&app.lock);
    for (struct connection **at = &app.all; *at; at = &(*at)->next_of_all)
        if (*at == c) {
            *at = c->next_of_all;
            break;
        }
    app.count--;
    app.busy--;
    pthread_cond_broadcast(&app.changed);
    pthread_mutex_unlock(&app.lock);
    connection_free(c);
    return rv;
}
