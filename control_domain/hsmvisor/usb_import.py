"""Has this guest's kernel import its module's USB device by USB/IP over vsock: no network is needed, and no login, for the guest's
own vsock device says who it is.

It needs root, the kernel's vhci-hcd, and Python's own library alone, so it may be copied into a guest that has nothing else of
ours: python3 usb_import.py NAME.  `hsmvisor usb import` is the same.
"""

from __future__ import annotations

import argparse
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

HOST, PORT = 2, 3240  #: of vsock
VHCI = Path("/sys/devices/platform/vhci_hcd.0")
_VERSION, _REQUEST, _REPLY = 0x0111, 0x8003, 0x0003  #: OP_REQ_IMPORT, OP_REP_IMPORT (Linux, Documentation/usb/usbip_protocol.rst)
_DEVICE = 312  #: bytes
_SECONDS = 10.0
_HIGH_SPEED, _FREE = "hs", 4  #: of vhci's status: hub, and VDEV_ST_NULL


class NotImported(Exception):
    """The text says why; `hint` what to do."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def import_device(name: str) -> int:
    """Imports the device with this serial number; returns vhci's port.  Raises NotImported."""
    if not VHCI.exists():
        subprocess.run(["modprobe", "vhci-hcd"], capture_output=True, check=False)
    if not VHCI.exists():
        raise NotImported("this kernel has no vhci-hcd", "install its package of extra modules, or plug the module in by QEMU")
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        try:
            sock.connect((HOST, PORT))
        except OSError as error:
            hint = "the module is to be this guest's vsock device: hsmvisor module attach NAME --qmp PATH on its host"
            raise NotImported(f"vsock port {PORT} of the host cannot be reached: {error.strerror or error}", hint) from None
        bus, device, speed = _ask(sock, name)
        sock.settimeout(None)
        port = _free_port()
        try:
            (VHCI / "attach").write_text(f"{port} {sock.fileno()} {bus << 16 | device} {speed}")
        except OSError as error:
            raise NotImported(f"the kernel does not take the connection: {error.strerror}", "run it as root") from None
    return port


def _ask(sock: socket.socket, name: str) -> tuple[int, int, int]:
    """Returns bus, device and speed of what is imported now."""
    try:
        sock.sendall(struct.pack(">HHI32s", _VERSION, _REQUEST, 0, name.encode()[:31]))
        version, code, status = struct.unpack(">HHI", _exactly(sock, 8))
        if (version, code) != (_VERSION, _REPLY):
            raise NotImported("the host does not speak USB/IP there")
        if status:
            raise NotImported(f"the host has no device {name!r} for this guest (status {status})", "the name is the module's")
        bus, device, speed = struct.unpack(">III", _exactly(sock, _DEVICE)[288:300])
    except OSError as error:
        raise NotImported(f"the host does not answer: {error.strerror or error}", "is the device imported already?") from None
    return bus, device, speed


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise NotImported("the host closed the connection", "is the device imported already?")
        data += part
    return data


def _free_port() -> int:
    """Returns a free port of high speed, by vhci's status: hub, port, status, speed, ..."""
    for line in (VHCI / "status").read_text().splitlines():
        found = re.match(rf"{_HIGH_SPEED}\s+(\d+)\s+(\d+)\s", line)
        if found and int(found[2]) == _FREE:
            return int(found[1])
    raise NotImported("all ports of vhci-hcd are taken", "usbip port shows by whom")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Import the module's USB device over vsock.")
    parser.add_argument("name", help="of the module, which is its serial number")
    try:
        port = import_device(parser.parse_args(arguments).name)
    except NotImported as error:
        print(f"usb_import: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    print(f"imported, vhci port {port}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
