/* libcrypto's memory.  A signature takes and gives about 30 pieces, and the daemon has one heap without a cache for each thread
 * (control_domain/hsmvisor/host/child.py): two threads that sign wait for each other there.  So a thread that serves lanes keeps a
 * few pieces of each size for itself, and every piece is overwritten when it is given, by whatever thread. */
#include "lanes.h"

#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>

#define SIZES 6u     /* 32 to 1024 bytes */
#define SMALLEST 32u
#define MOST_KEPT 32u /* pieces of one size */

/* Before each piece; as large as what malloc's pieces are aligned to. */
union head {
    struct {
        size_t size; /* bytes that may be used */
        union head *next;
    };
    max_align_t aligned;
};

static _Thread_local bool keeps;
static _Thread_local union head *kept[SIZES];
static _Thread_local unsigned counts[SIZES];

void heap_keep(void)
{
    keeps = true;
}

/* SIZES when there is none for it. */
static unsigned class_of(size_t size)
{
    unsigned class = 0;
    while (class < SIZES && (size_t)SMALLEST << class < size)
        class++;
    return class;
}

static void *take(size_t size, const char *file, int line)
{
    (void)file, (void)line;
    if (!size || size > SIZE_MAX / 2)
        return NULL; /* as libcrypto's own functions answer 0 */
    unsigned class = class_of(size);
    union head *head;
    if (class < SIZES && (head = kept[class])) {
        kept[class] = head->next;
        counts[class]--;
        return head + 1;
    }
    size_t room = class < SIZES ? (size_t)SMALLEST << class : size;
    head = malloc(sizeof *head + room);
    if (!head)
        return NULL;
    head->size = room;
    return head + 1;
}

static void give(void *piece, const char *file, int line)
{
    (void)file, (void)line;
    if (!piece)
        return;
    union head *head = (union head *)piece - 1;
    unsigned class = class_of(head->size);
    explicit_bzero(piece, head->size);
    if (!keeps || class == SIZES || counts[class] == MOST_KEPT) {
        free(head);
        return;
    }
    head->next = kept[class];
    kept[class] = head;
    counts[class]++;
}

static void *change(void *piece, size_t size, const char *file, int line)
{
    size_t room = piece ? ((union head *)piece - 1)->size : 0;
    if (size && size <= room)
        return piece;
    void *changed = take(size, file, line);
    if (changed && room)
        memcpy(changed, piece, room); /* which is less */
    if (changed || !size)
        give(piece, file, line);
    return changed;
}

/* In vain once libcrypto has memory: then it goes on with malloc, which is slower. */
__attribute__((constructor)) static void serve_libcrypto(void)
{
    CRYPTO_set_mem_functions(take, change, give);
}

bool heap_serves(void)
{
    CRYPTO_malloc_fn ours = NULL;
    CRYPTO_get_mem_functions(&ours, NULL, NULL);
    return ours == take;
}
