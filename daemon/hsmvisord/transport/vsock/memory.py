"""A guest's memory, mapped; and the rings in it.

Rings are addressed as the front-end maps them (user addresses), buffers as the guest does: two translations of one table.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
from collections.abc import Callable, Sequence

from hsmvisord import limits
from hsmvisord.rings import rings
from hsmvisord.rings.rings import Words
from hsmvisord.transport.vsock.saved import SavedRegion, SavedRing
from hsmvisord.wire.virtqueue import DESCRIPTOR, BadAddress

F_GET_SEALS, F_SEAL_SHRINK = 1034, 2
_PAGE = mmap.ALLOCATIONGRANULARITY


class BadMemory(Exception):
    """The front-end's table of memory or a ring's place cannot be."""


class _Mapped:
    """One region."""

    __slots__ = ("_memory", "end", "guest", "user", "view")

    def __init__(self, region: SavedRegion) -> None:
        _check_sealed(region.fd)
        start = region.offset // _PAGE * _PAGE
        lead = region.offset - start
        try:
            self._memory = mmap.mmap(region.fd, lead + region.size, offset=start)
        except (OSError, ValueError, OverflowError) as error:  # ValueError: longer than the file
            raise BadMemory(f"{region.size} bytes at {region.offset} of a memory file cannot be mapped: {error}") from None
        self.guest, self.user, self.end = region.guest_address, region.user_address, region.size
        self.view = memoryview(self._memory)[lead : lead + region.size]

    def close(self) -> None:
        self.view.release()
        self._memory.close()  # BufferError: somebody has kept a view, which is a fault of ours


def _check_sealed(fd: int) -> None:
    """A file that the front-end can shorten would end this process by SIGBUS."""
    try:
        sealed = fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK
    except OSError as error:
        raise BadMemory(f"the guest's memory is no memfd (memory-backend-memfd,share=on): {error.strerror}") from None
    if not sealed:
        raise BadMemory("the guest's memory is not sealed against shrinking (memory-backend-memfd,seal=on)")


class GuestMemory:
    """All regions; its descriptors are the caller's."""

    def __init__(self, regions: Sequence[SavedRegion]) -> None:
        """Raises BadMemory."""
        _check_places(regions, lambda region: region.guest_address)
        _check_places(regions, lambda region: region.user_address)
        self._regions: list[_Mapped] = []
        try:
            for region in regions:
                self._regions.append(_Mapped(region))
        except BaseException:
            self.close()
            raise
        self._last = self._regions[0] if self._regions else None

    def view(self, address: int, size: int) -> memoryview:
        """Returns guest physical memory, of one region; to be released.  Raises BadAddress."""
        region = self._last
        if region is None or not 0 <= address - region.guest <= region.end - size:
            region = self._last = self._find(address, size)
        offset = address - region.guest
        return region.view[offset : offset + size]

    def _find(self, address: int, size: int) -> _Mapped:
        for region in self._regions:
            if 0 <= address - region.guest <= region.end - size:
                return region
        raise BadAddress(f"{size} bytes at 0x{address:x} are not the guest's memory")

    def user_view(self, address: int, size: int) -> memoryview:
        """Returns memory by the front-end's address; to be released.  Raises BadMemory."""
        for region in self._regions:
            offset = address - region.user
            if 0 <= offset <= region.end - size:
                return region.view[offset : offset + size]
        raise BadMemory(f"a ring of {size} bytes at 0x{address:x} is outside of the guest's memory")

    def close(self) -> None:
        """Every view and ring must have been released."""
        for region in self._regions:
            region.close()
        self._regions = []
        self._last = None


def _check_places(regions: Sequence[SavedRegion], start: Callable[[SavedRegion], int]) -> None:
    end = 0
    for region in sorted(regions, key=start):
        if region.size <= 0 or start(region) < end:
            raise BadMemory("regions of memory that overlap or are empty")
        end = start(region) + region.size
    if end > 1 << 64:
        raise BadMemory("a region of memory beyond the end of addresses")


class SharedRing:
    """A virtqueue.Ring in the guest's memory."""

    __slots__ = ("_avail", "_table", "_used", "num")

    def __init__(self, memory: GuestMemory, place: SavedRing) -> None:
        """Raises BadMemory."""
        self.num = place.num
        if not 0 < self.num <= limits.MAX_RING or self.num & (self.num - 1):
            raise BadMemory(f"a ring of {self.num} descriptors")
        with contextlib.ExitStack() as undo:
            self._table = undo.enter_context(memory.user_view(place.table, DESCRIPTOR.size * self.num))
            try:
                self._avail = Words(memory.user_view(place.avail, 4 + 2 * self.num), 2)
                undo.callback(self._avail.release)
                self._used = Words(memory.user_view(place.used, 4 + 8 * self.num), 4)
            except ValueError as error:
                raise BadMemory(f"a ring that is {error}") from None
            undo.pop_all()

    def descriptor(self, index: int) -> bytes:
        return bytes(self._table[DESCRIPTOR.size * index : DESCRIPTOR.size * (index + 1)])

    def avail_flags(self) -> int:
        return self._avail.load(0)

    def avail_idx(self) -> int:
        return self._avail.load(1)

    def avail_entry(self, slot: int) -> int:
        return self._avail.load(2 + slot)

    def used_idx(self) -> int:
        return self._used.load(1)

    def put_used(self, slot: int, head: int, length: int) -> None:
        self._used.put(1 + 2 * slot, head)
        self._used.put(2 + 2 * slot, length)

    def publish(self, idx: int) -> None:
        self._used.store(1, idx)

    def fence(self) -> None:
        rings.fence()

    def release(self) -> None:
        self._table.release()
        self._avail.release()
        self._used.release()
