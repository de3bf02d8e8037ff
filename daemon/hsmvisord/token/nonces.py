"""The IVs and nonces of one message-based encryption (PKCS#11 3.1, 6.13.3, CK_GENERATOR_FUNCTION).

The token makes them where the caller's generator says so, and then no two are equal.  It keeps no counter for a key from one
C_MessageEncryptInit to the next, let alone through restarts, so a counter of its own begins at a random number: two processes with
one key would else begin with the same IVs.  That is enough where the counter is long; where it is short, the caller is refused.
CKG_GENERATE_COUNTER_XOR counts from 0, for the other end counts too: there the caller's IV is what no two processes share.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from hsmvisord import ck, limits
from hsmvisord.ck import CkError

COUNTER_BITS = 64  #: of a counter that begins by chance, at least
RANDOM_BITS = 96  #: of an IV that is made by chance (NIST SP 800-38D, 8.2.2), at least
_COUNTING = (ck.CKG_GENERATE, ck.CKG_GENERATE_COUNTER)
_STATE = struct.Struct(">BBHQ")  #: generator, bytes, fixed bits, how many were made; then the base and the number it began with


@dataclass(frozen=True, slots=True)
class Source:
    """What a caller's structure says: `given` is its IV, whose first `fixed` bits stay."""

    given: bytes
    fixed: int = 0
    generator: int = ck.CKG_NO_GENERATE


def _wrong(detail: str) -> CkError:
    return CkError(ck.CKR_MECHANISM_PARAM_INVALID, detail)


class Nonces:
    """`random`: from a number of bytes to so many random bytes."""

    __slots__ = ("_base", "_first", "_kind", "_made", "_random")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self._kind: tuple[int, int, int] | None = None  #: generator, bytes, fixed bits: of the first, and of all
        self._base = self._first = self._made = 0

    def settle(self, source: Source) -> None:
        """All IVs are of this kind from now on.  Raises CkError."""
        if source.generator == ck.CKG_NO_GENERATE:
            return
        size, fixed, generator = len(source.given), source.fixed, source.generator
        if generator not in (*_COUNTING, ck.CKG_GENERATE_RANDOM, ck.CKG_GENERATE_COUNTER_XOR):
            raise _wrong("there is no such generator")
        if not 1 <= size <= limits.MAX_MADE_IV or not 0 <= fixed < 8 * size:
            raise _wrong(f"the token makes IVs of 1 to {limits.MAX_MADE_IV} bytes, and some bits of each")
        free = 8 * size - fixed
        if (generator in _COUNTING and free < COUNTER_BITS) or (generator == ck.CKG_GENERATE_RANDOM and free < RANDOM_BITS):
            raise _wrong(f"a counter has {COUNTER_BITS} bits at least, a random IV {RANDOM_BITS}")
        base = int.from_bytes(source.given)
        if self._kind is None:
            self._kind, self._base, self._made = (generator, size, fixed), base, 0
            self._first = int.from_bytes(self._random(size)) % (1 << free) if generator in _COUNTING else 0
        elif self._kind != (generator, size, fixed) or base >> free != self._base >> free:
            raise _wrong("the IVs of one process are of one kind, with the same fixed bits")

    def next(self, source: Source) -> bytes:
        """Returns the IV of the next message.  Raises CkError: KEY_EXHAUSTED after the last."""
        if source.generator == ck.CKG_NO_GENERATE:
            if self._kind is not None:
                raise _wrong("the token makes the IVs of this process")
            return source.given
        self.settle(source)
        assert self._kind is not None
        generator, size, fixed = self._kind
        free = 8 * size - fixed
        mask = (1 << free) - 1
        if generator == ck.CKG_GENERATE_RANDOM:
            made = int.from_bytes(self._random(size))
        elif self._made > mask:
            raise CkError(ck.CKR_KEY_EXHAUSTED, "this process has used all its IVs")
        else:
            made = self._first + self._made
            if generator == ck.CKG_GENERATE_COUNTER_XOR:
                made ^= self._base
        self._made += 1
        return (self._base & ~mask | made & mask).to_bytes(size)

    def saved(self) -> bytes:
        if self._kind is None:
            return b""
        generator, size, fixed = self._kind
        return _STATE.pack(generator, size, fixed, self._made) + self._base.to_bytes(size) + self._first.to_bytes(size)

    def restore(self, state: bytes) -> None:
        """Raises ValueError."""
        if not state:
            return
        if len(state) < _STATE.size:
            raise ValueError("the state of a generator is too short")
        generator, size, fixed, made = _STATE.unpack_from(state)
        base, first = state[_STATE.size : _STATE.size + size], state[_STATE.size + size :]
        if len(base) != size or len(first) != size:
            raise ValueError("the state of a generator has another length")
        try:
            self.settle(Source(base, fixed, generator))
        except CkError as error:
            raise ValueError(str(error)) from None
        if self._kind is None:
            raise ValueError("the state of no generator")
        self._first, self._made = int.from_bytes(first), made
