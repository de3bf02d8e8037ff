"""A private key with its certificates, from files (PEM in any order, PKCS #12): put in order and checked before it is sent."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12

_SPKI = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


class BundleError(Exception):
    """The files do not make a key with its chain; the message says what is wrong and never shows a key."""


@dataclass(frozen=True)
class Bundle:
    """`pkcs8` None: a certificate alone, for a key that the module has."""

    public_key: bytes  #: SubjectPublicKeyInfo, DER
    certificates: tuple[bytes, ...]  #: DER, leaf first
    pkcs8: bytes | None = field(repr=False)

    @classmethod
    def make(cls, key: bytes | None, certificates: bytes = b"", passphrase: bytes | None = None) -> Bundle:
        """`key` in PEM, DER or PKCS #12; `certificates` in PEM or DER.  Raises BundleError."""
        private, found = (None, []) if key is None else _load_key(key, passphrase)
        found += _load_certificates(certificates)
        if private is None and not found:
            raise BundleError("neither a key nor a certificate was given")
        if private is not None:
            public_key = private.public_key().public_bytes(*_SPKI)
        else:
            public_key = _leaf_of(found).public_key().public_bytes(*_SPKI)
        chain = _ordered(found, public_key)
        pkcs8 = None
        if private is not None:
            encoding, form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8
            pkcs8 = private.private_bytes(encoding, form, serialization.NoEncryption())
        return cls(public_key, tuple(c.public_bytes(serialization.Encoding.DER) for c in chain), pkcs8)


def _load_key(data: bytes, passphrase: bytes | None) -> tuple[Any, list[x509.Certificate]]:
    try:
        if b"-----BEGIN" in data:
            return serialization.load_pem_private_key(data, passphrase), _load_certificates(data, required=False)
        try:
            return serialization.load_der_private_key(data, passphrase), []
        except ValueError:
            key, leaf, more = pkcs12.load_key_and_certificates(data, passphrase)
            if key is None:
                raise BundleError("the PKCS #12 file holds no private key") from None
            return key, [c for c in (leaf, *more) if c is not None]
    except TypeError:
        raise BundleError("the key is encrypted (give --passphrase-file), or a passphrase was given for one that is not") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError("the key file is not a private key in PEM, DER or PKCS #12, or its passphrase is wrong") from None


def _load_certificates(data: bytes, required: bool = True) -> list[x509.Certificate]:
    if not data:
        return []
    found: list[x509.Certificate] = []
    try:
        if b"-----BEGIN CERTIFICATE" in data:
            found = x509.load_pem_x509_certificates(data)
        elif b"-----BEGIN" not in data:
            found = [x509.load_der_x509_certificate(data)]
        for one in found:
            one.public_key()  # it is parsed when it is asked for
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise BundleError("the certificate file holds something that is not an X.509 certificate") from None
    if required and not found:
        raise BundleError("the certificate file holds no certificate")
    return found


def _leaf_of(found: list[x509.Certificate]) -> x509.Certificate:
    """The certificate that issued none of the others."""
    issuers = {c.issuer for c in found if c.issuer != c.subject}
    leaves = [c for c in found if c.subject not in issuers]
    return leaves[0] if leaves else found[0]


def _ordered(found: list[x509.Certificate], public_key: bytes) -> list[x509.Certificate]:
    """Leaf first, each followed by its issuer; a root at the end is left out, for clients have their own."""
    if not found:
        return []
    leaves = [c for c in found if c.public_key().public_bytes(*_SPKI) == public_key]
    if not leaves:
        raise BundleError("no certificate is of this private key")
    leaf = max(leaves, key=lambda c: c.not_valid_after_utc)
    if leaf.not_valid_after_utc.timestamp() <= time.time():
        raise BundleError(f"the certificate expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    chain, rest = [leaf], [c for c in found if c not in leaves]
    while rest and chain[-1].issuer != chain[-1].subject:
        issuer = next((c for c in rest if _issued(chain[-1], c)), None)
        if issuer is None:
            raise BundleError(
                f"the issuer of {chain[-1].subject.rfc4514_string()!r} is not among the certificates given, others are"
            )
        chain.append(issuer)
        rest.remove(issuer)
    if len(chain) > 1 and chain[-1].issuer == chain[-1].subject:
        chain.pop()
    return chain


def _issued(subject: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        subject.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
