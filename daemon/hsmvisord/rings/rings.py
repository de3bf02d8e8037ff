"""Words that are shared with a guest's processors, each read and written by one access, in the order that rings.c reasons.

Never struct.pack_into on such words: CPython zeroes the place before it writes, and the guest can see that.
"""

from __future__ import annotations

import functools
from typing import Any

import cffi

from hsmvisord import native

_DECLARATIONS = """
uint16_t rings_load(const uint16_t *word);
void rings_store(uint16_t *word, uint16_t value);
void rings_put(uint32_t *word, uint32_t value);
void rings_fence(void);
"""


@functools.cache
def _library() -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(str(native.library(__file__, "_rings")))


def preload() -> None:
    """Opens the library, so that forked workers share it and need no file later."""
    _library()


def fence() -> None:
    """What was stored before is seen by others before what is loaded after."""
    _library()[1].rings_fence()


class Words:
    """A part of shared memory as words; the view is its own, and released by `release`."""

    __slots__ = ("_halves", "_held", "_library", "_size", "_view", "_words")

    def __init__(self, view: memoryview, alignment: int) -> None:
        """Raises ValueError when it is not aligned to `alignment` bytes (2 or 4: the latter for `put`)."""
        ffi, self._library = _library()
        self._view, self._size = view, len(view)
        self._held = ffi.from_buffer("uint8_t[]", view, require_writable=True)
        if int(ffi.cast("uintptr_t", self._held)) % alignment:
            self.release()
            raise ValueError(f"not aligned to {alignment} bytes")
        self._halves = ffi.cast("uint16_t *", self._held)
        self._words: Any = ffi.cast("uint32_t *", self._held) if alignment >= 4 else None

    def load(self, index: int) -> int:
        """Returns the u16 number `index` (acquire)."""
        if not 0 <= index < self._size // 2:
            raise IndexError(index)
        return int(self._library.rings_load(self._halves + index))

    def store(self, index: int, value: int) -> None:
        """Writes the u16 number `index` (release)."""
        if not 0 <= index < self._size // 2:
            raise IndexError(index)
        self._library.rings_store(self._halves + index, value)

    def put(self, index: int, value: int) -> None:
        """Writes the u32 number `index`; ordered by the next `store`."""
        if not 0 <= index < self._size // 4:
            raise IndexError(index)
        self._library.rings_put(self._words + index, value)

    def release(self) -> None:
        """Lets the memory go; no word can be reached any more."""
        self._halves = self._words = None
        self._size = 0
        if self._held is not None:
            _library()[0].release(self._held)
            self._held = None
        self._view.release()
