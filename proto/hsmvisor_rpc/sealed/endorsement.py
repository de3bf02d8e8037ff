"""The certificates of a module's TPM: its host's authority certifies the endorsement keys, and on which platform they are.

They follow the TCG EK Credential Profile for TPM 2.0 (2.5, sections 3.1 and 3.2).  The host's signature is the TpmIdentity's: these
have to say the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hsmvisor_rpc.sealed.attestation import TpmIdentity
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

MAX_TPM_CERTIFICATES = 16 * 1024  #: bytes of an encoded TpmCertificates

_EK, _PLATFORM = ObjectIdentifier("2.23.133.8.1"), ObjectIdentifier("2.23.133.8.2")  #: tcg-kp


@dataclass(frozen=True)
class TpmCertificates(Record):
    """DER."""

    TYPE: ClassVar[str] = "tpm-certificates"
    rsa: bytes  #: of the endorsement keys
    p256: bytes
    platform: bytes  #: of the P-256 key
    ca: bytes  #: of the host's authority, which issued them


def verify_certificates(data: bytes, identity: TpmIdentity) -> TpmCertificates:
    """`data`: an encoded TpmCertificates; `identity`: verified (verify_attestation).  Raises Refusal."""
    if len(data) > MAX_TPM_CERTIFICATES:
        raise Refusal(Reason.TOO_LARGE, f"a TPM's certificates have at most {MAX_TPM_CERTIFICATES} bytes, these have {len(data)}")
    try:
        told = TpmCertificates.decode(data)
    except MalformedRecord as error:
        raise Refusal(Reason.MALFORMED, str(error)) from None
    if len(identity.endorsement_keys) != 2:
        raise Refusal(Reason.MALFORMED, f"a TPM has 2 endorsement keys, this has {len(identity.endorsement_keys)}")
    rsa, p256 = identity.endorsement_keys
    ca = _verify_ca(told.ca, identity)
    _verify("the RSA endorsement certificate", told.rsa, rsa, _EK, ca, identity.module_id)
    _verify("the P-256 endorsement certificate", told.p256, p256, _EK, ca, identity.module_id)
    _verify("the platform's certificate", told.platform, p256, _PLATFORM, ca, identity.module_id)
    return told


def _verify_ca(der: bytes, identity: TpmIdentity) -> x509.Certificate:
    what = "the certificate of the host's CA for TPMs"
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        hosts = _serial_numbers([certificate.subject])
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Exception as error:  # cryptography has about ten kinds for what cannot be read, TypeError among them
        raise Refusal(Reason.MALFORMED, f"{what} cannot be read: {error}") from None
    if not is_ca:
        raise Refusal(Reason.BAD_CHAIN, f"{what} is not a CA's")
    if hosts != [identity.host_id.hex()]:
        raise Refusal(Reason.WRONG_HOST, f"{what} names another host")
    if key != identity.authority_key:
        raise Refusal(Reason.KEY_MISMATCH, f"{what} is of another key than the TPM's identity names")
    _verify_issued(what, certificate, certificate)
    return certificate


def _verify(what: str, der: bytes, key: bytes, purpose: ObjectIdentifier, ca: x509.Certificate, module_id: bytes) -> None:
    """`key`: SubjectPublicKeyInfo (DER) that it has to be of."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        of = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        modules = _serial_numbers(names.get_values_for_type(x509.DirectoryName))
        purposes = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except Exception as error:  # as above
        raise Refusal(Reason.MALFORMED, f"{what} cannot be read: {error}") from None
    _verify_issued(what, certificate, ca)
    if of != key:
        raise Refusal(Reason.KEY_MISMATCH, f"{what} is of another key than the TPM's identity names")
    if modules != [module_id.hex()]:
        raise Refusal(Reason.WRONG_MODULE, f"{what} names another module")
    if purposes != [purpose]:
        raise Refusal(Reason.MALFORMED, f"{what} is for another purpose")


def _verify_issued(what: str, certificate: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise Refusal(Reason.BAD_CHAIN, f"{what} is not issued by the CA that came with it") from None


def _serial_numbers(names: Iterable[x509.Name]) -> list[object]:
    """Of the named, not of a certificate."""
    return [found.value for name in names for found in name.get_attributes_for_oid(NameOID.SERIAL_NUMBER)]
