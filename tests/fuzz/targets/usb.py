"""What an importer says to a USB device, by usbredir or USB/IP, and what happens behind the device meanwhile.

The first byte of an input chooses the protocol and how the reader answers.  Then come steps, each begun by one byte: bytes of the
importer, or something behind an endpoint.  Every input is lived twice: with the importer's bytes as they come, and byte by byte.
"""

from __future__ import annotations

import struct

from fuzz.harness import Input, block
from hsmvisord import limits
from hsmvisord.transport.usb.engine import Engine, Overload
from hsmvisord.wire import usb
from hsmvisord.wire.usb import BrokenPeer, Cancel, Event, Reset, Setup, Submit
from hsmvisord.wire.usb_descriptors import Descriptors, Identity
from hsmvisord.wire.usbip import UsbipServer
from hsmvisord.wire.usbredir import UsbredirHost
from support.usb_told import after_import, check_usbip, check_usbredir

INVARIANT = (
    "an importer is answered in whole messages, or it is BrokenPeer or Overload; each transfer ends once, those of an endpoint in "
    "their order; what waits stays within its limits; a channel takes and gives only while it is open; the same comes of a stream "
    "whole and byte by byte; nothing else is raised"
)
MAX_LENGTH = 4000
DESCRIPTORS = Descriptors(Identity(0x1209, 1, "web-1"))
CHANNEL = 1

LINUX, AT_ONCE = 1, 2  #: bits of the first byte
SAYS, ANSWERS, MOVES, COMES, ROOM, ENDS = range(6)


class Function:
    """Behind the endpoints: a reader that echoes, channels that give what came and take what there is room for."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.messages: list[bytes] = []
        self.opened: set[int] = set()
        self.gives: dict[int, bytes] = {}
        self.room: dict[int, int] = {}
        self.ended: set[int] = set()
        self.taken = 0
        self.engine = Engine(DESCRIPTORS, self)

    def ccid(self, message: bytes) -> None:
        assert len(message) == 10 + int.from_bytes(message[1:5], "little") <= limits.MAX_CCID_MESSAGE
        if self.at_once:
            self.engine.ccid_answer(message)
        else:
            self.messages.append(message)

    def ccid_control(self, setup: Setup) -> bytes | None:
        assert setup.request_type & 0x7F == 0x21 and self.engine.configuration
        return b"clocks" if setup.request == 2 else None

    def ccid_reset(self) -> None:
        self.messages.clear()

    def configured(self) -> None:
        assert not self.opened
        self.engine.ccid_notify(b"\x50\x03")

    def open(self, channel: int) -> bool:
        assert 1 <= channel <= limits.USB_CHANNELS and channel not in self.opened
        if channel == limits.USB_CHANNELS:
            return False
        self.opened.add(channel)
        self.gives[channel], self.room[channel] = b"", 100
        self.ended.discard(channel)
        return True

    def close_channel(self, channel: int) -> None:
        self.opened.remove(channel)

    def write(self, channel: int, data: memoryview) -> int:
        assert channel in self.opened and data
        taken = min(self.room[channel], len(data))
        self.room[channel] -= taken
        self.taken += taken
        return taken

    def read(self, channel: int, most: int) -> bytes | None:
        assert channel in self.opened and 0 < most <= limits.MAX_USB_TRANSFER
        data, self.gives[channel] = self.gives[channel][:most], self.gives[channel][most:]
        return data if data or channel in self.ended else None

    def happens(self, what: int, channel: int) -> None:
        if what == ANSWERS and self.messages:
            self.engine.ccid_answer(self.messages.pop(0) + bytes(2 * channel))
        elif what == MOVES:
            self.engine.ccid_notify(b"\x50\x02")
        elif channel in self.opened:
            if what == COMES:
                self.gives[channel] += b"data" * 50
                self.engine.readable(channel)
            elif what == ROOM:
                self.room[channel] += 300
                self.engine.writable(channel)
            elif what == ENDS:
                self.ended.add(channel)
                self.engine.readable(channel)


class Device:
    def __init__(self, head: int) -> None:
        self.codec = UsbipServer(DESCRIPTORS) if head & LINUX else UsbredirHost(DESCRIPTORS)
        self.function = Function(bool(head & AT_ONCE))
        self.engine = self.function.engine
        self.under_way: dict[int, int] = {}  #: by number, to its endpoint
        self.events: list[Event] = []
        self.told = b""

    def hear(self, data: bytes) -> None:
        for event in self.codec.receive(data):
            self.carry_out(event)
            self.settle()

    def carry_out(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case Submit(urb):
                assert urb.ident not in self.under_way
                self.under_way[urb.ident] = urb.endpoint
                self.engine.submit(urb)
            case Cancel(ident):
                was_parked = self.engine.cancel(ident)
                if was_parked:
                    del self.under_way[ident]
                self.codec.cancelled(ident, was_parked)
            case Reset():
                self.engine.reset()

    def settle(self) -> None:
        while ended := self.engine.take_done():
            for done in ended:
                assert done.ident == next(ident for ident, there in self.under_way.items() if there == done.endpoint)
                del self.under_way[done.ident]
                for event in self.codec.done(done):
                    self.carry_out(event)
        count, size = self.engine.parked
        assert count == len(self.under_way) <= limits.MAX_PARKED_URBS and 0 <= size <= limits.MAX_PARKED_URB_BYTES
        self.told += self.codec.data_to_send()

    def end(self, why: str) -> tuple[bytes, list[Event], int, str]:
        """Returns what came of it."""
        if isinstance(self.codec, UsbipServer):
            check_usbip(after_import(self.told), self.events, len(self.under_way))
        else:
            check_usbredir(self.told, self.codec._ids64 << 5 | self.codec._bulk32 << 6)
        self.engine.reset()
        assert self.engine.parked == (0, 0) and not self.function.opened
        return self.told, self.events, self.function.taken, why


def live(data: bytes, step: int) -> tuple[bytes, list[Event], int, str]:
    """What comes of an input, when at most `step` bytes of the importer come at once."""
    given = Input(data)
    device = Device(given.byte())
    try:
        while given.more:
            head = given.byte()
            what, channel = head & 7, 1 + (head >> 3) % limits.USB_CHANNELS
            if what == SAYS:
                said = given.block()
                for at in range(0, len(said), step):
                    device.hear(said[at : at + step])
            else:
                device.function.happens(what, channel)
            device.settle()
    except (BrokenPeer, Overload) as error:
        return device.end(str(error))
    return device.end("")


def run(data: bytes) -> None:
    assert live(data, 1 << 16) == live(data, 1)


# ---- seeds ------------------------------------------------------------------------------------------------------------


def say(*messages: bytes) -> bytes:
    return b"".join(bytes((SAYS,)) + block(message) for message in messages)


def behind(*what: int, channel: int = CHANNEL) -> bytes:
    return bytes(one | (channel - 1) << 3 for one in what)


def message(kind: int, ident: int = 0, body: bytes = b"") -> bytes:
    return struct.pack("<IIQ", kind, len(body), ident) + body


def bulk(ident: int, endpoint: int, data: bytes = b"", room: int = 0) -> bytes:
    return message(101, ident, struct.pack("<BBHIH", endpoint, 0, room or len(data), 0, 0) + data)


def packet(ident: int, setup: Setup, data: bytes = b"") -> bytes:
    kind, request, value, index, length = setup
    return message(100, ident, struct.pack("<BBBBHHH", kind & usb.IN, request, kind, 0, value, index, length) + data)


def submit(seqnum: int, endpoint: int, data: bytes = b"", room: int = 0, setup: bytes = bytes(8), flags: int = 0) -> bytes:
    size = room if endpoint & usb.IN else len(data)
    head = struct.pack(">IIIIIIiiii", 1, seqnum, 0x10001, endpoint >> 7, endpoint & 0x7F, flags, size, 0, 0, 0)
    return head + setup + data


def control(seqnum: int, setup: Setup) -> bytes:
    return submit(seqnum, setup.request_type & usb.IN, room=setup.w_length, setup=setup.encode())


def unlink(seqnum: int, victim: int) -> bytes:
    return struct.pack(">IIIIII24x", 2, seqnum, 0x10001, 0, 0, victim)


REQUESTS = [
    Setup(0x80, 6, 0x0100, 0, 18), Setup(0x80, 6, 0x0200, 0, 512), Setup(0x80, 6, 0x0300, 0, 255), Setup(0x80, 6, 0x0302, 1033, 64),
    Setup(0x80, 6, 0x0600, 0, 10), Setup(0x80, 0, 0, 0, 2), Setup(0x81, 0, 0, 0, 2), Setup(0x82, 0, 0, 0x81, 2),
    Setup(0x80, 8, 0, 0, 1), Setup(0x81, 10, 0, 1, 1), Setup(0x00, 5, 7, 0, 0), Setup(0x02, 3, 0, 0x81, 0),
    Setup(0x02, 1, 0, 0x81, 0), Setup(0xA1, 2, 0, 0, 16), Setup(0x21, 1, 0x0100, 0, 0), Setup(0x00, 9, 0, 0, 0),
]  # fmt: skip
CONFIGURE, OPEN = Setup(0x00, 9, 1, 0, 0), Setup(0x01, 11, 1, CHANNEL, 0)
ASK = b"\x6f\x05\0\0\0\0\x01\0\0\0" + b"\0\xa4\x04\0\0"


def seeds() -> dict[str, bytes]:
    hello = struct.pack("<III", 0, 68, 0) + b"qemu".ljust(64, b"\0") + struct.pack("<I", 0xFF)
    short = struct.pack("<III", 0, 68, 0) + b"old".ljust(64, b"\0") + struct.pack("<I", 0)
    begin = say(hello, message(3), message(6, 1, b"\x01"), message(9, 2, bytes((CHANNEL, 1))))
    imports = say(struct.pack(">HHI", 0x0111, 0x8005, 0), struct.pack(">HHI32s", 0x0111, 0x8003, 0, b"web-1"))
    imported = imports + say(control(1, CONFIGURE), control(2, OPEN))
    pieces = b"\x6f\x00\x03\0\0\0\x01\0\0\0" + bytes(502), bytes(266)
    both = {
        "card": (
            say(bulk(3, 0x81, room=512), bulk(4, 1, ASK)) + behind(ANSWERS),
            say(submit(3, 0x81, room=512), submit(4, 1, ASK)) + behind(ANSWERS),
        ),
        "pieces": (
            say(*(bulk(3 + n, 1, piece) for n, piece in enumerate(pieces)), bulk(5, 0x81, room=512)) + behind(ANSWERS, ANSWERS),
            say(*(submit(3 + n, 1, piece) for n, piece in enumerate(pieces)), submit(5, 0x81, room=512)) + behind(ANSWERS, ANSWERS),
        ),
        "channel": (
            say(bulk(3, 3, bytes(400)), bulk(4, 0x83, room=64), bulk(5, 0x83, room=600)) + behind(COMES, ROOM, COMES, ENDS),
            say(submit(3, 3, bytes(400)), submit(4, 0x83, room=64, flags=1), submit(5, 0x83, room=600, flags=1))
            + behind(COMES, ROOM, COMES, ENDS),
        ),
        "taken-back": (
            say(bulk(3, 0x83, room=64), message(21, 3), bulk(3, 0x83, room=64)) + behind(COMES) + say(message(21, 3), message(3)),
            say(submit(3, 0x83, room=64), unlink(4, 3), submit(5, 0x83, room=64)) + behind(COMES) + say(unlink(6, 5)),
        ),
        "notices": (
            say(message(15, 0, b"\x82")) + behind(MOVES, MOVES) + say(message(16, 0, b"\x82"), message(15, 0, b"\x82"), message(3)),
            say(submit(3, 0x82, room=8), submit(4, 0x82, room=8)) + behind(MOVES, MOVES),
        ),
        "requests": (
            say(*(packet(3 + n, setup) for n, setup in enumerate(REQUESTS))),
            say(*(control(3 + n, setup) for n, setup in enumerate(REQUESTS))),
        ),
    }  # fmt: skip
    made = {
        "other": bytes((0,)) + begin + say(
            message(7, 3), message(10, 4, b"\x01"), message(12, 5, b"\x83\x01\x01"), message(13, 6, b"\x83"),
            message(18, 7, bytes(8)), message(19, 8, bytes(4)), message(23, 0, b"-1,-1,-1,-1,1\0"), message(24),
            message(102, 0, struct.pack("<BBH", 3, 0, 1) + b"x"), message(103, 9, struct.pack("<BBH", 2, 0, 1) + b"x"), message(22),
        ),
        "old": bytes((0,)) + say(short, struct.pack("<III", 6, 1, 1) + b"\x01", struct.pack("<IIIBBHI", 101, 8, 2, 0x81, 0, 64, 0)),
        "data": bytes((AT_ONCE,)) + begin
        + say(packet(3, Setup(0x21, 2, 0, 0, 3), b"abc"), *(bulk(4 + n, 1, ASK) for n in range(20))),
        "strangers": bytes((LINUX,)) + say(struct.pack(">HHI32s", 0x0111, 0x8003, 0, b"web-2")) * 17,
    }  # fmt: skip
    for name, (redirected, linux) in both.items():
        for at_once in (0, AT_ONCE):
            made[f"redir-{name}-{at_once}"] = bytes((at_once,)) + begin + redirected
            made[f"usbip-{name}-{at_once}"] = bytes((LINUX | at_once,)) + imported + linux
    return made
