"""Attestations as a host gives them, of a key of ours in the place of a TPM's: each part can be another one, and well signed."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from hsmvisor_rpc.sealed.attestation import Attestation, Attested, TpmIdentity, verify_attestation
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import fingerprint, raw_public, sign
from support.certificates import spki

ECDSA = ec.ECDSA(SHA256(), deterministic_signing=True)
HOST = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
HOST_KEY, MODULE, NONCE = raw_public(HOST.public_key()), b"m" * 16, bytes(range(32))
PCRS = (0, 4, 7, 23)
VALUES = tuple([hashlib.sha256(bytes([pcr])).digest() for pcr in PCRS])
IDENTITY = TpmIdentity(fingerprint(HOST_KEY), MODULE, "web-1", spki(KEY), (b"an RSA key", spki(KEY)), spki(KEY))


@dataclass(frozen=True)
class Quote:
    """TPMS_ATTEST (part 2, 10.12.12)."""

    magic: int = 0xFF544347
    kind: int = 0x8018
    signer: bytes = b"\0\x0b" + b"n" * 32
    nonce: bytes = NONCE
    clock: int = 123456
    resets: int = 5
    restarts: int = 2
    safe: int = 1
    selections: tuple[tuple[int, bytes], ...] = ((0x000B, b"\x91\0\x80"),)  #: algorithm and bits: PCRS
    digest: bytes = hashlib.sha256(b"".join(VALUES)).digest()
    rest: bytes = b""

    def encode(self) -> bytes:
        head = struct.pack(">IHH", self.magic, self.kind, len(self.signer)) + self.signer
        head += struct.pack(">H", len(self.nonce)) + self.nonce
        clock = struct.pack(">QIIBQ", self.clock, self.resets, self.restarts, self.safe, 0x20190702)
        listed = b"".join(struct.pack(">HB", algorithm, len(bits)) + bits for algorithm, bits in self.selections)
        quoted = struct.pack(">I", len(self.selections)) + listed + struct.pack(">H", len(self.digest)) + self.digest
        return head + clock + quoted + self.rest


def attestation(
    attest: bytes | None = None, identified: Record = IDENTITY, key: Any = KEY, host: Any = HOST, **other: Any
) -> bytes:
    """`identified`: what the host signs; `other`: fields of the Attestation."""
    attest = Quote().encode() if attest is None else attest
    made = Attestation(sign(identified, host).encode(), attest, key.sign(attest, ECDSA), PCRS, VALUES)
    return replace(made, **other).encode()


def verify(data: bytes) -> Attested:
    return verify_attestation(data, HOST_KEY, MODULE, NONCE)
