"""What the built-in authority answers about its certificates: revocation lists (RFC 5280, 5), OCSP (RFC 6960; nonces: RFC 9654)."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hsmvisor.manager.ca.builtin.issuance import Issuer
from hsmvisor.manager.ca.interface import Reason

MAX_OCSP = 4096  #: bytes of a request
NONCE = range(1, 129)  #: bytes of a nonce that is answered (RFC 9654, 2.1)
OCSP_SECONDS = 3600  #: that an answer holds
CRL_SECONDS = 86400  #: that a list holds

_FLAGS = {reason: x509.ReasonFlags[reason.value] for reason in Reason}


@dataclass(frozen=True)
class Revoked:
    serial: int
    at: int  #: seconds since 1970
    reason: Reason


def _time(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def revocation_list(issuer: Issuer, revoked: Iterable[Revoked], number: int, now: int) -> bytes:
    """Returns a CRL in DER.  `number` rises with each (RFC 5280, 5.2.3)."""
    own = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(_time(now))
        .next_update(_time(now + CRL_SECONDS))
        .add_extension(x509.CRLNumber(number), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False)
    )
    for entry in revoked:
        one = x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(_time(entry.at))
        if entry.reason is not Reason.UNSPECIFIED:  # absent rather than unspecified (RFC 5280, 5.3.1)
            one = one.add_extension(x509.CRLReason(_FLAGS[entry.reason]), False)
        builder = builder.add_revoked_certificate(one.build())
    return builder.sign(issuer.key, issuer.hash).public_bytes(Encoding.DER)


@dataclass(frozen=True)
class Asked:
    """An OCSP request for one certificate."""

    serial: int
    request: ocsp.OCSPRequest
    nonce: bytes


def asked(untrusted: bytes, issuer: Issuer) -> Asked | None:
    """Returns what is asked; None for what is malformed or about another authority's certificate."""
    if len(untrusted) > MAX_OCSP:
        return None
    try:
        request = ocsp.load_der_ocsp_request(untrusted)
        if request.issuer_key_hash != _key_hash(issuer, request.hash_algorithm):
            return None
        nonce = request.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
    except x509.ExtensionNotFound:
        nonce = b""
    except (ValueError, NotImplementedError):
        return None
    if nonce and len(nonce) not in NONCE:
        return None
    return Asked(request.serial_number, request, nonce)


def _key_hash(issuer: Issuer, algorithm: hashes.HashAlgorithm) -> bytes:
    """The hash of the BIT STRING's content of the issuer's key (RFC 6960, 4.1.1)."""
    probe = ocsp.OCSPRequestBuilder().add_certificate(issuer.certificate, issuer.certificate, algorithm).build()
    return probe.issuer_key_hash


def malformed() -> bytes:
    return ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.MALFORMED_REQUEST).public_bytes(Encoding.DER)


def unauthorized() -> bytes:
    """Of a certificate that this authority has not issued (RFC 5019, 2.2.3)."""
    return ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.UNAUTHORIZED).public_bytes(Encoding.DER)


def answer(issuer: Issuer, question: Asked, certificate: x509.Certificate, revoked: Revoked | None, now: int) -> bytes:
    """Returns a response, signed by the issuer itself, about one of its certificates."""
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=certificate,
        issuer=issuer.certificate,
        algorithm=question.request.hash_algorithm,
        cert_status=ocsp.OCSPCertStatus.REVOKED if revoked else ocsp.OCSPCertStatus.GOOD,
        this_update=_time(now),
        next_update=_time(now + OCSP_SECONDS),
        revocation_time=_time(revoked.at) if revoked else None,
        revocation_reason=_FLAGS[revoked.reason] if revoked and revoked.reason is not Reason.UNSPECIFIED else None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, issuer.certificate)
    if question.nonce:
        builder = builder.add_extension(x509.OCSPNonce(question.nonce), False)
    return builder.sign(issuer.key, issuer.hash).public_bytes(Encoding.DER)
