"""A keystore in this process: its manager, its clock and its storage are plain values that a test turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import (
    Certify,
    Command,
    Generate,
    Signer,
    SignerCertificate,
    Stage,
    certify,
    raw_public,
)
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.keystore import persistence
from hsmvisord.keystore.keystore import Cause, Happening, Keystore, StorageError
from hsmvisord.keystore.persistence import SealedChange
from hsmvisord.keystore.vault import Vault
from hsmvisord.token.token import Token
from support.certificates import AnyKey, Authority, chain_der, new_key, pkcs8, spki

HOST, MODULE = b"h" * 32, b"m" * 16
NOW = int(time.time())  # certificates of tests begin now
DAY = 86400


def signed_by(root: Ed25519PrivateKey, key: Ed25519PrivateKey | None = None, **validity: int) -> Signer:
    key = key or Ed25519PrivateKey.generate()
    times = {"not_before": NOW - DAY, "not_after": NOW + DAY} | validity
    return Signer(key, certify(root, SignerCertificate("tester", raw_public(key.public_key()), **times)))


@dataclass
class Bench:
    """`stored` is what a disk would hold; `full` makes it refuse."""

    root: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    now: float = NOW
    stored: dict[str, bytes] = field(default_factory=dict)
    version: int = 0
    full: bool = False
    usage: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    happened: list[Happening] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.authority = Authority()
        self.vault = Vault(MODULE, b"k" * 32)
        self.provider = SoftwareProvider()
        self.signer = signed_by(self.root)
        root = raw_public(self.root.public_key())
        self.keystore = Keystore.create(MODULE, HOST, root, NOW, self.vault, self.provider, lambda: self.now, self.persist)
        self._watch()

    def _watch(self) -> None:
        self.keystore.happened = self.happened.append
        self.keystore.usage = lambda: self.usage

    def persist(self, change: SealedChange, request_id: str, result: bytes) -> None:
        if self.full:
            raise StorageError("the disk is full")
        assert change.version == self.version + 1
        self.stored |= change.put
        for name in change.delete:
            del self.stored[name]
        self.version = change.version

    def restart(self) -> None:
        """A new worker opens what is stored."""
        state, recipient, manifest = persistence.load(self.stored, self.vault, self.provider, self.version)
        self.keystore = Keystore(state, recipient, manifest, self.vault, self.provider, lambda: self.now, self.persist)
        self._watch()

    # ---- the manager ------------------------------------------------------------------------------------------------

    def command(
        self, action: str, material: str = "tls", generation: int = 1, body: Record | bytes = b"", **changes: Any
    ) -> Command:
        now = int(self.now)
        values: dict[str, Any] = {
            "action": action,
            "host_id": HOST,
            "module_id": MODULE,
            "sequence": self.keystore.state.sequence + 1,
            "issued_at": now,
            "expires_at": now + 600,
            "material": material,
            "generation": generation,
            "body": body.encode() if isinstance(body, Record) else body,
        }
        return Command(**(values | changes))

    def execute(self, *words: Any, **changes: Any) -> None:
        self.send(self.signer.sign(self.command(*words, **changes)))

    def send(self, signed: bytes) -> None:
        self.keystore.execute(signed, lambda command, signer: Cause())

    def body(
        self,
        key: AnyKey,
        certificates: tuple[x509.Certificate, ...] = (),
        material: str = "tls",
        generation: int = 1,
        renew: bool = False,
        **changes: Any,
    ) -> Stage:
        """The body of a stage command; with `renew` without the key."""
        recipient = self.keystore.recipient_public
        fingerprint = envelope.recipient_fingerprint(recipient)
        context = envelope.EnvelopeContext(HOST, MODULE, fingerprint, material, generation, int(self.now) + 600)
        values: dict[str, Any] = {
            "public_key": spki(key),
            "certificates": tuple(c.public_bytes(Encoding.DER) for c in certificates),
            "envelope": b"" if renew else envelope.seal(envelope.KeyMaterial(pkcs8(key)), recipient, context),
            "mode": "pin",
            "profile": "any",
            "alias_id": b"",
            "drain_seconds": 0,
            "after_drain": "extend",
            "on_expiry": "keep",
            "self_signed": False,
        }
        return Stage(**(values | changes))

    def stage(
        self, generation: int = 1, key: AnyKey | None = None, material: str = "tls", chained: bool = False, **changes: Any
    ) -> Any:
        key = key or new_key("p256")
        certificates = self.authority.chain(key) if chained else ()
        self.execute("stage", material, generation, self.body(key, certificates, material, generation, **changes))
        return key

    def to_make(self, **changes: Any) -> Generate:
        """The body of a generate command."""
        values: dict[str, Any] = {
            "key_type": "P-256",
            "names": ("dns:www.example.net",),
            "mode": "pin",
            "profile": "any",
            "alias_id": b"",
            "drain_seconds": 0,
            "after_drain": "extend",
            "on_expiry": "keep",
            "self_signed": False,
        }
        return Generate(**(values | changes))

    def generate(self, generation: int = 1, material: str = "tls", **changes: Any) -> x509.CertificateSigningRequest:
        """Returns the request that the state has of the new generation's key."""
        self.execute("generate", material, generation, self.to_make(**changes))
        return self.request_of(generation, material)

    def request_of(self, generation: int, material: str = "tls") -> x509.CertificateSigningRequest:
        found = self.keystore.state.materials[material].generation(generation)
        assert found is not None
        request = self.keystore.state.keys[found.key].request
        assert request is not None
        return x509.load_der_x509_csr(request.der)

    def to_certify(self, generation: int = 1, material: str = "tls") -> Certify:
        """The body of a certify command: a chain for the public key of the generation."""
        found = self.keystore.state.materials[material].generation(generation)
        assert found is not None
        public: Any = load_der_public_key(found.public_key)
        return Certify(chain_der((self.authority.issue_for(public), self.authority.intermediate)))

    def push(self, generation: int = 1, key: AnyKey | None = None, material: str = "tls", **changes: Any) -> Any:
        key = self.stage(generation, key, material, **changes)
        self.execute("activate", material, generation)
        return key

    def state_of(self, generation: int, material: str = "tls") -> str:
        found = self.keystore.state.materials[material].generation(generation)
        return str(found.state) if found else "forgotten"

    def token(self) -> Token:
        self.monotonic = 0.0
        return Token("web-1", self.keystore, self.provider, lambda: self.now, lambda: self.monotonic)
