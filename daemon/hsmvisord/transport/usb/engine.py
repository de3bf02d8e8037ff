"""One USB function: transfers in, completions out.  It serves both transports.  Sans-IO.

A transfer that cannot be answered yet is parked: an IN one until there is data, an OUT one until there is room behind its endpoint.
Those of one endpoint are answered in their order.  What may be parked is bounded; one more ends the device.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from hsmvisord import limits
from hsmvisord.wire import ccid, usb
from hsmvisord.wire.usb import Done, Setup, Status, Urb
from hsmvisord.wire.usb_descriptors import (
    CCID_IN,
    CCID_INTERRUPT,
    CCID_OUT,
    MAX_INTERRUPT,
    MAX_PACKET,
    Descriptors,
    channel_of,
    endpoints_of,
)


class Overload(Exception):
    """The importer has more under way than there may be."""


class Function(Protocol):
    """What is behind the endpoints."""

    def ccid(self, message: bytes) -> None:
        """One whole message to the reader; its answer comes by `Engine.ccid_answer`, now or later."""

    def ccid_control(self, setup: Setup) -> bytes | None:
        """Returns the answer to a request of the reader's class, None for one that there is not."""

    def ccid_reset(self) -> None:
        """The device was reset or deconfigured: the card is powered down, and what it was asked is forgotten."""

    def configured(self) -> None:
        """The importer begins: it is told by `Engine.ccid_notify` whether there is a card."""

    def open(self, channel: int) -> bool:
        """Begins a connection; says whether there is one."""

    def close_channel(self, channel: int) -> None:
        """Ends it."""

    def write(self, channel: int, data: memoryview) -> int:
        """Returns how much was taken; fewer than there is: `Engine.writable` tells when it goes on."""

    def read(self, channel: int, most: int) -> bytes | None:
        """Returns data, b"" at the end of the connection, None when there is nothing: `Engine.readable` tells when there is."""


class Engine:
    def __init__(self, descriptors: Descriptors, function: Function) -> None:
        self._descriptors, self._function = descriptors, function
        self._configuration = 0
        self._open: set[int] = set()  #: channels
        self._halted: set[int] = set()  #: endpoints
        self._parked: dict[int, deque[tuple[Urb, int]]] = {}  #: by endpoint: the transfer, and how much of it went OUT
        self._count = self._bytes = 0  #: of what is parked
        self._idents: dict[int, int] = {}  #: of what is parked, to its endpoint
        self._going: set[int] = set()  #: endpoints whose transfers are being answered
        self._done: list[Done] = []
        self._coming = bytearray()  #: of a message to the reader
        self._answers: deque[memoryview] = deque()  #: of the reader that were not read yet
        self._notice = b""

    @property
    def configuration(self) -> int:
        return self._configuration

    @property
    def parked(self) -> tuple[int, int]:
        """Returns how many transfers wait, and the bytes of them that go OUT."""
        return self._count, self._bytes

    def take_done(self) -> list[Done]:
        """Returns what ended since the last call, in order."""
        done, self._done = self._done, []
        return done

    # ---- the importer -------------------------------------------------------------------------------------------

    def submit(self, urb: Urb) -> None:
        """Raises Overload."""
        if urb.length > limits.MAX_USB_TRANSFER:
            raise Overload(f"a transfer of {urb.length} bytes")
        if urb.ident in self._idents:
            raise Overload(f"a second transfer with the number {urb.ident}")
        if urb.setup is not None:
            self._control(urb, urb.setup)
            return
        if not self._there(urb.endpoint):
            self._end(urb, Status.INVALID)
        elif urb.endpoint in self._halted:
            self._end(urb, Status.STALL)
        else:
            self._park(urb)
            self._go_on(urb.endpoint)

    def cancel(self, ident: int) -> bool:
        """Says whether the transfer was parked; then it is gone, and nothing is told of it."""
        endpoint = self._idents.get(ident)
        if endpoint is None:
            return False
        queue = self._parked[endpoint]
        for at, (urb, _) in enumerate(queue):
            if urb.ident == ident:
                del queue[at]
                self._unpark(urb)
                return True
        raise AssertionError("a number without its transfer")

    def reset(self) -> None:
        """As the bus does it: nothing is parked, configured or open after it.  May come at any time, and again and again."""
        self._deconfigure()

    # ---- what is behind -----------------------------------------------------------------------------------------

    def ccid_answer(self, message: bytes) -> None:
        """One whole message of the reader."""
        if self._configuration:
            if len(self._answers) >= 2 * limits.MAX_CCID_ANSWERS:
                # No message is taken meanwhile: these ask for time, for one that does not end.
                raise Overload("nobody reads what the reader answers")
            self._answers.append(memoryview(message))
            self._go_on(CCID_IN)

    def ccid_notify(self, message: bytes) -> None:
        """For the interrupt endpoint: a newer one takes the place of one that nobody has read."""
        if self._configuration:
            self._notice = message
            self._go_on(CCID_INTERRUPT)

    def readable(self, channel: int) -> None:
        if channel in self._open:
            self._go_on(endpoints_of(channel)[1])

    def writable(self, channel: int) -> None:
        if channel in self._open:
            self._go_on(endpoints_of(channel)[0])

    # ---- control transfers ----------------------------------------------------------------------------------------

    def _control(self, urb: Urb, setup: Setup) -> None:
        answer = self._requested(setup)
        if answer is None:
            self._end(urb, Status.STALL)
        elif setup.to_host:
            self._done.append(Done(urb.ident, urb.endpoint, Status.OK, answer[: min(setup.w_length, urb.length)]))
        else:
            self._done.append(Done(urb.ident, urb.endpoint, Status.OK, b"", len(urb.data)))

    def _requested(self, setup: Setup) -> bytes | None:
        """Returns the answer, b"" where there is nothing to say, None to stall (USB 2.0, 9.4)."""
        kind, to = setup.request_type & 0x60, setup.request_type & 0x1F
        if kind == usb.CLASS and to == usb.TO_INTERFACE and setup.w_index & 0xFF == 0:
            return self._function.ccid_control(setup) if self._configuration else None
        if kind != usb.STANDARD:
            return None
        match setup.request, to, setup.to_host:
            case usb.GET_DESCRIPTOR, usb.TO_DEVICE, True:
                return self._descriptors.get(setup.w_value >> 8, setup.w_value & 0xFF, setup.w_index)
            case usb.GET_STATUS, usb.TO_DEVICE, True:
                return b"\x01\x00"  # self-powered
            case usb.GET_STATUS, usb.TO_INTERFACE, True:
                return b"\x00\x00" if self._interface(setup.w_index) else None
            case usb.GET_STATUS, usb.TO_ENDPOINT, True:
                there = setup.w_index in (0, usb.IN) or self._there(setup.w_index)
                return bytes([setup.w_index in self._halted, 0]) if there else None
            case usb.CLEAR_FEATURE | usb.SET_FEATURE, usb.TO_ENDPOINT, False if setup.w_value == usb.ENDPOINT_HALT:
                return self._halt(setup.w_index, setup.request == usb.SET_FEATURE)
            case usb.SET_ADDRESS, usb.TO_DEVICE, False:
                return b""
            case usb.GET_CONFIGURATION, usb.TO_DEVICE, True:
                return bytes([self._configuration])
            case usb.SET_CONFIGURATION, usb.TO_DEVICE, False if setup.w_value in (0, 1):
                return self._configure(setup.w_value)
            case usb.GET_INTERFACE, usb.TO_INTERFACE, True:
                return bytes([setup.w_index in self._open]) if self._interface(setup.w_index) else None
            case usb.SET_INTERFACE, usb.TO_INTERFACE, False:
                return self._set_interface(setup.w_index, setup.w_value)
        return None

    def _interface(self, number: int) -> bool:
        return bool(self._configuration) and number <= limits.USB_CHANNELS

    def _there(self, endpoint: int) -> bool:
        if not self._configuration:
            return False
        if endpoint in (CCID_OUT, CCID_IN, CCID_INTERRUPT):
            return True
        return channel_of(endpoint) in self._open

    def _halt(self, endpoint: int, halt: bool) -> bytes | None:
        if endpoint in (0, usb.IN):
            return None if halt else b""  # the control pipe is never halted
        if not self._there(endpoint):
            return None
        if endpoint == CCID_OUT:
            self._coming.clear()  # what comes next begins a message
        if halt:
            self._stall(endpoint)
        else:
            self._halted.discard(endpoint)
            self._go_on(endpoint)
        return b""

    def _configure(self, value: int) -> bytes:
        self._deconfigure()
        if value:
            self._configuration = value
            self._function.configured()
        return b""

    def _deconfigure(self) -> None:
        for channel in list(self._open):
            self._close(channel)
        for endpoint in (CCID_OUT, CCID_IN, CCID_INTERRUPT):
            self._drop(endpoint)
        if self._configuration:
            self._configuration = 0
            self._function.ccid_reset()
        self._halted.clear()
        self._coming.clear()
        self._answers.clear()
        self._notice = b""

    def _set_interface(self, number: int, alternate: int) -> bytes | None:
        if not self._interface(number) or alternate > (number > 0):
            return None
        if number == 0:
            self._coming.clear()
            self._halted -= {CCID_OUT, CCID_IN, CCID_INTERRUPT}  # 9.1.1.5: all its endpoints begin anew
            return b""
        self._close(number)
        if alternate:
            if not self._function.open(number):
                return None
            self._open.add(number)
        return b""

    def _close(self, channel: int) -> None:
        if channel in self._open:
            self._open.discard(channel)
            self._function.close_channel(channel)
            for endpoint in endpoints_of(channel):
                self._drop(endpoint)
                self._halted.discard(endpoint)

    # ---- data ---------------------------------------------------------------------------------------------------

    def _park(self, urb: Urb) -> None:
        if self._count >= limits.MAX_PARKED_URBS or self._bytes + len(urb.data) > limits.MAX_PARKED_URB_BYTES:
            raise Overload(f"{self._count} transfers of {self._bytes} bytes wait, and one more came")
        self._parked.setdefault(urb.endpoint, deque()).append((urb, 0))
        self._idents[urb.ident] = urb.endpoint
        self._count += 1
        self._bytes += len(urb.data)

    def _unpark(self, urb: Urb) -> None:
        del self._idents[urb.ident]
        self._count -= 1
        self._bytes -= len(urb.data)

    def _end(self, urb: Urb, status: Status, data: bytes = b"", length: int = 0) -> None:
        self._done.append(Done(urb.ident, urb.endpoint, status, data, length))

    def _drop(self, endpoint: int) -> None:
        """Ends all that waits there: the endpoint is gone."""
        for urb, sent in self._parked.pop(endpoint, ()):
            self._unpark(urb)
            self._end(urb, Status.CANCELLED, length=sent)

    def _stall(self, endpoint: int) -> None:
        self._halted.add(endpoint)
        for urb, sent in self._parked.pop(endpoint, ()):
            self._unpark(urb)
            self._end(urb, Status.STALL, length=sent)

    def _go_on(self, endpoint: int) -> None:
        """Answers what waits at an endpoint, as far as that goes."""
        if endpoint in self._going:
            return  # what is behind it has answered at once: whoever asked it goes on himself
        self._going.add(endpoint)
        try:
            while self._answer_first(endpoint):
                pass
        finally:
            self._going.discard(endpoint)
        if endpoint == CCID_IN:
            self._go_on(CCID_OUT)  # there may be room for another message

    def _answer_first(self, endpoint: int) -> bool:
        """Answers the transfer that waits longest there, if that can be; says whether it was."""
        queue = self._parked.get(endpoint)
        if not queue or endpoint in self._halted:
            return False
        urb, sent = queue[0]
        data = b""
        if endpoint & usb.IN:
            read = self._read(endpoint, urb.length) if urb.length else b""
            if read is None:
                return False
            data = read
        else:
            if endpoint == CCID_OUT and len(self._answers) >= limits.MAX_CCID_ANSWERS:
                return False
            sent += self._write(endpoint, memoryview(urb.data)[sent:])
            if endpoint in self._halted:
                return False  # by what was written
            if sent < urb.length:
                queue[0] = (urb, sent)
                return False
        queue.popleft()
        self._unpark(urb)
        self._end(urb, Status.OK, data, sent)
        return True

    def _read(self, endpoint: int, room: int) -> bytes | None:
        if endpoint == CCID_IN:
            return self._read_answer(room)
        if endpoint == CCID_INTERRUPT:
            notice, self._notice = self._notice, b""
            return notice[: min(room, MAX_INTERRUPT)] or None
        data = self._function.read(channel_of(endpoint), room)
        if data == b"":
            self._stall(endpoint)
            return None
        return data

    def _read_answer(self, room: int) -> bytes | None:
        """As much of a message as there is room for; whoever reads knows from its head how long it is (CCID 1.10, 6.2)."""
        if not self._answers:
            return None
        answer = self._answers.popleft()
        if len(answer) > room:
            self._answers.appendleft(answer[room:])
        return bytes(answer[:room])

    def _write(self, endpoint: int, data: memoryview) -> int:
        if endpoint == CCID_OUT:
            self._take_message(data)
            return len(data)
        return self._function.write(channel_of(endpoint), data) if data else 0

    def _take_message(self, data: memoryview) -> None:
        """Collects a message to the reader; one that is too long, or does not end where it says, halts the endpoint."""
        self._coming += data
        if not self._coming:
            return  # the empty packet after a message of full ones
        ends = len(data) % MAX_PACKET != 0 or not data  # a short packet is a transfer's last one (USB 2.0, 5.8.3)
        whole = ccid.HEAD
        if len(self._coming) >= ccid.HEAD:
            whole += ccid.length(bytes(self._coming[: ccid.HEAD]))
        if whole > limits.MAX_CCID_MESSAGE or len(self._coming) > whole or (ends and len(self._coming) < whole):
            self._refuse()
        elif len(self._coming) == whole:
            message = bytes(self._coming)
            self._coming.clear()
            self._function.ccid(message)

    def _refuse(self) -> None:
        self._coming.clear()
        self._stall(CCID_OUT)
