"""A TPM's certificates beside its attestation: those that its host's authority issued are taken, and each other one is refused."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import fields, replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor_rpc.sealed.attestation import TpmIdentity
from hsmvisor_rpc.sealed.endorsement import MAX_TPM_CERTIFICATES, TpmCertificates, verify_certificates
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from support.soft_tpm import SoftTpm

KEY, OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"h" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
HOST, OTHER = HostIdentity(b"h" * 32), HostIdentity(b"o" * 32)
TPM, OTHER_TPM = SoftTpm(), SoftTpm()
MODULE = b"m" * 16
IDENTITY = TpmIdentity(HOST.host_id, MODULE, "web-1", b"", TPM.endorsement_keys, TpmCa(HOST).public)
GOOD = TPM.certificates(KEY, MODULE, "web-1")
OF_ANOTHER_TPM = OTHER_TPM.certificates(KEY, MODULE, "web-1")
OF_ANOTHER_MODULE = TPM.certificates(KEY, b"n" * 16, "web-1")
OF_ANOTHER_HOST = TPM.certificates(OTHER_KEY, MODULE, "web-1")
RSA, P256, PLATFORM = "the RSA endorsement certificate", "the P-256 endorsement certificate", "the platform's certificate"
KINDS = {"rsa": RSA, "p256": P256, "platform": PLATFORM}


def again(der: bytes, key: ec.EllipticCurvePrivateKey | None = None, **changes: object) -> bytes:
    """The same certificate, signed anew: with another `subject` or `issuer`, without an extension, with one of `padding` bytes."""
    found = x509.load_der_x509_certificate(der)
    builder = x509.CertificateBuilder(
        changes.get("issuer", found.issuer),  # type: ignore[arg-type]
        changes.get("subject", found.subject),  # type: ignore[arg-type]
        found.public_key(),  # type: ignore[arg-type]
        found.serial_number,
        dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC),
    )
    for extension in found.extensions:
        if not isinstance(extension.value, changes.get("without", ())):  # type: ignore[arg-type]
            builder = builder.add_extension(extension.value, extension.critical)
    if isinstance(padding := changes.get("padding"), int):
        builder = builder.add_extension(x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), os.urandom(padding)), False)
    return builder.sign(key or HOST.tpm_ca_key(), SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)


def name(*serial_numbers: str) -> x509.Name:
    common = x509.NameAttribute(NameOID.COMMON_NAME, "hsmvisor TPM CA")
    return x509.Name([common, *(x509.NameAttribute(NameOID.SERIAL_NUMBER, one) for one in serial_numbers)])


def of_ca(subject: x509.Name) -> TpmCertificates:
    """All of them by an authority of this name, which has the right key."""
    made = {kind: again(getattr(GOOD, kind), issuer=subject) for kind in KINDS}
    return TpmCertificates(**made, ca=again(GOOD.ca, issuer=subject, subject=subject))


def refused(data: bytes, identity: TpmIdentity = IDENTITY) -> Refusal:
    with pytest.raises(Refusal) as caught:
        verify_certificates(data, identity)
    return caught.value


def test_those_of_the_host_s_authority_are_taken() -> None:
    assert verify_certificates(GOOD.encode(), IDENTITY) == GOOD
    assert TpmCertificates(again(GOOD.rsa), GOOD.p256, GOOD.platform, GOOD.ca) == GOOD, "what is made anew here is what it was"
    assert verify_certificates(of_ca(name(HOST.host_id.hex())).encode(), IDENTITY)


def other(kind: str, made: TpmCertificates) -> TpmCertificates:
    return replace(GOOD, **{kind: getattr(made, kind)})


WRONG = {
    "nothing": (b"", Reason.MALFORMED, "not an hsmvisor record"),
    "another record": (IDENTITY.encode(), Reason.MALFORMED, "expected a record of type tpm-certificates"),
    "something behind them": (GOOD.encode() + b"x", Reason.MALFORMED, "1 bytes too many"),
    "another TPM's": (OF_ANOTHER_TPM.encode(), Reason.KEY_MISMATCH, f"{P256} is of another key"),
    "one of another TPM's": (other("platform", OF_ANOTHER_TPM).encode(), Reason.KEY_MISMATCH, f"{PLATFORM} is of another key"),
    "one for the other": (replace(GOOD, rsa=GOOD.p256, p256=GOOD.rsa).encode(), Reason.KEY_MISMATCH, f"{RSA} is of another key"),
    "the platform's as the TPM's": (replace(GOOD, p256=GOOD.platform).encode(), Reason.MALFORMED, f"{P256} is for another purpose"),
    "the TPM's as the platform's": (replace(GOOD, platform=GOOD.p256).encode(), Reason.MALFORMED, f"{PLATFORM} is for another"),
    "another module's": (OF_ANOTHER_MODULE.encode(), Reason.WRONG_MODULE, f"{RSA} names another module"),
    "another host's": (OF_ANOTHER_HOST.encode(), Reason.WRONG_HOST, "the host's CA for TPMs names another host"),
    "another host's authority": (other("ca", OF_ANOTHER_HOST).encode(), Reason.WRONG_HOST, "names another host"),
    "an authority of no host": (of_ca(name()).encode(), Reason.WRONG_HOST, "names another host"),
    "an authority of two hosts": (of_ca(name(HOST.host_id.hex(), "00")).encode(), Reason.WRONG_HOST, "names another host"),
    "an authority that another signed": (
        replace(GOOD, ca=again(GOOD.ca, OTHER.tpm_ca_key())).encode(),
        Reason.BAD_CHAIN,
        "the certificate of the host's CA for TPMs is not issued by the CA that came with it",
    ),
    "an authority that is none": (
        replace(GOOD, ca=again(GOOD.p256, subject=name(HOST.host_id.hex()))).encode(),
        Reason.BAD_CHAIN,
        "is not a CA's",
    ),
    "an authority that does not say": (
        replace(GOOD, ca=again(GOOD.ca, without=x509.BasicConstraints)).encode(),
        Reason.MALFORMED,
        "the host's CA for TPMs cannot be read",
    ),
}  # fmt: skip
WRONG |= {
    f"{kind} {what}": (replace(GOOD, **{kind: der}).encode(), reason, f"{said} {detail}")
    for kind, said in KINDS.items()
    for what, der, reason, detail in (
        ("of another host", getattr(OF_ANOTHER_HOST, kind), Reason.BAD_CHAIN, "is not issued by the CA"),
        ("signed by another", again(getattr(GOOD, kind), OTHER.tpm_ca_key()), Reason.BAD_CHAIN, "is not issued by the CA"),
        ("of another issuer", again(getattr(GOOD, kind), issuer=name("00")), Reason.BAD_CHAIN, "is not issued by the CA"),
        ("of another module", getattr(OF_ANOTHER_MODULE, kind), Reason.WRONG_MODULE, "names another module"),
        ("that names nothing", again(getattr(GOOD, kind), without=x509.SubjectAlternativeName), Reason.MALFORMED, "cannot be read"),
        ("of no purpose", again(getattr(GOOD, kind), without=x509.ExtendedKeyUsage), Reason.MALFORMED, "cannot be read"),
        ("that is none", b"certificate", Reason.MALFORMED, "cannot be read"),
        ("that is not there", b"", Reason.MALFORMED, "cannot be read"),
        ("with more", getattr(GOOD, kind) + b"\0", Reason.MALFORMED, "cannot be read"),
    )
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(what: str) -> None:
    data, reason, detail = WRONG[what]
    refusal = refused(data)
    assert refusal.reason is reason and detail in refusal.detail


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (replace(IDENTITY, endorsement_keys=OTHER_TPM.endorsement_keys), Reason.KEY_MISMATCH),
        (replace(IDENTITY, endorsement_keys=TPM.endorsement_keys[::-1]), Reason.KEY_MISMATCH),
        (replace(IDENTITY, endorsement_keys=TPM.endorsement_keys[:1]), Reason.MALFORMED),
        (replace(IDENTITY, endorsement_keys=()), Reason.MALFORMED),
        (replace(IDENTITY, module_id=b""), Reason.WRONG_MODULE),
        (replace(IDENTITY, host_id=OTHER.host_id), Reason.WRONG_HOST),
        (replace(IDENTITY, authority_key=TpmCa(OTHER).public), Reason.KEY_MISMATCH),
    ],
)
def test_the_signed_identity_says_which_they_have_to_be(identity: TpmIdentity, reason: Reason) -> None:
    assert refused(GOOD.encode(), identity).reason is reason


def test_they_are_taken_up_to_their_limit() -> None:
    padding, largest = 0, GOOD
    while room := MAX_TPM_CERTIFICATES - len(largest.encode()):  # a signature has a byte more or less each time
        padding += room
        largest = replace(GOOD, platform=again(GOOD.platform, padding=padding))
    assert verify_certificates(largest.encode(), IDENTITY) == largest
    refusal = refused(largest.encode() + b"\0")
    assert refusal.reason is Reason.TOO_LARGE
    assert refusal.detail == "a TPM's certificates have at most 16384 bytes, these have 16385"


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_byte_can_be_another_and_no_part_is_enough() -> None:
    data = GOOD.encode()
    signatures = [x509.load_der_x509_certificate(getattr(GOOD, field.name)).signature for field in fields(GOOD)]
    unused = {data.index(b"\0" + signature) for signature in signatures}  # how many bits of its BIT STRING are: it may end in a 0
    for place in {*range(len(data))} - unused:
        bent = bytearray(data)
        bent[place] ^= 1 << place % 8
        refused(bytes(bent))
    for end in range(0, len(data), 7):
        assert refused(data[:end]).reason is Reason.MALFORMED
    for field in fields(GOOD):
        der = getattr(GOOD, field.name)
        for end in range(0, len(der), 7):
            assert refused(replace(GOOD, **{field.name: der[:end]}).encode()).reason is Reason.MALFORMED
