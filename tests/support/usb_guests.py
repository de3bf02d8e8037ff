"""The other ends of usbredir and USB/IP, by the protocols' documents: what an importer says, and what it makes of answers.

Both are strict: an answer that a real importer would choke on is an AssertionError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

IN = 0x80
OFFERED = 0xFF  #: QEMU's capabilities

# ---- usbredir, QEMU's side ------------------------------------------------------------------------------------------------

HELLO, DEVICE_CONNECT, RESET, INTERFACE_INFO, EP_INFO = 0, 1, 3, 4, 5
SET_CONFIGURATION, GET_CONFIGURATION, CONFIGURATION_STATUS = 6, 7, 8
SET_ALT_SETTING, GET_ALT_SETTING, ALT_SETTING_STATUS = 9, 10, 11
START_ISO, STOP_ISO, ISO_STATUS = 12, 13, 14
START_INTERRUPTS, STOP_INTERRUPTS, INTERRUPTS_STATUS = 15, 16, 17
ALLOC_STREAMS, FREE_STREAMS, STREAMS_STATUS = 18, 19, 20
CANCEL, FILTER_REJECT, FILTER, DISCONNECT_ACK, START_BULK_RECEIVING, STOP_BULK_RECEIVING = 21, 22, 23, 24, 25, 26
CONTROL, BULK, ISO, INTERRUPT = 100, 101, 102, 103
SUCCESS, CANCELLED, INVAL, STALL = 0, 1, 2, 4


class Heard(NamedTuple):
    kind: int
    ident: int
    body: bytes


class Packet(NamedTuple):
    """What a data packet says, without what was asked."""

    ident: int
    status: int
    length: int
    data: bytes


class Qemu:
    """Makes messages and takes answers apart.  `waits` has the ids of packets that were not answered yet."""

    def __init__(self, offered: int = OFFERED) -> None:
        self.ids64, self.bulk32 = bool(offered & 1 << 5), bool(offered & 1 << 6)
        self.max_packets, self.versions = bool(offered & 1 << 4), bool(offered & 1 << 1)
        self.offered = offered
        self.waits: dict[int, tuple[int, int]] = {}  #: id: type, endpoint
        self._heard = b""
        self._greeted = False

    def message(self, kind: int, ident: int = 0, body: bytes = b"", length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        return struct.pack("<IIQ" if self.ids64 and kind != HELLO else "<III", kind, size, ident) + body

    def hello(self, version: bytes = b"qemu 7.2", words: int = 1) -> bytes:
        return self.message(HELLO, 0, version.ljust(64, b"\0") + struct.pack("<I", self.offered)[: 4 * words])

    def control(self, ident: int, kind: int, request: int, value: int, index: int, length: int, data: bytes = b"") -> bytes:
        self._asks(ident, CONTROL, kind & IN)
        return self.message(CONTROL, ident, struct.pack("<BBBBHHH", kind & IN, request, kind, 0, value, index, length) + data)

    def bulk(self, ident: int, endpoint: int, data: bytes = b"", room: int = 0, stream: int = 0) -> bytes:
        self._asks(ident, BULK, endpoint)
        size = room if endpoint & IN else len(data)
        head = struct.pack("<BBHI", endpoint, 0, size & 0xFFFF, stream)
        if self.bulk32:
            head += struct.pack("<H", size >> 16)
        return self.message(BULK, ident, head + data)

    def _asks(self, ident: int, kind: int, endpoint: int) -> None:
        self.waits[ident] = kind, endpoint

    def hears(self, data: bytes) -> list[Heard]:
        """Takes bytes of the usb-host apart; each packet is answered once, by one of its type and endpoint."""
        self._heard += data
        heard = list(self._messages())
        for kind, ident, body in heard:
            if kind in (CONTROL, BULK):
                assert self.waits.pop(ident) == (kind, body[0])
        return heard

    def _messages(self) -> Iterator[Heard]:
        while True:
            head = struct.Struct("<IIQ" if self.ids64 and self._greeted else "<III")
            if len(self._heard) < head.size:
                return
            kind, length, ident = head.unpack_from(self._heard)
            if len(self._heard) < head.size + length:
                return
            body = self._heard[head.size : head.size + length]
            self._heard = self._heard[head.size + length :]
            assert self._greeted == (kind != HELLO)
            self._greeted = True
            yield Heard(kind, ident, body)

    def packets(self, data: bytes) -> list[Packet]:
        """Takes answers apart that are all packets."""
        return [self.packet(heard) for heard in self.hears(data)]

    def packet(self, heard: Heard) -> Packet:
        kind, ident, body = heard
        match kind:
            case 100:
                endpoint, _, _, status, _, _, length = struct.unpack_from("<BBBBHHH", body)
                data = body[10:]
            case 101:
                endpoint, status, length, _ = struct.unpack_from("<BBHI", body)
                size = 10 if self.bulk32 else 8
                if self.bulk32:
                    length |= struct.unpack_from("<H", body, 8)[0] << 16
                data = body[size:]
            case 103:
                endpoint, status, length = struct.unpack_from("<BBH", body)
                data = body[4:]
            case _:
                raise AssertionError(f"a message of type {kind}, and no packet")
        assert len(data) == (length if endpoint & IN else 0)
        return Packet(ident, status, length, data)


# ---- USB/IP, Linux's side -------------------------------------------------------------------------------------------------

VERSION = 0x0111
ECONNRESET, EPIPE, EPROTO, ESHUTDOWN, EREMOTEIO = -104, -32, -71, -108, -121


class Returned(NamedTuple):
    """RET_SUBMIT; of RET_UNLINK `length` is -1."""

    seqnum: int
    status: int
    length: int = -1
    data: bytes = b""


class Vhci:
    """vhci-hcd of a guest: `waits` has what was not given back yet, by seqnum."""

    def __init__(self, bus_id: bytes = b"web-1") -> None:
        self.bus_id = bus_id
        self.waits: dict[int, tuple[int, int]] = {}  #: direction, length
        self.unlinks: dict[int, int] = {}  #: seqnum of an UNLINK, to what it takes back
        self._heard = b""

    def devlist(self) -> bytes:
        return struct.pack(">HHI", VERSION, 0x8005, 0)

    def import_(self, bus_id: bytes | None = None) -> bytes:
        return struct.pack(">HHI32s", VERSION, 0x8003, 0, self.bus_id if bus_id is None else bus_id)

    def submit(
        self,
        seqnum: int,
        endpoint: int,
        data: bytes = b"",
        room: int = 0,
        setup: bytes = bytes(8),
        flags: int = 0,
        packets: int = 0,
        length: int | None = None,
    ) -> bytes:
        direction = int(bool(endpoint & IN))
        size = length if length is not None else room if direction else len(data)
        self.waits[seqnum] = direction, size
        head = (1, seqnum, 0x00010001, direction, endpoint & 0x7F, flags, size, 0, packets, 0, setup)
        return struct.pack(">IIIIIIiiii8s", *head) + data

    def control(self, seqnum: int, kind: int, request: int, value: int = 0, index: int = 0, length: int = 0) -> bytes:
        setup = struct.pack("<BBHHH", kind, request, value, index, length)
        return self.submit(seqnum, kind & IN if length else 0, room=length, setup=setup)

    def unlink(self, seqnum: int, victim: int) -> bytes:
        self.unlinks[seqnum] = victim
        return struct.pack(">IIIIII24x", 2, seqnum, 0x00010001, 0, 0, victim)

    def hears(self, data: bytes) -> list[Returned]:
        """Takes answers apart as vhci-hcd does, which drops the device at an answer to what is not under way."""
        self._heard += data
        found = []
        while len(self._heard) >= 48:
            command, seqnum, _, _, _, status, length = struct.unpack_from(">IIIIIii", self._heard)
            if command == 4:
                victim = self.unlinks.pop(seqnum)
                assert victim not in self.waits or status == ECONNRESET, "given back as if it had gone well"
                self.waits.pop(victim, None)
                self._heard = self._heard[48:]
                found.append(Returned(seqnum, status))
                continue
            assert command == 3
            direction, size = self.waits[seqnum]
            assert 0 <= length <= size
            whole = 48 + (length if direction else 0)
            if len(self._heard) < whole:
                break
            del self.waits[seqnum]
            found.append(Returned(seqnum, status, length, self._heard[48:whole]))
            self._heard = self._heard[whole:]
        return found
