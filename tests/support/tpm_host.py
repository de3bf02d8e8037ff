"""Modules of a real host that are TPMs: their sockets as QEMU and the TSS have them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.tpm_guest import Guest
from support.tpm_qemu import WITHIN, Qemu

FIRST = 0x81800000


def tpm_settings(**keys: str) -> pb.Tpm:
    """`h0=MATERIAL`: at the first handle of the platform, and so on."""
    return pb.Tpm(enabled=True, keys={f"0x{FIRST + int(place[1:]):08x}": material for place, material in keys.items()})


def create(host: Host, name: str, **keys: str) -> Module:
    """Returns a module whose TPM serves."""
    module = host.create(name, tpm=tpm_settings(**keys))
    serving(module)
    return module


def serving(module: Module, not_pid: int = 0) -> pb.TpmState:
    """Returns the state of its TPM once that serves, by another process than `not_pid`."""

    def look() -> pb.TpmState | None:
        state = module.status().tpm
        return state if state.state == "serving" and state.pid != not_pid else None

    found: pb.TpmState = wait_for(look, 20, "the TPM")
    return found


@contextmanager
def machine(module: Module) -> Iterator[tuple[Qemu, Guest]]:
    """A QEMU that is connected with the TPM, and its guest, which has started it."""
    qemu = plugged(module)
    try:
        guest = qemu.connect()
        qemu.start()
        assert guest.startup() == 0
        yield qemu, guest
    finally:
        qemu.close()
        wait_for(lambda: not module.status().tpm.peer, WITHIN, "the end of QEMU")


def plugged(module: Module) -> Qemu:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(module.status().tpm.socket)
    return Qemu(sock)


def update(module: Module, tpm: pb.Tpm) -> None:
    """The module's settings are these, and others as they are by default."""
    asked = pb.UpdateModuleRequest(request_id=new_id(), name=module.name, settings=pb.ModuleSettings(tpm=tpm))
    module.host.process.modules.UpdateModule(asked, timeout=20)


def tool(module: Module, *words: str | Path, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """One of tpm2-tools' commands, by the TSS without a machine."""
    environment = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={module.status().tpm.tss_path}"}
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=cwd, check=False, timeout=60)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}{done.stdout.decode()}"
    return done
