"""Run in a guest: asks for the same again and again, and says how long the answers took.

Its argument is JSON: `seconds`, and `ways`, which are asked one after the other for that long.  Of each way:
  by     "pcscd", "usb" (a channel, by pyusb) or "vsock"
  at     what the reader's name has in it, the device's serial number, or CID:PORT
  first  what is said once, in hexadecimal: APDUs, or messages of the native dialect
  again  what is repeated; SESSION in it stands for the last eight bytes of the last answer to `first`
Prints a line of JSON for each: calls, and percentiles; or why it failed.
It needs Python's own library, libpcsclite.so.1 and python3-usb.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

SESSION = bytes.fromhex("5e5510f5e5510f5e")
GREETING = b"\x81"  #: the native dialect (hsmvisord/wire/NATIVE.md)
CHANNEL = (0xFF, 0x48, 0x01)  #: class, subclass, protocol of a channel's interface
LEAST = 3  #: calls, however long they take
MILLISECONDS = 30_000  #: that an answer may take
ROOM = 65536  #: bytes of one transfer

Ask = Callable[[bytes], bytes]


class Failed(Exception):
    """This way; the others are asked all the same."""


def repeated(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Returns how many calls there were and percentiles; one before them does not count."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < LEAST or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e6)
    took.sort()
    return {"calls": len(took), "p50_us": took[len(took) // 2], "p99_us": took[len(took) * 99 // 100]}


# ---- a card ---------------------------------------------------------------------------------------------------------------


class IoRequest(ctypes.Structure):
    _fields_ = (("protocol", ctypes.c_ulong), ("length", ctypes.c_ulong))


class Pcsc:
    """pcsc-lite, whose DWORD is an unsigned long."""

    SYSTEM, SHARED, ANY_PROTOCOL, LEAVE = (ctypes.c_ulong(value) for value in (2, 2, 3, 0))

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libpcsclite.so.1")
        self.context = ctypes.c_long()
        self.call("EstablishContext", self.SYSTEM, None, None, ctypes.byref(self.context))

    def call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, f"SCard{function}")(*arguments) & 0xFFFFFFFF
        if status:
            raise Failed(f"SCard{function}: {status:#x}")

    def readers(self) -> list[bytes]:
        room, length = ctypes.create_string_buffer(4096), ctypes.c_ulong(4096)
        self.call("ListReaders", self.context, None, room, ctypes.byref(length))
        return [name for name in room.raw[: length.value].split(b"\0") if name]


@contextlib.contextmanager
def card(name: str) -> Iterator[Ask]:
    """One APDU each.  The answer has to be a good one, or to say that more of it can be fetched."""
    pcsc = Pcsc()
    reader = next((one for one in pcsc.readers() if name.encode() in one), None)
    if reader is None:
        raise Failed(f"pcscd has no reader {name}")
    handle, protocol = ctypes.c_long(), ctypes.c_ulong()
    more = (pcsc.SHARED, pcsc.ANY_PROTOCOL, ctypes.byref(handle), ctypes.byref(protocol))
    pcsc.call("Connect", pcsc.context, reader, *more)
    head = IoRequest(protocol.value, ctypes.sizeof(IoRequest))
    room = ctypes.create_string_buffer(ROOM)

    def ask(apdu: bytes) -> bytes:
        length = ctypes.c_ulong(len(room))
        sent = (apdu, ctypes.c_ulong(len(apdu)))
        pcsc.call("Transmit", handle, ctypes.byref(head), *sent, None, room, ctypes.byref(length))
        answer = room.raw[: length.value]
        if answer[-2:-1] not in (b"\x90", b"\x61"):
            raise Failed(f"{apdu.hex()} in {name} is answered by {answer.hex()}")
        return answer

    yield ask
    pcsc.call("Disconnect", handle, pcsc.LEAVE)
    pcsc.call("ReleaseContext", pcsc.context)


# ---- a stream of the native dialect ---------------------------------------------------------------------------------------


class Stream(NamedTuple):
    write: Callable[[bytes], object]
    read: Callable[[int], bytes]  #: gives what there is, of at least as many bytes as wanted, or waits


def conversation(stream: Stream) -> Ask:
    """One message each, after the greeting; returns the reply without its head."""
    coming = bytearray()

    def take(size: int) -> bytes:
        while len(coming) < size:
            if not (data := stream.read(size - len(coming))):
                raise Failed("the module closed its connection")
            coming.extend(data)
        taken = bytes(coming[:size])
        del coming[:size]
        return taken

    def ask(message: bytes) -> bytes:
        stream.write(message)
        _, options, size = struct.unpack(">III", take(12))
        reply = take(options + size)[options:]
        if reply[:4] == bytes(4):
            raise Failed(f"{message[:32].hex()} is answered by CK_RV {reply[4:].hex()}")
        return reply

    stream.write(GREETING)
    if take(1) != GREETING:
        raise Failed("this module greets differently")
    return ask


@contextlib.contextmanager
def vsock(address: str) -> Iterator[Ask]:
    cid, port = address.split(":")
    with socket.socket(socket.AF_VSOCK) as connection:
        connection.settimeout(MILLISECONDS / 1000)
        connection.connect((int(cid), int(port)))
        yield conversation(Stream(connection.sendall, lambda wanted: connection.recv(ROOM)))


@contextlib.contextmanager
def channel(serial: str) -> Iterator[Ask]:
    """The first channel that nobody has."""
    import usb.core
    import usb.util

    devices = [device for device in usb.core.find(find_all=True) if device.iSerialNumber]
    device = next((one for one in devices if usb.util.get_string(one, one.iSerialNumber) == serial), None)
    if device is None:
        raise Failed(f"there is no device {serial}")
    interface = _claimed(device)
    device.set_interface_altsetting(interface=interface.bInterfaceNumber, alternate_setting=1)
    out, back = sorted(interface, key=lambda endpoint: endpoint.bEndpointAddress)

    def read(wanted: int) -> bytes:
        """Asks for whole packets."""
        return bytes(back.read(max(wanted + 511 & ~511, 512), MILLISECONDS))

    try:
        yield conversation(Stream(lambda data: out.write(data, MILLISECONDS), read))
    finally:
        device.set_interface_altsetting(interface=interface.bInterfaceNumber, alternate_setting=0)
        usb.util.dispose_resources(device)


def _claimed(device: Any) -> Any:
    import usb.core
    import usb.util

    for interface in device[0]:
        kind = interface.bInterfaceClass, interface.bInterfaceSubClass, interface.bInterfaceProtocol
        if kind == CHANNEL and interface.bAlternateSetting == 1:
            with contextlib.suppress(usb.core.USBError):
                usb.util.claim_interface(device, interface.bInterfaceNumber)
                return interface
    raise Failed("all channels are other programs'")


# ---- what is asked --------------------------------------------------------------------------------------------------------


BY: dict[str, Callable[[str], contextlib.AbstractContextManager[Ask]]] = {"pcscd": card, "usb": channel, "vsock": vsock}


def asked(way: dict[str, Any], seconds: float) -> dict[str, float]:
    """Raises Failed, OSError (pyusb's errors are some)."""
    with BY[way["by"]](way["at"]) as ask:
        last = b""
        for message in way["first"]:
            last = ask(bytes.fromhex(message))
        again = bytes.fromhex(way["again"]).replace(SESSION, last[-8:])
        return repeated(lambda: ask(again), seconds)


def main(plan: dict[str, Any]) -> None:
    for way in plan["ways"]:
        try:
            told: dict[str, Any] = asked(way, plan["seconds"])
        except (Failed, OSError) as error:
            told = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
