#include "session.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 1024u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct session *_Atomic buckets[BUCKETS]; /* closed sessions stay in their bucket and are used again */
static unsigned restored_in;                     /* the incarnation that they were last written for */

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
    struct session *s = buckets[handle % BUCKETS];
    while (s && !(s->open && s->handle == handle))
        s = s->next;
    return s;
}

static struct session *unused(CK_SESSION_HANDLE handle)
{
    struct session *s = buckets[handle % BUCKETS];
    while (s && s->open)
        s = s->next;
    if (s)
        return s;
    s = calloc(1, sizeof *s);
    if (s) {
        s->next = buckets[handle % BUCKETS];
        buckets[handle % BUCKETS] = s;
    }
    return s;
}

static void prepare(struct session *s, CK_SESSION_HANDLE handle, CK_SLOT_ID slot, CK_FLAGS flags)
{
    s->handle = handle;
    s->slot = slot;
    s->flags = flags;
    memset(s->begun, 0, sizeof s->begun);
    memset(s->uncertain, 0, sizeof s->uncertain);
    memset(s->deferred, 0, sizeof s->deferred);
    s->found_count = s->found_next = 0;
    s->found_more = false;
}

enum added session_add(CK_SESSION_HANDLE handle, CK_SLOT_ID slot, CK_FLAGS flags, unsigned in)
{
    enum added result = ADD_STALE;
    pthread_mutex_lock(&lock);
    if (in >= restored_in) {
        struct session *s = unused(handle);
        result = s ? ADDED : ADD_NO_MEMORY;
        if (s) {
            prepare(s, handle, slot, flags);
            s->open = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
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
    if (all)
        restored_in = 0;
    pthread_mutex_unlock(&lock);
}

static uint32_t count_open(void)
{
    uint32_t count = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct session *s = buckets[i]; s; s = s->next)
            count += s->open;
    return count;
}

bool sessions_any(void)
{
    pthread_mutex_lock(&lock);
    uint32_t count = count_open();
    pthread_mutex_unlock(&lock);
    return count != 0;
}

uint32_t sessions_write(struct writer *w, unsigned next)
{
    pthread_mutex_lock(&lock);
    restored_in = next;
    uint32_t count = count_open();
    put_u8(w, 1);
    put_u32(w, 3 * count);
    for (unsigned i = 0; i < BUCKETS; i++) {
        for (struct session *s = buckets[i]; s; s = s->next) {
            if (!s->open)
                continue;
            put_ulong(w, s->handle);
            put_ulong(w, s->slot);
            put_ulong(w, s->flags);
        }
    }
    pthread_mutex_unlock(&lock);
    return count;
}

void sessions_child(void)
{
    pthread_mutex_init(&lock, NULL);
    sessions_clear(0, true);
}
