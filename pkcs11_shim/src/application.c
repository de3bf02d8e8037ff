#include "application.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "descriptors.h"
#include "diagnostics.h"
#include "greeting.h"
#include "names.h"
#include "session.h"
#include "usb.h"
#include "usb_library.h"

#define FIRST_PAUSE_MS 2u  /* between attempts to reconnect: at first, then doubled */
#define LONG_PAUSE_MS 200u
#define GREET_MS 3000u     /* for a greeting, so that a module that hangs delays nobody for long */
#define FULL_PAUSE_MS 1000 /* after the module refused one more connection */

enum state { CLOSED, OPENING, OPEN, CLOSING, FORKED };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a connection came back, or the state changed */
    unsigned waiting;       /* for `changed` */
    _Atomic int state;      /* enum state */
    struct address address;
    struct connection *idle, *all;
    unsigned pooled, apart, busy; /* `pooled` counts `idle` and those in use, `apart` those for calls that wait */
    int64_t full_until;     /* no connection is added before */
} app = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int64_t now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static void make_condition(void)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&app.changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* ---- fork: the locks are held over it, so that a child finds nothing half done ---- */

static void before_fork(void)
{
    pthread_mutex_lock(&app.lock);
    greeting_lock();
    sessions_lock();
    usb_library_lock();
    descriptors_lock();
}

static void after_fork_parent(void)
{
    descriptors_unlock();
    usb_library_unlock();
    sessions_unlock();
    greeting_unlock();
    pthread_mutex_unlock(&app.lock);
}

static void after_fork_child(void)
{
    pthread_mutex_init(&app.lock, NULL);
    make_condition();
    app.waiting = 0;
    greeting_child();
    descriptors_child();
    usb_library_child();
    usb_child();
    sessions_child();
    proofs_child();
    if (app.state != CLOSED)
        app.state = FORKED;
}

/* ---- the list of all connections ---- */

static void unlist(struct connection *c)
{
    struct connection **at = &app.all;
    while (*at && *at != c)
        at = &(*at)->next_of_all;
    if (*at)
        *at = c->next_of_all;
}

static struct connection *list(void)
{
    struct connection *c = connection_new();
    if (c) {
        c->next_of_all = app.all;
        app.all = c;
    }
    return c;
}

static void drop_idle(void)
{
    while (app.idle) {
        struct connection *c = app.idle;
        app.idle = c->next;
        unlist(c);
        connection_free(c);
    }
}

/* Closes every connection and sends nothing, so that a parent's application is not touched.  In a child those that were in use at the
 * fork lose their descriptor alone: their memory may be half changed. */
static void drop_all(void)
{
    drop_idle();
    for (; app.all; app.all = app.all->next_of_all)
        connection_close(app.all);
    app.pooled = app.apart = app.busy = 0;
}

static void wake(void)
{
    if (app.waiting)
        pthread_cond_broadcast(&app.changed);
}

static void wait_change(void)
{
    app.waiting++;
    pthread_cond_wait(&app.changed, &app.lock);
    app.waiting--;
}

/* The same for no longer than until `until_ms` of now_ms; false then. */
static bool wait_change_until(int64_t until_ms)
{
    struct timespec time = {until_ms / 1000, until_ms % 1000 * 1000000};
    app.waiting++;
    bool changed = pthread_cond_timedwait(&app.changed, &app.lock, &time) != ETIMEDOUT;
    app.waiting--;
    return changed;
}

const struct slots *application_slots(void)
{
    return &app.address.slots;
}

/* ---- attach ---- */

static CK_RV attach_once(struct connection *c)
{
    if (!connection_open(c, &app.address, GREET_MS < app.address.deadline_ms ? GREET_MS : app.address.deadline_ms))
        return CKR_DEVICE_ERROR;
    CK_RV rv = greet(c);
    if (rv == CKR_OK) {
        connection_deadline(c, app.address.deadline_ms);
        return CKR_OK;
    }
    diagnose("the module does not take this connection: %s", rv_name(rv));
    connection_close(c);
    connection_failed(c, EPROTO);
    return rv;
}

CK_RV application_attach(struct connection *c)
{
    unsigned pause = FIRST_PAUSE_MS;
    int64_t until = now_ms() + (incarnation() ? app.address.reconnect_ms : 0);
    for (bool told = false;; told = true) {
        CK_RV rv = attach_once(c);
        if (rv == CKR_OK || rv == CKR_HOST_MEMORY)
            return rv;
        if (!told)
            diagnose("no connection to %s: %s", app.address.text, c->why);
        if (now_ms() >= until || !application_pause(pause)) {
            diagnose("gave up on %s: %s", app.address.text, c->why);
            return CKR_DEVICE_ERROR;
        }
        pause = pause * 2 > LONG_PAUSE_MS ? LONG_PAUSE_MS : pause * 2;
    }
}

bool application_pause(unsigned ms)
{
    int64_t until = now_ms() + ms;
    pthread_mutex_lock(&app.lock);
    while (app.state == OPEN && wait_change_until(until))
        ;
    bool open = app.state == OPEN;
    pthread_mutex_unlock(&app.lock);
    return open;
}

/* ---- the pool ---- */

/* With app.lock held.  A thread's own one, if it is idle: a module serves equal requests that follow one another on a connection faster.
 * Else the one that was used last: its memory is warm. */
static struct connection *take_idle(void)
{
    struct connection **best = &app.idle;
    for (struct connection **at = &app.idle; *at; at = &(*at)->next) {
        if (pthread_equal((*at)->user, pthread_self())) {
            best = at;
            break;
        }
    }
    struct connection *c = *best;
    if (c)
        *best = c->next;
    return c;
}

/* A channel of a USB device is a process's alone, and there are 12 for all: one for calls, so that they queue, and one for a call that
 * waits. */
static unsigned most_pooled(void)
{
    return app.address.usb ? 1 : most_connections();
}

static bool room_apart(void)
{
    return !app.address.usb || !app.apart;
}

/* With app.lock held. */
static CK_RV take(struct connection **c)
{
    for (;;) {
        if (app.state != OPEN)
            return CKR_CRYPTOKI_NOT_INITIALIZED;
        *c = take_idle();
        if (*c)
            break;
        if (!app.pooled || (app.pooled < most_pooled() && now_ms() >= app.full_until)) {
            *c = list();
            if (!*c)
                return CKR_HOST_MEMORY;
            app.pooled++;
            break;
        }
        wait_change();
    }
    app.busy++;
    (*c)->alone = app.busy == 1;
    (*c)->user = pthread_self();
    return CKR_OK;
}

CK_RV application_take(struct connection **c)
{
    pthread_mutex_lock(&app.lock);
    CK_RV rv = take(c);
    pthread_mutex_unlock(&app.lock);
    return rv;
}

void application_give(struct connection *c)
{
    pthread_mutex_lock(&app.lock);
    c->next = app.idle;
    app.idle = c;
    app.busy--;
    wake();
    pthread_mutex_unlock(&app.lock);
}

CK_RV application_take_apart(struct connection **c, CK_ULONG *timeout_ms)
{
    CK_RV rv = CKR_OK;
    int64_t began = now_ms(), until = *timeout_ms && *timeout_ms < UINT32_MAX ? began + (int64_t)*timeout_ms : INT64_MAX;
    pthread_mutex_lock(&app.lock);
    *c = NULL;
    while (app.state == OPEN && !room_apart() && wait_change_until(until))
        ;
    CK_ULONG waited = (CK_ULONG)(now_ms() - began);
    if (app.state != OPEN)
        rv = CKR_CRYPTOKI_NOT_INITIALIZED;
    else if (!room_apart())
        rv = CKR_FUNCTION_CANCELED;
    else if (!(*c = list()))
        rv = CKR_HOST_MEMORY;
    else
        app.apart++;
    pthread_mutex_unlock(&app.lock);
    if (*timeout_ms)
        *timeout_ms -= waited < *timeout_ms ? waited : *timeout_ms - 1;
    return rv;
}

void application_drop(struct connection *c)
{
    pthread_mutex_lock(&app.lock);
    unlist(c);
    connection_free(c);
    app.apart--;
    wake();
    pthread_mutex_unlock(&app.lock);
}

bool application_exchange(struct connection **c)
{
    bool good = false;
    pthread_mutex_lock(&app.lock);
    if (app.pooled > 1) {
        struct connection *old = *c, *other;
        unlist(old);
        app.pooled--;
        app.busy--;
        app.full_until = now_ms() + FULL_PAUSE_MS;
        good = take(&other) == CKR_OK;
        if (good) {
            struct writer message = old->out;
            old->out = other->out;
            other->out = message;
            *c = other;
        } else {
            *c = NULL;
        }
        connection_free(old);
        wake();
    }
    pthread_mutex_unlock(&app.lock);
    return good;
}

/* ---- initialise, finalise ---- */

/* An absent module is no error: an application with several tokens must not lose the others.  The slot list stays empty until it is
 * there. */
static void first_contact(struct connection *c)
{
    if (attach_once(c) == CKR_OK)
        diagnose("connected to %s", app.address.text);
    else
        diagnose("the module at %s is not there (%s): the list of slots is empty until it is", app.address.text, c->why);
}

CK_RV application_initialize(bool threads)
{
    pthread_mutex_lock(&app.lock);
    while (app.state == OPENING || app.state == CLOSING) /* another library of this process is at it */
        wait_change();
    if (app.state == OPEN) {
        pthread_mutex_unlock(&app.lock);
        return CKR_CRYPTOKI_ALREADY_INITIALIZED;
    }
    diagnostics_open();
    drop_all();
    if (!address_find(&app.address)) {
        diagnose("%s", app.address.text);
        pthread_mutex_unlock(&app.lock);
        return CKR_GENERAL_ERROR;
    }
    if (app.address.usb && !threads) {
        diagnose("%s needs a thread, and the application allows none", app.address.text);
        pthread_mutex_unlock(&app.lock);
        return CKR_NEED_TO_CREATE_THREADS;
    }
    sessions_clear(0, true);
    proofs_clear();
    descriptors_start();
    app.full_until = 0;
    struct connection *c = list();
    if (!c) {
        pthread_mutex_unlock(&app.lock);
        return CKR_HOST_MEMORY;
    }
    app.pooled = app.busy = 1;
    app.state = OPENING;
    pthread_mutex_unlock(&app.lock);
    first_contact(c);
    pthread_mutex_lock(&app.lock);
    app.state = OPEN;
    pthread_mutex_unlock(&app.lock);
    application_give(c);
    return CKR_OK;
}

CK_RV application_finalize(void)
{
    pthread_mutex_lock(&app.lock);
    if (app.state != OPEN && app.state != FORKED) {
        pthread_mutex_unlock(&app.lock);
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    }
    if (app.state == OPEN) {
        app.state = CLOSING;
        descriptors_stop();
        for (struct connection *c = app.all; c; c = c->next_of_all)
            connection_interrupt(c); /* ends calls that wait; the module ends the application with its last connection */
        pthread_cond_broadcast(&app.changed);
        while (app.busy || app.apart)
            wait_change();
        forget_ticket();
    }
    drop_all();
    sessions_clear(0, true);
    proofs_clear();
    diagnostics_close();
    app.state = CLOSED;
    wake();
    pthread_mutex_unlock(&app.lock);
    return CKR_OK;
}

CK_RV application_check(void)
{
    return app.state == OPEN ? CKR_OK : CKR_CRYPTOKI_NOT_INITIALIZED;
}

/* ---- the library's own beginning and end ---- */

__attribute__((constructor)) static void load(void)
{
    make_condition();
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* dlclose, or the end of the program, without C_Finalize.  Other threads may still be in calls: what they use is left to them. */
__attribute__((destructor)) static void unload(void)
{
    if (pthread_mutex_trylock(&app.lock))
        return;
    drop_idle();
    app.pooled = app.busy;
    if (app.state == FORKED)
        drop_all();
    if (!app.busy && !app.apart)
        usb_unload();
    pthread_mutex_unlock(&app.lock);
}
