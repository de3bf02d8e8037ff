"""Lanes: connections that ask for the same signature again and again are served without the interpreter (lanes.c).

The interpreter checks a request in full, and then hands the connection to a lane, with a plan: the bytes of that request but for
its id and its data, the head of its reply, and the key.  A thread of the pool compares what comes with the plan, signs, replies.
Anything that differs, whatever it is, comes back to the interpreter with the connection, and is answered there.  What was checked
holds as long as two gates are open, that of the token and that of the session: whoever changes what a check would say shuts them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cffi

from hsmvisord import native

MAX_DATA = 1024  #: bytes to sign; these four are those of lanes.h
MAX_HEAD, MAX_TAIL, MAX_REPLY_HEAD = 64, 8, 32

ECDSA, RSA, ED25519 = range(3)

_DECLARATIONS = """
struct gate; struct key; struct lane; struct pool;
struct plan {
    uint8_t head[64], tail[8], reply_head[32];
    size_t head_size, data_size, tail_size, reply_head_size;
    double refuse_after;
};
struct counts { uint64_t count; double seconds, last; uint64_t buckets[13]; };
struct key *key_new(const uint8_t *der, size_t length, int kind, size_t size);
void key_free(struct key *key);
bool key_sign(struct key *key, const uint8_t *data, size_t length, uint8_t *signature);
struct gate *gate_new(void);
void gate_shut(struct gate *gate);
void gate_free(struct gate *gate);
struct pool *pool_new(int64_t look_ns, unsigned alone, const double *bounds);
void pool_serve(struct pool *pool);
int pool_descriptor(struct pool *pool);
struct lane *lane_new(int fd, const struct key *key, struct gate *first, struct gate *second, const struct plan *plan);
void lane_free(struct lane *lane);
bool pool_enter(struct pool *pool, struct lane *lane);
void pool_recall(struct pool *pool);
struct lane *pool_collect(struct pool *pool);
void lane_counts(struct lane *lane, struct counts *counts);
const uint8_t *lane_received(const struct lane *lane, size_t *length);
const uint8_t *lane_unsent(const struct lane *lane, size_t *length);
"""


@functools.cache
def _library() -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(str(native.library(__file__, "_lanes")))


def preload() -> None:
    """Opens the library, so that forked workers share it and need no file later."""
    _library()


def _made(pointer: Any, what: str) -> Any:
    if pointer == _library()[0].NULL:
        raise MemoryError(what)
    return pointer


class Gate:
    """Open until it is shut; never again after that."""

    __slots__ = ("pointer",)

    def __init__(self) -> None:
        ffi, lib = _library()
        self.pointer = ffi.gc(_made(lib.gate_new(), "a gate"), lib.gate_free)

    def shut(self) -> None:
        _library()[1].gate_shut(self.pointer)


class Key:
    """A private key for lanes: ECDSA makes r ‖ s, RSA a PKCS #1 v1.5 block of the data as it is, ED25519 signs it."""

    __slots__ = ("pointer", "size", "sizes")

    def __init__(self, der: bytearray, kind: int, size: int, sizes: range) -> None:
        """`size`: of a signature; `sizes`: of the data.  `der` is overwritten."""
        ffi, lib = _library()
        self.size, self.sizes = size, sizes
        try:
            self.pointer = ffi.gc(_made(lib.key_new(ffi.from_buffer(der), len(der), kind, size), "a key"), lib.key_free)
        finally:
            der[:] = bytes(len(der))

    def sign(self, data: bytes) -> bytes:
        """In the calling thread."""
        ffi, lib = _library()
        out = ffi.new("uint8_t[]", self.size)
        if not lib.key_sign(self.pointer, data, len(data), out):
            raise ValueError("libcrypto does not sign this")
        return bytes(ffi.buffer(out))


@dataclass(frozen=True)
class Plan:
    """What is the same in all requests, and in all replies: see lanes.h."""

    key: Key
    gates: tuple[Gate, Gate]
    head: bytes
    data_size: int
    tail: bytes
    reply_head: bytes
    refuse_after: float


@dataclass(frozen=True)
class Counts:
    count: int
    seconds: float
    last: float  #: seconds since 1970
    buckets: list[int]


class Lane:
    """One connection's time without the interpreter, which ends when the pool's `collect` gives it."""

    def __init__(self, descriptor: int, plan: Plan) -> None:
        ffi, lib = _library()
        if len(plan.head) > MAX_HEAD or len(plan.tail) > MAX_TAIL or len(plan.reply_head) > MAX_REPLY_HEAD:
            raise ValueError("a plan longer than lanes have room for")
        raw = ffi.new("struct plan *")
        for name in ("head", "tail", "reply_head"):
            value = getattr(plan, name)
            ffi.memmove(getattr(raw, name), value, len(value))
            setattr(raw, f"{name}_size", len(value))
        raw.data_size, raw.refuse_after = plan.data_size, plan.refuse_after
        gates = [gate.pointer for gate in plan.gates]
        made = lib.lane_new(descriptor, plan.key.pointer, *gates, raw)
        self.pointer = ffi.gc(_made(made, "a lane"), lib.lane_free)

    def counts(self) -> Counts:
        """Returns what it has counted since the last time."""
        ffi, lib = _library()
        raw = ffi.new("struct counts *")
        lib.lane_counts(self.pointer, raw)
        return Counts(raw.count, raw.seconds, raw.last, list(raw.buckets))

    def received(self) -> bytes:
        """Returns what came and is not answered."""
        return self._bytes(_library()[1].lane_received)

    def unsent(self) -> bytes:
        """Returns what the socket did not take of the last reply."""
        return self._bytes(_library()[1].lane_unsent)

    def _bytes(self, get: Any) -> bytes:
        ffi, _ = _library()
        length = ffi.new("size_t *")
        start = get(self.pointer, length)
        return bytes(ffi.buffer(start, length[0]))


class Pool:
    """What its threads share; it lives as long as the process."""

    def __init__(self, look: float, alone: int, bounds: Sequence[float]) -> None:
        """`look`, seconds: how long the only busy lane's next request is looked for; `alone`: after so many of its requests."""
        ffi, lib = _library()
        self._pointer = _made(lib.pool_new(int(look * 1e9), alone, ffi.new("double[]", list(bounds))), "lanes")
        self.descriptor: int = lib.pool_descriptor(self._pointer)  #: readable when a lane has come back
        self._lanes: dict[int, Lane] = {}

    def serve(self) -> None:
        """The life of one of its threads: without the interpreter, and without end."""
        _library()[1].pool_serve(self._pointer)

    def enter(self, lane: Lane) -> bool:
        """Says whether the lane has begun: not when a gate is shut."""
        number = self._number(lane.pointer)
        self._lanes[number] = lane
        if _library()[1].pool_enter(self._pointer, lane.pointer):
            return True
        del self._lanes[number]
        return False

    def recall(self) -> None:
        """Has all lanes come back."""
        _library()[1].pool_recall(self._pointer)

    def collect(self) -> Lane | None:
        """Returns a lane that has come back."""
        pointer = _library()[1].pool_collect(self._pointer)
        return self._lanes.pop(self._number(pointer)) if pointer else None

    @staticmethod
    def _number(pointer: Any) -> int:
        return int(_library()[0].cast("uintptr_t", pointer))
