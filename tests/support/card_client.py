"""A program of a guest that holds a card's key for long, and what it got: a signature that fits its certificate, or none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hsmvisord import ck
from support.guest import REPOSITORY
from support.guest_machine import GuestMachine
from support.usb_guest import PIN, until

PROGRAM = REPOSITORY / "tests/integration/programs/hold_card.py"
NAMES = {value: name for name, value in vars(ck).items() if name.startswith("CKR_")}


@dataclass(frozen=True)
class Said:
    """Of one word: what failed, "" if nothing did; the certificate (SHA-256) that the program holds; whether it signed."""

    word: str
    failed: str
    certificate: str
    signed: bool


class Certificates:
    """All that were on the card, by SHA-256."""

    def __init__(self) -> None:
        self._all: dict[str, x509.Certificate] = {}

    def add(self, certificate: x509.Certificate) -> str:
        name = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
        self._all[name] = certificate
        return name

    def check(self, name: str, message: bytes, signature: bytes) -> None:
        """Fails unless the certificate's own key made the signature."""
        key = self._all[name].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        half = len(signature) // 2
        der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
        key.verify(der, message, ec.ECDSA(hashes.SHA256()))


class CardClient:
    """tests/integration/programs/hold_card.py; every signature that it makes is checked."""

    def __init__(self, machine: GuestMachine, name: str, library: str, certificates: Certificates, ident: str = "01") -> None:
        self._machine, self._certificates = machine, certificates
        self._words, self._output, self._errors = (f"/root/{name}.{end}" for end in ("words", "json", "err"))
        self._taken = 0
        machine.copy_in(PROGRAM, f"/root/{PROGRAM.name}")
        machine.run(["mkfifo", self._words])
        self._holder = machine.start(f"exec sleep 7200 >{self._words}")
        command = f"exec python3 /root/{PROGRAM.name} {library} {ident} {PIN} <{self._words} 2>{self._errors}"
        self._process = machine.start(command, output=self._output)

    def _lines(self) -> list[dict[str, Any]]:
        text = self._machine.read(self._output).decode()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        new, self._taken = lines[self._taken :], len(lines)
        return new

    def _said(self, line: dict[str, Any]) -> Said:
        if signature := bytes.fromhex(line["signature"]):
            self._certificates.check(line["certificate"], bytes.fromhex(line["message"]), signature)
        failed = f"{line['failed']}: {NAMES.get(line['rv'], hex(line['rv']))}" if line["failed"] else ""
        return Said(line["word"], failed, line["certificate"], bool(signature))

    def say(self, word: str) -> None:
        self._machine.run(f"echo {word} >{self._words}")

    def take(self) -> list[Said]:
        """Returns what is new."""
        return [self._said(line) for line in self._lines()]

    def do(self, word: str, within: float = 60) -> Said:
        """Returns what came of it; what a loop did before is dropped, checked."""
        self.say(word)
        found: list[Said] = []

        def done() -> bool:
            assert self._process.poll() is None, self._machine.read(self._errors).decode()
            found.extend(self.take())
            return bool(found) and found[-1].word == word

        until(done, f"an answer to {word!r}", within)
        return found[-1]

    def end(self) -> None:
        self._holder.kill()
        code = self._process.wait(30)
        assert code == 0, self._machine.read(self._errors).decode()
