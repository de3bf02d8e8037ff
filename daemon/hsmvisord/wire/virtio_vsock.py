"""virtio-vsock (virtio 1.2, 5.10): packets, the states of a stream, credit.  Sans-IO: packets and local events in, packets out.

A stream is known by (guest's port, our port).  Each side tells the other the size of its buffer and how much it has passed on, both
modulo 2**32; a sender never has more under way than that.  What a stream may do next stands in one table, `TRANSITIONS`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum, IntEnum, IntFlag
from typing import NamedTuple

from hsmvisord import limits

PACKET = struct.Struct("<QQIIIHHIII")  #: 44 bytes
HOST_CID = 2
STREAM = 1  #: type
MASK = 0xFFFFFFFF
WILL_NOT_RECEIVE, WILL_NOT_SEND = 1, 2  #: flags of SHUTDOWN
BOTH = WILL_NOT_RECEIVE | WILL_NOT_SEND


class Op(IntEnum):
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Packet(NamedTuple):
    """The header of one."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def decode(cls, data: bytes) -> Packet:
        return cls._make(PACKET.unpack(data))

    def encode(self) -> bytes:
        return PACKET.pack(*self)


class State(Enum):
    REQUESTED = "requested"  #: by the guest; whoever listens is asked
    OPEN = "open"
    ONLY_IN = "only-in"  #: nothing more goes to the guest
    ONLY_OUT = "only-out"  #: nothing more is taken from the guest
    ENDING = "ending"  #: we have told that it is over and wait for the guest's RST
    FLUSHING = "flushing"  #: both have told that it is over; what the guest sent before is passed on, then it gets RST
    GONE = "gone"


class Event(Enum):
    ACCEPTED = "somebody listens"
    REFUSED = "nobody listens, or there are too many"
    GUEST_QUIET = "SHUTDOWN: it will not send"
    GUEST_DEAF = "SHUTDOWN: it will not receive"
    GUEST_BYE = "SHUTDOWN: neither"
    GUEST_RST = "RST"
    VIOLATION = "a packet that must not be"
    LOCAL_QUIET = "the reader here will not send"
    LOCAL_DEAF = "the reader here will not receive"
    LOCAL_GONE = "neither"
    FLUSHED = "all that the guest sent is passed on"
    OVERDUE = "its end takes too long"


class Reaction(Enum):
    NOTHING = 0
    RESPONSE = 1
    RESET = 2
    TELL_QUIET = 3
    TELL_DEAF = 4
    TELL_BYE = 5


def _table() -> dict[tuple[State, Event], tuple[State, Reaction]]:
    s, e, r = State, Event, Reaction
    ends = {e.GUEST_RST: (s.GONE, r.NOTHING), e.VIOLATION: (s.GONE, r.RESET)}
    rows: dict[State, dict[Event, tuple[State, Reaction]]] = {
        s.REQUESTED: {e.ACCEPTED: (s.OPEN, r.RESPONSE), e.REFUSED: (s.GONE, r.RESET)},
        s.OPEN: {
            **ends,
            e.GUEST_QUIET: (s.ONLY_OUT, r.NOTHING),
            e.GUEST_DEAF: (s.ONLY_IN, r.NOTHING),
            e.GUEST_BYE: (s.FLUSHING, r.NOTHING),
            e.LOCAL_QUIET: (s.ONLY_IN, r.TELL_QUIET),
            e.LOCAL_DEAF: (s.ONLY_OUT, r.TELL_DEAF),
            e.LOCAL_GONE: (s.ENDING, r.TELL_BYE),
        },
        s.ONLY_OUT: {
            **ends,
            e.GUEST_QUIET: (s.ONLY_OUT, r.NOTHING),
            e.GUEST_DEAF: (s.FLUSHING, r.NOTHING),
            e.GUEST_BYE: (s.FLUSHING, r.NOTHING),
            e.LOCAL_QUIET: (s.FLUSHING, r.TELL_QUIET),  # a guest that is told more may send RST at once: what it sent would be lost
            e.LOCAL_DEAF: (s.ONLY_OUT, r.NOTHING),
            e.LOCAL_GONE: (s.ENDING, r.TELL_BYE),
        },
        s.ONLY_IN: {
            **ends,
            e.GUEST_QUIET: (s.FLUSHING, r.NOTHING),
            e.GUEST_DEAF: (s.ONLY_IN, r.NOTHING),
            e.GUEST_BYE: (s.FLUSHING, r.NOTHING),
            e.LOCAL_QUIET: (s.ONLY_IN, r.NOTHING),
            e.LOCAL_DEAF: (s.ENDING, r.TELL_BYE),
            e.LOCAL_GONE: (s.ENDING, r.TELL_BYE),
        },
        s.ENDING: {
            **ends,
            e.GUEST_QUIET: (s.ENDING, r.NOTHING),
            e.GUEST_DEAF: (s.ENDING, r.NOTHING),
            e.GUEST_BYE: (s.GONE, r.RESET),
            e.LOCAL_QUIET: (s.ENDING, r.NOTHING),
            e.LOCAL_DEAF: (s.ENDING, r.NOTHING),
            e.LOCAL_GONE: (s.ENDING, r.NOTHING),
            e.OVERDUE: (s.GONE, r.RESET),
        },
        s.FLUSHING: {
            **ends,
            e.GUEST_QUIET: (s.FLUSHING, r.NOTHING),
            e.GUEST_DEAF: (s.FLUSHING, r.NOTHING),
            e.GUEST_BYE: (s.FLUSHING, r.NOTHING),
            e.LOCAL_QUIET: (s.FLUSHING, r.NOTHING),
            e.LOCAL_DEAF: (s.GONE, r.RESET),
            e.LOCAL_GONE: (s.GONE, r.RESET),
            e.FLUSHED: (s.GONE, r.RESET),
            e.OVERDUE: (s.GONE, r.RESET),
        },
    }
    return {(state, event): then for state, row in rows.items() for event, then in row.items()}


TRANSITIONS = _table()  #: what is missing is a fault of ours
TAKES = {State.OPEN, State.ONLY_IN}  #: data of the guest is passed on
SENDS = {State.OPEN, State.ONLY_OUT}  #: data goes to the guest
LAST = {State.ENDING, State.FLUSHING}  #: states with an end in time


class Owed(IntFlag):
    """Packets without data that a stream has to send, in the order in which they go."""

    NOTHING = 0
    RESPONSE = 1
    CREDIT_REQUEST = 2
    CREDIT_UPDATE = 4
    SHUTDOWN = 8


_OPS = {
    Owed.RESPONSE: Op.RESPONSE,
    Owed.CREDIT_REQUEST: Op.CREDIT_REQUEST,
    Owed.CREDIT_UPDATE: Op.CREDIT_UPDATE,
    Owed.SHUTDOWN: Op.SHUTDOWN,
}


class Reset(NamedTuple):
    """An RST that is to be sent; `slot` is then given back (-1: none)."""

    guest_port: int
    our_port: int
    type: int = STREAM
    slot: int = -1


class Stream:
    """One stream, from REQUEST to GONE; changed by `Streams` alone."""

    __slots__ = (
        "buffer", "forwarded", "guest_buffer", "guest_forwarded", "guest_port", "our_port", "owed", "pending", "received",
        "sent", "shutdown", "slot", "state", "told",
    )  # fmt: skip

    def __init__(self, guest_port: int, our_port: int, buffer: int) -> None:
        self.guest_port, self.our_port = guest_port, our_port
        self.state = State.REQUESTED
        self.slot = -1
        self.owed = Owed.NOTHING
        self.shutdown = 0  #: flags that are told the guest
        self.buffer = buffer  #: buf_alloc
        self.received = 0  #: bytes from the guest, modulo 2**32 as all counters
        self.forwarded = 0  #: of them, passed on
        self.told = 0  #: `forwarded` as the guest knows it
        self.pending = bytearray()  #: from the guest, not passed on
        self.sent = 0
        self.guest_buffer = 0
        self.guest_forwarded = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.guest_port, self.our_port

    @property
    def room(self) -> int:
        """Returns how much may be sent to the guest."""
        if self.state not in SENDS:
            return 0
        return max(0, self.guest_buffer - ((self.sent - self.guest_forwarded) & MASK))


class Streams:
    """All streams of a guest."""

    def __init__(self, cid: int) -> None:
        self._cid = cid
        self._streams: dict[tuple[int, int], Stream] = {}
        self._owing: dict[tuple[int, int], Stream] = {}  #: have `owed`; the oldest first
        self._resets: deque[Reset] = deque()
        self._large = 0  #: streams with a large buffer

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    @property
    def resets(self) -> list[Reset]:
        """Returns those that wait."""
        return list(self._resets)

    @property
    def full(self) -> bool:
        """Whether so many RST wait that no packet of the guest shall be taken."""
        return len(self._resets) >= limits.MAX_RESETS

    def reset(self, resets: Iterable[Reset]) -> None:
        self._resets.extend(resets)

    def restore(self, stream: Stream) -> None:
        """Adds one that a predecessor had; raises ValueError on one that cannot be."""
        waiting = (stream.received - stream.forwarded) & MASK
        if stream.state in (State.REQUESTED, State.GONE) or stream.key in self._streams or len(self._streams) >= limits.MAX_STREAMS:
            raise ValueError("a stream that cannot be")
        if stream.buffer not in (limits.STREAM_BUFFER, limits.SMALL_STREAM_BUFFER) or waiting > stream.buffer:
            raise ValueError("a stream whose buffer cannot be")
        if len(stream.pending) > waiting:
            raise ValueError("a stream with more than it received")
        self._streams[stream.key] = stream
        self._large += stream.buffer == limits.STREAM_BUFFER
        if stream.owed:
            self._owing[stream.key] = stream

    # ---- packets of the guest -------------------------------------------------------------------------------------------

    def receive(self, packet: Packet, data: bytes) -> Stream | None:
        """Takes one packet, `data` being what its chain had of `packet.len` bytes; returns the stream that it changed.

        One that is REQUESTED then waits for `happened` with ACCEPTED or REFUSED.
        """
        if packet.src_cid != self._cid or packet.dst_cid != HOST_CID:
            return None  # not from this guest, or not to us: whoever it would be, has not asked
        key = packet.src_port, packet.dst_port
        if packet.type != STREAM:
            self._answer_stray(packet)  # 5.10.6.4.2: an unknown type gets RST
            return None
        stream = self._streams.get(key)
        if stream is None:
            if packet.op == Op.REQUEST and len(self._streams) < limits.MAX_STREAMS:
                return self._begin(packet)
            self._answer_stray(packet)
            return None
        self._take_credit(stream, packet)
        if len(data) != packet.len or not self._take(stream, packet, data):
            self.happened(stream, Event.VIOLATION)
        return stream

    def _begin(self, packet: Packet) -> Stream:
        large = self._large < limits.LARGE_STREAMS
        self._large += large
        stream = Stream(packet.src_port, packet.dst_port, limits.STREAM_BUFFER if large else limits.SMALL_STREAM_BUFFER)
        stream.guest_buffer = packet.buf_alloc
        self._streams[stream.key] = stream
        return stream

    def _answer_stray(self, packet: Packet) -> None:
        if packet.op != Op.RST:
            self._resets.append(Reset(packet.src_port, packet.dst_port, packet.type))

    def _take_credit(self, stream: Stream, packet: Packet) -> None:
        """A driver on several processors may send an older fwd_cnt after a newer: it goes neither back nor past what we sent."""
        stream.guest_buffer = packet.buf_alloc
        forward = (packet.fwd_cnt - stream.guest_forwarded) & MASK
        if forward <= (stream.sent - stream.guest_forwarded) & MASK:
            stream.guest_forwarded = packet.fwd_cnt
        if stream.owed & Owed.CREDIT_REQUEST and stream.room:
            self._owe_no_more(stream, Owed.CREDIT_REQUEST)

    def _take(self, stream: Stream, packet: Packet, data: bytes) -> bool:
        """Says whether the packet may be."""
        match packet.op:
            case Op.RW:
                return self._take_data(stream, data)
            case Op.CREDIT_REQUEST:
                self._owe(stream, Owed.CREDIT_UPDATE)
            case Op.CREDIT_UPDATE:
                pass
            case Op.SHUTDOWN:
                return self._take_shutdown(stream, packet.flags)
            case Op.RST:
                self.happened(stream, Event.GUEST_RST)
            case _:  # REQUEST and RESPONSE too: we ask for no stream, and this one is open
                return False
        return True

    def _take_data(self, stream: Stream, data: bytes) -> bool:
        if ((stream.received - stream.forwarded) & MASK) + len(data) > stream.buffer:
            return False
        stream.received = (stream.received + len(data)) & MASK
        if stream.state in TAKES:
            stream.pending += data
        else:
            self._passed_on(stream, len(data))  # it was under way when we told
        return True

    def _take_shutdown(self, stream: Stream, flags: int) -> bool:
        if not flags & BOTH:
            return False
        quiet, deaf = flags & WILL_NOT_SEND, flags & WILL_NOT_RECEIVE
        self.happened(stream, Event.GUEST_BYE if quiet and deaf else Event.GUEST_QUIET if quiet else Event.GUEST_DEAF)
        return True

    # ---- what happens here ----------------------------------------------------------------------------------------------

    def happened(self, stream: Stream, event: Event) -> None:
        """Raises KeyError when this cannot happen to the stream in its state."""
        stream.state, reaction = TRANSITIONS[stream.state, event]
        if event is Event.LOCAL_DEAF or event is Event.LOCAL_GONE:
            self._drop_pending(stream)
        match reaction:
            case Reaction.RESPONSE:
                self._owe(stream, Owed.RESPONSE)
            case Reaction.TELL_QUIET:
                self._tell(stream, WILL_NOT_SEND)
            case Reaction.TELL_DEAF:
                self._tell(stream, WILL_NOT_RECEIVE)
            case Reaction.TELL_BYE:
                self._tell(stream, BOTH)
            case Reaction.RESET:
                self._resets.append(Reset(stream.guest_port, stream.our_port, STREAM, stream.slot))
                stream.slot = -1
        if stream.state is State.GONE:
            self.forget(stream)
        elif stream.state is State.FLUSHING and not stream.pending:
            self.happened(stream, Event.FLUSHED)

    def forget(self, stream: Stream) -> None:
        """Without a word to the guest."""
        stream.state = State.GONE
        stream.pending.clear()
        stream.owed = Owed.NOTHING
        self._owing.pop(stream.key, None)
        if self._streams.pop(stream.key, None) is not None:
            self._large -= stream.buffer == limits.STREAM_BUFFER

    def forget_all(self) -> list[Reset]:
        """The driver has begun anew: nothing of before is of use.  Returns the RST that were not sent."""
        for stream in self:
            self.forget(stream)
        resets, self._resets = list(self._resets), deque()
        return resets

    def _tell(self, stream: Stream, flags: int) -> None:
        stream.shutdown |= flags
        self._owe(stream, Owed.SHUTDOWN)

    def _drop_pending(self, stream: Stream) -> None:
        dropped = len(stream.pending)
        stream.pending.clear()
        self._passed_on(stream, dropped)

    def passed_on(self, stream: Stream, count: int) -> None:
        """The first `count` bytes of `pending` have been taken."""
        del stream.pending[:count]
        self._passed_on(stream, count)
        if stream.state is State.FLUSHING and not stream.pending:
            self.happened(stream, Event.FLUSHED)

    def _passed_on(self, stream: Stream, count: int) -> None:
        stream.forwarded = (stream.forwarded + count) & MASK
        if (stream.forwarded - stream.told) & MASK >= stream.buffer // 4 and stream.state in (*TAKES, State.ONLY_OUT, State.ENDING):
            self._owe(stream, Owed.CREDIT_UPDATE)

    def wants_credit(self, stream: Stream) -> None:
        """There is data for the guest, and no room."""
        if stream.state in SENDS:
            self._owe(stream, Owed.CREDIT_REQUEST)

    def _owe(self, stream: Stream, owed: Owed) -> None:
        stream.owed |= owed
        self._owing[stream.key] = stream

    def _owe_no_more(self, stream: Stream, owed: Owed) -> None:
        stream.owed &= ~owed
        if not stream.owed:
            self._owing.pop(stream.key, None)

    # ---- packets to the guest -------------------------------------------------------------------------------------------

    @property
    def owes(self) -> bool:
        """Whether a packet without data waits; it goes before any data."""
        return bool(self._resets or self._owing)

    def next_packet(self) -> tuple[Packet, int]:
        """Returns a packet that waits, and the slot that is free once the guest has it, or -1; only when `owes`."""
        if self._resets:
            reset = self._resets.popleft()
            packet = Packet(HOST_CID, self._cid, reset.our_port, reset.guest_port, 0, reset.type, Op.RST, 0, 0, 0)
            return packet, reset.slot
        stream = next(iter(self._owing.values()))
        owed = Owed(stream.owed & -stream.owed)
        self._owe_no_more(stream, owed)
        flags = stream.shutdown if owed is Owed.SHUTDOWN else 0
        return self._packet(stream, _OPS[owed], flags, 0), -1

    def data_packet(self, stream: Stream, length: int) -> Packet:
        """Returns the header of `length` bytes of data that go now; at most `stream.room`."""
        stream.sent = (stream.sent + length) & MASK
        return self._packet(stream, Op.RW, 0, length)

    def _packet(self, stream: Stream, op: Op, flags: int, length: int) -> Packet:
        stream.told = stream.forwarded
        if stream.owed & Owed.CREDIT_UPDATE:  # every packet tells it
            self._owe_no_more(stream, Owed.CREDIT_UPDATE)
        return Packet(
            HOST_CID, self._cid, stream.our_port, stream.guest_port, length, STREAM, op, flags, stream.buffer, stream.forwarded
        )
