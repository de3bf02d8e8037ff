"""Importers of a module's USB device without a kernel: QEMU's end of usbredir, USB/IP's client; and a smart card driver on top.

Written from the protocols' own documents, so that they know nothing of the code that they test.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Protocol, Self

CAPABILITIES = 0xFF  #: as QEMU 7.2 announces them
SELECT_PIV = bytes.fromhex("00A404000BA00000030800001000010000")


class Stalled(Exception):
    pass


class Lost(Exception):
    """The device closed the connection."""


class Importer(Protocol):
    sock: socket.socket

    def control(self, request_type: int, request: int, value: int, index: int, length: int = 0, data: bytes = b"") -> bytes: ...

    def configure(self, value: int = 1) -> None: ...

    def set_interface(self, interface: int, alternate: int) -> None: ...

    def submit(self, endpoint: int, length: int, data: bytes = b"") -> int:
        """Begins a transfer; returns its number."""

    def finish(self, ident: int) -> tuple[bytes, int]:
        """Returns data and length of one that was begun; raises Stalled, whyever it failed."""

    def write(self, endpoint: int, data: bytes) -> int: ...

    def read(self, endpoint: int, length: int) -> bytes: ...

    def exactly(self, count: int) -> bytes: ...

    def say(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class _Socket:
    def __init__(self, sock: socket.socket, within: float = 20) -> None:
        self.sock = sock
        sock.settimeout(within)

    def exactly(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            try:
                part = self.sock.recv(count - len(parts))
            except ConnectionError:
                raise Lost from None
            if not part:
                raise Lost
            parts += part
        return parts

    def say(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except ConnectionError:
            raise Lost from None

    def close(self) -> None:
        self.sock.close()


class Usbredir(_Socket):
    """The "usb-guest" of usbredir: QEMU's side."""

    HELLO, CONNECT, RESET, INTERFACES, ENDPOINTS, SET_CONFIGURATION, CONFIGURATION = 0, 1, 3, 4, 5, 6, 8
    SET_ALT, ALT, START_INTERRUPT, INTERRUPT_STATUS, CANCEL = 9, 11, 15, 17, 21
    CONTROL, BULK, INTERRUPT = 100, 101, 103

    def __init__(self, where: Path | socket.socket) -> None:
        if isinstance(where, socket.socket):
            sock = where
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(where))
        super().__init__(sock)
        self.id = 0
        self.ids64 = False
        self.interrupts: list[bytes] = []
        self.interfaces = self.endpoints = b""
        self.held: list[tuple[int, int, bytes]] = []
        kind, _, body = self.receive()
        assert kind == self.HELLO and len(body) == 68 and struct.unpack("<I", body[64:])[0] == 0x7E
        self.send(self.HELLO, 0, b"a test".ljust(64, b"\0") + struct.pack("<I", CAPABILITIES))
        self.ids64 = True
        self.device = b""
        while not self.device:
            kind, _, body = self.receive()
            if kind == self.CONNECT:
                self.device = body

    def send(self, kind: int, ident: int, body: bytes = b"") -> None:
        head = struct.pack("<IIQ" if self.ids64 else "<III", kind, len(body), ident)
        self.say(head + body)

    def receive(self) -> tuple[int, int, bytes]:
        head = self.exactly(16 if self.ids64 else 12)
        kind, length, ident = struct.unpack("<IIQ" if self.ids64 else "<III", head)
        body = self.exactly(length)
        if kind == self.INTERFACES:
            self.interfaces = body
        elif kind == self.ENDPOINTS:
            self.endpoints = body
        elif kind == self.INTERRUPT:
            self.interrupts.append(body[4:])
        return kind, ident, body

    def until(self, kind: int, ident: int) -> bytes:
        for at, (other, number, body) in enumerate(self.held):
            if (other, number) == (kind, ident):
                del self.held[at]
                return body
        while True:
            found, number, body = self.receive()
            if (found, number) == (kind, ident):
                return body
            self.held.append((found, number, body))

    def next_id(self) -> int:
        self.id += 1
        return self.id

    def reset(self) -> None:
        self.send(self.RESET, 0)

    def control(self, request_type: int, request: int, value: int, index: int, length: int = 0, data: bytes = b"") -> bytes:
        ident = self.next_id()
        body = struct.pack("<BBBBHHH", request_type & 0x80, request, request_type, 0, value, index, length or len(data))
        self.send(self.CONTROL, ident, body + data)
        answer = self.until(self.CONTROL, ident)
        if answer[3]:
            raise Stalled(answer[3])
        return answer[10:]

    def configure(self, value: int = 1) -> None:
        ident = self.next_id()
        self.send(self.SET_CONFIGURATION, ident, bytes([value]))
        status = self.until(self.CONFIGURATION, ident)
        assert status == bytes([0, value])

    def set_interface(self, interface: int, alternate: int) -> None:
        ident = self.next_id()
        self.send(self.SET_ALT, ident, bytes([interface, alternate]))
        status = self.until(self.ALT, ident)
        if status[0]:
            raise Stalled(status[0])

    def submit(self, endpoint: int, length: int, data: bytes = b"") -> int:
        ident = self.next_id()
        self.send(self.BULK, ident, struct.pack("<BBHIH", endpoint, 0, length & 0xFFFF, 0, length >> 16) + data)
        return ident

    def ended(self, ident: int) -> tuple[int, bytes, int]:
        """Returns status, data and length of a bulk packet."""
        body = self.until(self.BULK, ident)
        _, status, low, _, high = struct.unpack_from("<BBHIH", body)
        return status, body[10:], low | high << 16

    def cancel(self, ident: int) -> None:
        self.send(self.CANCEL, ident)

    def finish(self, ident: int) -> tuple[bytes, int]:
        status, data, length = self.ended(ident)
        if status:
            raise Stalled(status)
        return data, length

    def write(self, endpoint: int, data: bytes) -> int:
        return self.finish(self.submit(endpoint, len(data), data))[1]

    def read(self, endpoint: int, length: int) -> bytes:
        return self.finish(self.submit(endpoint, length))[0]

    def watch(self, endpoint: int) -> None:
        self.send(self.START_INTERRUPT, self.next_id(), bytes([endpoint]))

    def interrupt(self) -> bytes:
        """Returns the next packet of the interrupt endpoint."""
        while not self.interrupts:
            self.held.append(self.receive())
        return self.interrupts.pop(0)


class Usbip(_Socket):
    """The importer of USB/IP: what usbip(8) and the kernel's vhci say."""

    def __init__(self, where: tuple[str, int] | socket.socket, bus_id: str) -> None:
        super().__init__(where if isinstance(where, socket.socket) else socket.create_connection(where, 20))
        self.seqnum = 0
        self.held: dict[tuple[int, int], tuple[int, bytes, int]] = {}
        self.reads: dict[int, bool] = {}
        self.say(struct.pack(">HHI32s", 0x0111, 0x8003, 0, bus_id.encode()))
        version, code, status = struct.unpack(">HHI", self.exactly(8))
        assert (version, code) == (0x0111, 0x0003)
        if status:
            raise Stalled(status)
        self.device = self.exactly(312)

    @staticmethod
    def devices(address: tuple[str, int]) -> tuple[bytes, bytes]:
        """Returns the block of the one device that there is, and its interfaces."""
        with socket.create_connection(address, 20) as sock:
            sock.sendall(struct.pack(">HHI", 0x0111, 0x8005, 0))
            inside = _Socket(sock)
            assert struct.unpack(">HHII", inside.exactly(12)) == (0x0111, 0x0005, 0, 1)
            device = inside.exactly(312)
            return device, inside.exactly(4 * device[-1])

    def submit(self, endpoint: int, length: int, data: bytes = b"", setup: bytes = bytes(8)) -> int:
        self.seqnum += 1
        direction = 1 if endpoint & 0x80 else 0
        self.reads[self.seqnum] = bool(direction)
        head = struct.pack(">IIIIIIiiii", 1, self.seqnum, 1 << 16 | 1, direction, endpoint & 15, 0, length, 0, 0, 0)
        self.say(head + setup + data)
        return self.seqnum

    def unlink(self, victim: int) -> int:
        """Returns the status of the RET_UNLINK."""
        self.seqnum += 1
        self.say(struct.pack(">IIIIII24x", 2, self.seqnum, 1 << 16 | 1, 0, 0, victim))
        return self.ended(4, self.seqnum)[0]

    def ended(self, command: int, seqnum: int) -> tuple[int, bytes, int]:
        while (command, seqnum) not in self.held:
            found, number, _, _, _, status, length = struct.unpack_from(">IIIIIii", head := self.exactly(48))
            assert len(head) == 48
            data = self.exactly(length) if found == 3 and self.reads.pop(number) else b""
            self.held[found, number] = status, data, length
        return self.held.pop((command, seqnum))

    def finish(self, seqnum: int) -> tuple[bytes, int]:
        status, data, length = self.ended(3, seqnum)
        if status:
            raise Stalled(status)
        return data, length

    def control(self, request_type: int, request: int, value: int, index: int, length: int = 0, data: bytes = b"") -> bytes:
        setup = struct.pack("<BBHHH", request_type, request, value, index, length or len(data))
        return self.finish(self.submit(request_type & 0x80, length or len(data), data, setup))[0]

    def configure(self, value: int = 1) -> None:
        self.control(0, 9, value, 0)

    def set_interface(self, interface: int, alternate: int) -> None:
        self.control(1, 11, alternate, interface)

    def write(self, endpoint: int, data: bytes) -> int:
        return self.finish(self.submit(endpoint, len(data), data))[1]

    def read(self, endpoint: int, length: int) -> bytes:
        return self.finish(self.submit(endpoint, length))[0]


class Ccid:
    """A smart card driver."""

    OUT, IN, NOTICES = 0x01, 0x81, 0x82

    def __init__(self, importer: Importer) -> None:
        self.importer, self.sequence = importer, 0

    def begin(self, kind: int, data: bytes = b"", own: bytes = bytes(3)) -> None:
        """Asks, and does not wait."""
        self.sequence = self.sequence + 1 & 0xFF
        self.importer.write(self.OUT, struct.pack("<BIBB3s", kind, len(data), 0, self.sequence, own) + data)

    def ask(self, kind: int, data: bytes = b"", own: bytes = bytes(3)) -> bytes:
        """Returns the whole answer; while the reader asks for time, it is waited for."""
        self.begin(kind, data, own)
        while True:
            answer = self.importer.read(self.IN, 65556)
            while len(answer) < 10 + int.from_bytes(answer[1:5], "little"):
                answer += self.importer.read(self.IN, 65556)
            if answer[7] >> 6 != 2:
                assert answer[6] == self.sequence
                return answer

    def power_on(self) -> bytes:
        answer = self.ask(0x62)
        assert answer[7] == 0, answer.hex()
        return answer[10:]

    @property
    def present(self) -> bool:
        return self.ask(0x65)[7] & 3 != 2

    def transmit(self, apdu: bytes) -> tuple[bytes, int]:
        """Returns data and status word, GET RESPONSE asked as often as there is more."""
        answer = self.ask(0x6F, apdu)
        if answer[7] & 0x40 or answer[7] & 3:
            raise Stalled(answer[7:9].hex())
        data, status = answer[10:-2], int.from_bytes(answer[-2:], "big")
        while status >> 8 == 0x61:
            answer = self.ask(0x6F, bytes([0, 0xC0, 0, 0, status & 0xFF]))
            data, status = data + answer[10:-2], int.from_bytes(answer[-2:], "big")
        return data, status

    def select(self) -> bytes:
        data, status = self.transmit(SELECT_PIV)
        assert status == 0x9000, hex(status)
        return data


def attached(importer: Importer) -> Ccid:
    """As an operating system begins with a device."""
    importer.control(0x80, 6, 0x0100, 0, 18)
    importer.configure()
    return Ccid(importer)


class Socketed:
    """A channel as a program of the guest has it: a stream of bytes."""

    def __init__(self, importer: Importer, channel: int) -> None:
        self.importer, self.channel, self.number = importer, channel, 2 + channel
        importer.set_interface(channel, 1)

    def settimeout(self, seconds: float) -> None:
        """The importer's is for all of its channels."""
        self.importer.sock.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        assert self.importer.write(self.number, data) == len(data)

    def recv(self, count: int) -> bytes:
        return self.importer.read(0x80 | self.number, count)

    def close(self) -> None:
        self.importer.set_interface(self.channel, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
