"""USB/IP, the server's side: one device for one importer (Linux, Documentation/usb/usbip_protocol.rst).  Sans-IO; big-endian.

Before the import it is asked which devices there are (OP_REQ_DEVLIST) and for one of them (OP_REQ_IMPORT); after it, transfers come
(USBIP_CMD_SUBMIT) and are taken back (USBIP_CMD_UNLINK).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hsmvisord import limits
from hsmvisord.wire import usb
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Event, Setup, Status, Submit, Urb
from hsmvisord.wire.usb_descriptors import INTERFACES, Descriptors

VERSION = 0x0111
REQUEST_DEVLIST, REPLY_DEVLIST = 0x8005, 0x0005
REQUEST_IMPORT, REPLY_IMPORT = 0x8003, 0x0003
SUBMIT, UNLINK, RET_SUBMIT, RET_UNLINK = 1, 2, 3, 4
BUS, DEVICE = 1, 1  #: numbers that the importer is told; it shows its own
HIGH_SPEED = 3  #: enum usb_device_speed of Linux
NO_DEVICE = 4  #: ST_NODEV
EPIPE, EPROTO, ECONNRESET, ESHUTDOWN, EREMOTEIO = -32, -71, -104, -108, -121  #: of Linux, as the protocol has them
SHORT_NOT_OK = 1  #: of a transfer's flags: less than there is room for is an error

_OP = struct.Struct(">HHI")  #: version, code, status
_BUS_ID = 32  #: bytes
_DEVICE = struct.Struct(">256s32sIIIHHHBBBBBB")
_HEAD = struct.Struct(
    ">IIIIIIiiii8s"
)  #: command, seqnum, devid, direction, ep, flags, length, start_frame, packets, interval, setup
_RETURN = struct.Struct(">IIIIIiiiii8x")  #: command, seqnum, devid, direction, ep, status, length, start_frame, packets, errors
_RETURN_UNLINK = struct.Struct(">IIIIIi24x")
_NO_PACKETS = -1  #: the transfer is not isochronous
#: INVALID: nobody answers at that endpoint; CANCELLED: as Linux says of an endpoint that is disabled.
_STATUS = {Status.OK: 0, Status.STALL: EPIPE, Status.INVALID: EPROTO, Status.CANCELLED: ESHUTDOWN}


class _Asked(NamedTuple):
    """What is kept of a transfer."""

    reads: bool
    least: int  #: bytes, for it to be no error


class UsbipServer:
    """`receive` gives what the engine is to do; `done` and `cancelled` take how that ended; `data_to_send` has what is answered."""

    def __init__(self, descriptors: Descriptors) -> None:
        """The module's name is the bus id."""
        self._descriptors = descriptors
        self._bus_id = descriptors.identity.name.encode()[: _BUS_ID - 1]
        self._in = bytearray()
        self._out = bytearray()
        self._imported = False
        self._asked = 0  #: requests before the import
        self._urbs: dict[int, _Asked] = {}  #: under way, by seqnum
        self._unlinks: dict[int, int] = {}  #: seqnum of the transfer, to that of its UNLINK

    @property
    def imported(self) -> bool:
        return self._imported

    def data_to_send(self) -> bytes:
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> Iterator[Event]:
        """Gives what came whole, to be carried out one by one: what is answered depends on it.  To be iterated to its end; raises
        BrokenPeer."""
        self._in += data
        while True:
            if not self._imported:
                if not self._operation():
                    return
            elif (event := self._command()) is not None:
                yield event
            else:
                return

    def done(self, done: Done) -> list[Event]:
        """Answers a transfer; returns what the engine is to do next: nothing."""
        asked = self._urbs.pop(done.ident)
        data = done.data if asked.reads else b""
        status = _STATUS[done.status]
        if status == 0 and len(data) < asked.least:
            status = EREMOTEIO
        length = len(data) if asked.reads else done.length
        self._out += _RETURN.pack(RET_SUBMIT, done.ident, 0, 0, 0, status, length, 0, _NO_PACKETS, 0) + data
        if done.ident in self._unlinks:
            self._return_unlink(done.ident, 0)
        return []

    def cancelled(self, ident: int, was_parked: bool) -> None:
        """Answers the UNLINK of a transfer: that it was taken back, or that it had been answered.

        The answer to the transfer goes first: of two, Linux believes the first, and drops the device at the other one.
        """
        if was_parked:
            del self._urbs[ident]
            self._return_unlink(ident, ECONNRESET)
        elif ident not in self._urbs and ident in self._unlinks:
            self._return_unlink(ident, 0)

    def _return_unlink(self, victim: int, status: int) -> None:
        self._out += _RETURN_UNLINK.pack(RET_UNLINK, self._unlinks.pop(victim), 0, 0, 0, status)

    # ---- before the import --------------------------------------------------------------------------------------

    def _operation(self) -> bool:
        """Answers one request, if it is whole; says whether it was."""
        if len(self._in) < _OP.size:
            return False
        version, code, _ = _OP.unpack_from(self._in)
        if version != VERSION:
            raise BrokenPeer(f"USB/IP of version {version:#06x}")
        if code not in (REQUEST_DEVLIST, REQUEST_IMPORT):
            raise BrokenPeer(f"an operation {code:#06x}")
        size = _OP.size + _BUS_ID * (code == REQUEST_IMPORT)
        if len(self._in) < size:
            return False
        wanted = bytes(self._in[_OP.size : size]).split(b"\0")[0]
        del self._in[:size]
        self._asked += 1
        if self._asked > limits.MAX_USBIP_OPERATIONS:
            raise BrokenPeer(f"more than {limits.MAX_USBIP_OPERATIONS} questions and no import")
        if code == REQUEST_DEVLIST:
            self._out += _OP.pack(VERSION, REPLY_DEVLIST, 0) + struct.pack(">I", 1) + self._device() + self._interfaces()
        elif wanted != self._bus_id:
            self._out += _OP.pack(VERSION, REPLY_IMPORT, NO_DEVICE)
        else:
            self._out += _OP.pack(VERSION, REPLY_IMPORT, 0) + self._device()
            self._imported = True
        return True

    def _device(self) -> bytes:
        i = self._descriptors.identity
        path = b"/sys/devices/hsmvisor/" + self._bus_id
        count = limits.USB_CHANNELS + 1
        return _DEVICE.pack(path, self._bus_id, BUS, DEVICE, HIGH_SPEED, i.vendor, i.product, i.release, 0, 0, 0, 0, 1, count)

    def _interfaces(self) -> bytes:
        return b"".join(bytes([*i.identity, 0]) for i in INTERFACES if i.alternate == 0)

    # ---- after it -----------------------------------------------------------------------------------------------

    def _command(self) -> Event | None:
        """Returns what the next command has the engine do, None when it is not whole yet."""
        if len(self._in) < _HEAD.size:
            return None
        command, seqnum, _, direction, number, flags, length, _, packets, _, eight = _HEAD.unpack_from(self._in)
        if command == UNLINK:
            del self._in[: _HEAD.size]
            return self._unlink(seqnum, flags)  # its seqnum stands where a SUBMIT has its flags
        if command != SUBMIT:
            raise BrokenPeer(f"a command {command}")
        if number > 15 or direction > 1:
            raise BrokenPeer(f"endpoint {number}, direction {direction}")
        if length < 0 or (length > limits.MAX_USB_TRANSFER and not direction):
            raise BrokenPeer(f"a transfer of {length} bytes")
        if packets not in (0, _NO_PACKETS):
            raise BrokenPeer("an isochronous transfer")
        if seqnum in self._urbs:
            raise BrokenPeer(f"a second transfer {seqnum}")
        size = _HEAD.size + (0 if direction else length)
        if len(self._in) < size:
            return None
        data = bytes(self._in[_HEAD.size : size])
        del self._in[:size]
        setup = Setup.decode(eight) if number == 0 else None
        if setup is not None and setup.to_host != bool(direction) and setup.w_length:  # without data Linux says OUT of both
            raise BrokenPeer("a control transfer whose parts do not fit together")
        endpoint = 0 if setup is not None else number | usb.IN * direction
        self._urbs[seqnum] = _Asked(bool(direction), length if direction and flags & SHORT_NOT_OK else 0)
        return Submit(Urb(seqnum, endpoint, min(length, limits.MAX_USB_TRANSFER), data, setup))

    def _unlink(self, seqnum: int, victim: int) -> Cancel:
        if victim in self._unlinks:
            raise BrokenPeer(f"a second UNLINK of {victim}")
        self._unlinks[victim] = seqnum
        return Cancel(victim)
