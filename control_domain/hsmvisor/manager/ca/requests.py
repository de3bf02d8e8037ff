"""Certificate requests (PKCS #10, RFC 2986) from modules: whose key it is, and that whoever asks has it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.interface import Refused
from hsmvisor.manager.ca.names import BadName, Name

MAX_CSR = 64 * 1024  #: bytes
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192


@dataclass(frozen=True)
class Checked:
    """A request whose signature was verified."""

    public_key: CertificatePublicKeyTypes
    key_type: str  #: "P-256", "RSA-2048", "Ed25519", ...
    names: tuple[Name, ...]  #: those that it asks for; none: it leaves that to the order


_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


def key_type(key: CertificatePublicKeyTypes) -> str:
    """Raises Refused for a key that no certificate is made of."""
    match key:
        case rsa.RSAPublicKey() if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS and key.public_numbers().e >= 65537:
            return f"RSA-{key.key_size}"
        case rsa.RSAPublicKey():
            raise Refused(f"an RSA key has {MIN_RSA_BITS} to {MAX_RSA_BITS} bits and an exponent of 65537 or more")
        case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
            return _CURVES[key.curve.name]
        case ed25519.Ed25519PublicKey():
            return "Ed25519"
        case ed448.Ed448PublicKey():
            return "Ed448"
    raise Refused("a key of this type is not certified")


def check(csr: bytes, allowed: tuple[Name, ...]) -> Checked:
    """Raises Refused: it is no request, its signature is wrong, it asks for a name that is not allowed."""
    if len(csr) > MAX_CSR:
        raise Refused(f"a certificate request has at most {MAX_CSR} bytes")
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        asked = names.told_by(request)
    except BadName as error:
        raise Refused(f"the request asks for a name that cannot be: {error}") from None
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise Refused("not a certificate request (PKCS #10 in DER) that can be read") from None
    kind = key_type(key)
    if not _is_signed(request):
        raise Refused("the request's signature is not its key's: nobody has proved to have the key")
    if more := set(asked) - set(allowed):
        raise Refused(f"the request asks for {min(more)}, which was not ordered")
    return Checked(key, kind, asked)


def _is_signed(request: x509.CertificateSigningRequest) -> bool:
    try:
        return request.is_signature_valid
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False


def spki(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
