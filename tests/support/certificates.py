"""A small certificate authority for tests: root, intermediate, leaves; and keys in the encodings that a module is given."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa, x448, x25519
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

MlDsaPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
AgreementKey = x25519.X25519PrivateKey | x448.X448PrivateKey  #: that signs nothing
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | MlDsaPrivateKey
AnyKey = PrivateKey | AgreementKey
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


def new_key(kind: str) -> PrivateKey:
    """`kind` is p256, p384, p521, rsa2048, rsa3072, ed25519, ed448, mldsa44, mldsa65 or mldsa87."""
    curves = {"p256": ec.SECP256R1, "p384": ec.SECP384R1, "p521": ec.SECP521R1}
    if kind in curves:
        return ec.generate_private_key(curves[kind]())
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    if kind.startswith("mldsa"):
        return {"44": mldsa.MLDSA44PrivateKey, "65": mldsa.MLDSA65PrivateKey, "87": mldsa.MLDSA87PrivateKey}[kind[5:]].generate()
    return {"ed25519": ed25519.Ed25519PrivateKey, "ed448": ed448.Ed448PrivateKey}[kind].generate()


def pkcs8(key: AnyKey) -> bytes:
    return key.private_bytes(DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def spki(key: AnyKey) -> bytes:
    return key.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: AnyKey) -> bytes:
    """CKA_ID of a generation: SHA-1 of the public key, as in a subject key identifier."""
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


@dataclass
class Authority:
    """Issues leaves from an intermediate; `chain` is what a server sends, `root_pem` what its client believes."""

    root_key: PrivateKey = field(default_factory=lambda: new_key("p256"))
    key: PrivateKey = field(default_factory=lambda: new_key("p256"))

    def __post_init__(self) -> None:
        self.root = self._certificate("hsmvisor test root", self.root_key.public_key(), None, self.root_key, ca=True)
        self.intermediate = self._certificate(
            "hsmvisor test intermediate", self.key.public_key(), self.root, self.root_key, ca=True
        )

    @property
    def root_pem(self) -> bytes:
        return self.root.public_bytes(PEM)

    def issue(self, key: AnyKey, name: str = "localhost", lifetime: dt.timedelta = dt.timedelta(days=30)) -> x509.Certificate:
        return self.issue_for(key.public_key(), name, lifetime)

    def issue_for(
        self, public: CertificatePublicKeyTypes, name: str = "localhost", lifetime: dt.timedelta = dt.timedelta(days=30)
    ) -> x509.Certificate:
        """For a key that nobody here has."""
        return self._certificate(name, public, self.intermediate, self.key, ca=False, lifetime=lifetime)

    def chain(self, key: AnyKey, name: str = "localhost") -> tuple[x509.Certificate, ...]:
        return (self.issue(key, name), self.intermediate)

    def _certificate(
        self,
        name: str,
        public: CertificatePublicKeyTypes,
        issuer: x509.Certificate | None,
        signer: PrivateKey,
        *,
        ca: bool,
        lifetime: dt.timedelta = dt.timedelta(days=365),
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(issuer.subject if issuer else _name(name))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            names = x509.SubjectAlternativeName([x509.DNSName(name)])
            purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
            builder = builder.add_extension(names, critical=False).add_extension(purposes, critical=False)
        edwards = isinstance(signer, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
        return builder.sign(signer, None if edwards else hashes.SHA256())


def chain_der(chain: tuple[x509.Certificate, ...]) -> tuple[bytes, ...]:
    return tuple(c.public_bytes(DER) for c in chain)


def chain_pem(chain: tuple[x509.Certificate, ...]) -> bytes:
    return b"".join(c.public_bytes(PEM) for c in chain)


def load_public(pem: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey:
    return cast("ec.EllipticCurvePublicKey", serialization.load_pem_public_key(pem))
