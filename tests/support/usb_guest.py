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
from support.guest import free_port
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


USBREDIR, USBIP = "usbredir", "usbip"


class Plug:
    """One module's way into one machine: QEMU's usbredir, or the guest's kernel by USB/IP over QEMU's user network."""

    def __init__(self, host: Host, module: Module, machine: GuestMachine, protocol: str) -> None:
        self.host, self.module, self.machine, self.protocol = host, module, machine, protocol
        self.port = free_port()

    def plug_in(self) -> pb.Module:
        """Returns when the host says so; the guest sees the device a moment later."""
        asked = pb.AttachModuleRequest(request_id=new_id(), name=self.module.name, face=pb.USB)
        if self.protocol == USBREDIR:
            asked.qmp_path = str(self.machine.qmp_socket)
        else:
            asked.usbip_listen = f"127.0.0.1:{self.port}"
            asked.usbip_peers.append("127.0.0.1")  # QEMU's user network calls from there
        found = self.host.process.modules.AttachModule(asked, timeout=30)
        if self.protocol == USBIP:
            self.import_it()
        return found

    def import_it(self) -> None:
        """What the guest has to do by USB/IP, each time that the device was lost."""
        command = f"modprobe vhci-hcd && usbip --tcp-port {self.port} attach -r 10.0.2.2 -b {self.module.name}"
        until(lambda: self.machine.run(f"{command} 2>&1", check=False).returncode == 0, "usbip attach")

    def pull_out(self) -> pb.Module:
        asked = pb.DetachModuleRequest(request_id=new_id(), name=self.module.name, face=pb.USB)
        return self.host.process.modules.DetachModule(asked, timeout=30)

    def come_back(self) -> None:
        """After its worker was another one."""
        if self.protocol == USBIP:
            CardGuest(self.machine).wait_gone()
            self.import_it()
        until(lambda: self.module.status().device.usb.protocol == self.protocol, "the importer")


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
        try:
            return str(until(self.reader, "a reader with a card", within))
        except AssertionError as error:
            looks = "opensc-tool -l; pidof pcscd; lsusb; usbip port; dmesg | tail -20"
            raise AssertionError(f"{error}\n{self.run(looks, check=False)}\n{self.probe()}") from None

    def wait_gone(self, ids: str = IDS) -> None:
        """Until pcscd too has noticed: a device that comes back before may be taken by it for the one that went."""
        until(lambda: not self.seen(ids), "the device to go")
        until(lambda: "No smart card readers" in self.run("opensc-tool --list-readers", check=False), "the reader to go")

    def card_id(self) -> bytes:
        """The GUID of the card, which OpenSC takes for its serial number."""
        digits = re.search(r"((?:[0-9A-F]{2} ){16})", self.run("piv-tool --serial"))
        assert digits is not None
        return bytes.fromhex(digits[1])

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
