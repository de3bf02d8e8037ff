"""vhost-user messages, chains of descriptors, and the streams' table: what is taken, at each limit and one past it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hsmvisord import limits
from hsmvisord.wire import vhost_user
from hsmvisord.wire.vhost_user import BrokenMessage, Head, Request
from hsmvisord.wire.virtio_vsock import LAST, SENDS, TAKES, TRANSITIONS, Event, Reaction, State
from hsmvisord.wire.virtqueue import INDIRECT, NEXT, WRITE, BadAddress, BrokenQueue, Virtqueue


def decode(request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> vhost_user.Message:
    head = vhost_user.decode_head(vhost_user.HEADER.pack(request, flags, len(payload)))
    return vhost_user.decode(head, payload, list(fds))


u64, two = struct.Struct("<Q").pack, struct.Struct("<II").pack


def table(count: int, rows: int | None = None) -> bytes:
    return two(count, 0) + struct.pack("<QQQQ", 0, 4096, 0, 0) * (count if rows is None else rows)


@pytest.mark.parametrize(
    ("request_", "good", "bad"),
    [
        (Request.SET_VRING_NUM, (two(1, limits.MAX_RING), ()), (two(1, 2 * limits.MAX_RING), ())),
        (Request.SET_VRING_NUM, (two(0, 1), ()), (two(0, 0), ())),
        (Request.SET_VRING_NUM, (two(0, 64), ()), (two(0, 65), ())),
        (Request.SET_VRING_NUM, (two(1, 64), ()), (two(2, 64), ())),
        (Request.SET_VRING_BASE, (two(1, 0xFFFF), ()), (two(1, 0x10000), ())),
        (Request.SET_VRING_ENABLE, (two(1, 1), ()), (two(1, 2), ())),
        (Request.SET_VRING_KICK, (u64(1), (5,)), (u64(1), ())),
        (Request.SET_VRING_KICK, (u64(1), (5,)), (u64(0x101), ())),
        (Request.SET_VRING_CALL, (u64(0x101), ()), (u64(0x101), (5,))),
        (Request.SET_VRING_CALL, (u64(0), (5,)), (u64(0), (5, 6))),
        (Request.SET_VRING_CALL, (u64(1), (5,)), (u64(2), (5,))),
        (Request.SET_VRING_ERR, (u64(1), (5,)), (u64(0x201), (5,))),
        (Request.SET_VRING_ADDR, (two(1, 0) + bytes(32), ()), (two(1, 1) + bytes(32), ())),
        (Request.SET_MEM_TABLE, (table(8), range(8)), (table(9), range(9))),
        (Request.SET_MEM_TABLE, (table(1, 8), (5,)), (table(0, 8), ())),
        (Request.SET_MEM_TABLE, (table(2), (5, 6)), (table(2), (5,))),
        (Request.SET_MEM_TABLE, (table(2), (5, 6)), (table(2, 1), (5, 6))),
        (Request.GET_CONFIG, (struct.pack("<III256x", 0, 256, 0), ()), (struct.pack("<III257x", 0, 257, 0), ())),
        (Request.GET_CONFIG, (struct.pack("<III8x", 0, 8, 0), ()), (struct.pack("<III7x", 0, 8, 0), ())),
        (Request.GET_FEATURES, (b"", ()), (b"\0", ())),
        (Request.SET_OWNER, (b"", ()), (b"", (5,))),
        (Request.SET_FEATURES, (u64(1), ()), (u64(1)[:7], ())),
    ],
)
def test_messages(request_: Request, good: tuple[bytes, Sequence[int]], bad: tuple[bytes, Sequence[int]]) -> None:
    assert decode(request_, *good).request is request_
    with pytest.raises(BrokenMessage):
        decode(request_, *bad)


def test_heads() -> None:
    assert vhost_user.decode_head(vhost_user.HEADER.pack(1, 9, limits.MAX_VHOST_PAYLOAD)) == Head(1, 9, limits.MAX_VHOST_PAYLOAD)
    for flags, size in ((1, limits.MAX_VHOST_PAYLOAD + 1), (0, 0), (2, 0), (5, 0)):
        with pytest.raises(BrokenMessage):
            vhost_user.decode_head(vhost_user.HEADER.pack(1, flags, size))
    with pytest.raises(BrokenMessage):
        decode(6)  # SET_LOG_BASE was not offered


def test_need_reply_is_for_messages_without_an_answer() -> None:
    assert decode(Request.SET_OWNER, flags=9).need_reply
    assert not decode(Request.SET_OWNER).need_reply
    assert not decode(Request.GET_FEATURES, flags=9).need_reply


def test_config_beyond_its_end_is_refused() -> None:
    config = vhost_user.Config(0, 8, 0)
    assert vhost_user.reply_config(config, b"12345678") == struct.pack("<IIIIII8s", 24, 5, 20, 0, 8, 0, b"12345678")
    assert vhost_user.reply_config(config._replace(size=9), b"12345678") == struct.pack("<III", 24, 5, 0)


# ---- chains ---------------------------------------------------------------------------------------------------------------

SIZE = 1 << 21


class Plain:
    """A ring and memory of one process."""

    def __init__(self, num: int = 8) -> None:
        self.num, self.idx, self.used = num, 0, 0
        self.table = [(0, 0, 0, 0)] * num
        self.avail, self.elements = [0] * num, [(0, 0)] * num
        self.memory = bytearray(SIZE)
        self.fences = self.flags = 0

    def descriptor(self, index: int) -> bytes:
        return struct.pack("<QIHH", *self.table[index])

    def avail_flags(self) -> int:
        return self.flags

    def avail_idx(self) -> int:
        return self.idx

    def avail_entry(self, slot: int) -> int:
        return self.avail[slot]

    def used_idx(self) -> int:
        return self.used

    def put_used(self, slot: int, head: int, length: int) -> None:
        self.elements[slot] = head, length

    def publish(self, idx: int) -> None:
        self.used = idx

    def fence(self) -> None:
        self.fences += 1

    def view(self, address: int, size: int) -> memoryview:
        if address + size > SIZE:
            raise BadAddress("outside")
        return memoryview(self.memory)[address : address + size]

    def chain(self, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
        self.table[: len(descriptors)] = descriptors
        self.avail[self.idx % self.num] = head
        self.idx = (self.idx + 1) & 0xFFFF


def test_a_chain_is_read_and_written_across_its_buffers() -> None:
    ring = Plain()
    ring.memory[:6] = b"abcdef"
    ring.chain((0, 2, NEXT, 1), (9, 0, NEXT, 2), (2, 4, NEXT, 3), (10, 3, NEXT | WRITE, 4), (20, 5, WRITE, 0))
    queue = Virtqueue(ring, ring, 0)
    with queue.peek() or pytest.fail() as chain:
        assert (chain.readable_size, chain.writable_size) == (6, 8)
        assert [chain.read(*part) for part in ((0, 6), (1, 3), (2, 99), (6, 1), (0, 0))] == [b"abcdef", b"bcd", b"cdef", b"", b""]
        chain.write(b"1234567")
        room = chain.room(2, 4)
        assert [len(view) for view in room] == [1, 3]
        for view in room:
            view[:] = b"x" * len(view)
            view.release()
        with pytest.raises(BrokenQueue, match="8 bytes for a packet of 9"):
            chain.write(bytes(9))
        queue.complete(chain, 7)
    assert (ring.memory[10:13], ring.memory[20:25]) == (b"12x", b"xxx7\0")
    assert (ring.used, ring.elements[0], queue.peek()) == (1, (0, 7), None)
    ring.memory.append(0)  # nobody holds it
    assert queue.wants_signal() and ring.fences == 1
    ring.flags = 1
    assert not queue.wants_signal()


def chain_of(count: int) -> list[tuple[int, int, int, int]]:
    return [(0, 1, NEXT if number < count - 1 else 0, number + 1) for number in range(count)]


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        (chain_of(8), [*chain_of(8)[:7], (0, 1, NEXT, 0)], "more than 8 descriptors"),
        (chain_of(1), [(0, 1, NEXT, 0)], "more than 8 descriptors"),
        ([(0, 1, NEXT, 7)], [(0, 1, NEXT, 8)], "descriptor 8 of 8"),
        ([(0, limits.MAX_CHAIN, 0, 0)], [(0, limits.MAX_CHAIN + 1, 0, 0)], "more than"),
        ([(0, 0xFFFF, NEXT, 1), (0, 1, 0, 0)], [(0, limits.MAX_CHAIN, NEXT, 1), (0, 1, 0, 0)], "more than"),
        ([(SIZE - 4, 4, WRITE, 0)], [(SIZE - 4, 5, WRITE, 0)], "outside"),
        ([(0, 4, 0, 0)], [((1 << 64) - 4, 4, 0, 0)], "outside"),
        ([(0, 4, NEXT, 1), (0, 4, WRITE, 0)], [(0, 4, NEXT | WRITE, 1), (0, 4, 0, 0)], "readable"),
        ([(0, 16, 0, 0)], [(0, 16, INDIRECT, 0)], "indirect"),
    ],
)
def test_chains(good: list[tuple[int, int, int, int]], bad: list[tuple[int, int, int, int]], why: str) -> None:
    for descriptors, fails in ((good, False), (bad, True)):
        ring = Plain()
        ring.chain(*descriptors)
        if fails:
            with pytest.raises(BrokenQueue, match=why):
                Virtqueue(ring, ring, 0).peek()
        else:
            with Virtqueue(ring, ring, 0).peek() or pytest.fail():
                pass
        ring.memory.append(0)  # nobody holds it


def test_heads_and_counts_of_a_ring() -> None:
    ring = Plain()
    ring.chain((0, 1, 0, 0), head=8)
    with pytest.raises(BrokenQueue, match="descriptor 8 of 8"):
        Virtqueue(ring, ring, 0).peek()
    for idx, base, waiting in ((8, 0, 8), (3, 0xFFFE, 5), (0xFFFF, 0xFFFF, 0)):
        ring.idx = idx
        assert Virtqueue(ring, ring, base).available() == waiting
    for idx, base in ((9, 0), (0xFFFF, 0), (0, 1)):
        ring.idx = idx
        with pytest.raises(BrokenQueue, match="said to wait"):
            Virtqueue(ring, ring, base).available()


# ---- states ---------------------------------------------------------------------------------------------------------------


def test_every_state_knows_every_event_that_can_happen_in_it() -> None:
    anywhere = set(Event) - {Event.ACCEPTED, Event.REFUSED, Event.FLUSHED, Event.OVERDUE}
    for state in State:
        known = {event for of, event in TRANSITIONS if of is state}
        match state:
            case State.GONE:
                assert not known
            case State.REQUESTED:
                assert known == {Event.ACCEPTED, Event.REFUSED}
            case State.FLUSHING:
                assert known == anywhere | {Event.FLUSHED, Event.OVERDUE}
            case State.ENDING:
                assert known == anywhere | {Event.OVERDUE}
            case _:
                assert known == anywhere


def test_no_state_goes_back() -> None:
    order = list(State)
    for (state, _), (then, _) in TRANSITIONS.items():
        assert then is state or (order.index(then) > order.index(state) and (TAKES | SENDS) - {state} != {then})
        assert not (state is State.ONLY_IN and then is State.ONLY_OUT)


def test_a_stream_that_ends_here_tells_the_guest() -> None:
    for (state, event), (then, reaction) in TRANSITIONS.items():
        if then is State.GONE:
            assert (reaction is Reaction.NOTHING) == (event is Event.GUEST_RST)
        if then in LAST and state not in LAST and event.name.startswith("LOCAL"):
            assert reaction is not Reaction.NOTHING
