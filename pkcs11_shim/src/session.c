#include "session.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 1024u
#define PROOFS 128u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct session *buckets[BUCKETS]; /* closed sessions stay in their bucket and are used again */

struct proof {
    enum operation kind;
    CK_OBJECT_HANDLE key;
    CK_ULONG output_size;
    uint32_t length; /* 0 = empty */
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
};
static pthread_mutex_t proof_lock = PTHREAD_MUTEX_INITIALIZER;
static struct proof proofs[PROOFS];

void sessions_lock(void)
{
    pthread_mutex_lock(&lock);
}

void sessions_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

struct session *session_find(CK_SESSION_HANDLE handle)
{
    pthread_mutex_lock(&lock);
    struct session *s = buckets[handle % BUCKETS];
    while (s && !(s->open && s->handle == handle))
        s = s->next;
    pthread_mutex_unlock(&lock);
    return s;
}

struct session *session_add(CK_SESSION_HANDLE handle, CK_SLOT_ID slot, CK_FLAGS flags)
{
    pthread_mutex_lock(&lock);
    struct session **bucket = &buckets[handle % BUCKETS], *s = *bucket;
    while (s && s->open)
        s = s->next;
    if (!s) {
        s = calloc(1, sizeof *s);
        if (s) {
            s->next = *bucket;
            *bucket = s;
        }
    }
    if (s) {
        struct session *next = s->next;
        CK_OBJECT_HANDLE *found = s->found;
        memset(s, 0, sizeof *s);
        s->next = next;
        free(found);
        s->handle = handle;
        s->slot = slot;
        s->flags = flags;
        s->open = true;
    }
    pthread_mutex_unlock(&lock);
    return s;
}

void session_remove(struct session *s)
{
    pthread_mutex_lock(&lock);
    s->open = false;
    pthread_mutex_unlock(&lock);
}

void sessions_clear(CK_SLOT_ID slot, bool all)
{
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct session *s = buckets[i]; s; s = s->next)
            if (all || s->slot == slot)
                s->open = false;
    pthread_mutex_unlock(&lock);
}

static struct session *from(unsigned bucket, struct session *s)
{
    for (;;) {
        while (s && !s->open)
            s = s->next;
        if (s || ++bucket == BUCKETS)
            return s;
        s = buckets[bucket];
    }
}

struct session *sessions_first(void)
{
    return from(0, buckets[0]);
}

struct session *sessions_next(struct session *s)
{
    return from((unsigned)(s->handle % BUCKETS), s->next);
}

void session_interrupted(struct session *s)
{
    s->lost |= s->active;
    s->active = 0;
}

void sessions_child(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&proof_lock, NULL);
    sessions_clear(0, true);
}

static struct proof *proof_slot(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length)
{
    uint64_t hash = 1469598103934665603u ^ kind ^ (key << 8);
    for (uint32_t i = 0; i < length; i++)
        hash = (hash ^ mechanism[i]) * 1099511628211u;
    return &proofs[(hash ^ hash >> 32) % PROOFS];
}

static bool proves(const struct proof *p, enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length)
{
    return p->length == length && p->kind == kind && p->key == key && !memcmp(p->mechanism, mechanism, length);
}

bool proof_find(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG *output_size)
{
    if (!length || length > MAX_PROVEN_MECHANISM)
        return false;
    const struct proof *p = proof_slot(kind, key, mechanism, length);
    pthread_mutex_lock(&proof_lock);
    bool found = proves(p, kind, key, mechanism, length);
    *output_size = found ? p->output_size : 0;
    pthread_mutex_unlock(&proof_lock);
    return found;
}

void proof_add(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG output_size)
{
    if (!length || length > MAX_PROVEN_MECHANISM)
        return;
    struct proof *p = proof_slot(kind, key, mechanism, length);
    pthread_mutex_lock(&proof_lock);
    if (!proves(p, kind, key, mechanism, length)) {
        p->kind = kind;
        p->key = key;
        p->length = length;
        p->output_size = 0;
        memcpy(p->mechanism, mechanism, length);
    }
    if (output_size)
        p->output_size = output_size;
    pthread_mutex_unlock(&proof_lock);
}

void proofs_clear(void)
{
    pthread_mutex_lock(&proof_lock);
    memset(proofs, 0, sizeof proofs);
    pthread_mutex_unlock(&proof_lock);
}
