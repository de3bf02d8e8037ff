"""A guest with three modules, by usbredir, USB/IP and vsock, and with QEMU's own smart card, all at once; what asks them there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call
from support.guest_machine import GuestMachine
from support.host import Module
from support.machine_guest import ADDRESS, OURS, device_socket
from support.native_client import NEW, NativeEncoding
from support.usb_guest import OPENSC, PIN, USBIP, USBREDIR, CardGuest, Plug, until
from support.wire_client import HEADER

from benchlib import qemu_card, usb_calls
from benchlib.setups import MECHANISMS
from benchlib.usb_ways import DISCOVERY, GUEST, LARGE, PLAIN, QEMU, SELECT, SLOTS, SMALL, turned

CALLS, SIGN = "/root/usb_calls.py", "/root/p11bench"
CARD, CHANNEL = ("select", "apdu"), ("small", "large")  #: what usb_calls.py asks
PATIENCE = 90  #: seconds that a measure may take beyond those that are measured

Run = dict[str, Any]  #: calls, p50_us, p99_us; or failed: why
Say = Callable[[str], None]


class Way(NamedTuple):
    """`reader`: what the name of its reader alone has in it; `address`: our library's.  "": there is none."""

    reader: str = ""
    address: str = ""


@contextmanager
def plugged(modules: dict[str, Module], directory: Path, program: Path, say: Say) -> Iterator[Asker]:
    """`directory` is for QEMU's card; `program` is p11bench."""
    qemu_card.make_database(directory)
    say("a guest boots")
    with GuestMachine(arguments=qemu_card.ARGUMENTS) as machine:
        machine.plug(device_socket(modules[PLAIN]))
        machine.copy_in(Path(usb_calls.__file__), CALLS)
        machine.copy_in(program, SIGN)
        say("pcscd starts in it")
        CardGuest(machine).start_pcscd()
        say("cards are plugged in")
        for way in (USBREDIR, USBIP):
            Plug(modules[way].host, modules[way], machine, way).plug_in()
        qemu_card.plug_in(machine, directory)
        asker = Asker(machine, {way: module.name for way, module in modules.items()})
        asker.wait_for_cards()
        say("")
        yield asker


class Asker:
    """`names`: of the modules, by way."""

    def __init__(self, machine: GuestMachine, names: dict[str, str]) -> None:
        self._machine, self._guest = machine, CardGuest(machine)
        usb = {way: Way(names[way], f"usb:serial={names[way]}") for way in (USBREDIR, USBIP)}
        self._ways = {**usb, PLAIN: Way(address=ADDRESS), QEMU: Way(qemu_card.READER)}
        self._readers = [way.reader for way in self._ways.values() if way.reader]
        for reader in self._readers:  # OpenSC would look at all of them
            others = ", ".join(f'"{other}"' for other in self._readers if other != reader)
            pinpad = "reader_driver pcsc { enable_pinpad = false; }"  # QEMU's reader says that it has one
            machine.write(_configuration(reader), f"app default {{ ignored_readers = {others}; {pinpad} }}\n")

    def wait_for_cards(self) -> None:
        def cards() -> int:
            return len(re.findall(r"^\d+\s+Yes", self._guest.run("opensc-tool --list-readers", check=False), re.MULTILINE))

        until(lambda: cards() == len(self._readers), f"{len(self._readers)} cards", PATIENCE)

    def begin_again(self) -> None:
        """After something hung: pcscd is another one."""
        self._guest.restart_pcscd()
        self.wait_for_cards()

    # ---- calls ------------------------------------------------------------------------------------------------------------

    def asked(self, number: int, seconds: float) -> dict[tuple[str, str], Run]:
        """All calls of one round, by call and way."""
        at = [(call, way) for call in (*CARD, *CHANNEL) for way in turned(GUEST, call, number)]
        plan = json.dumps({"seconds": seconds, "ways": [self._plan(call, way) for call, way in at]})
        done = self._machine.run(["python3", CALLS, plan], timeout=len(at) * (seconds + PATIENCE))
        return dict(zip(at, map(json.loads, done.stdout.splitlines()), strict=True))

    def _plan(self, call: str, way: str) -> dict[str, Any]:
        if call in CARD:
            select = qemu_card.SELECT if way == QEMU else SELECT
            again = select if call == "select" else DISCOVERY
            return {"by": "pcscd", "at": self._ways[way].reader, "first": [select.hex()], "again": again.hex()}
        first = [_message(Call.HELLO, 8, NEW, None, 0, b"bench", 1), _message(Call.OPEN_SESSION, 0, ck.CKF_SERIAL_SESSION)]
        session = int.from_bytes(usb_calls.SESSION, "big")
        again = bytes.fromhex(_message(Call.GENERATE_RANDOM, session, SMALL if call == "small" else LARGE))
        by, at = ("vsock", f"2:{limits.VSOCK_PORT}") if way == PLAIN else ("usb", self._ways[way].reader)
        return {"by": by, "at": at, "first": first, "again": again.hex()}

    # ---- signatures -------------------------------------------------------------------------------------------------------

    def signed(self, call: str, way: str, seconds: float) -> Run:
        key = call.removeprefix("card-")
        if call == key:
            which, more = ["--module", OURS.path, "--label", key], {OURS.variable: self._ways[way].address}
        else:
            ident = qemu_card.ID if way == QEMU else SLOTS[key][1]
            which, more = ["--module", OPENSC, "--id", ident, "--pin", PIN], {"OPENSC_CONF": _configuration(self._ways[way].reader)}
        times = ["--seconds", str(seconds), "--warmup", str(min(seconds, 0.5))]
        command = [SIGN, *which, "--mech", MECHANISMS[key], "--latency", *times]
        try:
            done = self._machine.run(command, more=more, timeout=seconds + PATIENCE, check=False)
        except TimeoutError:
            return {"failed": f"no end within {seconds + PATIENCE:g} s"}
        if done.returncode:
            return {"failed": f"exit code {done.returncode}: {(done.stderr + done.stdout).decode(errors='replace').strip()}"}
        told = json.loads(done.stdout)
        return {"calls": told["ops"], "p50_us": told["p50_us"], "p99_us": told["p99_us"]}


def _configuration(reader: str) -> str:
    return f"/root/only-{reader}.conf"


def _message(call: Call, *values: Any) -> str:
    """With its head, in hexadecimal."""
    message = NativeEncoding().request(call, *values)
    return (HEADER.pack(1, 0, len(message)) + message).hex()
