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


#: The library is loaded in a process of its own: it reads its configuration once.
_MAKES_KEYS = """
import sys, pkcs11
from pkcs11 import Attribute as A, KeyType
from pkcs11.util.ec import encode_named_curve_parameters
library, token, pin, kind, label, sensitive, extractable = sys.argv[1:8]
with pkcs11.lib(library).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    private = {A.SENSITIVE: sensitive == "1", A.EXTRACTABLE: extractable == "1"}
    told = {"store": True, "label": label, "id": label.encode(), "private_template": private}
    if kind == "RSA":
        public, _ = session.generate_keypair(KeyType.RSA, 2048, **told)
    else:
        edwards = kind == "Ed25519"
        curve = b"\\x13\\x0cedwards25519" if edwards else encode_named_curve_parameters(kind)
        of = KeyType.EC_EDWARDS if edwards else KeyType.EC
        session.create_domain_parameters(of, {A.EC_PARAMS: curve}, local=True).generate_keypair(**told)
"""


def make_key(token: Token, kind: str, label: str, sensitive: bool, extractable: bool) -> None:
    """`kind`: RSA, Ed25519, or a named curve.  CKA_ID is the label."""
    arguments = [token.library, TOKEN, PIN, kind, label, str(int(sensitive)), str(int(extractable))]
    subprocess.run([sys.executable, "-c", _MAKES_KEYS, *arguments], check=True, env=os.environ | token.environment)


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
