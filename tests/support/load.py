"""Constant load on a module: TLS handshakes from threads, signatures from a guest's own process; each one is noted and checked."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from support.certificates import PrivateKey
from support.guest import REPOSITORY, Guest
from support.nginx import handshake
from support.sshd import Sshd

PROGRAM = REPOSITORY / "tests/integration/programs/sign_on.py"


@dataclass
class TlsLoad:
    """Handshakes on and on; the handshake itself proves that key and certificate fit, the context that the chain does."""

    port: int
    context: ssl.SSLContext
    threads: int = 4
    name: str = "localhost"  #: that the certificate has to be for
    pause: float = 0.005  #: seconds after each handshake
    done: list[tuple[float, bytes]] = field(default_factory=list)  #: when it ended, leaf certificate (DER)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                leaf = handshake(self.port, self.context, self.name)[0]
                self.done.append((time.monotonic(), leaf))
            except (OSError, ValueError) as error:
                self.failures.append(f"{time.monotonic():.3f} {type(error).__name__} {error}")
            self._ended.wait(self.pause)

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(15)


@dataclass(frozen=True)
class Made:
    """One signature of a guest; times of CLOCK_MONOTONIC in seconds."""

    began: float
    ended: float
    message: bytes
    signature: bytes
    error: str = ""


class Signer:
    """A guest's process that signs on and on with one key."""

    def __init__(
        self, guest: Guest, label: str, kind: str = "ec", threads: int = 2, name: str = "signer", pause: float = 0.001
    ) -> None:
        self._output, self._errors = guest.directory / f"{name}.json", guest.directory / f"{name}.log"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(guest.library.path), label, kind, str(threads), str(pause)],
                env=guest.environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
            )

    @property
    def log(self) -> Path:
        return self._errors

    def stop(self) -> list[Made]:
        """Ends it and returns what it made; fails when it ended badly."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            status = self.process.wait(30)
        finally:
            self.process.kill()
        assert status == 0, f"the signer ended with {status}:\n{self._errors.read_text()}"
        return [Made(b, e, bytes.fromhex(m), bytes.fromhex(s), *more) for b, e, m, s, *more in map(json.loads, self._output.open())]


class SshLoad:
    """Logins without pause with the key `login` of the module; `allow` adds a public key before it comes into service."""

    def __init__(self, guest: Guest, first: PrivateKey) -> None:
        self.done, self.failures = 0, list[str]()
        self._guest, self._ended = guest, threading.Event()
        self._sshd = Sshd(guest, _openssh(first) + b"\n")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def allow(self, key: PrivateKey) -> None:
        with (self._guest.directory / "authorized_keys").open("ab") as file:
            file.write(_openssh(key) + b"\n")

    def _run(self) -> None:
        while not self._ended.is_set():
            result = self._guest.run(*self._sshd.command("true"), check=False)
            if result.returncode == 0:
                self.done += 1
            else:
                self.failures.append(result.stdout.decode(errors="replace"))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(30)
        self._sshd.stop()


def _openssh(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def fits(key: PrivateKey, made: Made) -> bool:
    """Says whether a signature is `key`'s over its message."""
    public = key.public_key()
    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            half = len(made.signature) // 2
            r, s = (int.from_bytes(part, "big") for part in (made.signature[:half], made.signature[half:]))
            public.verify(encode_dss_signature(r, s), made.message, ec.ECDSA(hashes.SHA256()))
        else:
            assert isinstance(public, rsa.RSAPublicKey)
            public.verify(made.signature, made.message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True
