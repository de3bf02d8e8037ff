"""Chains of certificates as they come from an authority: put in order, and held to what was ordered."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.interface import Later, Order

MAX_CHAIN = 10  #: certificates
MAX_PEM = 256 * 1024  #: characters


def of_pem(text: str) -> tuple[bytes, ...]:
    """Returns the certificates in DER.  Raises Later: an authority's answer that cannot be used may be mended there."""
    if len(text) > MAX_PEM:
        raise Later(f"the authority's chain has more than {MAX_PEM} characters")
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except (ValueError, x509.InvalidVersion):
        raise Later("the authority's chain cannot be read: certificates in PEM are expected") from None
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)


def checked(chain: Sequence[bytes], order: Order) -> tuple[bytes, ...]:
    """Returns the chain of an order: the leaf first, each certified by the next, without the root.  Raises Later."""
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise Later(f"the authority gave {len(chain)} certificates, a chain has 1 to {MAX_CHAIN}")
    try:
        found = [x509.load_der_x509_certificate(der) for der in chain]
        wanted = x509.load_der_x509_csr(order.csr).public_key()
        leaves = [certificate for certificate in found if certificate.public_key() == wanted]
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise Later("the authority's chain has a certificate that cannot be read") from None
    if not leaves:
        raise Later("the authority gave no certificate of the key that was ordered")
    _check_names(leaves[0], order)
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in _ordered(leaves[0], found))


def _check_names(leaf: x509.Certificate, order: Order) -> None:
    try:
        told = set(names.told_by(leaf))
    except ValueError:
        told = set()
    if missing := set(order.names) - told:
        raise Later(f"the authority's certificate is not for {min(missing)}, which was ordered")
    if more := told - set(order.names):
        raise Later(f"the authority's certificate is for {min(more)} too, which was not ordered")


def _ordered(leaf: x509.Certificate, found: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """From the leaf upwards, as far as there are issuers; what does not belong there is left out."""
    chain = [leaf]
    while (issuer := _issuer_of(chain[-1], found)) is not None and issuer not in chain:
        if issuer.issuer == issuer.subject:
            break
        chain.append(issuer)
    return chain


def _issuer_of(certificate: x509.Certificate, found: Sequence[x509.Certificate]) -> x509.Certificate | None:
    for candidate in found:
        try:
            certificate.verify_directly_issued_by(candidate)
            return candidate
        except (ValueError, TypeError, InvalidSignature):
            continue
    return None
