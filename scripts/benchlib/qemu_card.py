"""QEMU's own smart card for a guest: usb-ccid with ccid-card-emulated, a CAC with three RSA keys of an NSS database.

Its reader is full speed and hangs on a UHCI controller.  On xHCI QEMU 7.2 answers an empty packet after a message of exactly 64
bytes, and whoever reads it is one answer behind from then on; OpenSC's driver reads such a message first of all.  It sometimes does
not answer on UHCI either; libccid then waits for half a minute.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from support.guest import REPOSITORY
from support.guest_machine import GuestMachine

ARGUMENTS = ("-device", "piix3-usb-uhci,id=uhci")  #: of the machine
READER = "Gemplus"  #: in its name
SELECT = bytes.fromhex("00A4040007A0000000790100")  #: the applet of the first key
ID = "0001"  #: of the first key, as OpenSC has it
_CERTIFICATES = ("id", "sign", "encrypt")


def make_database(directory: Path) -> None:
    """Keys and certificates, without a password: with one QEMU would have to be told it."""
    noise = directory / "noise"
    _certutil("-N", "--empty-password", directory=directory)
    for number, name in enumerate(_CERTIFICATES, 1):
        noise.write_bytes(os.urandom(64))
        more = ("-k", "rsa", "-g", "2048", "-z", str(noise), "-m", str(number), "-t", "u,u,u")
        _certutil("-S", "-x", "-n", name, "-s", f"CN=bench {name}", *more, directory=directory)


def _certutil(*arguments: str, directory: Path) -> None:
    made = subprocess.run(["certutil", *arguments, "-d", f"sql:{directory}"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"certutil {arguments[0]}: {made.stderr.strip()}")


def plug_in(machine: GuestMachine, directory: Path) -> None:
    """The guest's image lacks the driver of UHCI."""
    (driver,) = (REPOSITORY / ".cache/kernel/lib/modules").glob("*/kernel/drivers/usb/host/uhci-hcd.ko")
    machine.copy_in(driver, f"/root/{driver.name}")
    machine.run(f"modprobe usbcore && insmod /root/{driver.name}")
    machine.qmp("device_add", driver="usb-ccid", id="ccid", bus="uhci.0")
    more: dict[str, Any] = {f"cert{number}": name for number, name in enumerate(_CERTIFICATES, 1)}
    more |= {"backend": "certificates", "db": f"sql:{directory}"}
    machine.qmp("device_add", driver="ccid-card-emulated", id="card", bus="ccid.0", **more)
