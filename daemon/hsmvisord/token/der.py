"""The few fields of an X.509 certificate that clients compare byte by byte, sliced from its DER (never encoded anew)."""

from __future__ import annotations

from dataclasses import dataclass


def _element(der: bytes, offset: int) -> tuple[int, int]:
    """Returns where the content of the element at `offset` begins and where the element ends."""
    length, start = der[offset + 1], offset + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    return start, start + length


@dataclass(frozen=True)
class CertificateFields:
    """DER encodings: serial number (INTEGER), issuer and subject (Name), SubjectPublicKeyInfo (RFC 5280 4.1)."""

    serial: bytes
    issuer: bytes
    subject: bytes
    spki: bytes


def certificate_fields(der: bytes) -> CertificateFields:
    """`der` is a certificate that `cryptography` has parsed."""
    tbs, _ = _element(der, 0)
    offset, _ = _element(der, tbs)
    if der[offset] == 0xA0:  # version
        _, offset = _element(der, offset)
    parts = []
    for _ in range(6):  # serialNumber, signature, issuer, validity, subject, subjectPublicKeyInfo
        _, end = _element(der, offset)
        parts.append(der[offset:end])
        offset = end
    return CertificateFields(parts[0], parts[2], parts[4], parts[5])
