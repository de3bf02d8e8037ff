"""A host's authority for its TPMs: certificates as a TPM's maker gives them, which OpenSSL and a real TPM take."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.tpm_ca import Certificates, TpmCa
from support.certificates import spki
from support.tpm_guest import Machine, started

HOST, MODULE, LONGEST = HostIdentity(bytes(range(32))), bytes(range(16)), "m" * 64
RSA, P256 = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())
MOST = 1600  #: bytes of a certificate
GOLDEN = (
    0x7C50B7CE1C006F01EC257533414246896FEA0D3C595694C186C2F877B509FEB7,
    0x1255DCDBE46B8426923CA7CBD2A2BB585DE589F29CFFA19C2692E08CD4344212,
)  #: of HOST's authority: x, y
KINDS = ("rsa", "p256", "platform")

#: Extensions that swtpm_cert 0.7.1 (Debian 12) gives endorsement certificates and one of a platform, but for its authority's key
#: (which is another) and its names: OID, whether it is critical, and its value.
_BASIC, _EKU, _USAGE, _SAN = "2.5.29.19", "2.5.29.37", "2.5.29.15", "2.5.29.17"
_ENDORSEMENT = {
    _EKU: (False, "300706056781050801"),
    _BASIC: (True, "3000"),
    "2.5.29.9": (False, "3019301706056781050210310e300c0c03322e30020100020200a4"),
}
SWTPM = {
    "rsa": _ENDORSEMENT | {_USAGE: (True, "03020520")},
    "p256": _ENDORSEMENT | {_USAGE: (True, "03020308")},
    "platform": {_EKU: (False, "300706056781050802"), _BASIC: (True, "3000"), _USAGE: (True, "03020308")},
}
#: And its subjectAltName, with what it was told.
SWTPM_NAMES = {
    "endorsement": (
        ("id:00001014", "swtpm", "id:20191023"),
        "3046a444304231163014060567810502010c0b69643a30303030313031343110300e060567810502020c05737774706d"
        "31163014060567810502030c0b69643a3230313931303233",
    ),
    "platform": (
        ("QEMU", "q35", "2.1"),
        "3038a43630343110300e06066781050501010c0451454d55310f300d06066781050501040c03713335310f300d06066781050501050c03322e31",
    ),
}


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from started()


def issued(name: str = "web-1", host: HostIdentity = HOST, module_id: bytes = MODULE) -> Certificates:
    return TpmCa(host).issue(name, module_id, spki(RSA), spki(P256))


def certificate(kind: str, **of: Any) -> x509.Certificate:
    return x509.load_der_x509_certificate(getattr(issued(**of), kind))


def names(found: x509.Certificate) -> list[x509.Name]:
    san = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.critical
    return san.value.get_values_for_type(x509.DirectoryName)


# ---- as others make and read them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_extensions_are_as_swtpm_has_them(kind: str) -> None:
    found = {e.oid.dotted_string: (e.critical, e.value.public_bytes().hex()) for e in certificate(kind).extensions}
    assert found.pop(_SAN)[0]
    assert found.pop(ExtensionOID.AUTHORITY_KEY_IDENTIFIER.dotted_string)[0] is False
    assert found == SWTPM[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_written_as_swtpm_writes_them(kind: str) -> None:
    """The first of them: the same attributes in the same order, each in a set of its own, in UTF-8."""
    ours, (values, theirs) = names(certificate(kind))[0], SWTPM_NAMES["platform" if kind == "platform" else "endorsement"]
    with_theirs = x509.Name([x509.NameAttribute(found.oid, value) for found, value in zip(ours, values, strict=True)])
    assert x509.SubjectAlternativeName([x509.DirectoryName(with_theirs)]).public_bytes().hex() == theirs


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_openssl(kind: str, tmp_path: Path) -> None:
    ca = x509.load_der_x509_certificate(TpmCa(HOST).certificate)
    other = x509.load_der_x509_certificate(TpmCa(HostIdentity(b"o" * 32)).certificate)
    for name, one in (("ca", ca), ("other", other), ("one", certificate(kind))):
        (tmp_path / name).write_bytes(one.public_bytes(Encoding.PEM))

    def verified(by: str) -> subprocess.CompletedProcess[str]:
        words = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / by, tmp_path / "one"]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert verified("ca").stdout.endswith("one: OK\n"), verified("ca")
    assert "unable to get local issuer certificate" in verified("other").stderr
    words = ["openssl", "x509", "-in", tmp_path / "one", "-noout", "-text"]
    lines = [line.strip() for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()]
    assert "Subject:" in lines
    assert f"Issuer: CN = hsmvisor TPM CA, serialNumber = {HOST.host_id.hex()}" in lines
    assert "Not After : Dec 31 23:59:59 9999 GMT" in lines

    def extension(name: str) -> str:
        return lines[lines.index(name) + 1]

    usage, purpose = {
        "rsa": ("Key Encipherment", "2.23.133.8.1"),
        "p256": ("Key Agreement", "2.23.133.8.1"),
        "platform": ("Key Agreement", "2.23.133.8.2"),
    }[kind]
    assert extension("X509v3 Key Usage: critical") == usage
    assert extension("X509v3 Extended Key Usage:") == purpose
    assert extension("X509v3 Basic Constraints: critical") == "CA:FALSE"
    attributes = "2.23.133.2.1=id:48534D56/2.23.133.2.2=hsmvisor TPM 2.0/2.23.133.2.3=id:00010000"
    if kind == "platform":
        attributes = "2.23.133.5.1.1=hsmvisor/2.23.133.5.1.4=module web-1/2.23.133.5.1.5=1"
    said = f"DirName:/{attributes}, DirName:/serialNumber={MODULE.hex()}"
    assert extension("X509v3 Subject Alternative Name: critical").replace("DirName: /", "DirName:/") == said


def test_a_real_tpm_takes_them(machine: Machine) -> None:
    keys = machine.managed.endorsement_keys()
    made = TpmCa(HOST).issue(LONGEST, MODULE, *keys)
    assert machine.managed.certificates() == ()
    machine.managed.certify(made.rsa, made.p256, made.platform)
    assert machine.managed.certificates() == (made.rsa, made.p256, made.platform)
    assert [machine.guest.nv(index) for index in (0x01C00002, 0x01C0000A)] == [made.rsa, made.p256]


# ---- whose they are ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_names_its_module_and_its_host(kind: str) -> None:
    found = certificate(kind)
    assert names(found)[1] == x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, MODULE.hex())])
    assert len(names(found)) == 2
    assert found.issuer.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value == HOST.host_id.hex()
    assert found.public_key() == (RSA if kind == "rsa" else P256).public_key()


def test_the_authority() -> None:
    ca = x509.load_der_x509_certificate(TpmCa(HOST).certificate)
    ca.verify_directly_issued_by(ca)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints) == x509.Extension(
        ExtensionOID.BASIC_CONSTRAINTS, True, x509.BasicConstraints(True, 0)
    )
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and usage.crl_sign and not usage.digital_signature
    key = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    other = x509.load_der_x509_certificate(TpmCa(HostIdentity(b"o" * 32)).certificate)
    for kind in KINDS:
        found = certificate(kind)
        found.verify_directly_issued_by(ca)
        assert found.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == key
        with pytest.raises(ValueError, match="Issuer certificate subject does not match"):
            found.verify_directly_issued_by(other)
    assert ExtendedKeyUsageOID.SERVER_AUTH not in _purposes(certificate("p256")), "no key of a server"


def _purposes(found: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_the_key_is_made_of_the_hosts() -> None:
    """Certificates in TPMs outlive a release: this is the key of HOST for ever."""
    public = x509.load_der_x509_certificate(TpmCa(HOST).certificate).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert (public.public_numbers().x, public.public_numbers().y) == GOLDEN


def test_the_same_each_time() -> None:
    assert issued() == issued()
    assert TpmCa(HOST).certificate == TpmCa(HostIdentity(bytes(range(32)))).certificate
    serials = [certificate(kind).serial_number for kind in KINDS]
    serials += [certificate(kind, module_id=b"n" * 16).serial_number for kind in KINDS]
    assert len(set(serials)) == 6
    assert all(0 < serial < 1 << 159 for serial in serials)
    assert issued(host=HostIdentity(b"o" * 32)) != issued()


def test_they_are_small() -> None:
    made = TpmCa(HOST).issue(LONGEST, b"\xff" * 16, spki(RSA), spki(P256))
    assert max(map(len, (made.rsa, made.p256, made.platform, TpmCa(HOST).certificate))) < 900 < MOST


# ---- keys that are none of a TPM --------------------------------------------------------------------------------------------

_P384, _ED25519 = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
WRONG = {
    "swapped": (spki(P256), spki(RSA)),
    "RSA 1024": (spki(rsa.generate_private_key(65537, 1024)), spki(P256)),
    "RSA 3072": (spki(rsa.generate_private_key(65537, 3072)), spki(P256)),
    "P-384": (spki(RSA), spki(_P384)),
    "Ed25519": (spki(RSA), spki(_ED25519)),
    "nothing": (spki(RSA), b""),
    "no DER": (b"\xff" * 300, spki(P256)),
    "more": (spki(RSA), spki(P256) + b"\0"),
    "an algorithm that nobody has": (spki(RSA), bytes.fromhex("300c300706052a0304050603 0100")),
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_are_none_of_a_tpm(name: str) -> None:
    with pytest.raises(ValueError):
        TpmCa(HOST).issue("web-1", MODULE, *WRONG[name])
