"""The keys of a guest's live streams, in shared memory that outlives this process: its successor resets each of them.

A slot is `u32 guest's port, u32 our port`, little-endian as the processor's; our port is never 0 where there is a key.  It is
written last and cleared first, so that a process that is killed between the two leaves no half key.
"""

from __future__ import annotations

import fcntl
import mmap
from typing import NamedTuple

from hsmvisord import limits
from hsmvisord.transport.vsock.memory import F_GET_SEALS, F_SEAL_SHRINK

SIZE = limits.MAX_STREAMS * 8  #: bytes of the memory
NO_PORT = 0xFFFFFFFF  #: VMADDR_PORT_ANY


class Key(NamedTuple):
    slot: int
    guest_port: int
    our_port: int


class StreamKeys:
    def __init__(self, descriptor: int) -> None:
        """`descriptor`: a memfd of SIZE bytes, sealed against shrinking; stays the caller's.  Raises OSError, ValueError."""
        if not fcntl.fcntl(descriptor, F_GET_SEALS) & F_SEAL_SHRINK:  # else a predecessor in its guest's hands could end us
            raise ValueError("the memory of keys is not sealed")
        self._memory = mmap.mmap(descriptor, SIZE)
        self._words = memoryview(self._memory).cast("I")
        self._free = [slot for slot in reversed(range(limits.MAX_STREAMS)) if not self._words[2 * slot + 1]]

    def enter(self, guest_port: int, our_port: int) -> int | None:
        """Returns the slot, or None when all are taken."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._words[2 * slot] = guest_port
        self._words[2 * slot + 1] = our_port
        return slot

    def clear(self, slot: int) -> None:
        if self._words[2 * slot + 1]:
            self._words[2 * slot + 1] = 0
            self._words[2 * slot] = 0
            self._free.append(slot)

    def found(self) -> list[Key]:
        """Returns what a predecessor left; a key that cannot be, or stands there twice, is cleared."""
        keys: dict[tuple[int, int], Key] = {}
        for slot in range(limits.MAX_STREAMS):
            guest_port, our_port = self._words[2 * slot], self._words[2 * slot + 1]
            if not our_port:
                continue
            if NO_PORT in (guest_port, our_port) or (guest_port, our_port) in keys:
                self.clear(slot)
            else:
                keys[guest_port, our_port] = Key(slot, guest_port, our_port)
        return list(keys.values())

    def close(self) -> None:
        """Unmaps; the keys stay."""
        self._words.release()
        self._memory.close()
