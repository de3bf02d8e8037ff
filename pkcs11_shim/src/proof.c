#include "proof.h"

#include <pthread.h>
#include <string.h>

#define PROOFS 128u

struct proof {
    enum operation kind;
    CK_OBJECT_HANDLE key;
    CK_ULONG output_size;
    uint32_t length; /* 0 = empty */
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct proof proofs[PROOFS];

/* The words without what stands in a cipher's byte strings (NATIVE.md, "Mechanism"): an IV is another one each time, and no Init looks at
 * more of it than its length. */
static void blank(uint8_t *words, enum operation kind, const uint8_t *mechanism, uint32_t length)
{
    enum { TYPE = 8, HEAD = 9, RAW = 1, STRUCTURED = 2, NUMBER = 9, LENGTH = 4 };
    memcpy(words, mechanism, length);
    if (length <= HEAD || (kind != OPERATION_ENCRYPT && kind != OPERATION_DECRYPT))
        return;
    if (words[TYPE] == RAW)
        memset(words + HEAD, 0, length - HEAD);
    if (words[TYPE] != STRUCTURED)
        return;
    for (uint32_t at = HEAD + 1; at + 1 + LENGTH <= length;) {
        if (words[at] == 'u') {
            at += NUMBER;
            continue;
        }
        uint32_t size = (uint32_t)words[at + 3] << 8 | words[at + 4]; /* of MAX_PROVEN_MECHANISM bytes at most */
        at += 1 + LENGTH;
        if (size > length - at)
            return;
        memset(words + at, 0, size);
        at += size;
    }
}

/* Two that meet in one place push each other out: slower, never wrong. */
static struct proof *place(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length)
{
    uint64_t hash = 1469598103934665603u ^ (uint64_t)kind ^ (uint64_t)key << 8; /* FNV-1a */
    for (uint32_t i = 0; i < length; i++)
        hash = (hash ^ mechanism[i]) * 1099511628211u;
    return &proofs[(hash ^ hash >> 32) % PROOFS];
}

static bool proves(const struct proof *p, enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length)
{
    return p->length == length && p->kind == kind && p->key == key && !memcmp(p->mechanism, mechanism, length);
}

bool proof_find(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *encoded, uint32_t length, CK_ULONG *output_size)
{
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
    blank(mechanism, kind, encoded, length);
    const struct proof *p = place(kind, key, mechanism, length);
    pthread_mutex_lock(&lock);
    bool found = proves(p, kind, key, mechanism, length);
    *output_size = found ? p->output_size : 0;
    pthread_mutex_unlock(&lock);
    return found;
}

void proof_add(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *encoded, uint32_t length, CK_ULONG output_size)
{
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
    blank(mechanism, kind, encoded, length);
    struct proof *p = place(kind, key, mechanism, length);
    pthread_mutex_lock(&lock);
    if (!proves(p, kind, key, mechanism, length)) {
        p->kind = kind;
        p->key = key;
        p->length = length;
        p->output_size = 0;
        memcpy(p->mechanism, mechanism, length);
    }
    if (output_size)
        p->output_size = output_size;
    pthread_mutex_unlock(&lock);
}

void proof_drop(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *encoded, uint32_t length)
{
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
    blank(mechanism, kind, encoded, length);
    struct proof *p = place(kind, key, mechanism, length);
    pthread_mutex_lock(&lock);
    if (proves(p, kind, key, mechanism, length))
        p->length = 0;
    pthread_mutex_unlock(&lock);
}

void proofs_clear(void)
{
    pthread_mutex_lock(&lock);
    memset(proofs, 0, sizeof proofs);
    pthread_mutex_unlock(&lock);
}

void proofs_child(void)
{
    pthread_mutex_init(&lock, NULL);
    proofs_clear();
}
