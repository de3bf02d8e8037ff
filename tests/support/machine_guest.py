"""Programs of a virtual machine, which reach the module that is its device with stock software or with our library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def environment(self) -> dict[str, str]:
        return {self.variable: ADDRESS}


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


class MachineSigner:
    """A process of the machine that signs on and on with one key."""

    def __init__(self, machine: GuestMachine, library: GuestLibrary, label: str, name: str = "signer", threads: int = 2) -> None:
        self._machine, self._file = machine, f"/root/{name}.json"
        machine.copy_in(SIGNER, "/root/sign_on.py")
        self._alive = f"/root/{name}.alive"
        machine.run(["mkfifo", self._alive], check=False)
        command = f"python3 /root/sign_on.py {library.path} {label} ec {threads} 0.001 <{self._alive} 2>/root/{name}.err"
        self._holder = machine.start(f"exec sleep 3600 >{self._alive}")
        self._process: GuestProcess = machine.start(command, output=self._file, more=library.environment)

    def made(self) -> list[Made]:
        """What it has written until now."""
        lines = self._machine.read(self._file).decode().splitlines()
        return [Made(b, e, bytes.fromhex(m), bytes.fromhex(s), *more) for b, e, m, s, *more in map(json.loads, lines)]

    def stop(self) -> list[Made]:
        self._holder.kill()
        code = self._process.wait(30)
        assert code == 0, self._machine.read(self._file.replace(".json", ".err")).decode()
        return self.made()
