"""The module's USB device as its descriptors tell it: one table of interfaces and endpoints, and all that is made of it.

Interface 0 is a smart card reader (CCID 1.10, 5.1); the others are channels, each a byte stream of the PKCS#11 library in its
alternate setting 1.  In alternate setting 0 a channel has no endpoint, and is closed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hsmvisord import limits
from hsmvisord.wire import usb

MAX_PACKET, MAX_INTERRUPT = 512, 8  #: bytes, high speed
CCID_OUT, CCID_IN, CCID_INTERRUPT = 0x01, 0x81, 0x82
CCID_CLASS, CHANNEL_CLASS = (0x0B, 0, 0), (0xFF, 0x48, 0x01)  #: class, subclass, protocol
_FIRST_CHANNEL = 3  #: number of the first channel's endpoints
_INTERVAL = 10  #: of the interrupt endpoint: 2^9 microframes, 64 ms
_LANGUAGE = 0x0409

#: CCID 1.10, table 5.1-1: one slot, 5 V, T=1, 4 MHz; parameters, voltage, clock, baud rate by the reader; extended APDUs.
CCID_FUNCTIONAL = struct.pack(
    "<BBHBBIIIBIIBIIIIIBBHBB",
    54, 0x21, 0x0110, 0, 0x01, 2, 4000, 4000, 0, 10752, 10752, 0, 254, 0, 0, 0x000400BA, limits.MAX_CCID_MESSAGE,
    0xFF, 0xFF, 0, 0, 1,
)  # fmt: skip


KEYS_MARK = "~"  #: in a serial number: what follows the module's name stands for the card's keys


@dataclass(frozen=True)
class Identity:
    vendor: int
    product: int
    serial: str  #: ASCII
    release: int = 0x0100  #: bcdDevice
    manufacturer: str = "hsmvisor"
    product_name: str = "hsmvisor virtual smart card"

    @property
    def name(self) -> str:
        """The module's."""
        return self.serial.partition(KEYS_MARK)[0]


@dataclass(frozen=True)
class Endpoint:
    address: int
    kind: int  #: of usb.BULK, usb.INTERRUPT
    size: int
    interval: int = 0

    def encode(self) -> bytes:
        return struct.pack("<BBBBHB", 7, usb.ENDPOINT, self.address, self.kind, self.size, self.interval)


@dataclass(frozen=True)
class Interface:
    """One alternate setting of an interface.  It has no string: pcscd puts a reader's into its name if it finds it in time, and to
    clients a reader that comes back by another name is another one."""

    number: int
    alternate: int
    identity: tuple[int, int, int]  #: class, subclass, protocol
    endpoints: tuple[Endpoint, ...]
    functional: bytes = b""

    def encode(self) -> bytes:
        head = struct.pack("<BBBBBBBBB", 9, usb.INTERFACE, self.number, self.alternate, len(self.endpoints), *self.identity, 0)
        return b"".join((head, self.functional, *(endpoint.encode() for endpoint in self.endpoints)))


def _interfaces() -> tuple[Interface, ...]:
    reader = (
        Endpoint(CCID_OUT, usb.BULK, MAX_PACKET),
        Endpoint(CCID_IN, usb.BULK, MAX_PACKET),
        Endpoint(CCID_INTERRUPT, usb.INTERRUPT, MAX_INTERRUPT, _INTERVAL),
    )
    found = [Interface(0, 0, CCID_CLASS, reader, functional=CCID_FUNCTIONAL)]
    for channel in range(1, limits.USB_CHANNELS + 1):
        ends = tuple(Endpoint(address, usb.BULK, MAX_PACKET) for address in endpoints_of(channel))
        found += [Interface(channel, 0, CHANNEL_CLASS, ()), Interface(channel, 1, CHANNEL_CLASS, ends)]
    return tuple(found)


def endpoints_of(channel: int) -> tuple[int, int]:
    """Returns the OUT and the IN endpoint of a channel; `channel` is its interface's number, from 1 on."""
    number = _FIRST_CHANNEL - 1 + channel
    return number, usb.IN | number


def channel_of(endpoint: int) -> int:
    """Returns the channel of an endpoint, 0 when it is no channel's."""
    if endpoint & ~(usb.IN | 0x0F):
        return 0
    channel = (endpoint & 0x0F) - (_FIRST_CHANNEL - 1)
    return channel if 1 <= channel <= limits.USB_CHANNELS else 0


INTERFACES = _interfaces()


class Descriptors:
    """What one device answers to GET_DESCRIPTOR, and tells importers of itself."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        i = identity
        self.device = struct.pack(
            "<BBHBBBBHHHBBBB", 18, usb.DEVICE, 0x0200, 0, 0, 0, 64, i.vendor, i.product, i.release, 1, 2, 3, 1
        )
        body = b"".join(interface.encode() for interface in INTERFACES)
        self.configuration = (
            struct.pack("<BBHBBBBB", 9, usb.CONFIGURATION, 9 + len(body), limits.USB_CHANNELS + 1, 1, 0, 0xC0, 50) + body
        )
        texts = (i.manufacturer, i.product_name, i.serial)
        self.strings = {0: struct.pack("<BBH", 4, usb.STRING, _LANGUAGE)}
        for index, text in enumerate(texts, 1):
            coded = b"".join(bytes([byte, 0]) for byte in text.encode("ascii"))  # a worker cannot load Python's UTF-16
            if len(coded) > limits.MAX_USB_STRING:
                raise ValueError(f"a USB string has at most {limits.MAX_USB_STRING // 2} characters")
            self.strings[index] = struct.pack("<BB", 2 + len(coded), usb.STRING) + coded

    def get(self, kind: int, index: int, language: int) -> bytes | None:
        """Returns a descriptor, None where there is none (the device then stalls).  `language`: of a string but the first."""
        if kind == usb.DEVICE and index == 0:
            return self.device
        if kind == usb.CONFIGURATION and index == 0:
            return self.configuration
        if kind == usb.STRING and (index == 0 or language == _LANGUAGE):
            return self.strings.get(index)
        return None
