"""The device's side of a split virtqueue (virtio 1.2, 2.7) on memory that the driver may change at any time.  Sans-IO.

Every descriptor is copied once, and the copy is what is checked and used.  Chains are completed in the order in which they came, so
that between two of them used.idx is all there is to know.  Not offered: indirect descriptors, EVENT_IDX, any ring in another order.
"""

from __future__ import annotations

import struct
from typing import Protocol

from hsmvisord import limits

DESCRIPTOR = struct.Struct("<QIHH")  #: address, length, flags, next
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1  #: of avail.flags
MASK = 0xFFFF


class BrokenQueue(Exception):
    """The driver did what it must not; the device cannot go on."""


class BadAddress(BrokenQueue):
    """Outside of the guest's memory."""


class Ring(Protocol):
    """The shared words of a ring, each read and written by one access."""

    num: int  #: descriptors, a power of 2

    def descriptor(self, index: int) -> bytes:
        """Returns a copy of DESCRIPTOR.size bytes; `index` < num."""
        ...

    def avail_flags(self) -> int: ...
    def avail_idx(self) -> int: ...  # acquire
    def avail_entry(self, slot: int) -> int: ...
    def used_idx(self) -> int: ...
    def put_used(self, slot: int, head: int, length: int) -> None: ...
    def publish(self, idx: int) -> None: ...  # release
    def fence(self) -> None: ...


class Memory(Protocol):
    def view(self, address: int, size: int) -> memoryview:
        """Returns guest physical memory; raises BadAddress."""
        ...


class Chain:
    """The buffers of one chain, which hold the memory until `release`, or to the end of a `with`."""

    __slots__ = ("head", "readable", "readable_size", "writable", "writable_size")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.readable_size = self.writable_size = 0

    def read(self, offset: int, size: int) -> bytes:
        """Returns a copy; less where the buffers end."""
        parts = []
        for view in self.readable:
            if size <= 0:
                break
            if offset < len(view):
                part = bytes(view[offset : offset + size])
                parts.append(part)
                size -= len(part)
            offset = max(0, offset - len(view))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: bytes) -> None:
        """Raises BrokenQueue where it has no room."""
        if len(data) > self.writable_size:
            raise BrokenQueue(f"a buffer of {self.writable_size} bytes for a packet of {len(data)}")
        done = 0
        for view in self.writable:
            part = data[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)

    def room(self, offset: int, size: int) -> list[memoryview]:
        """Returns the writable memory from `offset` on, `size` bytes at most; to be released by the caller."""
        parts = []
        for view in self.writable:
            if size <= 0:
                break
            if offset < len(view):
                part = view[offset : offset + size]
                parts.append(part)
                size -= len(part)
            offset = max(0, offset - len(view))
        return parts

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        for view in (*self.readable, *self.writable):
            view.release()
        self.readable, self.writable = [], []
        self.readable_size = self.writable_size = 0


class Virtqueue:
    def __init__(self, ring: Ring, memory: Memory, base: int) -> None:
        """`base`: the index of the first chain."""
        self._ring, self._memory = ring, memory
        self.next = base & MASK  #: of the chain that comes next; used.idx as well

    def available(self) -> int:
        """Returns how many chains wait; raises BrokenQueue."""
        waiting = (self._ring.avail_idx() - self.next) & MASK
        if waiting > self._ring.num:
            raise BrokenQueue(f"{waiting} chains are said to wait in a ring of {self._ring.num}")
        return waiting

    def peek(self) -> Chain | None:
        """Returns the next chain, or None; it stays the next until `complete`.  Raises BrokenQueue."""
        if not self.available():
            return None
        ring = self._ring
        head = ring.avail_entry(self.next & (ring.num - 1))
        chain = Chain(head)
        try:
            self._walk(chain)
        except BaseException:
            chain.release()
            raise
        return chain

    def _walk(self, chain: Chain) -> None:
        num, index, total = self._ring.num, chain.head, 0
        for _ in range(num):
            if index >= num:
                raise BrokenQueue(f"descriptor {index} of {num}")
            address, length, flags, following = DESCRIPTOR.unpack(self._ring.descriptor(index))
            if flags & INDIRECT:
                raise BrokenQueue("an indirect descriptor, which is not offered")
            total += length
            if total > limits.MAX_CHAIN:
                raise BrokenQueue(f"a chain of more than {limits.MAX_CHAIN} bytes")
            if flags & WRITE:
                chain.writable.append(self._memory.view(address, length))
                chain.writable_size += length
            elif chain.writable:  # 2.7.4.2: readable ones stand first
                raise BrokenQueue("a readable descriptor behind a writable one")
            else:
                chain.readable.append(self._memory.view(address, length))
                chain.readable_size += length
            if not flags & NEXT:
                return
            index = following
        raise BrokenQueue(f"a chain of more than {num} descriptors")

    def complete(self, chain: Chain, written: int) -> None:
        """Gives the chain, which was the next, back to the driver; `written`: bytes of its writable buffers."""
        ring = self._ring
        ring.put_used(self.next & (ring.num - 1), chain.head, written)
        self.next = (self.next + 1) & MASK
        ring.publish(self.next)

    def wants_signal(self) -> bool:
        """Whether the driver is to be told of what was completed."""
        self._ring.fence()
        return not self._ring.avail_flags() & NO_INTERRUPT
