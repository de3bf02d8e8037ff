"""A guest that has its module as a USB device: Debian's pcscd, OpenSC, ykcs11 and SSH, and what they say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsmvisor import usb_probe
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.guest_machine import GuestMachine
from support.host import Host, Module
from support.host_process import new_id

OPENSC = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
YKCS11 = "/usr/lib/x86_64-linux-gnu/libykcs11.so.2"
OURS = "/usr/local/lib/pkcs11/libhsmvisor-pkcs11.so"
IDS = "1209:0001"
PIN = "123456"


def until(holds: Callable[[], Any], what: str, within: float = 60) -> Any:
    """Returns what `holds` returns once that is true."""
    began = time.monotonic()
    while not (value := holds()):
        assert time.monotonic() - began < within, f"waited {within} s in vain for {what}"
        time.sleep(0.2)
    return value


def attach(host: Host, module: Module, machine: GuestMachine) -> pb.Module:
    """Plugs the module in by QMP."""
    asked = pb.AttachModuleRequest(request_id=new_id(), name=module.name, qmp_path=str(machine.qmp_socket), face=pb.USB)
    return host.process.modules.AttachModule(asked, timeout=30)


def detach(host: Host, module: Module) -> pb.Module:
    return host.process.modules.DetachModule(pb.DetachModuleRequest(request_id=new_id(), name=module.name, face=pb.USB), timeout=30)


class CardGuest:
    """The programs of one machine."""

    def __init__(self, machine: GuestMachine) -> None:
        self.machine = machine

    def run(self, command: str, check: bool = True, timeout: float = 60, **more: str) -> str:
        """Returns what it wrote, errors too."""
        done = self.machine.run(f"{command} 2>&1", timeout=timeout, check=check, more=more)
        return done.stdout.decode(errors="replace")

    def start_pcscd(self, ids: str = IDS) -> None:
        """As an image does that has our entry in libccid's list."""
        self.run(f"hsmvisor-ccid-entry --id {ids}")
        if not self.run("pidof systemd-udevd", check=False).strip():
            self.run("/lib/systemd/systemd-udevd --daemon; udevadm trigger; udevadm settle --timeout=20", check=False)
        self.restart_pcscd()

    def restart_pcscd(self) -> None:
        self.run("pkill pcscd; while pidof pcscd; do sleep 0.1; done; rm -f /run/pcscd/*; pcscd", check=False)

    def devices(self) -> str:
        return self.run("lsusb", check=False)

    def seen(self, ids: str = IDS) -> bool:
        return ids in self.devices()

    def reader(self) -> str:
        """OpenSC's list of readers, "" while there is none with a card."""
        said = self.run("opensc-tool --list-readers", check=False)
        return said if re.search(r"^\d+\s+Yes", said, re.MULTILINE) else ""

    def wait_for_card(self, within: float = 60) -> str:
        return str(until(self.reader, "a reader with a card", within))

    def opensc(self, *words: str, check: bool = True) -> str:
        return self.run(" ".join(["pkcs11-tool", "--module", OPENSC, *words]), check=check)

    def sign(self, slot: str, message: bytes, mechanism: str = "ECDSA-SHA256", library: str = OPENSC, *more: str) -> bytes:
        """Signs with the key of a slot's id (OpenSC: 01 is 9A, 02 9C, 03 9D, 04 9E); returns the signature, ECDSA in DER."""
        self.machine.write("/root/message", message)
        form = ["--signature-format", "openssl"] if mechanism.startswith("ECDSA") else []
        words = ["pkcs11-tool", "--module", library, "--login", "--pin", PIN, "--sign", "--id", slot, "--mechanism", mechanism]
        words += ["--input-file", "/root/message", "--output-file", "/root/signature", *form, *more]
        self.run("rm -f /root/signature; " + " ".join(words))
        return self.machine.read("/root/signature")

    def probe(self) -> dict[str, dict[str, str]]:
        """The diagnostic, as a guest without our package runs it; by step."""
        self.machine.copy_in(Path(usb_probe.__file__), "/root/usb_probe.py")
        said = self.machine.run(["python3", "/root/usb_probe.py", "--json"], check=False, timeout=60).stdout
        return {one["step"]: one for one in json.loads(said)}
