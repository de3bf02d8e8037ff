"""The host's authority for its modules' TPMs: it certifies endorsement keys, as a TPM's maker does, and says on which platform they
are.

Certificates follow the TCG EK Credential Profile for TPM 2.0 (2.5, sections 3.1 and 3.2), and for the platform TCG's attributes in
a public key certificate, as swtpm's own authority makes it.  Each names its module, and the authority its host.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hsmvisor.host.identity import HostIdentity

#: A maker's id is four characters in hexadecimal: HSMV.
MANUFACTURER, MODEL, VERSION = "id:48534D56", "hsmvisor TPM 2.0", "id:00010000"
FAMILY, LEVEL, REVISION = "2.0", 0, 164  #: of the specification that libtpms follows (TPM2_PT_FAMILY_INDICATOR, _LEVEL, _REVISION)

#: tcg-at-tpmManufacturer, -tpmModel and -tpmVersion; -platformManufacturerStr, -platformModel and -platformVersion.
_TPM = tuple([ObjectIdentifier(f"2.23.133.2.{number}") for number in (1, 2, 3)])
_PLATFORM = tuple([ObjectIdentifier(f"2.23.133.5.1.{number}") for number in (1, 4, 5)])
_EK, _PLATFORM_CERTIFICATE = ObjectIdentifier("2.23.133.8.1"), ObjectIdentifier("2.23.133.8.2")  #: tcg-kp
_SUBJECT_DIRECTORY_ATTRIBUTES = ObjectIdentifier("2.5.29.9")
#: The same at each time, so that a certificate that is made again is the same; without end (RFC 5280, 4.1.2.5).
_FROM, _TO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)

_PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Certificates:
    """DER."""

    rsa: bytes
    p256: bytes
    platform: bytes  #: of the P-256 key


class TpmCa:
    """Its key is made of the host's: whoever keeps that keeps this.  The same question has the same answer, byte for byte."""

    def __init__(self, identity: HostIdentity) -> None:
        self._key = identity.tpm_ca_key()
        host_id = x509.NameAttribute(NameOID.SERIAL_NUMBER, identity.host_id.hex())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hsmvisor TPM CA"), host_id])

    @property
    def public(self) -> bytes:
        """SubjectPublicKeyInfo (DER)."""
        return self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @cached_property
    def certificate(self) -> bytes:
        """DER, self-signed."""
        public = self._key.public_key()
        builder = (
            self._builder(public, self._name, b"ca")
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        return self._signed(builder)

    def issue(self, name: str, module_id: bytes, rsa: bytes, p256: bytes) -> Certificates:
        """`rsa`, `p256`: SubjectPublicKeyInfo (DER) of the endorsement keys of module `name`.  Raises ValueError."""
        tpm = _directory(_TPM, (MANUFACTURER, MODEL, VERSION))
        platform = _directory(_PLATFORM, ("hsmvisor", f"module {name}", "1"))
        rsa_key, p256_key = _public(rsa), _public(p256)
        if not _is_rsa_2048(rsa_key) or not _is_p256(p256_key):
            raise ValueError("a TPM's endorsement keys are RSA 2048 and P-256")
        return Certificates(
            self._issue(module_id, rsa_key, rsa, _EK, tpm),
            self._issue(module_id, p256_key, p256, _EK, tpm),
            self._issue(module_id, p256_key, p256, _PLATFORM_CERTIFICATE, platform),
        )

    def _issue(self, module_id: bytes, public: _PublicKey, spki: bytes, purpose: ObjectIdentifier, named: x509.Name) -> bytes:
        wraps = isinstance(public, rsa.RSAPublicKey)
        names = [x509.DirectoryName(named), x509.DirectoryName(_directory((NameOID.SERIAL_NUMBER,), (module_id.hex(),)))]
        builder = (
            self._builder(public, x509.Name([]), module_id + purpose.dotted_string.encode() + spki)
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(x509.KeyUsage(False, False, wraps, False, not wraps, False, False, False, False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
        )
        if purpose == _EK:
            specification = x509.UnrecognizedExtension(_SUBJECT_DIRECTORY_ATTRIBUTES, _specification())
            builder = builder.add_extension(specification, critical=False)
        return self._signed(builder)

    def _builder(self, public: _PublicKey, subject: x509.Name, of: bytes) -> x509.CertificateBuilder:
        number = int.from_bytes(hashlib.sha256(of).digest()[:19], "big") | 1
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.CertificateBuilder(self._name, subject, public, number, _FROM, _TO).add_extension(issuer, critical=False)

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        """By RFC 6979."""
        return builder.sign(self._key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)


def _public(spki: bytes) -> object:
    try:
        return load_der_public_key(spki)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None


def _is_rsa_2048(key: object) -> TypeGuard[rsa.RSAPublicKey]:
    return isinstance(key, rsa.RSAPublicKey) and key.key_size == 2048


def _is_p256(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _directory(kinds: tuple[ObjectIdentifier, ...], values: tuple[str, ...]) -> x509.Name:
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in zip(kinds, values, strict=True)])


def _specification() -> bytes:
    """SubjectDirectoryAttributes with tcg-at-tpmSpecification 2.23.133.2.16: family, level and revision."""
    revision = _tlv(0x02, REVISION.to_bytes(2, "big"))
    specification = _tlv(0x30, _tlv(0x0C, FAMILY.encode()) + _tlv(0x02, bytes([LEVEL])) + revision)
    kind = _tlv(0x06, bytes.fromhex("6781050210"))
    return _tlv(0x30, _tlv(0x30, kind + _tlv(0x31, specification)))


def _tlv(tag: int, content: bytes) -> bytes:
    """DER, of fewer than 128 bytes."""
    return bytes([tag, len(content)]) + content
