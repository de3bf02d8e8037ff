"""A key with a chain of a test CA, for trying out: root, intermediate, leaf."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hsmvisor.authority import BundleError
from hsmvisor.files import write_private

KINDS: dict[str, Callable[[], Any]] = {
    "ec-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ec-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ec-p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa-3072": lambda: rsa.generate_private_key(65537, 3072),
    "rsa-4096": lambda: rsa.generate_private_key(65537, 4096),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
    "ml-dsa-44": mldsa.MLDSA44PrivateKey.generate,
    "ml-dsa-65": mldsa.MLDSA65PrivateKey.generate,
    "ml-dsa-87": mldsa.MLDSA87PrivateKey.generate,
}


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _issue(subject: str, public: Any, issuer: str, signer: Any, days: int, authority: bool) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if not authority:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(signer, hashes.SHA256())


def make_chain(directory: str, name: str, kind: str, days: int) -> list[str]:
    """Writes key.pem, chain.pem (leaf, intermediate) and ca.pem; a CA that is there already issues again.  Returns their paths."""
    if kind not in KINDS:
        raise BundleError(f"unknown type {kind!r}: {', '.join(KINDS)}")
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    root_file, root_key_file = place / "ca.pem", place / "ca-key.pem"
    if root_file.exists():
        root = serialization.load_pem_private_key(root_key_file.read_bytes(), None)
    else:
        root = ec.generate_private_key(ec.SECP256R1())
        certificate = _issue("hsmvisor test CA", root.public_key(), "hsmvisor test CA", root, 3650, True)
        root_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_private(root_key_file, _pem(root))
    middle, key = ec.generate_private_key(ec.SECP256R1()), KINDS[kind]()
    chain = [
        _issue(name, key.public_key(), "hsmvisor test intermediate", middle, days, False),
        _issue("hsmvisor test intermediate", middle.public_key(), "hsmvisor test CA", root, 365, True),
    ]
    write_private(place / "key.pem", _pem(key))
    (place / "chain.pem").write_bytes(b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain))
    return [str(place / file) for file in ("key.pem", "chain.pem", "ca.pem")]


def _pem(key: Any) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
