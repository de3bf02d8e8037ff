"""What keeps a guest from its module's USB device: looked at step by step, by pyusb, in the guest.

This file needs pyusb and Python's own library alone (Debian: python3-usb), so it may be copied into a guest that has nothing else
of ours: python3 usb_probe.py [--serial NAME] [--json].  `hsmvisor usb probe` is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, NOTE, WRONG = "ok", "note", "WRONG"

CCID_CLASS = 0x0B
CHANNEL = (0xFF, 0x48, 0x01)  #: class, subclass, protocol of a channel's interface
GREETING = b"\x81"  #: the native dialect (hsmvisord/wire/NATIVE.md)
SELECT_PIV = bytes.fromhex("00A4040009A00000030800001000")  #: NIST SP 800-73-4, part 2, 3.1.1
LIST = Path("/etc/libccid_Info.plist")
PCSCD = "/run/pcscd/pcscd.comm"
MILLISECONDS = 3000  #: that an answer may take


@dataclass(frozen=True)
class Finding:
    """One step: what was looked at, how it is, what was found, and what to do if it is wrong."""

    step: str
    result: str
    found: str
    change: str = ""


def probe(serial: str = "") -> Iterator[Finding]:
    """Gives what is found, step by step; ends where nothing more can be looked at."""
    try:
        import usb.core
        import usb.util
    except ImportError:
        yield Finding("pyusb", WRONG, "it is not installed", "apt install python3-usb, or pip install pyusb")
        return
    try:
        devices = list(usb.core.find(find_all=True))
    except usb.core.NoBackendError:
        yield Finding("pyusb", WRONG, "it finds no libusb", "apt install libusb-1.0-0")
        return
    hubs = [d for d in devices if d.bDeviceClass == 9]
    if not hubs:
        yield Finding(
            "bus", WRONG, "this machine has no USB controller", "hsmvisor module attach NAME --as usb on its host adds one"
        )
        return
    yield Finding("bus", OK, f"{len(hubs)} root hubs and hubs, {len(devices) - len(hubs)} devices")
    ours = [d for d in devices if _channels(d)]
    if not ours:
        yield Finding(
            "device",
            WRONG,
            "no module is plugged in",
            "on the host: hsmvisor module show NAME says who has it, hsmvisor module attach NAME --as usb plugs it in; "
            "by USB/IP: modprobe vhci-hcd, then usbip attach here",
        )
        return
    others = []
    for device in ours:
        name = _serial_in_sysfs(device)
        if name and not _is_named(name, serial):
            others.append(name)
        else:
            yield from _probe_device(device, serial)
    if len(others) == len(ours):
        yield Finding(
            "device",
            WRONG,
            f"no module with serial number {serial} is plugged in; there is {', '.join(others)}",
            "name one of them",
        )


def _probe_device(device: Any, wanted: str) -> Iterator[Finding]:
    import usb.core
    import usb.util

    ids = f"{device.idVendor:04x}:{device.idProduct:04x}"
    try:
        serial = usb.util.get_string(device, device.iSerialNumber)
    except (usb.core.USBError, ValueError) as error:
        yield Finding("device", OK, f"{ids} at bus {device.bus}, device {device.address}")
        yield Finding("access", WRONG, f"it cannot be opened: {error}", "run this as root, or let udev give your group the device")
        return
    if not _is_named(serial or "", wanted):
        return
    speed = {1: "low", 2: "full", 3: "high", 4: "super"}.get(device.speed or 0, "unknown")
    yield Finding("device", OK, f"{ids}, serial {serial}, {speed} speed, bus {device.bus}, device {device.address}")
    yield _listed(device.idVendor, device.idProduct)
    yield _pcscd()
    yield _card(device)
    yield from _channel(device)


def _is_named(serial: str, wanted: str) -> bool:
    """As NAME, or as NAME~DIGEST where the device is another one for other keys; all are, where none is asked for."""
    return not wanted or wanted in (serial, serial.partition("~")[0])


def _channels(device: Any) -> list[Any]:
    import usb.core

    try:
        configuration = device[0]
    except (usb.core.USBError, IndexError):
        return []
    return [i for i in configuration if (i.bInterfaceClass, i.bInterfaceSubClass, i.bInterfaceProtocol) == CHANNEL]


def _serial_in_sysfs(device: Any) -> str:
    """Returns what the kernel has read; "" where it is not known."""
    for path in Path("/sys/bus/usb/devices").glob("*/serial"):
        with contextlib.suppress(OSError, ValueError):
            place = int((path.parent / "busnum").read_text()), int((path.parent / "devnum").read_text())
            if place == (device.bus, device.address):
                return path.read_text().strip()
    return ""


def _listed(vendor: int, product: int) -> Finding:
    try:
        text = LIST.read_text()
    except OSError:
        return Finding("libccid", NOTE, f"there is no {LIST}", "for smart card programs: apt install pcscd libccid")
    of = []
    for key in ("ifdVendorID", "ifdProductID"):
        array = re.search(rf"<key>{key}</key>\s*<array>(.*?)</array>", text, re.DOTALL)
        of.append([int(value, 16) for value in re.findall(r"<string>(0x[0-9A-Fa-f]{4})</string>", array[1])] if array else [])
    if len(of[0]) != len(of[1]):
        return Finding(
            "libccid", WRONG, f"the arrays of {LIST} differ in length: no reader is found", "apt install --reinstall libccid"
        )
    if (vendor, product) in zip(*of, strict=True):
        return Finding("libccid", OK, f"its list has {vendor:04x}:{product:04x}")
    change = f"hsmvisor-ccid-entry --id {vendor:04x}:{product:04x}, then systemctl restart pcscd"
    return Finding("libccid", WRONG, f"its list does not have {vendor:04x}:{product:04x}: pcscd does not see the reader", change)


def _pcscd() -> Finding:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(PCSCD)
        except FileNotFoundError:
            return Finding(
                "pcscd", NOTE, "it is not there", "for smart card programs: apt install pcscd, systemctl start pcscd.socket"
            )
        except OSError as error:
            return Finding("pcscd", WRONG, f"it does not answer: {error.strerror}", "systemctl restart pcscd")
    return Finding("pcscd", OK, "it answers")


def _card(device: Any) -> Finding:
    """Powers the card on and selects PIV, if nobody else has the reader."""
    import usb.core
    import usb.util

    reader = next((i for i in device[0] if i.bInterfaceClass == CCID_CLASS), None)
    if reader is None:
        return Finding("card", WRONG, "the device has no CCID interface", "it is not hsmvisor's, or of another release")
    number = reader.bInterfaceNumber
    try:
        usb.util.claim_interface(device, number)
    except usb.core.USBError:
        return Finding("card", OK, "another program has the reader (pcscd, most likely)")
    try:
        out, back = _endpoints(reader)
        atr = _ccid(out, back, 0x62, 0, b"")
        if atr is None:
            return Finding(
                "card", NOTE, "there is no card in the reader", "on the host: hsmvisor module show; a material makes a card"
            )
        answer = _ccid(out, back, 0x6F, 1, SELECT_PIV) or b""
        status = answer[-2:].hex()
        if status != "9000":
            return Finding(
                "card", WRONG, f"the card does not select PIV: {status or 'no answer'}", "see the module's status on the host"
            )
        return Finding("card", OK, f"ATR {atr.hex()}; it selects PIV")
    except usb.core.USBError as error:
        return Finding(
            "card", WRONG, f"the reader does not answer: {error}", "hsmvisor module upgrade NAME on the host, then again"
        )
    finally:
        usb.util.release_interface(device, number)


def _ccid(out: Any, back: Any, kind: int, sequence: int, data: bytes) -> bytes | None:
    """Returns the data of the answer, None when there is none (CCID 1.10, 6.1 and 6.2)."""
    out.write(struct.pack("<BIBBBBB", kind, len(data), 0, sequence, 0, 0, 0) + data, MILLISECONDS)
    while True:
        answer = bytes(back.read(65556, MILLISECONDS))
        if len(answer) < 10 or answer[6] != sequence:
            continue
        if answer[7] >> 6 == 2:  # it asks for more time
            continue
        return answer[10:] if answer[7] >> 6 == 0 and answer[7] & 3 != 2 else None


def _endpoints(interface: Any) -> tuple[Any, Any]:
    """Returns bulk OUT and bulk IN."""
    bulk = [e for e in interface if e.bmAttributes & 3 == 2]
    return next(e for e in bulk if not e.bEndpointAddress & 0x80), next(e for e in bulk if e.bEndpointAddress & 0x80)


def _channel(device: Any) -> Iterator[Finding]:
    """Greets the module on a channel that is free."""
    import usb.core
    import usb.util

    open_ones = [i for i in _channels(device) if i.bAlternateSetting == 1]
    taken = 0
    for interface in open_ones:
        number = interface.bInterfaceNumber
        try:
            usb.util.claim_interface(device, number)
        except usb.core.USBError:
            taken += 1
            continue
        try:
            began = time.perf_counter()
            device.set_interface_altsetting(interface=number, alternate_setting=1)
            out, back = _endpoints(interface)
            out.write(GREETING, MILLISECONDS)
            answer = bytes(back.read(512, MILLISECONDS))
            took = (time.perf_counter() - began) * 1000
            if answer != GREETING:
                yield Finding("library", WRONG, f"channel {number} answers {answer[:8].hex()}", "the module is of another release")
            else:
                yield Finding("library", OK, f"channel {number} greets in {took:.1f} ms: usb: works for libhsmvisor-pkcs11.so")
        except usb.core.USBError as error:
            yield Finding("library", WRONG, f"channel {number} does not answer: {error}", "see the module's status on the host")
        finally:
            with contextlib.suppress(usb.core.USBError):
                device.set_interface_altsetting(interface=number, alternate_setting=0)
            usb.util.release_interface(device, number)
        break
    else:
        yield Finding("library", WRONG, f"all {taken} channels are other programs'", "end one of them, or use vsock")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 nothing is wrong, 1 something is."""
    parser = argparse.ArgumentParser(description="What keeps this guest from its module's USB device.")
    parser.add_argument("--serial", default="", help="of the module, if there are several; default: all")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    found = list(probe(asked.serial))
    if asked.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        for one in found:
            print(f"{one.result:6} {one.step:8} {one.found}" + (f"\n{'':16}{one.change}" if one.change else ""))
    return int(any(one.result == WRONG for one in found))


if __name__ == "__main__":
    sys.exit(main())
