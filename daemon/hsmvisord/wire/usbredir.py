"""usbredir, our side being its "usb-host": the device that QEMU's usb-redir has in its guest.  Sans-IO.

A message is `u32 type, u32 length, u32 or u64 id` in little-endian, its own header, and data (the protocol's
usb-redirection-protocol.md; numbers as in usbredirproto.h).  We speak first.  What QEMU says by messages of its own (configuration,
alternate setting) is a control transfer to the engine; a stream of interrupts is one transfer after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

from hsmvisord import limits
from hsmvisord.wire import usb
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Event, Reset, Setup, Status, Submit, Urb
from hsmvisord.wire.usb_descriptors import INTERFACES, Descriptors

VERSION = b"hsmvisor"
CONNECT_DEVICE_VERSION, FILTER, DISCONNECT_ACK, EP_INFO_MAX_PACKET_SIZE, IDS_64, BULK_LENGTH_32 = 1, 2, 3, 4, 5, 6
CAPABILITIES = sum(
    1 << c for c in (CONNECT_DEVICE_VERSION, FILTER, DISCONNECT_ACK, EP_INFO_MAX_PACKET_SIZE, IDS_64, BULK_LENGTH_32)
)
HIGH_SPEED = 2
INVALID_ENDPOINT = 255

_HEAD, _HEAD_64 = struct.Struct("<III"), struct.Struct("<IIQ")
_HELLO = struct.Struct("<64sI")
_CONTROL = struct.Struct("<BBBBHHH")  #: endpoint, request, requesttype, status, value, index, length
_BULK, _BULK_32 = struct.Struct("<BBHI"), struct.Struct("<BBHIH")  #: endpoint, status, length, stream, the length's high half
_INTERRUPT = struct.Struct("<BBH")  #: endpoint, status, length; isochronous packets have the same
_STREAMS = struct.Struct("<II")
_INTERRUPTS = {e.address: e.size for i in INTERFACES for e in i.endpoints if e.kind == usb.INTERRUPT}


class Type(IntEnum):
    HELLO = 0
    DEVICE_CONNECT = 1
    DEVICE_DISCONNECT = 2
    RESET = 3
    INTERFACE_INFO = 4
    EP_INFO = 5
    SET_CONFIGURATION = 6
    GET_CONFIGURATION = 7
    CONFIGURATION_STATUS = 8
    SET_ALT_SETTING = 9
    GET_ALT_SETTING = 10
    ALT_SETTING_STATUS = 11
    START_ISO_STREAM = 12
    STOP_ISO_STREAM = 13
    ISO_STREAM_STATUS = 14
    START_INTERRUPT_RECEIVING = 15
    STOP_INTERRUPT_RECEIVING = 16
    INTERRUPT_RECEIVING_STATUS = 17
    ALLOC_BULK_STREAMS = 18
    FREE_BULK_STREAMS = 19
    BULK_STREAMS_STATUS = 20
    CANCEL_DATA_PACKET = 21
    FILTER_REJECT = 22
    FILTER_FILTER = 23
    DEVICE_DISCONNECT_ACK = 24
    START_BULK_RECEIVING = 25
    STOP_BULK_RECEIVING = 26
    BULK_RECEIVING_STATUS = 27
    CONTROL_PACKET = 100
    BULK_PACKET = 101
    ISO_PACKET = 102
    INTERRUPT_PACKET = 103


SUCCESS, CANCELLED, INVAL, IO_ERROR, STALL = 0, 1, 2, 3, 4

_STATUS = {Status.OK: SUCCESS, Status.STALL: STALL, Status.INVALID: INVAL, Status.CANCELLED: CANCELLED}


class _Asked(NamedTuple):
    """What is kept of a transfer: what to do when it ends, or is cancelled instead."""

    setup: Setup | None
    ended: Callable[[Done], None]
    cancelled: Callable[[], None]


class UsbredirHost:
    """`receive` gives what the engine is to do; `done` and `cancelled` take how that ended; `data_to_send` has what is told."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors
        self._in = bytearray()
        self._out = bytearray()
        self._greeted = False
        self._ids64 = self._bulk32 = self._max_packets = False
        self._alternates: dict[int, int] = {}
        self._configuration = 0
        self._asked: dict[int, _Asked] = {}  #: under way, by number
        self._numbers = 0
        self._by_id: dict[int, int] = {}  #: QEMU's id of a packet, to the engine's number; not of one that is being cancelled
        self._interrupts: dict[int, int] = {}  #: endpoints that are received from, to the engine's number
        self._interrupt_id = 0
        self._events: list[Event] = []
        self._send(Type.HELLO, 0, _HELLO.pack(VERSION, CAPABILITIES))

    @property
    def imported(self) -> bool:
        return self._greeted

    def data_to_send(self) -> bytes:
        data = bytes(self._out)
        self._out.clear()
        return data

    # ---- from QEMU ----------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Iterator[Event]:
        """Gives what came whole, to be carried out one by one: what is told depends on it.  To be iterated to its end; raises
        BrokenPeer."""
        self._in += data
        while (message := self._next()) is not None:
            kind, ident, body = message
            _HANDLERS[kind](self, ident, body)
            yield from self._taken()

    def _next(self) -> tuple[Type, int, bytes] | None:
        head = _HEAD_64 if self._ids64 else _HEAD
        if len(self._in) < head.size:
            return None
        number, length, ident = head.unpack_from(self._in)
        kind = _TYPES.get(number)
        if kind is None or kind not in _HANDLERS:
            raise BrokenPeer(f"a message of type {number}")
        if self._greeted == (kind is Type.HELLO):
            raise BrokenPeer("a second HELLO" if self._greeted else f"{kind.name} before HELLO")
        least, most = self._sizes(kind)
        if not least <= length <= most:
            raise BrokenPeer(f"{kind.name} of {length} bytes")
        if len(self._in) < head.size + length:
            return None
        body = bytes(self._in[head.size : head.size + length])
        del self._in[: head.size + length]
        return kind, ident, body

    def _sizes(self, kind: Type) -> tuple[int, int]:
        if kind is Type.BULK_PACKET:
            size = self._bulk_head.size
            return size, size + limits.MAX_USB_TRANSFER
        return _SIZES[kind]

    @property
    def _bulk_head(self) -> struct.Struct:
        return _BULK_32 if self._bulk32 else _BULK

    def _hello(self, ident: int, body: bytes) -> None:
        theirs = int.from_bytes(body[64:68], "little") if len(body) >= _HELLO.size else 0
        self._greeted = True
        self._ids64 = bool(theirs & 1 << IDS_64)
        self._bulk32 = bool(theirs & 1 << BULK_LENGTH_32)
        self._max_packets = bool(theirs & 1 << EP_INFO_MAX_PACKET_SIZE)
        self._tell_interfaces()
        i = self._descriptors.identity
        connect = struct.pack("<BBBBHH", HIGH_SPEED, 0, 0, 0, i.vendor, i.product)
        if theirs & 1 << CONNECT_DEVICE_VERSION:
            connect += struct.pack("<H", i.release)
        self._send(Type.DEVICE_CONNECT, 0, connect)

    def _reset(self, ident: int, body: bytes) -> None:
        """What is under way ends by it, and is told: QEMU waits for an answer to each packet, also to one that it cancels later."""
        self._alternates.clear()
        self._configuration = 0
        self._events.append(Reset())

    def _set_configuration(self, ident: int, body: bytes) -> None:
        def ended(done: Done) -> None:
            told = bytes([_STATUS[done.status], self._configuration])
            self._send(Type.CONFIGURATION_STATUS, ident, told)

        self._control(Setup(usb.TO_DEVICE, usb.SET_CONFIGURATION, body[0], 0, 0), ended)

    def _get_configuration(self, ident: int, body: bytes) -> None:
        def ended(done: Done) -> None:
            self._send(Type.CONFIGURATION_STATUS, ident, bytes([_STATUS[done.status], *done.data]))

        self._control(Setup(usb.IN | usb.TO_DEVICE, usb.GET_CONFIGURATION, 0, 0, 1), ended)

    def _set_alt_setting(self, ident: int, body: bytes) -> None:
        number, alternate = body

        def ended(done: Done) -> None:
            told = bytes([_STATUS[done.status], number, self._alternates.get(number, 0)])
            self._send(Type.ALT_SETTING_STATUS, ident, told)

        self._control(Setup(usb.TO_INTERFACE, usb.SET_INTERFACE, alternate, number, 0), ended)

    def _get_alt_setting(self, ident: int, body: bytes) -> None:
        number = body[0]

        def ended(done: Done) -> None:
            alternate = done.data or b"\xff"  # of an interface that there is not
            self._send(Type.ALT_SETTING_STATUS, ident, bytes([_STATUS[done.status], number]) + alternate)

        self._control(Setup(usb.IN | usb.TO_INTERFACE, usb.GET_INTERFACE, 0, number, 1), ended)

    def _start_interrupts(self, ident: int, body: bytes) -> None:
        endpoint = body[0]
        known = endpoint in _INTERRUPTS
        self._send(Type.INTERRUPT_RECEIVING_STATUS, ident, bytes([SUCCESS if known else STALL, endpoint]))
        if known and endpoint not in self._interrupts:
            self._receive_interrupt(endpoint)

    def _receive_interrupt(self, endpoint: int) -> None:
        def ended(done: Done) -> None:
            goes_on = self._interrupts.get(endpoint) == done.ident
            if done.status is Status.OK:
                packet = _INTERRUPT.pack(endpoint, SUCCESS, len(done.data)) + done.data
                self._send(Type.INTERRUPT_PACKET, self._interrupt_id, packet)
                self._interrupt_id = self._interrupt_id + 1 & 0xFFFFFFFF
                if goes_on:
                    self._receive_interrupt(endpoint)
            elif goes_on:  # whyever: with any other status QEMU would believe that it is received still
                del self._interrupts[endpoint]
                self._send(Type.INTERRUPT_RECEIVING_STATUS, 0, bytes([STALL, endpoint]))

        self._interrupts[endpoint] = self._submit(endpoint, _INTERRUPTS[endpoint], b"", None, ended)

    def _stop_interrupts(self, ident: int, body: bytes) -> None:
        endpoint = body[0]
        number = self._interrupts.pop(endpoint, 0)
        if number:
            self._events.append(Cancel(number))
        self._send(Type.INTERRUPT_RECEIVING_STATUS, ident, bytes([SUCCESS, endpoint]))

    def _bulk_streams(self, ident: int, body: bytes) -> None:
        endpoints, count = _STREAMS.unpack(body) if len(body) == _STREAMS.size else (int.from_bytes(body, "little"), 0)
        self._send(Type.BULK_STREAMS_STATUS, ident, _STREAMS.pack(endpoints, count) + bytes([INVAL]))

    def _start_iso(self, ident: int, body: bytes) -> None:
        self._send(Type.ISO_STREAM_STATUS, ident, bytes([STALL, body[0]]))  # there is no such endpoint: none was started

    def _stop_iso(self, ident: int, body: bytes) -> None:
        self._send(Type.ISO_STREAM_STATUS, ident, bytes([SUCCESS, body[0]]))

    def _bulk_receiving(self, ident: int, body: bytes) -> None:
        raise BrokenPeer("bulk receiving, which was not offered")

    def _ignore(self, ident: int, body: bytes) -> None:
        return

    def _rejected(self, ident: int, body: bytes) -> None:
        raise BrokenPeer("the guest's filter rejects the device")

    def _cancel(self, ident: int, body: bytes) -> None:
        number = self._by_id.pop(ident, None)  # the id may be another packet's from now on
        if number is not None:  # else it was answered while this was on its way
            self._events.append(Cancel(number))

    def _control_packet(self, ident: int, body: bytes) -> None:
        endpoint, request, kind, _, value, index, length = _CONTROL.unpack_from(body)
        data = body[_CONTROL.size :]
        if endpoint & 0x7F or bool(endpoint & usb.IN) != bool(kind & usb.IN) or len(data) != (0 if kind & usb.IN else length):
            raise BrokenPeer("a control packet whose parts do not fit together")

        def told(status: int, size: int, data: bytes) -> None:
            head = _CONTROL.pack(endpoint, request, kind, status, value, index, size)
            self._send(Type.CONTROL_PACKET, ident, head + data)

        setup = Setup(kind, request, value, index, length)
        self._packet(ident, Urb(0, 0, length, data, setup), bool(kind & usb.IN), told)

    def _bulk_packet(self, ident: int, body: bytes) -> None:
        head = self._bulk_head
        endpoint, _, low, stream, *high = head.unpack_from(body)
        length = low | (high[0] << 16 if high else 0)
        data = body[head.size :]
        if len(data) != (0 if endpoint & usb.IN else length):
            raise BrokenPeer(f"a bulk packet of {length} bytes with {len(data)}")

        def told(status: int, size: int, data: bytes) -> None:
            parts = (size & 0xFFFF, stream, *([size >> 16] if head is _BULK_32 else []))
            self._send(Type.BULK_PACKET, ident, head.pack(endpoint, status, *parts) + data)

        self._packet(ident, Urb(0, endpoint, min(length, limits.MAX_USB_TRANSFER), data), bool(endpoint & usb.IN), told)

    def _interrupt_packet(self, ident: int, body: bytes) -> None:
        endpoint = body[0]
        self._send(Type.INTERRUPT_PACKET, ident, _INTERRUPT.pack(endpoint, INVAL, 0))  # there is no interrupt OUT endpoint

    def _packet(self, ident: int, urb: Urb, reads: bool, told: Callable[[int, int, bytes], None]) -> None:
        """A packet that is answered by another of its type, once: `told` gets status, length and data."""

        def ended(done: Done) -> None:
            if self._by_id.get(ident) == done.ident:
                del self._by_id[ident]
            told(_STATUS[done.status], len(done.data) if reads else done.length, done.data)

        if ident in self._by_id:
            raise BrokenPeer(f"a second packet with the id {ident}")
        self._by_id[ident] = self._submit(urb.endpoint, urb.length, urb.data, urb.setup, ended, lambda: told(CANCELLED, 0, b""))

    # ---- the engine ---------------------------------------------------------------------------------------------

    def _control(self, setup: Setup, ended: Callable[[Done], None]) -> None:
        self._submit(0, setup.w_length, b"", setup, ended)

    def _submit(
        self,
        endpoint: int,
        length: int,
        data: bytes,
        setup: Setup | None,
        ended: Callable[[Done], None],
        cancelled: Callable[[], None] = lambda: None,
    ) -> int:
        self._numbers += 1
        urb = Urb(self._numbers, endpoint, length, data, setup)
        self._asked[urb.ident] = _Asked(setup, ended, cancelled)
        self._events.append(Submit(urb))
        return urb.ident

    def done(self, done: Done) -> list[Event]:
        """Tells how a transfer ended; returns what the engine is to do next."""
        asked = self._asked.pop(done.ident)
        if done.status is Status.OK and asked.setup is not None:
            self._follow(asked.setup)
        asked.ended(done)
        return self._taken()

    def cancelled(self, ident: int, was_parked: bool) -> None:
        """Tells that a transfer was cancelled; how one ended that was not parked any more is told by `done`."""
        if was_parked:
            self._asked.pop(ident).cancelled()

    def _follow(self, setup: Setup) -> None:
        """What is configured changes which endpoints there are, by whichever message that was asked."""
        match setup.request_type, setup.request:
            case usb.TO_DEVICE, usb.SET_CONFIGURATION:
                self._configuration = setup.w_value
                self._alternates.clear()
            case usb.TO_INTERFACE, usb.SET_INTERFACE:
                self._alternates[setup.w_index] = setup.w_value
            case _:
                return
        self._tell_interfaces()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # ---- to QEMU ------------------------------------------------------------------------------------------------

    def _send(self, kind: Type, ident: int, body: bytes) -> None:
        head = _HEAD_64 if self._ids64 and kind is not Type.HELLO else _HEAD
        self._out += head.pack(kind, len(body), ident) + body

    def _tell_interfaces(self) -> None:
        """What there is now: QEMU learns endpoints from it."""
        now = [i for i in INTERFACES if i.alternate == self._alternates.get(i.number, 0)]
        numbers, classes, subclasses, protocols = (bytearray(32) for _ in range(4))
        kinds, intervals, owners = bytearray([INVALID_ENDPOINT] * 32), bytearray(32), bytearray(32)
        sizes = [0] * 32
        kinds[0] = kinds[16] = usb.CONTROL
        sizes[0] = sizes[16] = 64
        for at, interface in enumerate(now):
            numbers[at] = interface.number
            classes[at], subclasses[at], protocols[at] = interface.identity
            for endpoint in interface.endpoints:
                place = (endpoint.address & usb.IN) >> 3 | endpoint.address & 0x0F
                kinds[place], intervals[place], owners[place] = endpoint.kind, endpoint.interval, interface.number
                sizes[place] = endpoint.size
        told = struct.pack("<I", len(now)) + numbers + classes + subclasses + protocols
        self._send(Type.INTERFACE_INFO, 0, told)
        told = bytes(kinds + intervals + owners)
        if self._max_packets:
            told += struct.pack("<32H", *sizes)
        self._send(Type.EP_INFO, 0, told)


_TYPES = {int(kind): kind for kind in Type}

#: What QEMU may say, and who hears it; the least and the most bytes of each.
_HANDLERS: dict[Type, Callable[[UsbredirHost, int, bytes], None]] = {
    Type.HELLO: UsbredirHost._hello,
    Type.RESET: UsbredirHost._reset,
    Type.SET_CONFIGURATION: UsbredirHost._set_configuration,
    Type.GET_CONFIGURATION: UsbredirHost._get_configuration,
    Type.SET_ALT_SETTING: UsbredirHost._set_alt_setting,
    Type.GET_ALT_SETTING: UsbredirHost._get_alt_setting,
    Type.START_ISO_STREAM: UsbredirHost._start_iso,
    Type.STOP_ISO_STREAM: UsbredirHost._stop_iso,
    Type.START_INTERRUPT_RECEIVING: UsbredirHost._start_interrupts,
    Type.STOP_INTERRUPT_RECEIVING: UsbredirHost._stop_interrupts,
    Type.ALLOC_BULK_STREAMS: UsbredirHost._bulk_streams,
    Type.FREE_BULK_STREAMS: UsbredirHost._bulk_streams,
    Type.CANCEL_DATA_PACKET: UsbredirHost._cancel,
    Type.FILTER_REJECT: UsbredirHost._rejected,
    Type.FILTER_FILTER: UsbredirHost._ignore,
    Type.DEVICE_DISCONNECT_ACK: UsbredirHost._ignore,
    Type.START_BULK_RECEIVING: UsbredirHost._bulk_receiving,
    Type.STOP_BULK_RECEIVING: UsbredirHost._bulk_receiving,
    Type.CONTROL_PACKET: UsbredirHost._control_packet,
    Type.BULK_PACKET: UsbredirHost._bulk_packet,
    Type.ISO_PACKET: UsbredirHost._ignore,
    Type.INTERRUPT_PACKET: UsbredirHost._interrupt_packet,
}
_SIZES: dict[Type, tuple[int, int]] = {
    Type.HELLO: (64, 64 + 4 * limits.MAX_USBREDIR_CAPABILITIES),
    Type.RESET: (0, 0),
    Type.SET_CONFIGURATION: (1, 1),
    Type.GET_CONFIGURATION: (0, 0),
    Type.SET_ALT_SETTING: (2, 2),
    Type.GET_ALT_SETTING: (1, 1),
    Type.START_ISO_STREAM: (3, 3),
    Type.STOP_ISO_STREAM: (1, 1),
    Type.START_INTERRUPT_RECEIVING: (1, 1),
    Type.STOP_INTERRUPT_RECEIVING: (1, 1),
    Type.ALLOC_BULK_STREAMS: (8, 8),
    Type.FREE_BULK_STREAMS: (4, 4),
    Type.CANCEL_DATA_PACKET: (0, 0),
    Type.FILTER_REJECT: (0, 0),
    Type.FILTER_FILTER: (1, limits.MAX_USBREDIR_FILTER),
    Type.DEVICE_DISCONNECT_ACK: (0, 0),
    Type.START_BULK_RECEIVING: (10, 10),
    Type.STOP_BULK_RECEIVING: (5, 5),
    Type.CONTROL_PACKET: (_CONTROL.size, _CONTROL.size + 0xFFFF),
    Type.ISO_PACKET: (_INTERRUPT.size, _INTERRUPT.size + 0xFFFF),
    Type.INTERRUPT_PACKET: (_INTERRUPT.size, _INTERRUPT.size + 0xFFFF),
}
