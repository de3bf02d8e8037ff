"""A USB device without threads and sockets: its engine, a function behind it that a test steers, and the one loop between them and
a codec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hsmvisord.transport.usb.engine import Engine
from hsmvisord.wire.usb import Cancel, Done, Event, Reset, Setup, Submit
from hsmvisord.wire.usb_descriptors import Descriptors, Identity
from hsmvisord.wire.usbip import UsbipServer
from hsmvisord.wire.usbredir import UsbredirHost

IDENTITY = Identity(0x1209, 0x0001, "web-1", 0x0102)
DESCRIPTORS = Descriptors(IDENTITY)
PLENTY = 1 << 30
CLOCKS = 0x02  #: GET_CLOCK_FREQUENCIES, which the fake reader answers


class FakeFunction:
    """What is behind the endpoints.  `said` has what it was told, in words; channels give what `feed` puts in and take `room`."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.messages: list[bytes] = []  #: to the reader
        self.answers_at_once = False  #: the reader echoes before `ccid` returns
        self.refuses: set[int] = set()  #: channels that cannot be opened
        self.opened: set[int] = set()
        self.room: dict[int, int] = {}  #: bytes that a channel takes
        self.took: dict[int, bytearray] = {}
        self.gives: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.engine: Engine

    def ccid(self, message: bytes) -> None:
        self.messages.append(message)
        if self.answers_at_once:
            self.engine.ccid_answer(message)

    def ccid_control(self, setup: Setup) -> bytes | None:
        self.said.append(f"class request {setup.request}")
        return b"clocks" if setup.request == CLOCKS else None

    def ccid_reset(self) -> None:
        self.said.append("card off")
        self.messages.clear()

    def configured(self) -> None:
        self.said.append("configured")

    def open(self, channel: int) -> bool:
        assert channel not in self.opened
        if channel in self.refuses:
            return False
        self.said.append(f"open {channel}")
        self.opened.add(channel)
        self.room.setdefault(channel, PLENTY)
        self.took[channel], self.gives[channel] = bytearray(), bytearray()
        self.ended.discard(channel)
        return True

    def close_channel(self, channel: int) -> None:
        self.said.append(f"close {channel}")
        self.opened.remove(channel)

    def write(self, channel: int, data: memoryview) -> int:
        assert channel in self.opened and data
        taken = min(len(data), self.room[channel])
        self.took[channel] += data[:taken]
        self.room[channel] -= taken
        return taken

    def read(self, channel: int, most: int) -> bytes | None:
        assert channel in self.opened and most
        data = bytes(self.gives[channel][:most])
        del self.gives[channel][:most]
        return data if data or channel in self.ended else None

    # ---- what a test does -------------------------------------------------------------------------------------------

    def feed(self, channel: int, data: bytes) -> None:
        self.gives[channel] += data
        self.engine.readable(channel)

    def end(self, channel: int) -> None:
        self.ended.add(channel)
        self.engine.readable(channel)

    def make_room(self, channel: int, room: int) -> None:
        self.room[channel] = self.room.get(channel, 0) + room
        self.engine.writable(channel)


def new_engine() -> tuple[Engine, FakeFunction]:
    function = FakeFunction()
    function.engine = Engine(DESCRIPTORS, function)
    return function.engine, function


class Codec(Protocol):
    def receive(self, data: bytes) -> Iterable[Event]: ...

    def done(self, done: Done) -> list[Event]: ...

    def cancelled(self, ident: int, was_parked: bool) -> None: ...

    def data_to_send(self) -> bytes: ...


class Rig:
    """A codec and what is behind it; `events` has what the codec asked for."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.engine, self.function = new_engine()
        self.events: list[Event] = []

    def hear(self, data: bytes) -> None:
        for event in self.codec.receive(data):
            self.carry_out(event)
            self.settle()

    def carry_out(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Submit(urb):
                self.engine.submit(urb)
            case Cancel(ident):
                self.settle()
                self.codec.cancelled(ident, self.engine.cancel(ident))
            case Reset():
                self.engine.reset()

    def settle(self) -> None:
        while ended := self.engine.take_done():
            for done in ended:
                for event in self.codec.done(done):
                    self.carry_out(event)

    def told(self) -> bytes:
        """Returns what the codec says, after what happened behind the engine."""
        self.settle()
        return self.codec.data_to_send()


def usbredir_rig() -> Rig:
    return Rig(UsbredirHost(DESCRIPTORS))


def usbip_rig() -> Rig:
    return Rig(UsbipServer(DESCRIPTORS))
