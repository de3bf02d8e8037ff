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
        """Fails unless the certificate's own key made the signature, an ECDSA one as PKCS#11 has it."""
        key = self._all[name].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        half = len(signature) // 2
        der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
        key.verify(der, message, ec.ECDSA(hashes.SHA256()))


class CardClient:
    """tests/integration/programs/hold_card.py: does the words that it is told, and every signature that it makes is checked."""

    def __init__(self, machine: GuestMachine, name: str, library: str, certificates: Certificates) -> None:
        self._machine, self._certificates = machine, certificates
        self._words, self._output, self._errors = (f"/root/{name}.{end}" for end in ("words", "json", "err"))
        self._all: list[Said] = []
        self._loop = 0  #: where in it the loop begins
        machine.copy_in(PROGRAM, f"/root/{PROGRAM.name}")
        machine.run(["mkfifo", self._words])
        self._holder = machine.start(f"exec sleep 7200 >{self._words}")
        command = f"exec python3 /root/{PROGRAM.name} {library} 01 {PIN} <{self._words} 2>{self._errors}"
        self._process = machine.start(command, output=self._output)

    def _said(self, line: dict[str, Any]) -> Said:
        if signature := bytes.fromhex(line["signature"]):
            self._certificates.check(line["certificate"], bytes.fromhex(line["message"]), signature)
        failed = line["failed"] + (f": {NAMES.get(line['rv'], hex(line['rv']))}" if line["rv"] else "")
        return Said(line["word"], failed, line["certificate"], bool(signature))

    def say(self, word: str) -> None:
        """Does not wait for what comes of it."""
        self._machine.run(f"echo {word} >{self._words}")

    def look(self) -> list[Said]:
        """Returns all that it has said."""
        ended = self._process.poll()
        assert ended is None, f"it ended ({ended}): {self._machine.read(self._errors).decode()}"
        text = self._machine.read(self._output).decode()
        lines = text[: text.rfind("\n") + 1].splitlines()
        self._all += [self._said(json.loads(line)) for line in lines[len(self._all) :]]
        return self._all

    def do(self, word: str, within: float = 60) -> Said:
        """Returns what came of it.  A loop must have ended."""
        before = len(self.look())
        self.say(word)
        until(lambda: len(self.look()) > before, f"an answer to {word!r}", within)
        said = self._all[-1]
        assert (said.word, len(self._all)) == (word, before + 1)
        return said

    def does(self, words: str) -> Said:
        """All of it works; returns what came of the last word."""
        for word in words.split():
            said = self.do(word)
            assert not said.failed, said
        return said

    def fails(self, word: str) -> str:
        """Returns what failed."""
        said = self.do(word)
        assert said.failed and not said.signed, said
        return said.failed

    def loop(self) -> None:
        """Returns when it has signed."""
        self._loop = len(self.look())
        self.say("loop")
        self.goes_on()

    def goes_on(self) -> None:
        """Waits until the loop has signed once more."""
        before = len(self.look())
        until(lambda: any(said.signed for said in self.look()[before:]), "a signature")

    def end_loop(self) -> list[Said]:
        """Returns all that it did."""
        self.say("pause")
        until(lambda: self.look()[-1].word == "pause", "the end of the loop")
        return self._all[self._loop : -1]

    def end(self) -> None:
        self._holder.kill()
        code = self._process.wait(30)
        assert code == 0, self._machine.read(self._errors).decode()
