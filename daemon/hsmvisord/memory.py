"""Keeps what may hold key bytes out of swap and out of dumps: the heap and the stacks, page by page as they come into use.

All allocations of a worker come from one heap (GLIBC_TUNABLES of control_domain/hsmvisor/environment.py: one arena, no chunks by
mmap), so that one range is all there is to lock; it has room to grow, which costs nothing before it is used.  Never mlockall(2):
with MCL_FUTURE it fills every stack and whatever is mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Callable

MOST = 1 << 30  #: bytes that a worker may have of its own, and so may lock
STACKS = 3 << 19  #: bytes kept for stacks where the limit is too low for the whole heap

_LARGEST_HOLE, _SMALL_HOLE, _SMALLEST_HOLE = 1 << 20, 1024, 24  #: bytes; malloc's small sizes are 16 apart

_MLOCK_ONFAULT = 1
_MADV_DONTDUMP = 16
_PAGE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sbrk.restype = ctypes.c_void_p
_libc.sbrk.argtypes = (ctypes.c_ssize_t,)
_libc.pthread_self.restype = ctypes.c_void_p
_libc.pthread_getattr_np.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
for _name, _types in (("mlock2", (ctypes.c_int,)), ("munlock", ()), ("madvise", (ctypes.c_int,))):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_size_t, *_types)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3)); only the last of its ten counters is of use here."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t))


_libc.mallinfo2.restype = _MallInfo
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.free.argtypes = (ctypes.c_void_p,)

_heap = 0  #: where this process's heap begins; 0 = it is not kept
_rollup = -1  #: descriptor
_followed = 0  #: where it ended when it was looked at last
_newest_alone = False  #: the limit is too low for more


def raise_limit(most: int = MOST) -> None:
    """Lets this process and its children lock `most` bytes, where the kernel lets us (CAP_SYS_RESOURCE, or a hard limit)."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard == resource.RLIM_INFINITY or hard >= most:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, hard))
        return
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def keep(threads: int = 0) -> str:
    """From now on heap and stacks of this process are kept; returns what.  Raises OSError where not all can be.

    Where the limit is low and CAP_IPC_LOCK is there, which will be given up, all that is to be locked is made and locked now: the
    heap with its room to grow, and stacks for `threads` threads.
    """
    global _heap, _followed, _newest_alone
    regions = _regions()
    _heap = regions["[heap]"][0]
    what = f"heap of {(_end() - _heap) >> 20} MiB and stacks, as they come into use; in no dump"
    if _limit() >= MOST:
        _lock(*regions["[stack]"])
        _lock(_heap, _end())
        return what
    try:
        _lock(_heap, _end())  # as CAP_IPC_LOCK may
        _followed = _end()
    except OSError:
        _newest_alone = True
        follow()
        what = f"the newest part of a heap of {(_end() - _heap) >> 20} MiB alone"
        raise OSError(f"RLIMIT_MEMLOCK is {_limit() >> 10} KiB: {what} (LimitMEMLOCK=infinity)") from None
    _stock_stacks(threads)  # not the main one: it could not grow
    return f"{what}; room is left for {room() >> 20} MiB"


def follow() -> str:
    """Locks what the heap has grown by; cheap, to be called now and then.  Returns why it could not, or nothing."""
    global _followed
    end, before = _end(), _followed
    _followed = end
    if not _heap or (_limit() < MOST and end <= before):  # over the limit even what is locked cannot be locked again
        return ""
    first = _heap if _limit() >= MOST else before
    if _newest_alone:
        first = max(_heap, end - max(0, _limit() - STACKS))
        _libc.munlock(_heap, first - _heap)
    try:
        _lock(first, end)
    except OSError as error:
        grown = f"the heap has grown to {(end - _heap) >> 20} MiB, and what is new cannot be locked"
        return f"{grown}: {error.strerror} (LimitMEMLOCK=infinity)"
    return ""


def room() -> int:
    """Bytes at the heap's end that nobody has used yet (mallinfo(3), keepcost)."""
    return int(_libc.mallinfo2().keepcost)


def make_room(least: int) -> None:
    """Has the heap grow, by GLIBC_TUNABLES' top_pad, if there is less room than `least`."""
    if room() < least:
        _libc.free(_libc.malloc(room() + _PAGE))


def fill_holes() -> int:
    """Takes what is free between used parts of the heap, for good; returns how many bytes.  What a forked child allocates then lies
    side by side at the heap's end, instead of in holes of many pages, each of which it would have to copy."""
    end, taken, size = _end() - room(), 0, _LARGEST_HOLE
    while size >= _SMALLEST_HOLE:
        address = _libc.malloc(size)
        if address and address < end:
            taken += size
            continue
        _libc.free(address)
        size = size * 3 // 4 if size > _SMALL_HOLE else size - 16
    return taken


def _stock_stacks(threads: int) -> None:
    """Threads that start later take the stacks of these: glibc keeps those of ended ones."""
    together = threading.Barrier(threads + 1)

    def run() -> None:
        _lock_stack()
        together.wait()

    started = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    together.wait()
    for thread in started:
        thread.join()


def open_size() -> None:
    """Keeps the kernel's count of this process's memory open, while it may still be opened."""
    global _rollup
    _rollup = os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)


def size() -> int:
    """Returns the proportional set size in bytes (proc(5), smaps_rollup: shared pages count by share); 0 = not known."""
    if _rollup < 0:
        return 0
    os.lseek(_rollup, 0, os.SEEK_SET)
    lines = os.read(_rollup, _PAGE).decode("ascii").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def start_thread(name: str, target: Callable[[], None]) -> None:
    """Starts a daemon thread; its stack is kept if the heap is."""

    def run() -> None:
        if _heap:
            _lock_stack()
        target()

    threading.Thread(target=run, name=name, daemon=True).start()


def _lock_stack() -> None:
    attributes = ctypes.create_string_buffer(128)  # pthread_attr_t: 56 or 64 bytes
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    if _libc.pthread_getattr_np(_libc.pthread_self(), attributes) == 0:
        _libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size))
        _libc.pthread_attr_destroy(attributes)
        if address.value:
            with contextlib.suppress(OSError):  # as in `follow`
                _lock(address.value, address.value + size.value)


def _lock(start: int, end: int) -> None:
    start = -(-start // _PAGE) * _PAGE
    if end > start:
        for done in (_libc.mlock2(start, end - start, _MLOCK_ONFAULT), _libc.madvise(start, end - start, _MADV_DONTDUMP)):
            if done != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))


def _limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return MOST if soft == resource.RLIM_INFINITY else soft


def _end() -> int:
    return int(_libc.sbrk(0) or 0)


def _regions() -> dict[str, tuple[int, int]]:
    """Returns where heap and main stack lie (proc(5), maps)."""
    found: dict[str, tuple[int, int]] = {}
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            name = line.rstrip().rpartition(" ")[2]
            if name in ("[heap]", "[stack]"):
                start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
                found[name] = (found.get(name, (start, end))[0], end)
    return found
