"""A TPM of ours in a process of its own, at two ports of the loopback where the TSS' swtpm TCTI finds one; or swtpm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from cryptography.hazmat.primitives.serialization import load_der_private_key
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.managed import ManagedTpm, Wanted
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from support.cryptoki import REPOSITORY
from support.host_process import wait_for

SOURCES = os.pathsep.join(str(REPOSITORY / d) for d in ("daemon", "proto", "tests"))
KEY, MODULE = bytes(range(32)), b"m" * 16


class TpmProcess:
    """`program`: ours or swtpm, at ports for the TSS, or with `for_qemu` at a socket; its state is in `directory`."""

    def __init__(self, directory: Path, program: str = "ours", for_qemu: bool = False) -> None:
        self.directory, self.program = directory, program
        self.port = two_ports()
        self.control = directory / "control.sock"  #: where QEMU finds it; swtpm has either this or the ports
        directory.mkdir(exist_ok=True)
        command = {
            "ours": [sys.executable, "-m", "support.tpm_rig", str(directory), "0" if for_qemu else str(self.port)],
            "swtpm": ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}", *self._where(for_qemu)],
        }[program]
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": SOURCES})
        wait_for(self.control.exists if for_qemu else self._answers, 20, "the TPM")

    def _where(self, for_qemu: bool) -> list[str]:
        if for_qemu:
            return ["--ctrl", f"type=unixio,path={self.control}"]
        server = f"type=tcp,port={self.port},bindaddr=127.0.0.1,disconnect"
        control = f"type=tcp,port={self.port + 1},bindaddr=127.0.0.1"
        return ["--flags", "not-need-init,startup-clear", "--server", server, "--ctrl", control]

    def _answers(self) -> bool:
        assert self.process.poll() is None, "it ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port + 1), 1):
            return True
        return False

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def run(self, *words: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
        """One of tpm2-tools' commands."""
        command = [str(word) for word in words]
        environment = os.environ | {"TPM2TOOLS_TCTI": self.tcti}
        done = subprocess.run(command, capture_output=True, env=environment, cwd=cwd, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}{done.stdout.decode()}"
        return done

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def two_ports() -> int:
    """The first of two that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


# ---- the process ----------------------------------------------------------------------------------------------------------


def main(directory: Path, port: int) -> None:
    """`port`: 0 = at a socket, for QEMU."""
    path = directory / "permanent"

    def store(data: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(data)
        new.rename(path)

    log = partial(print, file=sys.stderr, flush=True)
    tpm = ManagedTpm(path.read_bytes() if path.exists() else b"", store, log, firmware=bool(port))
    if not path.exists():
        tpm.manufacture()
    server = Server(tpm, Seals(Blobs(KEY, MODULE)), log)
    if not port:
        manage = socket.create_server(str(directory / "manage.sock"), family=socket.AF_UNIX)
        threading.Thread(target=listen, args=(manage, partial(managed_by, tpm)), daemon=True).start()
        listen(socket.create_server(str(directory / "control.sock"), family=socket.AF_UNIX), server.serve_control)
    tpm.switch_on()
    tpm.process(bytes.fromhex("80010000000c000001440000"))  # TPM2_Startup(CLEAR), as swtpm's flag startup-clear
    commands, control = (socket.create_server(("127.0.0.1", number)) for number in (port, port + 1))
    as_the_tss_asks = partial(server.serve_control, padded=False)
    threading.Thread(target=listen, args=(control, as_the_tss_asks), daemon=True).start()
    listen(commands, server.serve_commands)


def managed_by(tpm: ManagedTpm, sock: socket.socket) -> None:
    """One line: what is wanted, by handle."""
    with sock, sock.makefile("rw") as lines:
        wanted = {
            int(handle): Wanted(load_der_private_key(bytes.fromhex(key), None))
            for handle, key in json.loads(lines.readline()).items()
        }  # type: ignore[arg-type]
        tpm.want(wanted)
        lines.write("done\n")


def listen(listener: socket.socket, serve: Callable[[socket.socket], object]) -> NoReturn:
    with listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
