"""What helper processes find in their environment: nothing of ours but paths, and an allocator that leaves no keys behind."""

from __future__ import annotations

import os

#: Freed memory is overwritten, so that a key that was freed is gone: perturb works with malloc, not with Python's arenas, and not
#: on chunks that malloc's per-thread cache (tcache) takes back, where an RSA key's coefficient was found again.  One heap without
#: arenas and mmap, which grows in large steps, so that hsmvisord/memory.py can lock it; what is free at its end is given back.
_TUNABLES = {"perturb": 165, "tcache_count": 0, "arena_max": 1, "mmap_max": 0, "top_pad": 8 << 20, "trim_threshold": 16 << 20}
ALLOCATOR = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items()),
}
_INHERITED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV")


def child_environment() -> dict[str, str]:
    return {**{n: os.environ[n] for n in _INHERITED if n in os.environ}, **ALLOCATOR, "LANG": "C.UTF-8"}
