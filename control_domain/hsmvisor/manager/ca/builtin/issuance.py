"""One certificate, in two steps that cannot be taken in another order: `prepare` builds and lints it under a key that nobody keeps,
and `issue` redeems what that gave, once, with the authority's key.  What is signed is what was linted, byte for byte.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID
from hsmvisor.manager.ca import names, requests
from hsmvisor.manager.ca.builtin import lint
from hsmvisor.manager.ca.builtin.profiles import Profile
from hsmvisor.manager.ca.interface import Order, Refused

BACKDATED = 300  #: seconds: clocks differ


@dataclass(frozen=True)
class Issuer:
    """The authority that signs, and where its answers are found."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    crl_url: str = ""
    ocsp_url: str = ""

    @property
    def hash(self) -> hashes.SHA256 | hashes.SHA384:
        return hashes.SHA384() if self.key.key_size > 256 else hashes.SHA256()


@dataclass
class Prepared:
    """A certificate that was linted; `issue` takes it once."""

    serial: int
    not_before: int
    not_after: int
    tbs: bytes
    _builder: x509.CertificateBuilder | None = field(repr=False)


def prepare(
    order: Order, profile: Profile, issuer: Issuer, now: int, serial: Callable[[], int] = x509.random_serial_number
) -> Prepared:
    """`now`: seconds since 1970.  Raises Refused: the order or its request is not what the profile certifies."""
    checked = requests.check(order.csr, order.names)
    _check(order, profile, checked)
    not_before = now - BACKDATED
    not_after = min(now + (order.lifetime or profile.lifetime), int(issuer.certificate.not_valid_after_utc.timestamp()))
    number = serial()
    builder = _extended(_builder(order, issuer, number, not_before, not_after, checked), order, profile, issuer, checked)
    throwaway = ec.generate_private_key(issuer.key.curve)
    linted = builder.sign(throwaway, issuer.hash)
    if wrong := lint.findings(linted.public_bytes(Encoding.DER)):
        raise Refused(f"the certificate would not be well made: {'; '.join(wrong)}")
    return Prepared(number, not_before, not_after, linted.tbs_certificate_bytes, builder)


def issue(prepared: Prepared, issuer: Issuer) -> x509.Certificate:
    """Raises ValueError for one that was issued already."""
    builder, prepared._builder = prepared._builder, None
    if builder is None:
        raise ValueError("a prepared certificate is issued once")
    made = builder.sign(issuer.key, issuer.hash)
    if made.tbs_certificate_bytes != prepared.tbs:
        raise ValueError("what would be signed is not what was linted")
    return made


def _check(order: Order, profile: Profile, checked: requests.Checked) -> None:
    if checked.key_type not in profile.key_types:
        raise Refused(f"profile {profile.name} certifies {', '.join(profile.key_types)}, not {checked.key_type}")
    for name in order.names:
        if name.kind not in profile.kinds:
            raise Refused(f"profile {profile.name} has no names of kind {name.kind}")
    if order.lifetime and not profile.shortest <= order.lifetime <= profile.longest:
        raise Refused(
            f"profile {profile.name}: a lifetime of {profile.shortest} to {profile.longest} seconds, not {order.lifetime}"
        )


def _time(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _builder(
    order: Order, issuer: Issuer, serial: int, not_before: int, not_after: int, checked: requests.Checked
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(names.subject(order.names))
        .issuer_name(issuer.certificate.subject)
        .public_key(checked.public_key)
        .serial_number(serial)
        .not_valid_before(_time(not_before))
        .not_valid_after(_time(not_after))
    )


def _extended(
    builder: x509.CertificateBuilder, order: Order, profile: Profile, issuer: Issuer, checked: requests.Checked
) -> x509.CertificateBuilder:
    own = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    encipherment = profile.encipherment and isinstance(checked.public_key, rsa.RSAPublicKey)
    rows: list[tuple[Any, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(encipherment=encipherment), True),
        (x509.ExtendedKeyUsage(profile.uses), False),
        (x509.SubjectAlternativeName(map(names.general, order.names)), not names.subject(order.names)),  # RFC 5280, 4.2.1.6
        (x509.SubjectKeyIdentifier.from_public_key(checked.public_key), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False),
    ]
    if issuer.ocsp_url:
        access = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(issuer.ocsp_url))
        rows.append((x509.AuthorityInformationAccess([access]), False))
    if issuer.crl_url:
        point = x509.DistributionPoint([x509.UniformResourceIdentifier(issuer.crl_url)], None, None, None)
        rows.append((x509.CRLDistributionPoints([point]), False))
    for value, critical in rows:
        builder = builder.add_extension(value, critical)
    return builder


def _usage(encipherment: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
