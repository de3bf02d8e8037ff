"""vsock in a guest of this process, over a FakeFrontEnd: streams as its kernel has them, and what its programs read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hsmvisord.wire.virtio_vsock import BOTH, HOST_CID, MASK, STREAM, Op, Packet
from support.fake_frontend import PORT, WITHIN, FakeFrontEnd


@dataclass
class GuestStream:
    """A stream as a guest's kernel has it; `took` is what its program has read."""

    guest: Guest
    port: int
    peer_port: int
    buffer: int
    start: int = 0  #: of both counters, as far as the guest decides them
    state: str = "requested"
    received: int = 0
    forwarded: int = 0
    told: int = 0
    sent: int = 0
    peer_buffer: int = 0
    peer_forwarded: int = 0
    shutdown: int = 0  #: flags that the device told
    reads: bool = True  #: as soon as data comes
    took: bytearray = field(default_factory=bytearray)
    waiting: bytearray = field(default_factory=bytearray)

    def packet(self, op: int, length: int = 0, flags: int = 0, **other: int) -> Packet:
        self.told = self.forwarded
        packet = Packet(
            self.guest.front.cid, HOST_CID, self.port, self.peer_port, length, STREAM, op, flags, self.buffer, self.forwarded & MASK
        )  # fmt: skip
        return packet._replace(**other)

    def say(self, op: int, data: bytes = b"", flags: int = 0, **other: int) -> None:
        self.guest.front.transmit(self.packet(op, len(data), flags, **other), data)

    @property
    def room(self) -> int:
        return self.peer_buffer - ((self.sent - self.peer_forwarded) & MASK)

    def write(self, data: bytes) -> None:
        """All of it, as credit comes."""
        view, done = memoryview(data), 0
        while done < len(data):
            while not self.room and self.state == "open":
                self.guest.wait()
            assert self.state == "open", self.state
            part = bytes(view[done : done + min(self.room, self.guest.front.tx_size)])
            self.say(Op.RW, part)
            self.sent += len(part)
            done += len(part)
            while self.guest.step(0):
                pass

    def read(self, count: int) -> None:
        """A program of the guest reads so much of what waits."""
        part = self.waiting[:count]
        del self.waiting[:count]
        self.took += part
        self.forwarded += len(part)
        if self.forwarded - self.told >= self.buffer // 4 or not self.waiting:
            self.say(Op.CREDIT_UPDATE)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.guest.wait()

    def close(self) -> None:
        self.say(Op.SHUTDOWN, flags=BOTH)
        self.until(lambda: self.state == "gone")


class Guest:
    """Programs of a guest, in the test's own thread; packets that the device sends are taken by `step`."""

    def __init__(self, front: FakeFrontEnd, buffer: int = 65536) -> None:
        self.front, self.buffer = front, buffer
        self.streams: dict[tuple[int, int], GuestStream] = {}
        self.stray: list[Packet] = []
        self._port = 1023

    def request(self, port: int = PORT, buffer: int = 0) -> GuestStream:
        self._port += 1
        stream = GuestStream(self, self._port, port, buffer or self.buffer)
        self.streams[stream.port, port] = stream
        stream.say(Op.REQUEST)
        return stream

    def connect(self, port: int = PORT, buffer: int = 0) -> GuestStream:
        stream = self.request(port, buffer)
        stream.until(lambda: stream.state != "requested")
        return stream

    def wait(self) -> None:
        assert self.step(WITHIN), "the device does not go on"

    def step(self, within: float) -> bool:
        came = self.front.receive(within)
        if came is None:
            return False
        packet, data = came
        assert (packet.src_cid, packet.dst_cid) == (HOST_CID, self.front.cid)
        stream = self.streams.get((packet.dst_port, packet.src_port))
        if stream is None or stream.state == "gone" or packet.type != STREAM:
            self.stray.append(packet)
            return True
        if packet.op != Op.RST:
            stream.peer_buffer = packet.buf_alloc
            assert (packet.fwd_cnt - stream.peer_forwarded) & MASK <= (stream.sent - stream.peer_forwarded) & MASK
            stream.peer_forwarded = packet.fwd_cnt
        match packet.op:
            case Op.RESPONSE:
                assert stream.state == "requested"
                stream.state = "open"
            case Op.RST:
                stream.state = "refused" if stream.state == "requested" else "gone"
            case Op.RW:
                stream.received += len(data)
                assert stream.received - stream.forwarded <= stream.buffer, "more than there is credit for"
                assert not stream.shutdown & 2, "data after SHUTDOWN"
                stream.waiting += data
                if stream.reads:
                    stream.read(len(data))
            case Op.SHUTDOWN:
                stream.shutdown |= packet.flags
                if stream.shutdown == BOTH:
                    stream.say(Op.RST)
                    stream.state = "gone"
            case Op.CREDIT_REQUEST:
                stream.say(Op.CREDIT_UPDATE)
            case Op.CREDIT_UPDATE:
                pass
            case _:
                raise AssertionError(packet)
        return True
