"""Any interleaving of packets, reads and writes keeps credit, order and every byte, also where counters wrap."""

from __future__ import annotations

from collections import deque

from hsmvisord import limits
from hsmvisord.wire.virtio_vsock import HOST_CID, MASK, STREAM, Event, Op, Packet, State, Stream, Streams
from hypothesis import given, settings
from hypothesis import strategies as st

CID, PORT, GUEST_PORT = 1027, 9111, 5
BUFFER = 5000  #: of the guest

STEPS = st.lists(
    st.tuples(st.sampled_from(["guest-writes", "guest-reads", "we-write", "we-read", "to-us", "to-guest"]), st.integers(1, 9000)),
    max_size=300,
)


class Both:
    """A stream and its peer, with packets under way in both directions."""

    def __init__(self, start: int) -> None:
        self.streams = Streams(CID)
        self.to_us: deque[tuple[Packet, bytes]] = deque()
        self.to_guest: deque[tuple[Packet, bytes]] = deque()
        self.sent = self.forwarded = self.told = 0  # of the guest, not wrapped
        self.peer_buffer = self.peer_forwarded = 0
        self.start = start
        self.waiting = b""
        self.wrote, self.took = b"", b""  # guest to us
        self.we_wrote, self.guest_took = b"", b""
        self.say(Op.REQUEST)
        packet, data = self.to_us.popleft()
        stream = self.streams.receive(packet, data)
        assert stream is not None
        self.stream: Stream = stream
        self.streams.happened(stream, Event.ACCEPTED)
        stream.received = stream.forwarded = stream.told = stream.sent = stream.guest_forwarded = start
        self.flush()

    def say(self, op: Op, data: bytes = b"") -> None:
        forwarded = (self.start + self.forwarded) & MASK if op is not Op.REQUEST else 0
        self.told = self.forwarded
        self.to_us.append((Packet(CID, HOST_CID, GUEST_PORT, PORT, len(data), STREAM, op, 0, BUFFER, forwarded), data))

    def flush(self) -> None:
        while self.streams.owes:
            self.to_guest.append((self.streams.next_packet()[0], b""))

    def step(self, what: str, count: int) -> None:
        stream = self.stream
        match what:
            case "guest-writes":
                room = self.peer_buffer - (self.sent - self.peer_forwarded)
                data = bytes((self.sent + number) % 251 for number in range(min(count, room)))
                if data:
                    self.say(Op.RW, data)
                    self.sent += len(data)
                    self.wrote += data
            case "guest-reads":
                self.guest_took += self.waiting[:count]
                self.forwarded += min(count, len(self.waiting))
                self.waiting = self.waiting[count:]
                if self.forwarded - self.told > BUFFER // 4:
                    self.say(Op.CREDIT_UPDATE)
            case "we-write":
                data = bytes((len(self.we_wrote) + number) % 241 for number in range(min(count, stream.room)))
                if data:
                    self.flush()
                    self.to_guest.append((self.streams.data_packet(stream, len(data)), data))
                    self.we_wrote += data
                else:
                    self.streams.wants_credit(stream)
            case "we-read":
                self.took += bytes(stream.pending[:count])
                self.streams.passed_on(stream, min(count, len(stream.pending)))
            case "to-us":
                if self.to_us:
                    packet, data = self.to_us.popleft()
                    assert self.streams.receive(packet, data) is stream
            case "to-guest":
                self.flush()
                if self.to_guest:
                    self.deliver(*self.to_guest.popleft())
        assert stream.state is State.OPEN
        assert len(stream.pending) <= stream.buffer

    def deliver(self, packet: Packet, data: bytes) -> None:
        assert packet.op != Op.RST
        self.peer_buffer = packet.buf_alloc
        ahead = (packet.fwd_cnt - self.start - self.peer_forwarded) & MASK
        if packet.op != Op.RESPONSE:
            self.peer_forwarded += ahead
        assert self.peer_forwarded <= self.sent
        self.waiting += data
        assert len(self.waiting) <= BUFFER, "more than there is credit for"
        if packet.op == Op.CREDIT_REQUEST:
            self.say(Op.CREDIT_UPDATE)


@settings(max_examples=150, deadline=None)
@given(start=st.sampled_from([0, MASK, MASK - 3000, (1 << 31) - 100]), steps=STEPS)
def test_credit_and_order(start: int, steps: list[tuple[str, int]]) -> None:
    both = Both(start)
    for what, count in steps:
        both.step(what, count)
    for _ in range(3):  # whatever is left arrives
        while both.to_us or both.to_guest or both.streams.owes:
            both.step("to-us", 1)
            both.step("to-guest", 1)
        both.step("we-read", limits.STREAM_BUFFER)
        both.step("guest-reads", BUFFER)
    assert both.took == both.wrote
    assert both.guest_took == both.we_wrote
    both.say(Op.CREDIT_UPDATE)
    both.step("to-us", 1)
    assert both.stream.room == BUFFER, "credit was lost"


PACKETS = st.lists(
    st.tuples(
        st.sampled_from([CID, CID, CID, 3]), st.sampled_from([2, 2, 2, 3]), st.integers(1, 3), st.sampled_from([PORT, PORT, 7]),
        st.integers(0, 99), st.sampled_from([1, 1, 1, 1, 2]), st.integers(0, 9), st.integers(0, 7), st.integers(0, MASK),
        st.integers(0, MASK), st.sampled_from([0, 0, 0, 1]), st.sampled_from(list(Event)),
    ),
    max_size=80,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(packets=PACKETS)
def test_whatever_a_guest_sends(packets: list[tuple[int, ...]]) -> None:
    """Nothing is raised; what is kept stays bounded; nothing but RST is sent for what is not open."""
    streams = Streams(CID)
    for *fields, lie, event in packets:
        packet = Packet(*fields)
        stream = streams.receive(packet, bytes(packet.len + lie))
        if stream is not None and stream.state is State.REQUESTED:
            streams.happened(stream, Event.ACCEPTED if packet.dst_port == PORT else Event.REFUSED)
        local = (Event.LOCAL_QUIET, Event.LOCAL_DEAF, Event.LOCAL_GONE)
        if stream is not None and stream.state is not State.GONE and event in local:
            streams.happened(stream, event)  # type: ignore[arg-type]
        assert len(streams) <= 3
        assert all(one.room <= one.guest_buffer and len(one.pending) <= one.buffer for one in streams)
        if packet.flags & 1:
            while streams.owes:
                sent, _ = streams.next_packet()
                known = {(one.guest_port, one.our_port) for one in streams}
                assert (sent.src_cid, sent.dst_cid) == (HOST_CID, CID)
                assert sent.op == Op.RST or (sent.dst_port, sent.src_port) in known
    assert len(streams.resets) <= len(packets) * 2
