"""Certificate requests as modules give them out: read, and held against what was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor.authority.store import AuthorityError
from hsmvisor_rpc.sealed import names as certificate_names
from hsmvisor_rpc.sealed.names import BadName

_FIXED = {
    ed25519.Ed25519PublicKey: "Ed25519",
    ed448.Ed448PublicKey: "Ed448",
    mldsa.MLDSA44PublicKey: "ML-DSA-44",
    mldsa.MLDSA65PublicKey: "ML-DSA-65",
    mldsa.MLDSA87PublicKey: "ML-DSA-87",
}
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


@dataclass(frozen=True)
class CertificateRequest:
    """One whose signature was verified: whoever made it has the key."""

    der: bytes
    public_key: bytes  #: SubjectPublicKeyInfo, DER
    key_type: str  #: one of sealed.commands.KEY_TYPES, or empty
    names: tuple[str, ...]  #: dns:..., ip:..., uri:..., email:...

    @classmethod
    def read(cls, der: bytes) -> CertificateRequest:
        """Raises AuthorityError."""
        try:
            request = x509.load_der_x509_csr(der)
            key, names = request.public_key(), tuple(map(str, certificate_names.told_by(request)))
            is_signed = request.is_signature_valid
        except (ValueError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion):
            raise AuthorityError("the module gave no certificate request that can be read") from None
        if not is_signed:
            raise AuthorityError("the certificate request is not signed by its own key")
        return cls(der, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), _key_type(key), names)

    @property
    def pem(self) -> bytes:
        return x509.load_der_x509_csr(self.der).public_bytes(Encoding.PEM)

    def demand(self, public_key: bytes, key_type: str, names: tuple[str, ...]) -> None:
        """Raises AuthorityError unless it is what was asked for: the host could have put another in its place."""
        if (self.public_key, self.key_type, self.names) != (public_key, key_type, names):
            raise AuthorityError(
                "the certificate request that came is not the one that was asked for: have no certificate made of it"
            )


def spelled(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names as commands have them.  Raises AuthorityError."""
    try:
        return tuple(dict.fromkeys(str(certificate_names.parse(name)) for name in names))
    except BadName as error:
        raise AuthorityError(str(error)) from None


def _key_type(key: object) -> str:
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _CURVES.get(key.curve.name, "")
    return next((name for kind, name in _FIXED.items() if isinstance(key, kind)), "")
