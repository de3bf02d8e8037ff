"""What a guest and its front-end say to a device: messages, chains of descriptors, packets.

An input is a row of steps, each begun by one byte: a message, a chain, a packet, or what happens here to a stream.
"""

from __future__ import annotations

import struct

from fuzz.harness import Input, block
from hsmvisord import limits
from hsmvisord.transport.vsock.front_end import change
from hsmvisord.transport.vsock.saved import Saved
from hsmvisord.wire import vhost_user
from hsmvisord.wire.vhost_user import HEADER, BrokenMessage, Request
from hsmvisord.wire.virtio_vsock import HOST_CID, PACKET, TRANSITIONS, Event, Op, Packet, State, Streams
from hsmvisord.wire.virtqueue import BadAddress, BrokenQueue, Virtqueue

INVARIANT = (
    "a message is decoded or BrokenMessage, and what a successor is told of it decodes to itself; a chain is bounded and inside of "
    "the memory or BrokenQueue; streams, what waits in them and RST stay within their limits, and a packet to the guest is of a "
    "stream that it knows, or RST; nothing else is raised"
)
MAX_LENGTH = 1500
CID, PORT, NUM, SIZE = 1027, 9111, 8, 4096

MESSAGE, CHAIN, PACKETS, LOCAL = range(4)


class Memory:
    """A ring of NUM descriptors in SIZE bytes, all of them the guest's."""

    num = NUM

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data[:SIZE].ljust(SIZE, b"\0"))
        self.completed = 0

    def _word(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 2], "little")

    def descriptor(self, index: int) -> bytes:
        assert 0 <= index < NUM
        return bytes(self.data[16 * index + 4 : 16 * index + 20])

    def avail_flags(self) -> int:
        return self._word(0)

    def avail_idx(self) -> int:
        return self._word(2)

    def avail_entry(self, slot: int) -> int:
        return self._word(4 + 16 * NUM + 2 * slot)

    def used_idx(self) -> int:
        return self.completed

    def put_used(self, slot: int, head: int, length: int) -> None:
        assert 0 <= slot < NUM and length <= limits.MAX_CHAIN

    def publish(self, idx: int) -> None:
        self.completed = idx

    def fence(self) -> None: ...

    def view(self, address: int, size: int) -> memoryview:
        if address + size > SIZE:
            raise BadAddress("outside")
        return memoryview(self.data)[address : address + size]


def hear(saved: Saved, text: bytes, descriptors: int) -> Saved:
    try:
        head = vhost_user.decode_head(text[: HEADER.size].ljust(HEADER.size, b"\0"))
        message = vhost_user.decode(head, text[HEADER.size :], list(range(100, 100 + descriptors)))
        made = change(saved, message, struct.pack("<Q", CID), lambda index: saved.rings[index].base)
    except BrokenMessage:
        return saved
    assert len(made.answer) <= HEADER.size + limits.MAX_VHOST_PAYLOAD
    again = Saved.decode(made.saved.encode(), made.saved.descriptors())
    assert again == made.saved
    return again


def walk(memory: Memory) -> None:
    queue = Virtqueue(memory, memory, 0)
    try:
        for _ in range(NUM):
            chain = queue.peek()
            if chain is None:
                break
            with chain:
                assert chain.readable_size + chain.writable_size <= limits.MAX_CHAIN
                assert len(chain.read(0, 1 << 32)) == chain.readable_size
                chain.write(bytes(min(44, chain.writable_size)))
                queue.complete(chain, chain.writable_size)
    except BrokenQueue:
        pass
    memory.data.append(0)  # BufferError: a view was kept


def receive(streams: Streams, text: bytes, cut: int) -> None:
    packet = Packet.decode(text[: PACKET.size].ljust(PACKET.size, b"\0"))
    stream = streams.receive(packet, bytes(max(0, min(packet.len, limits.MAX_CHAIN) - cut)))
    if stream is not None and stream.state is State.REQUESTED:
        streams.happened(stream, Event.ACCEPTED if packet.dst_port == PORT else Event.REFUSED)


def happen(streams: Streams, which: int, what: int) -> None:
    event = list(Event)[what % len(Event)]
    alive = list(streams)
    if not alive:
        return
    stream = alive[which % len(alive)]
    if event in (Event.LOCAL_QUIET, Event.LOCAL_DEAF, Event.LOCAL_GONE, Event.OVERDUE):
        if (stream.state, event) in TRANSITIONS:
            streams.happened(stream, event)
    elif event is Event.FLUSHED:
        streams.passed_on(stream, min(1000, len(stream.pending)))
    elif stream.room:
        assert len(streams.data_packet(stream, min(stream.room, what)).encode()) == PACKET.size
    else:
        streams.wants_credit(stream)


def run(data: bytes) -> None:
    given, saved, streams = Input(data), Saved(), Streams(CID)
    while given.more:
        head = given.byte()
        what, much = head & 3, head >> 2
        if what == MESSAGE:
            saved = hear(saved, given.block(), much % 12)
        elif what == CHAIN:
            walk(Memory(given.block()))
        elif what == PACKETS and not streams.full:
            receive(streams, given.take(PACKET.size), much >> 4)
        elif what == LOCAL:
            happen(streams, much, given.byte())
        assert len(streams) <= limits.MAX_STREAMS and len(streams.resets) <= limits.MAX_RESETS + limits.MAX_STREAMS
        assert all(len(stream.pending) <= stream.buffer for stream in streams)
        if much & 1:
            while streams.owes:
                sent, _ = streams.next_packet()
                known = {stream.key for stream in streams}
                assert sent.op == Op.RST or (sent.dst_port, sent.src_port) in known


# ---- seeds ------------------------------------------------------------------------------------------------------------


def message(request: int, payload: bytes = b"", descriptors: int = 0) -> bytes:
    return bytes((MESSAGE | descriptors << 2,)) + block(HEADER.pack(request, 9, len(payload)) + payload)


def packet(op: int, length: int = 0, flags: int = 0, port: int = PORT, forwarded: int = 0) -> bytes:
    return bytes((PACKETS,)) + Packet(CID, HOST_CID, 5, port, length, 1, op, flags, 65536, forwarded).encode()


def seeds() -> dict[str, bytes]:
    two = struct.Struct("<II").pack
    made = {
        "start": b"".join(
            (
                message(Request.GET_FEATURES), message(Request.SET_FEATURES, struct.pack("<Q", vhost_user.FEATURES)),
                message(Request.SET_MEM_TABLE, two(1, 0) + struct.pack("<QQQQ", 0, 4096, 0, 0), 1),
                message(Request.SET_VRING_NUM, two(1, 128)), message(Request.SET_VRING_BASE, two(1, 0)),
                message(Request.SET_VRING_ADDR, two(1, 0) + struct.pack("<QQQQ", 0, 1024, 2048, 0)),
                message(Request.SET_VRING_KICK, struct.pack("<Q", 1), 1), message(Request.SET_VRING_CALL, struct.pack("<Q", 1), 1),
                message(Request.SET_VRING_ENABLE, two(1, 1)), message(Request.GET_VRING_BASE, two(1, 0)),
                message(Request.GET_CONFIG, struct.pack("<III8x", 0, 8, 0)),
            )
        ),
        "stream": packet(Op.REQUEST) + packet(Op.RW, 100) + packet(Op.CREDIT_REQUEST) + packet(Op.SHUTDOWN, 0, 3),
        "half": packet(Op.REQUEST) + packet(Op.SHUTDOWN, 0, 2) + bytes((LOCAL, 6)) + packet(Op.RST),
        "refused": packet(Op.REQUEST, port=7) + packet(Op.RW, 9, port=7),
    }  # fmt: skip
    for event in range(len(Event)):
        made[f"local-{event}"] = packet(Op.REQUEST) + packet(Op.RW, 9) + bytes((LOCAL | 4, event)) + packet(Op.SHUTDOWN, 0, 1)
    table = struct.pack("<HH", 0, 2) + b"".join(struct.pack("<QIHH", 64 * n, 60, 1 if n < 3 else 2, n + 1) for n in range(NUM))
    made["chain"] = bytes((CHAIN,)) + block(table + struct.pack("<8H", 0, 4, *range(6)))
    return made
