"""Private keys in an owner's own PKCS #11 token, where they may leave it: read, or wrapped with a key of a moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import keywrap
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor import pkcs11_token
from hsmvisor.bundle import Bundle, BundleError
from hsmvisor.pkcs11_token import TokenFault
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11 import exceptions as failures

#: CKA_EC_PARAMS: object identifiers in DER (SEC 2, RFC 8410), and the name of PKCS #11 3.0.
_CURVES: dict[bytes, ec.EllipticCurve] = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
    bytes.fromhex("06052b81040023"): ec.SECP521R1(),
}
_ED25519 = (bytes.fromhex("06032b6570"), b"\x13\x0cedwards25519")
#: Makers differ in what they call RFC 5649's, and in what they mean by the second (PKCS #11 3.1, 6.13.11).
_WRAPPING = (Mechanism.AES_KEY_WRAP_KWP, Mechanism.AES_KEY_WRAP_PAD, Mechanism.AES_KEY_WRAP_PKCS7)
_BLOCK = 8  #: bytes that the wrapped are padded to


@dataclass(frozen=True)
class StoredKey:
    """Where a key is: by its label, its CKA_ID, or both."""

    library: Path
    token: str  #: the token's label
    pin: str = field(repr=False)
    label: str = ""
    id: bytes = b""

    def __str__(self) -> str:
        told = [repr(self.label)] if self.label else []
        return " ".join([*told, *([f"id {self.id.hex()}"] if self.id else [])])


def take_out(stored: StoredKey, certificates: bytes = b"") -> Bundle:
    """Returns the key with the certificates that the token has under its id, and `certificates` (PEM or DER) besides.

    Raises BundleError: there is no such key, or it may not leave the token.
    """
    try:
        with pkcs11_token.session(stored.library, stored.token, stored.pin) as session:
            key = _found(session, stored)
            pkcs8 = _taken(session, key, stored)
            beside = _certificates(session, bytes(key[Attribute.ID]))
    except TokenFault as fault:
        raise BundleError(str(fault)) from None
    return Bundle.make(pkcs8, _pem(certificates) + beside)


def _found(session: Any, stored: StoredKey) -> Any:
    wanted: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
    wanted |= {Attribute.LABEL: stored.label} if stored.label else {}
    wanted |= {Attribute.ID: stored.id} if stored.id else {}
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        raise BundleError(f"token {stored.token!r} has {len(found)} private keys {stored}: name one by its label, its id, or both")
    return found[0]


def _taken(session: Any, key: Any, stored: StoredKey) -> bytes:
    if not key[Attribute.EXTRACTABLE]:
        raise BundleError(
            f"the key {stored} may not leave token {stored.token!r}: it was made not to be extractable (CKA_EXTRACTABLE)"
        )
    if not key[Attribute.SENSITIVE]:
        return _read(key, stored)
    if _asked(key, Attribute.WRAP_WITH_TRUSTED):
        raise BundleError(f"the key {stored} leaves token {stored.token!r} wrapped by a key trusted there alone (CKA_TRUSTED)")
    return _wrapped(session, key, stored)


def _asked(key: Any, attribute: Attribute) -> Any:
    """None: the token does not know it."""
    try:
        return key[attribute]
    except failures.PKCS11Error:
        return None


def _wrapped(session: Any, key: Any, stored: StoredKey) -> bytes:
    secret = os.urandom(32)
    template = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE: secret,
        Attribute.TOKEN: False,
        Attribute.WRAP: True,
    }
    try:
        wrapping = session.create_object(template)
    except failures.PKCS11Error as error:
        raise BundleError(f"token {stored.token!r} takes no AES key to wrap {stored} with: {type(error).__name__}") from None
    failed = []
    for mechanism in _WRAPPING:
        try:
            return _unwrapped(bytes(wrapping.wrap_key(key, mechanism=mechanism)), secret, stored)
        except failures.PKCS11Error as error:
            failed.append(f"{mechanism.name}: {type(error).__name__}")
    raise BundleError(
        f"the key {stored} is extractable, but token {stored.token!r} does not wrap it with AES ({', '.join(failed)})"
    )


def _unwrapped(wrapped: bytes, secret: bytes, stored: StoredKey) -> bytes:
    for unwrap in (keywrap.aes_key_unwrap_with_padding, keywrap.aes_key_unwrap):  # RFC 5649, RFC 3394
        try:
            return _without_padding(unwrap(secret, wrapped))
        except (keywrap.InvalidUnwrap, ValueError):
            continue
    raise BundleError(f"token {stored.token!r} wrapped the key {stored} as neither RFC 5649 nor RFC 3394 says")


def _without_padding(told: bytes) -> bytes:
    """PKCS #8 as long as its own SEQUENCE says: makers pad to whole blocks, with zeros or as PKCS #7 does."""
    size = told[1:2] + b"\0"
    digits = size[0] & 0x7F if size[0] & 0x80 else 0
    length = int.from_bytes(told[2 : 2 + digits], "big") if digits else size[0]
    end = 2 + digits + length
    return told[:end] if told[:1] == b"\x30" and 0 <= len(told) - end <= _BLOCK else told


def _read(key: Any, stored: StoredKey) -> bytes:
    kind = key[Attribute.KEY_TYPE]
    readers: dict[Any, Callable[[Any], Any]] = {KeyType.RSA: _rsa, KeyType.EC: _ec, KeyType.EC_EDWARDS: _edwards}
    if kind not in readers:
        raise BundleError(f"the key {stored} is neither RSA nor EC nor Edwards")
    try:
        private = readers[kind](key)
    except ValueError:
        raise BundleError(f"what token {stored.token!r} tells of the key {stored} is no key") from None
    form = PrivateFormat.PKCS8
    told: bytes = private.private_bytes(Encoding.DER, form, NoEncryption())
    return told


def _number(key: Any, attribute: Attribute) -> int:
    return int.from_bytes(bytes(key[attribute]), "big")


def _rsa(key: Any) -> rsa.RSAPrivateKey:
    n, d = _number(key, Attribute.MODULUS), _number(key, Attribute.PRIVATE_EXPONENT)
    e = _number(key, Attribute.PUBLIC_EXPONENT)
    p, q = rsa.rsa_recover_prime_factors(n, e, d)
    numbers = rsa.RSAPrivateNumbers(
        p, q, d, rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q), rsa.RSAPublicNumbers(e, n)
    )
    return numbers.private_key()


def _ec(key: Any) -> ec.EllipticCurvePrivateKey:
    curve = _CURVES.get(bytes(key[Attribute.EC_PARAMS])) or _unknown()
    return ec.derive_private_key(_number(key, Attribute.VALUE), curve)


def _edwards(key: Any) -> ed25519.Ed25519PrivateKey:
    if bytes(key[Attribute.EC_PARAMS]) not in _ED25519:
        _unknown()
    return ed25519.Ed25519PrivateKey.from_private_bytes(_plain(bytes(key[Attribute.VALUE])))


def _plain(value: bytes) -> bytes:
    """Without the OCTET STRING around it that some tokens tell."""
    return value[2:] if len(value) == 34 and value[:2] == b"\x04\x20" else value


def _unknown() -> NoReturn:
    raise BundleError("the key is on a curve that is not taken: P-256, P-384, P-521 and Ed25519 are")


def _certificates(session: Any, key_id: bytes) -> bytes:
    """Those under the key's id, in PEM."""
    if not key_id:
        return b""
    found = session.get_objects({Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.ID: key_id})
    return b"".join(_pem(bytes(one[Attribute.VALUE])) for one in found)


def _pem(certificates: bytes) -> bytes:
    if not certificates or b"-----BEGIN" in certificates:
        return certificates
    try:
        return x509.load_der_x509_certificate(certificates).public_bytes(Encoding.PEM)
    except ValueError:
        raise BundleError("a certificate that is not X.509, neither in PEM nor in DER") from None
