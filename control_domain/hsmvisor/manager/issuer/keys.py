"""Private keys of the kinds that modules share, and certificate requests that they sign."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from hsmvisor.manager.ca import names as certificate_names
from hsmvisor.manager.ca.names import Name

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192  #: of imported keys

_Hash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512
_CURVES: dict[str, tuple[ec.EllipticCurve, _Hash]] = {
    "P-256": (ec.SECP256R1(), hashes.SHA256()),
    "P-384": (ec.SECP384R1(), hashes.SHA384()),
    "P-521": (ec.SECP521R1(), hashes.SHA512()),
}
_BY_CURVE = {curve.name: name for name, (curve, _) in _CURVES.items()}
_RSA = {"RSA-2048": 2048, "RSA-3072": 3072, "RSA-4096": 4096}
KEY_TYPES = (*_CURVES, *_RSA, "Ed25519")  #: that are made here; imported ones may be others


class BadKey(Exception):
    """There is no key, or it is not what it should be; the message is for people, and holds no secret."""


def make(key_type: str) -> PrivateKey:
    """Raises BadKey."""
    if key_type in _CURVES:
        return ec.generate_private_key(_CURVES[key_type][0])
    if key_type in _RSA:
        return rsa.generate_private_key(65537, _RSA[key_type])
    if key_type == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    raise BadKey(f"keys of type {key_type!r} are not made; there are {', '.join(KEY_TYPES)}")


def load(pkcs8: bytes) -> PrivateKey:
    """From PKCS #8 in DER without a password.  Raises BadKey."""
    try:
        key = load_der_private_key(pkcs8, None)
    except Exception:  # it comes from outside; what a library says of it may show it
        raise BadKey("the key is not a private key (PKCS #8 in DER) that can be read") from None
    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in _BY_CURVE:
            return key
        case ec.EllipticCurvePrivateKey():
            raise BadKey(f"the key is on the curve {key.curve.name}; taken are {', '.join(_CURVES)}")
        case rsa.RSAPrivateKey() if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS and _exponent(key) >= 65537:
            return key
        case rsa.RSAPrivateKey():
            limit = f"{MIN_RSA_BITS} to {MAX_RSA_BITS} bits and an exponent of 65537 or more"
            raise BadKey(f"an RSA key of {key.key_size} bits with the exponent {_exponent(key)}; taken are {limit}")
        case ed25519.Ed25519PrivateKey() | ed448.Ed448PrivateKey():
            return key
    raise BadKey("the key is of a type that is not taken: RSA, EC (P-256, P-384, P-521), Ed25519 and Ed448 are")


def _exponent(key: rsa.RSAPrivateKey) -> int:
    return key.public_key().public_numbers().e


def pkcs8(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def spki(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def request(key: PrivateKey, names: Sequence[Name]) -> bytes:
    """Returns a certificate request (PKCS #10) in DER.  Raises BadKey: the private key is not the public key's."""
    made = certificate_names.request(names).sign(key, _hash(key))
    if not made.is_signature_valid:
        raise BadKey("the private key is not the one of its own public key")
    return made.public_bytes(Encoding.DER)


def _hash(key: PrivateKey) -> _Hash | None:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return _CURVES[_BY_CURVE[key.curve.name]][1]
    return hashes.SHA256() if isinstance(key, rsa.RSAPrivateKey) else None
