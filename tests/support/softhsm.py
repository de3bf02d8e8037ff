"""SoftHSM2 in the place of a hardware security module: a token of a test's own, and a module's helper that uses it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import Record, record_type
from hsmvisord.crypto.hardware.provider import HardwareProvider
from support.guest import system_file

TOKEN, PIN, SO_PIN = "rack-7", "847362", "58293746"


@dataclass(frozen=True)
class Token:
    directory: Path
    library: str

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    def arguments(self, module_id: bytes, **others: str) -> list[str]:
        """The helper's; `others` in the place of the right ones."""
        told = {"library": self.library, "token": TOKEN, "pin_file": str(self.pin_file)} | others
        found = ["--module-id", module_id.hex()]
        found += [part for name, value in told.items() for part in (f"--{name.replace('_', '-')}", value)]
        return found + [part for name, value in self.environment.items() for part in ("--environment", f"{name}={value}")]


def make_token(directory: Path) -> Token:
    (directory / "tokens").mkdir(parents=True)
    token = Token(directory, system_file("softhsm/libsofthsm2.so"))
    (directory / "softhsm2.conf").write_text(f"directories.tokendir = {directory}/tokens\nlog.level = ERROR\n")
    token.pin_file.write_text(PIN + "\n")
    token.pin_file.chmod(0o600)
    command = ["softhsm2-util", "--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", SO_PIN]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | token.environment)
    return token


class Helper:
    """A module's helper as the supervisor starts it."""

    def __init__(self, at: Token, module_id: bytes, program: Sequence[str] = ("-m", "hsmvisord.hsm.main"), **others: str) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(20)
        with theirs:
            command = [sys.executable, *program, "--control-fd", str(theirs.fileno())]
            command += at.arguments(module_id, **others)
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        self._reader = FrameReader()

    def ask(self, request: Record, descriptors: list[int]) -> Record:
        socket.send_fds(self._control, [encode_frame(Frame(1, Kind.REQUEST, request.encode()))], descriptors)
        frames: list[Frame] = []
        while not frames:
            data = self._control.recv(65536)
            assert data, "the helper ended"
            frames = list(self._reader.feed(data))
        kinds = {kind.TYPE: kind for kind in (m.Done, m.Error, m.Report)}
        return kinds[record_type(frames[0].payload)].decode(frames[0].payload)

    def socket(self) -> socket.socket:
        """A worker's end."""
        ours, theirs = socket.socketpair()
        with theirs:
            answer = self.ask(m.ServeWorker(), [theirs.fileno()])
        assert isinstance(answer, m.Done), answer
        return ours

    def refusal(self) -> str:
        """Returns why it serves no worker."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            answer = self.ask(m.ServeWorker(), [theirs.fileno()])
        assert isinstance(answer, m.Error) and answer.reason == m.REASON_HSM, answer
        return answer.detail

    def provider(self) -> HardwareProvider:
        """As another worker has it."""
        provider = HardwareProvider()
        provider.connect(self.socket())
        return provider

    def leave(self) -> None:
        """As a supervisor that ends."""
        self._control.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        self._control.close()
        self.kill()
        if self.process.stderr is not None:
            self.process.stderr.close()
