"""Whatever an importer asks for and whatever happens behind: each transfer ends once, bytes keep their order, limits hold; and a
stream means the same whole, in pieces and byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hsmvisord import limits
from hsmvisord.transport.usb.engine import Overload
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Event, Status
from hsmvisord.wire.usbip import UsbipServer
from hypothesis import given, settings
from hypothesis import strategies as st
from support import usb_guests as q
from support.usb_guests import Qemu, Vhci
from support.usb_rig import DESCRIPTORS, Rig, usbip_rig, usbredir_rig

CHANNELS = (1, 2)
READER_OUT, READER_IN, READER_INTERRUPT = 0x01, 0x81, 0x82
POWER_ON = b"\x62" + bytes(9)


class Linux:
    """A guest with USB/IP; what it asks for by name."""

    hidden = 0  #: transfers at most that are none of the guest's

    def __init__(self) -> None:
        self.vhci = Vhci()

    def begin(self) -> tuple[Rig, bytes]:
        return usbip_rig(), self.vhci.import_()

    def configure(self, number: int) -> bytes:
        return self.vhci.control(number, 0, 9, 1)

    def reset(self, number: int) -> bytes:
        return self.configure(number)  # a reset of the bus is the guest's own affair

    def set_interface(self, number: int, channel: int, alternate: int) -> bytes:
        return self.vhci.control(number, 1, 11, alternate, channel)

    def transfer(self, number: int, endpoint: int, data: bytes = b"", room: int = 0) -> bytes:
        return self.vhci.submit(number, endpoint, data, room)

    def control(self, number: int, kind: int, request: int, value: int, index: int) -> bytes:
        return self.vhci.control(number, kind, request, value, index, 64 if kind & 0x80 else 0)

    def notices(self, number: int, starts: bool) -> bytes:
        return self.vhci.submit(number, READER_INTERRUPT, room=8)

    def take_back(self, number: int, victim: int) -> bytes:
        return self.vhci.unlink(number, victim)

    def hears(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Gives number and data of what ended well."""
        for one in self.vhci.hears(data):
            if one.length >= 0 and one.status == 0:
                yield one.seqnum, one.data
        assert self.vhci.unlinks == {}, "each UNLINK is answered at once"

    def waits(self) -> int:
        return len(self.vhci.waits)


class QemuGuest:
    """The same with usbredir."""

    hidden = 1  #: the stream of interrupts is one transfer

    def __init__(self) -> None:
        self.qemu = Qemu()

    def begin(self) -> tuple[Rig, bytes]:
        return usbredir_rig(), self.qemu.hello()

    def configure(self, number: int) -> bytes:
        return self.qemu.message(q.SET_CONFIGURATION, number, b"\x01")

    def reset(self, number: int) -> bytes:
        return self.qemu.message(q.RESET, number)

    def set_interface(self, number: int, channel: int, alternate: int) -> bytes:
        return self.qemu.message(q.SET_ALT_SETTING, number, bytes([channel, alternate]))

    def transfer(self, number: int, endpoint: int, data: bytes = b"", room: int = 0) -> bytes:
        return self.qemu.bulk(number, endpoint, data, room)

    def control(self, number: int, kind: int, request: int, value: int, index: int) -> bytes:
        return self.qemu.control(number, kind, request, value, index, 64 if kind & 0x80 else 0)

    def notices(self, number: int, starts: bool) -> bytes:
        return self.qemu.message(q.START_INTERRUPTS if starts else q.STOP_INTERRUPTS, number, b"\x82")

    def take_back(self, number: int, victim: int) -> bytes:
        return self.qemu.message(q.CANCEL, victim)

    def hears(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        for heard in self.qemu.hears(data):
            if heard.kind == q.BULK:
                packet = self.qemu.packet(heard)
                if packet.status == q.SUCCESS:
                    yield packet.ident, packet.data

    def waits(self) -> int:
        return len(self.qemu.waits)


SAYS = (
    "open", "open", "close", "read", "read", "read", "write", "write", "ask", "hear", "notices", "take back", "take back", "halt",
    "go on", "descriptor", "configure", "reset",
)  # fmt: skip
HAPPENS = ("comes", "comes", "room", "full", "ends", "answers", "moves")
STEPS = st.lists(st.tuples(st.sampled_from(SAYS * 2 + HAPPENS * 3), st.sampled_from(CHANNELS), st.integers(0, 1500)), max_size=120)


def say(guest: Linux | QemuGuest, what: str, number: int, channel: int, amount: int) -> bytes:
    match what:
        case "open" | "close":
            return guest.set_interface(number, channel, int(what == "open"))
        case "read":
            return guest.transfer(number, 0x82 + channel, room=amount)
        case "write":
            return guest.transfer(number, 2 + channel, bytes(n % 253 for n in range(amount)))
        case "ask":
            return guest.transfer(number, READER_OUT, POWER_ON)
        case "hear":
            return guest.transfer(number, READER_IN, room=amount)
        case "notices":
            return guest.notices(number, amount % 3 > 0)
        case "take back":
            return guest.take_back(number, max(1, number - 1 - amount % 8))
        case "halt" | "go on":
            return guest.control(number, 0x02, 3 if what == "halt" else 1, 0, 0x82 + channel)
        case "descriptor":
            return guest.control(number, 0x80, 6, 0x0100 * (amount % 16), 0)
        case "configure":
            return guest.configure(number)
    return guest.reset(number)


class Life:
    """A guest, its device and what is behind it, with the bytes that every channel has brought since it was opened."""

    def __init__(self, guest: Linux | QemuGuest) -> None:
        self.guest = guest
        self.rig, begins = guest.begin()
        self.rig.hear(begins)
        told = self.rig.told()
        if isinstance(guest, QemuGuest):
            guest.qemu.hears(told)
        self.number = 0
        self.reads: dict[int, int] = {}  #: by number, to its channel
        self.fed: dict[int, bytes] = {}
        self.brought: dict[int, bytes] = {}

    def step(self, what: str, channel: int, amount: int) -> None:
        function = self.rig.function
        if what in SAYS:
            self.number += 1
            if what == "read":
                self.reads[self.number] = channel
            self.rig.hear(say(self.guest, what, self.number, channel, amount))
        elif what == "answers":
            if function.messages:
                function.engine.ccid_answer(function.messages.pop(0) + bytes(amount))
        elif what == "moves":
            function.engine.ccid_notify(b"\x50\x03")
        elif channel in function.opened:
            match what:
                case "comes":
                    data = bytes((len(self.fed.get(channel, b"")) + n) % 251 for n in range(amount))
                    self.fed[channel] = self.fed.get(channel, b"") + data
                    function.feed(channel, data)
                case "room":
                    function.make_room(channel, amount)
                case "full":
                    function.room[channel] = 0
                case "ends":
                    function.end(channel)
        self.look()

    def look(self) -> None:
        for number, data in self.guest.hears(self.rig.told()):
            if number in self.reads:
                channel = self.reads.pop(number)
                self.brought[channel] = self.brought.get(channel, b"") + data
        said = self.rig.function.said
        for channel in CHANNELS:
            if f"open {channel}" in said or f"close {channel}" in said:
                self.fed[channel] = self.brought[channel] = b""
            elif channel in self.rig.function.opened:
                coming = bytes(self.rig.function.gives[channel])
                assert self.brought.get(channel, b"") + coming == self.fed.get(channel, b""), "lost, doubled or out of order"
        said.clear()
        count, size = self.rig.engine.parked
        assert count <= limits.MAX_PARKED_URBS and size <= limits.MAX_PARKED_URB_BYTES
        assert 0 <= count - self.guest.waits() <= self.guest.hidden, "what is not parked was answered, and nothing else"


def live(guest: Linux | QemuGuest, steps: list[tuple[str, int, int]]) -> None:
    life = Life(guest)
    life.step("configure", 1, 0)
    try:
        for step in steps:
            life.step(*step)
    except Overload as error:
        assert "one more came" in str(error)
        return
    life.step("reset", 1, 0)
    assert guest.waits() == 0 and life.rig.engine.parked == (0, 0)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_each_transfer_of_usbip_ends_once(steps: list[tuple[str, int, int]]) -> None:
    live(Linux(), steps)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_each_packet_of_usbredir_ends_once(steps: list[tuple[str, int, int]]) -> None:
    live(QemuGuest(), steps)


@settings(max_examples=8, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["read", "hear", "notices", "write"]), min_size=1, max_size=4),
    amount=st.sampled_from([1, 1000, 60_000]),
)
def test_what_waits_never_exceeds_its_limits(kinds: list[str], amount: int) -> None:
    """A guest that asks on and on and never takes: the device ends, and not a transfer later."""
    life = Life(Linux())
    for step in (("configure", 1, 0), ("open", 1, 0), ("full", 1, 0)):
        life.step(*step)
    try:
        while True:
            life.step(kinds[life.number % len(kinds)], 1, amount)
            assert life.number < 2 * limits.MAX_PARKED_URBS
    except Overload:
        count, size = life.rig.engine.parked
        assert count == limits.MAX_PARKED_URBS or size + amount > limits.MAX_PARKED_URB_BYTES


# ---- UNLINK and what ends meanwhile -----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(choices=st.lists(st.tuples(st.sampled_from(["submit", "unlink", "end", "carry out"]), st.integers(0, 999)), max_size=60))
def test_races_of_unlink(choices: list[tuple[str, int]]) -> None:
    """Whenever the engine ends a transfer or hears that it is taken back, a strict vhci-hcd takes all answers, and misses none."""
    codec, vhci = UsbipServer(DESCRIPTORS), Vhci()
    list(codec.receive(vhci.import_()))
    codec.data_to_send()
    seqnum = 0
    parked: list[int] = []
    cancels: list[int] = []  #: that the engine has not heard yet
    unlinked: set[int] = set()

    def hear(events: Iterator[Event]) -> None:
        cancels.extend(event.ident for event in events if isinstance(event, Cancel))

    def carry_out() -> None:
        ident = cancels.pop(0)
        was_parked = ident in parked
        if was_parked:
            parked.remove(ident)
        codec.cancelled(ident, was_parked)

    for what, which in choices:
        if what == "submit":
            seqnum += 1
            hear(codec.receive(vhci.submit(seqnum, 0x83, room=9)))
            parked.append(seqnum)
        elif what == "unlink" and seqnum:
            victim = 1 + which % seqnum
            if victim not in unlinked:
                unlinked.add(victim)
                seqnum += 1
                unlinked.add(seqnum)  # its own number is no transfer's
                hear(codec.receive(vhci.unlink(seqnum, victim)))
        elif what == "end" and parked:
            ident = parked.pop(which % len(parked))
            codec.done(Done(ident, 0x83, Status.OK if which % 2 else Status.STALL, b"data" if which % 2 else b""))
        elif what == "carry out" and cancels:
            carry_out()
        vhci.hears(codec.data_to_send())
    while cancels:
        carry_out()
    vhci.hears(codec.data_to_send())
    assert sorted(vhci.waits) == sorted(parked) and vhci.unlinks == {}


# ---- in pieces ----------------------------------------------------------------------------------------------------------------


def lived(guest: Linux | QemuGuest, pieces: list[bytes]) -> tuple[list[Event], bytes, list[str], list[bytes], str]:
    """What comes of a stream: events, answers, what the function was told, and how it broke, if it did."""
    rig, _ = guest.begin()
    rig.function.answers_at_once = True
    rig.function.room = dict.fromkeys(CHANNELS, 700)
    why = ""
    told = b""
    try:
        for piece in pieces:
            rig.hear(piece)
            told += rig.told()
    except (BrokenPeer, Overload) as error:
        why = str(error)
        told += rig.told()
    return rig.events, told, rig.function.said, rig.function.messages, why


WORDS = st.lists(st.tuples(st.sampled_from(SAYS), st.sampled_from(CHANNELS), st.integers(0, 900)), max_size=25)


@settings(max_examples=120, deadline=None)
@given(
    linux=st.booleans(),
    words=WORDS,
    damage=st.none() | st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=3)),
    cuts=st.lists(st.integers(0, 1 << 16), max_size=6),
)
def test_a_stream_means_the_same_however_it_comes(
    linux: bool, words: list[tuple[str, int, int]], damage: tuple[int, bytes] | None, cuts: list[int]
) -> None:
    guest: Linux | QemuGuest = Linux() if linux else QemuGuest()
    _, begins = guest.begin()
    said = [begins, guest.configure(1)]
    said += [say(guest, what, number, channel, amount) for number, (what, channel, amount) in enumerate(words, 2)]
    stream = b"".join(said)
    if damage is not None:
        at = damage[0] % len(stream)
        stream = stream[:at] + damage[1] + stream[at + len(damage[1]) :]
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    whole = lived(guest, [stream])
    assert lived(guest, [stream[a:b] for a, b in pairwise(places)]) == whole
    assert lived(guest, [stream[at : at + 1] for at in range(len(stream))]) == whole
