"""Programs of a virtual machine, which reach the module that is its device with stock software or with our library."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmvisord import limits
from support.guest import REPOSITORY
from support.guest_machine import GuestMachine, GuestProcess
from support.host import Module
from support.load import Made

ADDRESS = f"vsock:cid=2;port={limits.VSOCK_PORT}"
SIGNER = REPOSITORY / "tests/integration/programs/sign_on.py"
_ENGINE = "/usr/lib/x86_64-linux-gnu/engines-3/pkcs11.so"


@dataclass(frozen=True)
class GuestLibrary:
    """One of the machine's libraries."""

    name: str
    path: str
    variable: str
    address: str = ADDRESS

    @property
    def environment(self) -> dict[str, str]:
        return {self.variable: self.address}


OURS = GuestLibrary("ours", "/usr/local/lib/pkcs11/libhsmvisor-pkcs11.so", "HSMVISOR_PKCS11_ADDRESS")
STOCK = GuestLibrary("p11-kit", "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so", "P11_KIT_SERVER_ADDRESS")


def device_socket(module: Module) -> Path:
    return Path(module.address.removeprefix("unix:path=")).with_name("vhost.sock")


def tool(machine: GuestMachine, library: GuestLibrary, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
    """pkcs11-tool of the machine; returns its output."""
    result = machine.run(
        ["pkcs11-tool", "--module", library.path, *arguments], stdin=stdin, more=library.environment, timeout=60, check=check
    )
    return result.stdout + (b"" if check else result.stderr)


def engine(machine: GuestMachine, library: GuestLibrary) -> dict[str, str]:
    """The environment of programs of the machine that use libengine-pkcs11 with `library`."""
    path = f"/root/{library.name}.cnf"
    machine.write(
        path,
        "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = pkcs11_section\n"
        f"[pkcs11_section]\nengine_id = pkcs11\ndynamic_path = {_ENGINE}\nMODULE_PATH = {library.path}\ninit = 1\n"
        "[req]\ndistinguished_name = dn\n[dn]\n",
    )
    return {"OPENSSL_CONF": path, **library.environment}


class MachineLoad:
    """A Python program of the machine that writes JSON lines on and on, until its input ends."""

    def __init__(self, machine: GuestMachine, name: str, program: Path, *arguments: object, library: GuestLibrary = OURS) -> None:
        self._machine, self._output, self._errors = machine, f"/root/{name}.json", f"/root/{name}.err"
        machine.copy_in(program, f"/root/{program.name}")
        alive = f"/root/{name}.alive"
        machine.run(["mkfifo", alive], check=False)
        words = shlex.join(map(str, ["python3", f"/root/{program.name}", *arguments]))
        self._holder = machine.start(f"exec sleep 7200 >{alive}")
        command = f"exec {words} <{alive} 2>{self._errors}"
        self._process: GuestProcess = machine.start(command, output=self._output, more=library.environment)

    def lines(self) -> list[list[Any]]:
        """What it has written until now."""
        text = self._machine.read(self._output).decode()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def tail(self) -> str:
        """Its last lines."""
        return self._machine.run(["tail", "-n", "4", self._output]).stdout.decode()

    def end(self) -> None:
        """Fails when it ended badly."""
        self._holder.kill()
        code = self._process.wait(30)
        assert code == 0, self._machine.read(self._errors).decode()


class MachineSigner(MachineLoad):
    """A process of the machine that signs on and on with one key."""

    def __init__(self, machine: GuestMachine, library: GuestLibrary, label: str, name: str = "signer", threads: int = 2) -> None:
        super().__init__(machine, name, SIGNER, library.path, label, "ec", threads, 0.001, library=library)

    def made(self) -> list[Made]:
        """What it has written until now; times are the machine's."""
        return [Made(b, e, bytes.fromhex(m), bytes.fromhex(s), *more) for b, e, m, s, *more in self.lines()]

    def stop(self) -> list[Made]:
        self.end()
        return self.made()
