"""Certificate chains as they are delivered: parsed, ordered leaf first, and fitting their key."""

from __future__ import annotations

import itertools

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.refusal import Reason, Refusal


def parse_chain(ders: tuple[bytes, ...], public_key: bytes, now: float) -> list[x509.Certificate]:
    """Returns the certificates, leaf first; raises Refusal.  `public_key`: SubjectPublicKeyInfo that the leaf must hold."""
    if len(ders) > limits.MAX_CERTIFICATES:
        raise Refusal(Reason.TOO_LARGE, f"a chain has at most {limits.MAX_CERTIFICATES} certificates, this has {len(ders)}")
    chain = [_parse(der, position) for position, der in enumerate(ders)]
    if not chain:
        return chain
    leaf = chain[0]
    if leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != public_key:
        raise Refusal(
            Reason.KEY_MISMATCH, "the first certificate is not of this private key: the leaf comes first, then its issuers"
        )
    if leaf.not_valid_after_utc.timestamp() <= now:
        raise Refusal(Reason.EXPIRED, f"the certificate expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    for position, (subject, issuer) in enumerate(itertools.pairwise(chain)):
        _check_issued(subject, issuer, position)
    return chain


def _parse(der: bytes, position: int) -> x509.Certificate:
    if len(der) > limits.MAX_CERTIFICATE:
        raise Refusal(Reason.TOO_LARGE, f"certificate {position} has {len(der)} bytes, the limit is {limits.MAX_CERTIFICATE}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.public_key()
        read_all(certificate)
    except Exception:  # the parser of hostile bytes raises more kinds than its documentation names
        raise Refusal(Reason.MALFORMED, f"certificate {position} is not an X.509 certificate that can be used") from None
    return certificate


def read_all(certificate: x509.Certificate) -> None:
    """Raises ValueError for a certificate whose fields cannot be read: the parser looks at them only when they are asked for."""
    _ = certificate.subject, certificate.issuer, certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _check_issued(subject: x509.Certificate, issuer: x509.Certificate, position: int) -> None:
    try:
        subject.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise Refusal(
            Reason.BAD_CHAIN,
            f"certificate {position + 1} did not issue certificate {position}: "
            "order the chain leaf first, each followed by its issuer",
        ) from None
