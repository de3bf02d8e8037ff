/* Words of a virtqueue, which a guest's processors read and write at the same time (see rings.py).  A plain library: no Python in it.
 *
 * The split ring (virtio 1.2, 2.7) asks for three orderings:
 *
 * 1. "read avail.idx, then the ring entry, the descriptors and the data": load-acquire.  What the driver wrote before it stored
 *    avail.idx is then seen.  x86-64: any load is (TSO never reorders loads), so a plain mov, and the compiler may not move later
 *    loads before it.  aarch64: ldarh; a plain load could be passed by the loads that follow.
 * 2. "write the data and the used element, then used.idx": store-release.  x86-64: a plain mov (stores stay in order).
 *    aarch64: stlrh; a plain store could become visible before those that precede it.
 * 3. "write used.idx, then read avail.flags": a full fence between a store and a load of another word.  Neither of the two above
 *    gives it: x86-64 lets a load pass an earlier store that is still in the store buffer, so mfence or a locked instruction is
 *    needed there too; aarch64: dmb ish.  (stlr then ldar would be ordered on aarch64, but not on x86-64.)  Without it the driver may
 *    clear NO_INTERRUPT, find used.idx old and sleep, while we read the old flag and do not signal: nobody wakes it.
 *
 * The other store-load order of the standard, "clear NO_NOTIFY, then read avail.idx again", is not needed: NO_NOTIFY is never set.
 * A kick's read(2) of an eventfd is ordered by the kernel after the driver's stores.
 *
 * Ordinary (inner shareable, cacheable) memory on both sides, as all guest memory is that is mapped from a file. */
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio 1.0 words are little-endian");
_Static_assert(__atomic_always_lock_free(sizeof(uint16_t), 0), "one access, no lock");

uint16_t rings_load(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

void rings_store(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* One half of a used element: ordered by the release that follows. */
void rings_put(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

void rings_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
