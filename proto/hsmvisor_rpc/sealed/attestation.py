"""What a guest's boot was measured as, signed by its module's TPM: PCRs with a nonce of whoever asks.

The host signs whose attestation key it is, as it certifies modules; that key, which never leaves the TPM and signs nothing that was
not made in it, signs the PCRs (TPM 2.0 Library, part 1, 31; part 2, 10.12.8 and 10.12.12).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.commands import Signed, check, fingerprint
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

PCRS = range(24)  #: of a bank (PC Client Platform TPM Profile, 4.6.2)
DIGEST = 32  #: bytes of a PCR
MAX_ATTESTATION = 16 * 1024  #: bytes of an encoded Attestation

_GENERATED, _QUOTE, _SHA256 = 0xFF544347, 0x8018, 0x000B  #: TPM_GENERATED_VALUE, TPM_ST_ATTEST_QUOTE, TPM_ALG_SHA256
_CLOCK = struct.Struct(">QIIBQ")  #: TPMS_CLOCK_INFO (clock, resets, restarts, safe), and the firmware's version


@dataclass(frozen=True)
class TpmIdentity(Record):
    """Which keys a module's TPM has, as its host certifies them; travels as a Signed."""

    TYPE: ClassVar[str] = "tpm-identity"
    host_id: bytes  #: 32 bytes
    module_id: bytes  #: 16 bytes
    name: str
    attestation_key: bytes  #: SubjectPublicKeyInfo (DER), P-256
    endorsement_keys: tuple[bytes, ...]  #: SubjectPublicKeyInfo (DER): RSA 2048, P-256
    authority_key: bytes  #: SubjectPublicKeyInfo (DER), of the host's CA for TPMs


@dataclass(frozen=True)
class Attestation(Record):
    TYPE: ClassVar[str] = "tpm-attestation"
    identity: bytes  #: Signed TpmIdentity
    attest: bytes  #: TPMS_ATTEST of a TPM2_Quote
    signature: bytes  #: ECDSA-Sig-Value (DER) of its SHA-256
    pcrs: tuple[int, ...]  #: of the SHA-256 bank, ascending
    values: tuple[bytes, ...]  #: DIGEST bytes each


@dataclass(frozen=True)
class Attested:
    """What was verified."""

    identity: TpmIdentity
    pcrs: Mapping[int, bytes]
    resets: int  #: how often the TPM was started anew
    restarts: int  #: how often it woke since then
    clock: int  #: milliseconds that it has run


def verify_attestation(data: bytes, host_key: bytes, module_id: bytes, nonce: bytes) -> Attested:
    """`host_key`: raw Ed25519, pinned; `nonce`: what was asked with.  Raises Refusal."""
    if len(data) > MAX_ATTESTATION:
        raise Refusal(Reason.TOO_LARGE, f"an attestation has at most {MAX_ATTESTATION} bytes, this has {len(data)}")
    try:
        attestation = Attestation.decode(data)
        identity = _verify_identity(attestation.identity, host_key)
    except MalformedRecord as error:
        raise Refusal(Reason.MALFORMED, str(error)) from None
    if identity.module_id != module_id:
        raise Refusal(Reason.WRONG_MODULE, "the attestation is of another module's TPM")
    _verify_signature(attestation, identity)
    return _verify_quote(attestation, identity, nonce)


def _verify_identity(data: bytes, host_key: bytes) -> TpmIdentity:
    outer = Signed.decode(data)
    try:
        check(outer.signature, outer.payload, host_key, "TPM's identity")
    except Refusal:
        raise Refusal(Reason.WRONG_HOST, "the TPM's identity is not signed by the pinned host key") from None
    identity = TpmIdentity.decode(outer.payload)
    if identity.host_id != fingerprint(host_key):
        raise Refusal(Reason.WRONG_HOST, "the TPM's identity names another host")
    return identity


def _verify_signature(attestation: Attestation, identity: TpmIdentity) -> None:
    try:
        key = load_der_public_key(identity.attestation_key)
    except (ValueError, UnsupportedAlgorithm):
        raise Refusal(Reason.MALFORMED, "the attestation key is none") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refusal(Reason.UNSUPPORTED_KEY, "an attestation key is on P-256")
    try:
        key.verify(attestation.signature, attestation.attest, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise Refusal(Reason.ALTERED, "the quote is not signed by the TPM's attestation key") from None


def _verify_quote(attestation: Attestation, identity: TpmIdentity, nonce: bytes) -> Attested:
    pcrs, values = attestation.pcrs, attestation.values
    if list(pcrs) != sorted(set(pcrs)) or not pcrs or pcrs[-1] not in PCRS:
        raise Refusal(Reason.MALFORMED, "PCRs are 0 to 23, ascending, each once")
    if len(values) != len(pcrs) or any(len(value) != DIGEST for value in values):
        raise Refusal(Reason.MALFORMED, f"each PCR has one value of {DIGEST} bytes")
    reader = _Reader(attestation.attest)
    if (reader.number(4), reader.number(2)) != (_GENERATED, _QUOTE):
        raise Refusal(Reason.MALFORMED, "what the attestation key signed is no quote")
    reader.sized()  # the Qualified Name of the key that signed, which is known
    if reader.sized() != nonce:
        raise Refusal(Reason.REPLAY, "the quote was made for another nonce: it is of another time")
    clock, resets, restarts, safe, _ = reader.take(_CLOCK)
    if safe > 1:
        raise Refusal(Reason.MALFORMED, "a TPMI_YES_NO is 0 or 1")
    selected = reader.number(4), reader.number(2), reader.take_bytes(reader.number(1))
    digest = reader.sized()
    reader.end()
    if selected != (1, _SHA256, _bitmap(pcrs)):
        raise Refusal(Reason.MALFORMED, "the quote is of other PCRs")
    if digest != hashlib.sha256(b"".join(values)).digest():
        raise Refusal(Reason.ALTERED, "the PCRs are not those that were quoted")
    return Attested(identity, dict(zip(pcrs, values, strict=True)), resets, restarts, clock)


def _bitmap(pcrs: tuple[int, ...]) -> bytes:
    """TPMS_PCR_SELECTION's."""
    return sum(1 << pcr for pcr in pcrs).to_bytes(len(PCRS) // 8, "little")


class _Reader:
    """Of big-endian structures; raises Refusal."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take_bytes(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            raise Refusal(Reason.MALFORMED, "the quote ends early")
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take_bytes(size), "big")

    def sized(self) -> bytes:
        return self.take_bytes(self.number(2))

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take_bytes(form.size))

    def end(self) -> None:
        if self._at != len(self._data):
            raise Refusal(Reason.MALFORMED, "something follows the quote")
