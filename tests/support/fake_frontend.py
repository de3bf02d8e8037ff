"""A front-end, a driver and a guest in this process: sealed memory, kicks and calls, the driver's side of the rings, vsock."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

from hsmvisord.rings.rings import Words
from hsmvisord.transport.vsock import keys as stream_keys
from hsmvisord.wire.vhost_user import FEATURES, HEADER, PROTOCOL_FEATURES, Request
from hsmvisord.wire.virtio_vsock import PACKET, Packet

CID = 1027
PORT = 9111
WITHIN = 5.0  #: seconds for whatever is awaited

GUEST_BASE, USER_BASE = 0x4000_0000, 0x7F12_3400_0000
SEALS = 7  #: SEAL, SHRINK, GROW
NEED_REPLY, REPLY = 8, 4
TO_GUEST, FROM_GUEST = 0, 1
NEXT, WRITE = 1, 2

_RING_AREA = 0x10000
_DATA_AREA = 2 * _RING_AREA


def sealed_memory(size: int, seals: int = SEALS, name: str = "guest") -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def key_memory() -> int:
    return sealed_memory(stream_keys.SIZE, name="keys")


class Refused(Exception):
    """The device answered with an error, or not at all."""


class DriverRing:
    """The driver's side of one ring."""

    def __init__(self, memory: memoryview, index: int, num: int) -> None:
        self.num, start = num, index * _RING_AREA
        self.table, self.avail, self.used = start, start + 0x5000, start + 0x6000
        self.memory = memory
        self.words_avail = Words(memory[self.avail : self.avail + 4 + 2 * num], 2)
        self.words_used = Words(memory[self.used : self.used + 4 + 8 * num], 4)
        self.added = self.seen = 0

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        place = self.table + 16 * index
        self.memory[place : place + 16] = struct.pack("<QIHH", address, length, flags, following)

    def add(self, head: int) -> None:
        self.words_avail.store(2 + self.added % self.num, head)
        self.added = (self.added + 1) & 0xFFFF
        self.words_avail.store(1, self.added)

    def take(self) -> tuple[int, int] | None:
        """Returns (head, length) of a used chain."""
        if self.words_used.load(1) == self.seen:
            return None
        place = self.used + 4 + 8 * (self.seen % self.num)
        head, length = struct.unpack("<II", bytes(self.memory[place : place + 8]))
        self.seen = (self.seen + 1) & 0xFFFF
        return head, length

    def begin_at(self, index: int) -> None:
        """As after so many chains."""
        self.added = self.seen = index
        self.words_avail.store(1, index)
        self.words_used.store(1, index)

    def release(self) -> None:
        self.words_avail.release()
        self.words_used.release()


class FakeFrontEnd:
    """Speaks as QEMU 7.2 does, and is a driver of one buffer for each chain to the guest and two for each from it."""

    def __init__(self, num: int = 128, rx_size: int = 4096, tx_size: int = 4096, size: int = 0) -> None:
        """`size`: bytes of memory, if more than is used."""
        self.cid = CID  #: that the device must have
        self.num, self.rx_size, self.tx_size = num, rx_size, tx_size
        used = _DATA_AREA + num * rx_size + num * (PACKET.size + tx_size)
        self.size = max(size, -(-used // 4096) * 4096)
        self.fd = sealed_memory(self.size)
        self._mapped = mmap.mmap(self.fd, self.size)
        self.memory = memoryview(self._mapped)
        self.sock, self.device_sock = socket.socketpair()
        self.sock.settimeout(WITHIN)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.rings = [DriverRing(self.memory, index, num) for index in range(2)]
        self.refill = True
        self.free: list[int] = []
        self.regions = ((GUEST_BASE, self.size, USER_BASE, 0),)

    # ---- messages ---------------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        socket.send_fds(self.sock, [HEADER.pack(request, 1 | flags, len(payload)) + payload], list(fds))

    def answer(self) -> bytes:
        try:
            head = self.sock.recv(HEADER.size, socket.MSG_WAITALL)
        except OSError:
            head = b""
        if len(head) < HEADER.size:
            raise Refused("no answer")
        _, flags, size = HEADER.unpack(head)
        assert flags == 1 | REPLY
        return self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        self.send(request, payload, fds)
        return self.answer()

    def sure(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """With need_reply."""
        self.send(request, payload, fds, NEED_REPLY)
        if self.answer() != bytes(8):
            raise Refused(Request(request).name)

    def settled(self) -> None:
        """All messages before have been carried out."""
        self.ask(Request.GET_FEATURES)

    def begin(self) -> None:
        """As when QEMU starts."""
        assert struct.unpack("<Q", self.ask(Request.GET_FEATURES)) == (FEATURES,)
        assert struct.unpack("<Q", self.ask(Request.GET_PROTOCOL_FEATURES)) == (PROTOCOL_FEATURES,)
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", PROTOCOL_FEATURES))
        assert self.ask(Request.GET_QUEUE_NUM) == struct.pack("<Q", 2)
        self.send(Request.SET_OWNER)
        for index in range(2):
            self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])
            with self.temporary() as fd:
                self.send(Request.SET_VRING_ERR, struct.pack("<Q", index), [fd])
        config = self.ask(Request.GET_CONFIG, struct.pack("<III8x", 0, 8, 0))
        assert struct.unpack("<12xQ", config) == (self.cid,)

    @staticmethod
    @contextlib.contextmanager
    def temporary():  # type: ignore[no-untyped-def]
        fd = os.eventfd(0)
        yield fd
        os.close(fd)

    def table(self) -> tuple[bytes, list[int]]:
        rows = b"".join(struct.pack("<QQQQ", *region) for region in self.regions)
        return struct.pack("<II", len(self.regions), 0) + rows, [self.fd] * len(self.regions)

    def set_memory(self) -> None:
        self.sure(Request.SET_MEM_TABLE, *self.table())

    def set_ring(self, index: int, base: int, num: int | None = None, user: int = USER_BASE) -> None:
        ring = self.rings[index]
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, num or self.num))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, base))
        places = (user + ring.table, user + ring.used, user + ring.avail)
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *places, 0))
        self.send(Request.SET_VRING_KICK, struct.pack("<Q", index), [self.kicks[index]])

    def start(self, bases: tuple[int, int] = (0, 0)) -> None:
        """As when a driver starts, or the machine goes on."""
        for index in (1, 0):
            self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])
        self.send(Request.SET_FEATURES, struct.pack("<Q", FEATURES))
        self.set_memory()
        for index in range(2):
            self.set_ring(index, bases[index])
        for index in range(2):
            self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        for index in range(2):
            self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])

    def stop(self) -> tuple[int, int]:
        """As when the machine stops, or its driver does; returns the bases."""
        for index in range(2):
            self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        bases = [struct.unpack("<II", self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0)))[1] for index in range(2)]
        for index in range(2):
            self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])
        return bases[0], bases[1]

    # ---- the driver -------------------------------------------------------------------------------------------------------

    def load_driver(self, at: int = 0) -> None:
        """Its rings begin anew; `at`: as if so many chains had been before."""
        for ring in self.rings:
            self.memory[ring.table : ring.table + _RING_AREA] = bytes(_RING_AREA)
            ring.begin_at(at)
        self.free = list(range(self.num // 2))
        for slot in range(self.num):
            self.add_buffer(slot)

    def add_buffer(self, slot: int) -> None:
        self.rings[TO_GUEST].describe(slot, GUEST_BASE + self.rx_place(slot), self.rx_size, WRITE)
        self.rings[TO_GUEST].add(slot)

    def rx_place(self, slot: int) -> int:
        return _DATA_AREA + slot * self.rx_size

    def tx_place(self, slot: int) -> int:
        return _DATA_AREA + self.num * self.rx_size + slot * (PACKET.size + self.tx_size)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def transmit(self, packet: Packet | bytes, data: bytes = b"", kick: bool = True) -> None:
        """One packet: its header in one descriptor, its data in another."""
        head = packet if isinstance(packet, bytes) else packet.encode()
        until = time.monotonic() + WITHIN
        while not self.reclaim():
            assert time.monotonic() < until, "the device takes no packets"
            select.select([self.calls[FROM_GUEST]], [], [], 0.05)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.calls[FROM_GUEST])
        slot = self.free.pop()
        place, ring = self.tx_place(slot), self.rings[FROM_GUEST]
        self.memory[place : place + len(head) + len(data)] = head + data
        ring.describe(2 * slot, GUEST_BASE + place, len(head), NEXT if data else 0, 2 * slot + 1)
        if data:
            ring.describe(2 * slot + 1, GUEST_BASE + place + len(head), len(data))
        ring.add(2 * slot)
        if kick:
            self.kick(FROM_GUEST)

    def reclaim(self) -> int:
        """Returns how many packets may be sent now."""
        while (used := self.rings[FROM_GUEST].take()) is not None:
            self.free.append(used[0] // 2)
        return len(self.free)

    def receive(self, within: float = WITHIN) -> tuple[Packet, bytes] | None:
        """Returns the next packet from the device, woken by its calls alone."""
        ring, until = self.rings[TO_GUEST], time.monotonic() + within
        while (used := ring.take()) is None:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.calls[TO_GUEST]], [], [], left)[0]:
                assert within < WITHIN or ring.take() is None, "a packet without a call"
                return None
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.calls[TO_GUEST])
        head, length = used
        place = self.rx_place(head)
        raw = bytes(self.memory[place : place + length])
        if self.refill:
            self.add_buffer(head)
            self.kick(TO_GUEST)
        packet = Packet.decode(raw[: PACKET.size])
        assert length == PACKET.size + packet.len
        return packet, raw[PACKET.size :]

    def remap(self) -> None:
        """The same memory elsewhere: another file, other user addresses."""
        other = sealed_memory(self.size)
        mapped = mmap.mmap(other, self.size)
        mapped[:] = self._mapped[:]
        self.release_memory()
        os.close(self.fd)
        self.fd, self._mapped, self.memory = other, mapped, memoryview(mapped)
        for index, old in enumerate(self.rings):
            ring = DriverRing(self.memory, index, self.num)
            ring.added, ring.seen = old.added, old.seen
            self.rings[index] = ring

    def release_memory(self) -> None:
        for ring in self.rings:
            ring.release()
            ring.memory = memoryview(b"")
        self.memory.release()
        self._mapped.close()

    def close(self) -> None:
        self.sock.close()
        self.release_memory()
        for fd in (self.fd, *self.kicks, *self.calls):
            os.close(fd)
