"""Guests and front-ends that do what they must not: the device ends with a reason, and nothing of it is left."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hsmvisord.wire.vhost_user import FEATURES, HEADER, Request
from hsmvisord.wire.virtio_vsock import HOST_CID, Op, Packet
from support.fake_frontend import CID, GUEST_BASE, NEXT, PORT, USER_BASE, WRITE, FakeFrontEnd, Refused, sealed_memory
from support.vsock_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    with open("/proc/self/maps", encoding="ascii") as maps:
        left = sum("/memfd:guest" in line for line in maps)
    rig.close()
    assert left == 1 or rig.why is None, "memory stays mapped"


def send_chain(front: FakeFrontEnd, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    ring = front.rings[1]
    for index, descriptor in enumerate(descriptors):
        ring.describe(index, *descriptor)
    ring.add(head)
    front.kick(1)


def buffers(front: FakeFrontEnd, *descriptors: tuple[int, int, int, int]) -> None:
    """The guest's only buffers, and a packet that wants one."""
    ring = front.rings[0]
    ring.added = 0
    for index, descriptor in enumerate(descriptors):
        ring.describe(index, *descriptor)
    for slot in range(front.num):
        ring.words_avail.store(2 + slot, 0)
    front.transmit(Packet(CID, HOST_CID, 5, PORT, 0, 1, Op.RW, 0, 0, 0))


def too_many(front: FakeFrontEnd) -> None:
    front.rings[1].words_avail.store(1, front.rings[1].added + front.num + 1)
    front.kick(1)


CHAINS: dict[str, tuple[Callable[[FakeFrontEnd], None], str]] = {
    "loop": (lambda f: send_chain(f, (GUEST_BASE, 1, NEXT, 1), (GUEST_BASE, 1, NEXT, 0)), "more than 128 descriptors"),
    "head": (lambda f: send_chain(f, head=128), "descriptor 128 of 128"),
    "next": (lambda f: send_chain(f, (GUEST_BASE, 1, NEXT, 65535)), "descriptor 65535 of 128"),
    "below": (lambda f: send_chain(f, (GUEST_BASE - 1, 44, 0, 0)), "not the guest's memory"),
    "across": (lambda f: send_chain(f, (GUEST_BASE + f.size - 43, 44, 0, 0)), "not the guest's memory"),
    "wraps": (lambda f: send_chain(f, ((1 << 64) - 1, 44, 0, 0)), "not the guest's memory"),
    "user-address": (lambda f: send_chain(f, (USER_BASE, 44, 0, 0)), "not the guest's memory"),
    "long": (lambda f: send_chain(f, (GUEST_BASE, 0xFFFFFFFF, 0, 0)), "more than 1048576 bytes"),
    "short": (lambda f: send_chain(f, (GUEST_BASE, 43, 0, 0)), "a packet of 43 bytes"),
    "writable": (lambda f: send_chain(f, (GUEST_BASE, 44, WRITE, 0)), "a packet of 0 bytes"),
    "order": (lambda f: send_chain(f, (GUEST_BASE, 4, WRITE | NEXT, 1), (GUEST_BASE, 44, 0, 0)), "readable descriptor behind"),
    "indirect": (lambda f: send_chain(f, (GUEST_BASE, 16, 4, 0)), "indirect"),
    "count": (too_many, "129 chains are said to wait"),
    "small-buffer": (lambda f: buffers(f, (GUEST_BASE, 43, WRITE, 0)), "a buffer of 43 bytes for a packet of 44"),
    "read-only-buffer": (lambda f: buffers(f, (GUEST_BASE, 4096, 0, 0)), "a buffer of 0 bytes for a packet of 44"),
    "buffer-outside": (lambda f: buffers(f, (0, 4096, WRITE, 0)), "not the guest's memory"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(rig: Rig, name: str) -> None:
    does, why = CHAINS[name]
    rig.boot()
    other = rig.guest.connect()
    sock = rig.service.next()
    assert other.state == "open"
    does(rig.front)
    assert why in rig.ended()
    assert sock.recv(9) == b""
    assert not rig.keys()


def test_lengths_that_lie_cost_the_stream_alone(rig: Rig) -> None:
    rig.boot()
    for length in (1, 4097, 0xFFFFFFFF):
        stream = rig.guest.connect()
        rig.front.transmit(stream.packet(Op.RW, length))
        stream.until(lambda stream=stream: stream.state == "gone")  # type: ignore[misc]
    assert rig.guest.connect().state == "open"


def table(regions: list[tuple[int, int, int, int]]) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)


@pytest.mark.parametrize(
    ("regions", "seals", "why"),
    [
        ([(0, 1 << 16, 0, 0)], 0, "not sealed against shrinking"),
        ([(0, 1 << 16, 0, 0)], 4, "not sealed against shrinking"),
        ([(0, (1 << 16) + 1, 0, 0)], 7, "cannot be mapped"),
        ([(0, 1 << 16, 0, 4096)], 7, "cannot be mapped"),
        ([(0, 4096, 0, 1 << 63)], 7, "cannot be mapped"),
        ([(0, 1 << 63, 0, 0)], 7, "cannot be mapped"),
        ([(0, 0, 0, 0)], 7, "overlap or are empty"),
        ([(0, 8192, 0, 0), (4096, 4096, 1 << 20, 8192)], 7, "overlap or are empty"),
        ([(0, 4096, 0, 0), (1 << 20, 4096, 4095, 8192)], 7, "overlap or are empty"),
        ([((1 << 64) - 4095, 4096, 0, 0)], 7, "beyond the end"),
    ],
)
def test_tables_of_memory(rig: Rig, regions: list[tuple[int, int, int, int]], seals: int, why: str) -> None:
    fd = sealed_memory(1 << 16, seals)
    with pytest.raises(Refused, match="SET_MEM_TABLE"):
        rig.front.sure(Request.SET_MEM_TABLE, table(regions), [fd] * len(regions))
    assert why in rig.ended()
    os.close(fd)


def test_memory_that_is_no_memfd(rig: Rig) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        with pytest.raises(Refused):
            rig.front.sure(Request.SET_MEM_TABLE, table([(0, 4096, 0, 0)]), [file.fileno()])
    assert "memfd" in rig.ended()


def place(table: int = 0, used: int = 0x6000, avail: int = 0x5000, num: int = 128) -> Callable[[FakeFrontEnd], None]:
    def set_ring(front: FakeFrontEnd) -> None:
        front.send(Request.SET_FEATURES, struct.pack("<Q", FEATURES))
        front.set_memory()
        front.send(Request.SET_VRING_NUM, struct.pack("<II", 1, num))
        front.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, USER_BASE + table, USER_BASE + used, USER_BASE + avail, 0))
        front.send(Request.SET_VRING_KICK, struct.pack("<Q", 1), [front.kicks[1]])
        front.send(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1))

    return set_ring


def message(request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> Callable[[FakeFrontEnd], None]:
    def send(front: FakeFrontEnd) -> None:
        socket.send_fds(front.sock, [HEADER.pack(request, flags, len(payload)) + payload], [front.fd] * fds)

    return send


def kick_by(fd: Callable[[], int]) -> Callable[[FakeFrontEnd], None]:
    def kick(front: FakeFrontEnd) -> None:
        front.kicks[1] = fd()
        place()(front)

    return kick


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def half(front: FakeFrontEnd) -> None:
    front.sock.send(HEADER.pack(2, 1, 8) + b"1234")


def no_ring(front: FakeFrontEnd) -> None:
    front.send(Request.SET_FEATURES, u64(FEATURES))
    front.set_memory()
    front.send(Request.SET_VRING_KICK, u64(1), [front.kicks[1]])
    front.send(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1))


u64 = struct.Struct("<Q").pack
MESSAGES: dict[str, tuple[Callable[[FakeFrontEnd], None], str]] = {
    "unknown": (message(6, bytes(16)), "message 6 is not known"),
    "size": (message(2, bytes(9)), "SET_FEATURES with 9 bytes"),
    "oversize": (message(2, bytes(513)), "of 513 bytes"),
    "version": (message(1, flags=2), "flags 0x2"),
    "reply": (message(1, flags=5), "flags 0x5"),
    "features": (message(2, u64(FEATURES | 1 << 29)), "features 0x"),
    "protocol-features": (message(16, u64(1 << 12)), "protocol features 0x1000"),
    "ring": (message(8, struct.pack("<II", 2, 8)), "ring 2"),
    "descriptors": (message(5, struct.pack("<II", 1, 0) + bytes(32), fds=9), "more than 8 descriptors"),
    "no-descriptor": (message(5, struct.pack("<II", 1, 0) + bytes(32)), "1 regions of memory with 0 descriptors"),
    "half": (half, "not whole after 1 s"),
    "no-memory": (no_ring, "a ring of 0 descriptors"),
    "ring-outside": (place(table=1 << 40), "outside of the guest's memory"),
    "ring-below": (place(avail=-2), "outside of the guest's memory"),
    "ring-unaligned": (place(used=0x6002), "not aligned to 4 bytes"),
    "avail-unaligned": (place(avail=0x5001), "not aligned to 2 bytes"),
    "kick-is-a-file": (kick_by(lambda: os.open("/etc/hostname", os.O_RDONLY)), "cannot be waited for"),
    "kick-is-closed": (kick_by(closed_pipe), "closed at its other end"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(rig: Rig, name: str) -> None:
    does, why = MESSAGES[name]
    rig.front.begin()
    does(rig.front)
    assert why in rig.ended()


def test_a_front_end_that_takes_no_answers(rig: Rig) -> None:
    rig.front.sock.setblocking(False)
    until = time.monotonic() + 10
    while rig.why is None and time.monotonic() < until:
        try:
            rig.front.send(Request.GET_FEATURES)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            time.sleep(0.01)
    assert "takes no answers" in rig.ended()


def test_calls_that_would_block(rig: Rig) -> None:
    """An eventfd at its most, and a pipe that is full."""
    rig.boot()
    full = os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    reader, writer = os.pipe()
    for fd in (full, writer):
        rig.front.send(Request.SET_VRING_CALL, u64(0), [fd])
        rig.front.settled()
        for _ in range(100):
            rig.front.transmit(Packet(CID, HOST_CID, 5, PORT, 0, 1, Op.RW, 0, 0, 0))
    rig.front.settled()
    for fd in (full, reader, writer):
        os.close(fd)


def test_memory_that_changes_under_our_feet(rig: Rig) -> None:
    """Another processor scribbles over rings, descriptors and packets: the device goes on, or ends with a reason."""
    for seed in range(6):
        mine = Rig().boot()
        stop = threading.Event()

        def scribble(mine: Rig = mine, stop: threading.Event = stop, seed: int = seed) -> None:
            memory, number = mine.front.memory, seed
            while not stop.is_set():
                number = (number * 1103515245 + 12345) & 0x7FFFFFFF
                at = mine.front.tx_place(0) + number % 4000 if seed & 1 else 0x10000 + number % (16 * 128)
                memory[at] = number >> 16 & 0xFF

        thread = threading.Thread(target=scribble)
        thread.start()
        packet = Packet(CID, HOST_CID, 5, PORT, 0, 1, Op.RW, 0, 0, 0)
        until = time.monotonic() + 0.5
        while time.monotonic() < until and mine.why is None:
            if mine.front.free:
                mine.front.transmit(packet)
            mine.front.free = list(range(64))
            mine.front.receive(0)
        stop.set()
        thread.join()
        if mine.why is None:
            mine.front.settled()
        assert not (mine.why or "").startswith("fault"), mine.why
        mine.close()


@pytest.mark.parametrize("seed", range(8))
def test_messages_by_chance(seed: int) -> None:
    """Valid messages in any order, some with a byte changed: never a fault."""
    import random

    rng = random.Random(seed)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        rig = Rig()
        rig.front.load_driver()
        rig.front.sock.setblocking(False)
        payload, _ = rig.front.table()
        known: list[tuple[int, bytes, int]] = [
            (Request.SET_FEATURES, u64(FEATURES), 0), (Request.SET_MEM_TABLE, payload, rig.front.fd),
            *((Request.SET_VRING_NUM, struct.pack("<II", i, 128), 0) for i in (0, 1)),
            *((Request.SET_VRING_BASE, struct.pack("<II", i, 0), 0) for i in (0, 1)),
            *((Request.SET_VRING_ENABLE, struct.pack("<II", i, 1), 0) for i in (0, 1)),
            *((Request.SET_VRING_KICK, u64(i), rig.front.kicks[i]) for i in (0, 1)),
            *((Request.SET_VRING_CALL, u64(i), rig.front.calls[i]) for i in (0, 1)),
            *((Request.GET_VRING_BASE, struct.pack("<II", i, 0), 0) for i in (0, 1)),
            *((Request.SET_VRING_ADDR, struct.pack(
                "<IIQQQQ", i, 0, *(USER_BASE + at for at in (r.table, r.used, r.avail)), 0), 0)
              for i, r in enumerate(rig.front.rings)),
        ]  # fmt: skip
        try:
            for _ in range(60):
                request, body, fd = rng.choice(known)
                if rng.random() < 0.03 and body:
                    at = rng.randrange(len(body))
                    body = body[:at] + rng.randbytes(1) + body[at + 1 :]
                rig.front.send(request, body, [fd] if fd else [], rng.choice((0, 8)))
        except OSError:
            pass
        time.sleep(0.02)
        rig.device.close()
        assert not (rig.why or "").startswith("fault"), rig.why
        rig.close()
