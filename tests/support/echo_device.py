"""Our vhost-user-vsock device without a module: each stream of its guest is joined to a process that echoes it (stream_echo.c).

As a program, with a socket's path, the guest's CID and the program stream_echo as arguments, it listens for front-ends, one after
the other, writes "ready", and ends when its standard input does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from hsmvisord.transport.vsock.device import Device
from hsmvisord.transport.vsock.keys import StreamKeys
from hsmvisord.transport.vsock.saved import Saved
from support.fake_frontend import key_memory
from support.host_process import SOURCES

CID = 1027
ECHO, DAMAGES, ENDS = 7, 8, 9  #: ports
PLACE = 777_777  #: the byte that DAMAGES alters, and before which ENDS ends
_ARGUMENTS = {ECHO: (), DAMAGES: (str(PLACE),), ENDS: (str(2**63), str(PLACE))}


class EchoDevice:
    """The program, in a process of its own."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.socket = directory / "echo.sock"
        command = [sys.executable, "-m", "support.echo_device", str(self.socket), str(CID), str(program)]
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": SOURCES}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == b"ready\n", said

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(listener: socket.socket, cid: int, program: str) -> None:
    def accept(port: int, peer: str) -> socket.socket | None:
        if port not in _ARGUMENTS:
            return None
        ours, theirs = socket.socketpair()
        with theirs:
            subprocess.Popen([program, "echo", *_ARGUMENTS[port]], stdin=theirs)
        return ours

    while True:
        ended = threading.Event()

        def end(why: str, ended: threading.Event = ended) -> None:
            if "has closed the connection" not in why:  # as when it was unplugged
                print(f"the device has ended: {why}", file=sys.stderr)
            ended.set()

        keys = key_memory()
        Device(listener.accept()[0], cid, accept, StreamKeys(keys), None, _keep, end).start()
        os.close(keys)
        ended.wait()


def _keep(saved: Saved) -> None:
    """There is no successor."""


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    path, cid, program = sys.argv[1:]
    threading.Thread(target=_end_with_input, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps whoever echoed
    with socket.socket(socket.AF_UNIX) as listener:
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        _serve(listener, int(cid), program)


if __name__ == "__main__":
    main()
