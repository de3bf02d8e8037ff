"""Private keys sealed to one module: HPKE (RFC 9180) with ML-KEM-768 + X25519, HKDF-SHA256, AES-256-GCM.

HPKE's `info` binds where the key may go; who sent it is proved by the signed command around it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

PUBLIC_SIZE = 1184 + 32  #: bytes of a recipient's public key: ML-KEM-768 encapsulation key, X25519 public key
PRIVATE_SIZE = 64 + 32  #: bytes of a recipient's private key: ML-KEM-768 seed (d, z), X25519 scalar

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True)
class EnvelopeContext(Record):
    """What an envelope is bound to; its encoding is HPKE's `info`."""

    TYPE: ClassVar[str] = "envelope-context"
    host_id: bytes
    module_id: bytes
    recipient: bytes  #: SHA-256 of the recipient's public key
    material: str
    generation: int
    expires_at: int


@dataclass(frozen=True)
class KeyMaterial(Record):
    """The plaintext of an envelope."""

    TYPE: ClassVar[str] = "key-material"
    pkcs8: bytes = field(repr=False)  #: PrivateKeyInfo, DER


class RecipientKey:
    """A module's own HPKE key pair.  Its repr shows nothing."""

    def __init__(self, private: bytes | None = None) -> None:
        """`private`: PRIVATE_SIZE bytes, or None for a new key."""
        if private is None:
            kem, dh = mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
        else:
            kem = mlkem.MLKEM768PrivateKey.from_seed_bytes(private[:64])
            dh = x25519.X25519PrivateKey.from_private_bytes(private[64:])
        self._kem, self._dh = kem, dh
        self.public = kem.public_key().public_bytes_raw() + dh.public_key().public_bytes_raw()
        self._hpke = hpke.MLKEM768X25519PrivateKey(kem, dh)

    def private_bytes(self) -> bytes:
        return self._kem.private_bytes_raw() + self._dh.private_bytes_raw()

    def open(self, envelope: bytes, context: Record) -> KeyMaterial:
        """Returns what `seal` was given; raises Refusal.  `context`: an EnvelopeContext, or an ImportContext (fleet.py)."""
        if len(envelope) > limits.MAX_ENVELOPE:
            raise Refusal(Reason.TOO_LARGE, f"an envelope has at most {limits.MAX_ENVELOPE} bytes, this has {len(envelope)}")
        try:
            plain = _SUITE.decrypt(envelope, self._hpke, context.encode())
        except (InvalidTag, ValueError):
            raise Refusal(
                Reason.ALTERED, "the envelope does not open: it was altered, or sealed for another key, module or generation"
            ) from None
        try:
            return KeyMaterial.decode(plain)
        except MalformedRecord:
            raise Refusal(Reason.MALFORMED, "the envelope holds no key material") from None


def recipient_fingerprint(public: bytes) -> bytes:
    return hashlib.sha256(public).digest()


def seal(material: KeyMaterial, public: bytes, context: Record) -> bytes:
    """Returns the envelope; `public` is the recipient's PUBLIC_SIZE bytes."""
    if len(public) != PUBLIC_SIZE:
        raise ValueError(f"a recipient's public key has {PUBLIC_SIZE} bytes")
    key = hpke.MLKEM768X25519PublicKey(
        mlkem.MLKEM768PublicKey.from_public_bytes(public[:1184]),
        x25519.X25519PublicKey.from_public_bytes(public[1184:]),
    )
    return _SUITE.encrypt(material.encode(), key, context.encode())
