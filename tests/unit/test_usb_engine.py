"""One USB function: what chapter 9 asks, transfers that wait and end, the reader and the channels behind it; its limits."""

from __future__ import annotations

import pytest
from hsmvisord import limits
from hsmvisord.transport.usb.engine import Engine, Overload
from hsmvisord.wire.usb import Done, Setup, Status, Urb
from support.usb_rig import DESCRIPTORS, FakeFunction, new_engine

OK, STALL, INVALID, CANCELLED = Status.OK, Status.STALL, Status.INVALID, Status.CANCELLED
READER_OUT, READER_IN, READER_INTERRUPT = 0x01, 0x81, 0x82
CHANNEL, OUT, IN = 4, 6, 0x86  #: one channel and its endpoints


class Bus:
    """Who says what to the engine, by short names."""

    def __init__(self) -> None:
        self.engine, self.function = new_engine()
        self.idents = 0

    def control(self, kind: int, request: int, value: int = 0, index: int = 0, length: int = 0, data: bytes = b"") -> Done:
        """One control transfer; it ends at once."""
        self.idents += 1
        size = len(data) or length
        self.engine.submit(Urb(self.idents, 0, size, data, Setup(kind, request, value, index, size)))
        ended = self.engine.take_done()
        assert ended[-1][:2] == (self.idents, 0)
        return ended[-1]

    def asks(self, kind: int, request: int, value: int = 0, index: int = 0, length: int = 64) -> bytes | Status:
        """What a control transfer IN brings, or how else it ended."""
        done = self.control(kind, request, value, index, length)
        return done.data if done.status is OK else done.status

    def sets(self, kind: int, request: int, value: int = 0, index: int = 0) -> Status:
        return self.control(kind, request, value, index).status

    def read(self, endpoint: int, room: int) -> int:
        self.idents += 1
        self.engine.submit(Urb(self.idents, endpoint, room))
        return self.idents

    def write(self, endpoint: int, data: bytes) -> int:
        self.idents += 1
        self.engine.submit(Urb(self.idents, endpoint, len(data), data))
        return self.idents

    def ended(self) -> list[tuple[int, Status, bytes | int]]:
        """What ended: number, how, and data or how much was written."""
        done = self.engine.take_done()
        return [(one.ident, one.status, one.data if one.endpoint & 0x80 else one.length) for one in done]


@pytest.fixture
def bus() -> Bus:
    bus = Bus()
    assert bus.sets(0x00, 9, 1) is OK
    bus.function.said.clear()
    return bus


@pytest.fixture
def channel(bus: Bus) -> Bus:
    assert bus.sets(0x01, 11, 1, CHANNEL) is OK
    bus.function.said.clear()
    return bus


def message(data: bytes = b"", length: int | None = None) -> bytes:
    """One to the reader (CCID 1.10, 6.1)."""
    size = len(data) if length is None else length
    return b"\x6f" + size.to_bytes(4, "little") + bytes(5) + data


# ---- chapter 9 ----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_configured() -> None:
    bus = Bus()
    assert bus.asks(0x80, 6, 0x0100, 0, 18) == DESCRIPTORS.device
    assert bus.asks(0x80, 8) == b"\0"
    assert bus.asks(0x80, 0) == b"\x01\x00"
    assert bus.asks(0x82, 0, 0, 0) == b"\0\0"
    assert bus.sets(0x00, 5, 17) is OK  # SET_ADDRESS is the transport's
    for asked in ((0x81, 0, 0, 0), (0x82, 0, 0, 0x81), (0x81, 10, 0, 0), (0xA1, 2, 0, 0)):
        assert bus.asks(*asked) is STALL
    for told in ((0x01, 11, 0, 1), (0x01, 11, 1, 1), (0x02, 1, 0, 0x81), (0x02, 3, 0, 0x81)):
        assert bus.sets(*told) is STALL
    first = bus.read(READER_IN, 64), bus.read(READER_INTERRUPT, 8), bus.write(READER_OUT, message())
    assert bus.ended() == [(first[0], INVALID, b""), (first[1], INVALID, b""), (first[2], INVALID, 0)]
    assert bus.function.said == []


@pytest.mark.parametrize("length", [0, 1, 8, 9, 17, 18, 64, 0xFFFF])
def test_descriptors_of_any_length(length: int) -> None:
    bus = Bus()
    assert bus.asks(0x80, 6, 0x0100, 0, length) == DESCRIPTORS.device[:length]
    assert bus.asks(0x80, 6, 0x0200, 0, length) == DESCRIPTORS.configuration[:length]
    assert bus.asks(0x80, 6, 0x0300, 0, length) == b"\x04\x03\x09\x04"[:length]
    assert bus.asks(0x80, 6, 0x0600, 0, length) is STALL


def test_an_answer_fits_in_its_transfer() -> None:
    bus = Bus()
    bus.engine.submit(Urb(1, 0, 10, b"", Setup(0x80, 6, 0x0100, 0, 18)))
    assert bus.engine.take_done() == [Done(1, 0, OK, DESCRIPTORS.device[:10])]


@pytest.mark.parametrize(
    ("kind", "request_", "value", "index"),
    [
        (0x00, 9, 2, 0),  # a configuration that there is not
        (0x00, 9, 0x0101, 0),
        (0x00, 7, 0x0100, 0),  # SET_DESCRIPTOR
        (0x00, 3, 1, 0),  # remote wakeup, which it has not
        (0x00, 1, 1, 0),
        (0x00, 3, 2, 0x0100),  # TEST_MODE
        (0x00, 2, 0, 0),
        (0x00, 0xFF, 0, 0),
        (0x01, 11, 1, 0),  # the reader has one alternate setting
        (0x01, 11, 2, 1),
        (0x01, 11, 0, 13),
        (0x01, 11, 0x0101, 1),
        (0x01, 11, 1, 0x0101),
        (0x02, 3, 0, 0x80),  # the control pipe is never halted
        (0x02, 3, 0, 0x03),  # a closed channel's
        (0x02, 3, 1, 0x81),
        (0x02, 1, 0, 0x0181),
        (0x02, 12, 0, 0x81),  # SYNCH_FRAME
        (0x03, 9, 1, 0),
        (0x40, 9, 1, 0),
        (0x21, 2, 0, 1),  # a request of the reader's class, to a channel
        (0x22, 2, 0, 0),
    ],
)
def test_what_stalls_and_changes_nothing(bus: Bus, kind: int, request_: int, value: int, index: int) -> None:
    assert bus.sets(kind, request_, value, index) is STALL
    assert bus.asks(0x80, 8) == b"\x01"
    assert bus.function.said == []
    assert bus.asks(0x82, 0, 0, 0x81) == b"\0\0"


def test_a_stall_of_the_control_pipe_ends_with_the_next_setup(bus: Bus) -> None:
    assert bus.sets(0x00, 9, 7) is STALL
    assert bus.asks(0x80, 8) == b"\x01"


def test_requests_of_the_readers_class(bus: Bus) -> None:
    assert bus.asks(0xA1, 2, 0, 0) == b"clocks"
    assert bus.asks(0xA1, 2, 0, 0, 3) == b"clo"
    assert bus.asks(0xA1, 3, 0, 0) is STALL
    assert bus.control(0x21, 2, 0, 0, data=b"abc") == Done(bus.idents, 0, OK, b"", 3)
    assert bus.function.said == ["class request 2", "class request 2", "class request 3", "class request 2"]


def test_configuration_and_alternate_settings() -> None:
    bus = Bus()
    assert bus.sets(0x00, 9, 1) is OK
    assert bus.engine.configuration == 1
    assert bus.sets(0x01, 11, 1, 5) is OK
    assert [bus.asks(0x81, 10, 0, n) for n in (0, 4, 5, 12, 13)] == [b"\0", b"\0", b"\x01", b"\0", STALL]
    assert bus.sets(0x01, 11, 1, 5) is OK  # a fresh connection
    assert bus.sets(0x00, 9, 1) is OK  # begins anew
    assert bus.asks(0x81, 10, 0, 5) == b"\0"
    assert bus.sets(0x01, 11, 1, 12) is OK
    assert bus.sets(0x01, 11, 0, 12) is OK
    assert bus.sets(0x01, 11, 0, 12) is OK
    assert bus.sets(0x01, 11, 1, 1) is OK
    assert bus.sets(0x00, 9, 0) is OK
    assert bus.asks(0x80, 8) == b"\0"
    assert bus.function.said == [
        "configured", "open 5", "close 5", "open 5", "close 5", "card off", "configured", "open 12", "close 12", "open 1",
        "close 1", "card off",
    ]  # fmt: skip


def test_a_channel_that_cannot_be_opened(bus: Bus) -> None:
    assert bus.sets(0x01, 11, 1, CHANNEL) is OK
    bus.function.refuses.add(CHANNEL)
    waits = bus.read(IN, 10)
    assert bus.sets(0x01, 11, 1, CHANNEL) is STALL
    assert bus.asks(0x81, 10, 0, CHANNEL) == b"\0"
    refused = bus.read(IN, 10)
    assert bus.ended() == [(refused, INVALID, b"")]
    assert waits != refused and bus.function.said == ["open 4", "close 4"]


# ---- resets -------------------------------------------------------------------------------------------------------------


def test_resets_before_anything() -> None:
    bus = Bus()
    for _ in range(6):
        bus.engine.reset()
    assert bus.function.said == [] and bus.ended() == []
    assert bus.sets(0x00, 9, 1) is OK


def test_a_reset_ends_all_that_waits(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 3
    waiting = [bus.read(READER_IN, 64), bus.read(READER_INTERRUPT, 8), bus.read(IN, 64), bus.write(OUT, b"12345")]
    bus.write(READER_OUT, message(length=1000) + bytes(502))  # the first half of a message
    assert bus.ended() == [(bus.idents, OK, 512)]
    bus.engine.reset()
    ended = {(ident, status) for ident, status, _ in bus.ended()}
    assert ended == {(ident, CANCELLED) for ident in waiting}
    assert bus.engine.parked == (0, 0) and bus.engine.configuration == 0
    assert bus.function.said == ["close 4", "card off"]
    bus.engine.reset()
    assert bus.function.said == ["close 4", "card off"]
    assert bus.sets(0x00, 9, 1) is OK
    bus.write(READER_OUT, message(b"fresh"))
    assert bus.function.messages == [message(b"fresh")]


def test_what_ended_before_a_reset_is_told_still(channel: Bus) -> None:
    bus = channel
    sent = bus.write(OUT, b"abc")
    bus.engine.reset()
    assert bus.ended() == [(sent, OK, 3)]


def test_answers_and_notices_of_before_are_gone_after_it(bus: Bus) -> None:
    bus.engine.ccid_answer(b"answer")
    bus.engine.ccid_notify(b"\x50\x03")
    bus.engine.reset()
    bus.engine.ccid_answer(b"late")
    bus.engine.ccid_notify(b"\x50\x02")
    assert bus.sets(0x00, 9, 1) is OK
    bus.read(READER_IN, 64)
    bus.read(READER_INTERRUPT, 8)
    assert bus.ended() == []


# ---- the reader ---------------------------------------------------------------------------------------------------------


def test_a_message_and_its_answer(bus: Bus) -> None:
    waits = bus.read(READER_IN, 512)
    sent = bus.write(READER_OUT, message(b"select"))
    assert bus.function.messages == [message(b"select")]
    assert bus.ended() == [(sent, OK, 16)]
    bus.engine.ccid_answer(b"answer")
    assert bus.ended() == [(waits, OK, b"answer")]


def test_a_reader_that_answers_at_once(bus: Bus) -> None:
    bus.function.answers_at_once = True
    reads = [bus.read(READER_IN, 512) for _ in range(3)]
    writes = [bus.write(READER_OUT, message(bytes([n]))) for n in range(4)]
    ended = bus.ended()
    assert [one for one in ended if one[0] in writes] == [(ident, OK, 11) for ident in writes]
    assert [one for one in ended if one[0] in reads] == [(ident, OK, message(bytes([n]))) for n, ident in enumerate(reads)]
    assert bus.read(READER_IN, 512) and bus.ended() == [(bus.idents, OK, message(b"\x03"))]


@pytest.mark.parametrize("size", [10, 11, 511, 512, 513, 1024, 1536, 5000, limits.MAX_CCID_MESSAGE])
def test_messages_in_pieces(bus: Bus, size: int) -> None:
    """A transfer goes on after a full packet; the empty packet that may come after the last full one is no message."""
    whole = message(bytes(n % 251 for n in range(size - 10)))
    for step in (512, 1024, 1 << 20):
        for at in range(0, size, step):
            bus.write(READER_OUT, whole[at : at + step])
        if size % 512 == 0:
            bus.write(READER_OUT, b"")
    assert bus.function.messages == [whole] * 3
    assert {status for _, status, _ in bus.ended()} == {OK}


@pytest.mark.parametrize(
    "parts",
    [
        [b"\x6f"],
        [message(b"abc")[:9]],
        [message(length=1)],  # ends before it is whole
        [message(length=600) + bytes(502), bytes(97)],
        [message(length=502 + 512) + bytes(502), b""],
        [message(b"abc") + b"d"],  # goes on after it is whole
        [message() + message()],
        [message(length=502) + bytes(502 + 512)],
        [message(length=limits.MAX_CCID_MESSAGE - 9) + bytes(502)],  # too long, by its head
        [message(length=0xFFFFFFFF) + bytes(502)],
    ],
    ids=range(10),
)
def test_messages_that_halt_the_endpoint(bus: Bus, parts: list[bytes]) -> None:
    for part in parts:
        bus.write(READER_OUT, part)
    assert [status for _, status, _ in bus.ended()] == [OK] * (len(parts) - 1) + [STALL]
    assert bus.function.messages == []
    assert bus.asks(0x82, 0, 0, READER_OUT) == b"\x01\0"
    again = bus.write(READER_OUT, message(b"x"))
    assert bus.ended() == [(again, STALL, 0)]
    assert bus.sets(0x02, 1, 0, READER_OUT) is OK
    bus.write(READER_OUT, message(b"x"))
    assert bus.function.messages == [message(b"x")], "nothing of before is in it"


def test_the_longest_message_and_one_past_it(bus: Bus) -> None:
    longest = message(bytes(limits.MAX_CCID_MESSAGE - 10))
    bus.write(READER_OUT, longest)
    bus.write(READER_OUT, message(bytes(limits.MAX_CCID_MESSAGE - 9)))
    assert [status for _, status, _ in bus.ended()] == [OK, STALL]
    assert bus.function.messages == [longest]


def test_the_interface_begins_anew(bus: Bus) -> None:
    bus.write(READER_OUT, message(length=1000) + bytes(502))
    assert bus.sets(0x02, 3, 0, READER_IN) is OK
    assert bus.sets(0x01, 11, 0, 0) is OK
    assert bus.asks(0x82, 0, 0, READER_IN) == b"\0\0"
    bus.write(READER_OUT, message(b"x"))
    assert bus.function.messages == [message(b"x")]


@pytest.mark.parametrize("requests", [[1], [3, 1]], ids=["cleared", "halted and cleared"])
def test_a_halt_that_is_cleared_drops_half_a_message(bus: Bus, requests: list[int]) -> None:
    """As a driver does it after a program that ended in the middle of one."""
    bus.write(READER_OUT, message(length=1000) + bytes(502))
    for request in requests:
        assert bus.sets(0x02, request, 0, READER_OUT) is OK
    bus.write(READER_OUT, message(b"x"))
    assert bus.function.messages == [message(b"x")]


def test_an_answer_in_pieces(bus: Bus) -> None:
    answer = bytes(n % 251 for n in range(1200))
    bus.engine.ccid_answer(answer)
    bus.engine.ccid_answer(b"next")
    for room in (512, 512, 512, 512):
        bus.read(READER_IN, room)
    assert [data for _, _, data in bus.ended()] == [answer[:512], answer[512:1024], answer[1024:], b"next"]


@pytest.mark.parametrize("room", [1024, 1025, 65556])
def test_an_answer_of_full_packets(bus: Bus, room: int) -> None:
    """Whoever reads knows from its head how long it is: no empty packet follows a transfer that it filled."""
    bus.engine.ccid_answer(bytes(1024))
    one, two = bus.read(READER_IN, room), bus.read(READER_IN, room)
    assert bus.ended() == [(one, OK, bytes(1024))]
    bus.engine.ccid_answer(b"next")
    assert bus.ended() == [(two, OK, b"next")]


def test_a_transfer_without_room_brings_nothing_and_takes_nothing(channel: Bus) -> None:
    bus = channel
    bus.engine.ccid_notify(b"\x50\x03")
    bus.engine.ccid_answer(b"answer")
    bus.function.feed(CHANNEL, b"data")
    for endpoint, data in ((READER_INTERRUPT, b"\x50\x03"), (READER_IN, b"answer"), (IN, b"data")):
        none, some = bus.read(endpoint, 0), bus.read(endpoint, 64)
        assert bus.ended() == [(none, OK, b""), (some, OK, data)]
    assert bus.write(OUT, b"") and bus.ended() == [(bus.idents, OK, 0)]


def test_answers_that_nobody_reads(bus: Bus) -> None:
    """The reader takes no message more until one is read; what asks for time meanwhile has its limit too."""
    bus.function.answers_at_once = True
    sent = [bus.write(READER_OUT, message(bytes([n]))) for n in range(limits.MAX_CCID_ANSWERS + 2)]
    assert [ident for ident, _, _ in bus.ended()] == sent[:-2]
    assert len(bus.function.messages) == limits.MAX_CCID_ANSWERS and bus.engine.parked[0] == 2
    read = bus.read(READER_IN, 512)
    assert bus.ended() == [(read, OK, message(b"\0")), (sent[-2], OK, 11)]
    for _ in range(limits.MAX_CCID_ANSWERS):
        bus.engine.ccid_answer(b"more time")
    with pytest.raises(Overload, match="nobody reads"):
        bus.engine.ccid_answer(b"more time")


def test_the_newest_notice(bus: Bus) -> None:
    bus.engine.ccid_notify(b"\x50\x03")
    bus.engine.ccid_notify(b"\x50\x02")
    one, two = bus.read(READER_INTERRUPT, 8), bus.read(READER_INTERRUPT, 8)
    assert bus.ended() == [(one, OK, b"\x50\x02")]
    bus.engine.ccid_notify(b"\x50\x03")
    assert bus.ended() == [(two, OK, b"\x50\x03")]


def test_notices_keep_until_the_halt_is_cleared(bus: Bus) -> None:
    waits = bus.read(READER_INTERRUPT, 8)
    bus.engine.submit(Urb(99, 0, 0, b"", Setup(0x02, 3, 0, READER_INTERRUPT, 0)))
    assert bus.ended() == [(waits, STALL, b""), (99, OK, 0)]
    bus.engine.ccid_notify(b"\x50\x03")
    refused = bus.read(READER_INTERRUPT, 8)
    assert bus.ended() == [(refused, STALL, b"")]
    assert bus.sets(0x02, 1, 0, READER_INTERRUPT) is OK
    told = bus.read(READER_INTERRUPT, 8)
    assert bus.ended() == [(told, OK, b"\x50\x03")]


# ---- channels -----------------------------------------------------------------------------------------------------------


def test_bytes_out(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 4
    one, two = bus.write(OUT, b"abcdef"), bus.write(OUT, b"ghi")
    assert bus.ended() == [] and bus.engine.parked == (2, 9)
    bus.function.make_room(CHANNEL, 3)
    assert bus.ended() == [(one, OK, 6)]
    bus.function.make_room(CHANNEL, 100)
    assert bus.ended() == [(two, OK, 3)]
    assert bus.function.took[CHANNEL] == b"abcdefghi" and bus.engine.parked == (0, 0)


def test_bytes_in(channel: Bus) -> None:
    bus = channel
    one, two = bus.read(IN, 4), bus.read(IN, 512)
    bus.function.feed(CHANNEL, b"abcdef")
    assert bus.ended() == [(one, OK, b"abcd"), (two, OK, b"ef")]
    bus.function.feed(CHANNEL, bytes(512))  # as a full packet and an empty one would be
    three = bus.read(IN, 1024)
    assert bus.ended() == [(three, OK, bytes(512))]


def test_the_end_of_a_connection(channel: Bus) -> None:
    bus = channel
    waits = [bus.read(IN, 64) for _ in range(2)]
    bus.function.feed(CHANNEL, b"")
    assert bus.ended() == []
    bus.function.end(CHANNEL)
    assert bus.ended() == [(ident, STALL, b"") for ident in waits]
    assert bus.asks(0x82, 0, 0, IN) == b"\x01\0"
    assert bus.read(IN, 64) and bus.ended() == [(bus.idents, STALL, b"")]
    assert bus.sets(0x02, 1, 0, IN) is OK
    assert bus.read(IN, 64) and bus.ended() == [(bus.idents, STALL, b"")], "it has ended still"
    assert bus.sets(0x01, 11, 1, CHANNEL) is OK
    fresh = bus.read(IN, 64)
    bus.function.feed(CHANNEL, b"hello")
    assert bus.ended() == [(fresh, OK, b"hello")]


def test_the_last_bytes_come_before_the_end(channel: Bus) -> None:
    bus = channel
    bus.function.feed(CHANNEL, b"last")
    bus.function.end(CHANNEL)
    one, two = bus.read(IN, 64), bus.read(IN, 64)
    assert bus.ended() == [(one, OK, b"last"), (two, STALL, b"")]


def test_a_channel_that_closes_ends_what_waits(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 2
    one, two = bus.read(IN, 64), bus.write(OUT, b"abc")
    bus.engine.submit(Urb(99, 0, 0, b"", Setup(0x01, 11, 0, CHANNEL, 0)))
    assert set(bus.ended()) == {(one, CANCELLED, b""), (two, CANCELLED, 2), (99, OK, 0)}
    assert bus.function.said == ["close 4"]
    gone = bus.read(IN, 64)
    assert bus.ended() == [(gone, INVALID, b"")]
    bus.engine.readable(CHANNEL)  # told of late
    bus.engine.writable(CHANNEL)


def test_halts_of_a_channel(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 1
    waits = bus.write(OUT, b"abc")
    bus.engine.submit(Urb(99, 0, 0, b"", Setup(0x02, 3, 0, OUT, 0)))
    assert bus.ended() == [(waits, STALL, 1), (99, OK, 0)]
    bus.function.make_room(CHANNEL, 100)
    assert bus.sets(0x02, 1, 0, OUT) is OK
    bus.write(OUT, b"xyz")
    assert bus.function.took[CHANNEL] == b"axyz"


@pytest.mark.parametrize("endpoint", [0, 0x80, 0x02, 0x0F, 0x8F, 0x03, 0x83, 0x13, 0x70, 0xF6])
def test_endpoints_that_there_are_not(channel: Bus, endpoint: int) -> None:
    channel.engine.submit(Urb(500, endpoint, 4, b"" if endpoint & 0x80 else b"data"))
    (done,) = channel.engine.take_done()
    assert (done.ident, done.status) == (500, INVALID)


# ---- taken back -----------------------------------------------------------------------------------------------------------


def test_cancelling(channel: Bus) -> None:
    bus = channel
    one, two, three = (bus.read(IN, 64) for _ in range(3))
    assert bus.engine.cancel(two)
    assert not bus.engine.cancel(two), "it is gone"
    assert not bus.engine.cancel(12345)
    bus.function.feed(CHANNEL, b"data")
    assert not bus.engine.cancel(one), "it was answered, and is told of"
    assert bus.ended() == [(one, OK, b"data")]
    assert bus.engine.parked == (1, 0)
    bus.function.feed(CHANNEL, b"more")
    assert bus.ended() == [(three, OK, b"more")]


def test_cancelling_out(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 1
    one, two = bus.write(OUT, b"abc"), bus.write(OUT, b"def")
    assert bus.engine.cancel(one) and bus.engine.parked == (1, 3)
    bus.function.make_room(CHANNEL, 100)
    assert bus.ended() == [(two, OK, 3)]
    assert bus.function.took[CHANNEL] == b"adef", "what has gone has gone"


# ---- limits ---------------------------------------------------------------------------------------------------------------


def test_how_many_may_wait(channel: Bus) -> None:
    bus = channel
    idents = [bus.read(IN, 64) for _ in range(limits.MAX_PARKED_URBS)]
    assert bus.engine.parked == (limits.MAX_PARKED_URBS, 0)
    assert bus.asks(0x80, 8) == b"\x01", "what does not wait is none of them"
    assert bus.engine.cancel(idents[7])
    bus.read(READER_INTERRUPT, 8)
    with pytest.raises(Overload, match="one more came"):
        bus.read(READER_IN, 64)


def test_how_many_bytes_may_wait(channel: Bus) -> None:
    bus = channel
    bus.function.room[CHANNEL] = 0
    piece = bytes(limits.MAX_USB_TRANSFER)
    for _ in range(limits.MAX_PARKED_URB_BYTES // len(piece)):
        bus.write(OUT, piece)
    assert bus.engine.parked[1] == limits.MAX_PARKED_URB_BYTES
    with pytest.raises(Overload, match="one more came"):
        bus.write(OUT, b"x")


def test_the_longest_transfer(channel: Bus) -> None:
    bus = channel
    bus.write(OUT, bytes(limits.MAX_USB_TRANSFER))
    assert bus.ended() == [(bus.idents, OK, limits.MAX_USB_TRANSFER)]
    with pytest.raises(Overload, match=f"a transfer of {limits.MAX_USB_TRANSFER + 1} bytes"):
        bus.write(OUT, bytes(limits.MAX_USB_TRANSFER + 1))


def test_a_number_twice(channel: Bus) -> None:
    channel.engine.submit(Urb(7, IN, 64))
    with pytest.raises(Overload, match="a second transfer with the number 7"):
        channel.engine.submit(Urb(7, READER_IN, 64))


def test_two_devices_do_not_know_each_other() -> None:
    (one, first), (two, second) = new_engine(), new_engine()
    assert isinstance(one, Engine) and isinstance(first, FakeFunction)
    one.submit(Urb(1, 0, 0, b"", Setup(0x00, 9, 1, 0, 0)))
    assert (one.configuration, two.configuration) == (1, 0)
    assert (first.said, second.said) == (["configured"], [])
