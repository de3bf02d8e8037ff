"""Keys as python-pkcs11 and as `cryptography` have them: uses, components, encodings."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from pkcs11 import Attribute, MechanismFlag

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import parts
from hsmvisord.crypto.ec import CURVES
from hsmvisord.crypto.edwards import EDWARDS
from hsmvisord.crypto.rsa import big_endian

_RSA = (
    MechanismFlag.SIGN | MechanismFlag.VERIFY | MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
    | MechanismFlag.WRAP | MechanismFlag.UNWRAP
)  # fmt: skip
_SECRET = _RSA | MechanismFlag.DERIVE
USES = {
    ck.CKK_RSA: _RSA,
    ck.CKK_EC: MechanismFlag.SIGN | MechanismFlag.VERIFY | MechanismFlag.DERIVE,
    ck.CKK_EC_EDWARDS: MechanismFlag.SIGN | MechanismFlag.VERIFY,
    ck.CKK_AES: _SECRET,
    ck.CKK_GENERIC_SECRET: _SECRET,
}


def spki(key_type: int, key: Any) -> bytes:
    if key_type == ck.CKK_RSA:
        told = {ck.CKA_MODULUS: bytes(key[Attribute.MODULUS]), ck.CKA_PUBLIC_EXPONENT: bytes(key[Attribute.PUBLIC_EXPONENT])}
    else:
        told = {ck.CKA_EC_PARAMS: bytes(key[Attribute.EC_PARAMS]), ck.CKA_EC_POINT: bytes(key[Attribute.EC_POINT])}
    return parts.public_key(key_type, told).spki


def secret_attributes(key: Any) -> tuple[int, dict[Attribute, Any]]:
    """Returns CKK_ and the secret parts by python-pkcs11's names."""
    if isinstance(key, rsa.RSAPrivateKey):
        n = key.private_numbers()
        values = {
            Attribute.MODULUS: n.public_numbers.n,
            Attribute.PUBLIC_EXPONENT: n.public_numbers.e,
            Attribute.PRIVATE_EXPONENT: n.d,
            Attribute.PRIME_1: n.p,
            Attribute.PRIME_2: n.q,
            Attribute.EXPONENT_1: n.dmp1,
            Attribute.EXPONENT_2: n.dmq1,
            Attribute.COEFFICIENT: n.iqmp,
        }
        return ck.CKK_RSA, {kind: big_endian(value) for kind, value in values.items()}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        size = (key.curve.key_size + 7) // 8
        value = key.private_numbers().private_value.to_bytes(size, "big")
        return ck.CKK_EC, {Attribute.EC_PARAMS: CURVES[key.curve.name][2], Attribute.VALUE: value}
    if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        named = {row[0].bits: row[0].parameters for row in EDWARDS.values()}
        curve = named[255 if isinstance(key, ed25519.Ed25519PrivateKey) else 448]
        return ck.CKK_EC_EDWARDS, {Attribute.EC_PARAMS: curve, Attribute.VALUE: key.private_bytes_raw()}
    raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "the module's hardware keeps RSA, EC and Edwards keys")


def pkcs8(key: Any) -> bytes:
    kind = int(key[Attribute.KEY_TYPE])
    if kind == ck.CKK_RSA:
        wanted = {
            ck.CKA_MODULUS: Attribute.MODULUS,
            ck.CKA_PUBLIC_EXPONENT: Attribute.PUBLIC_EXPONENT,
            ck.CKA_PRIVATE_EXPONENT: Attribute.PRIVATE_EXPONENT,
            ck.CKA_PRIME_1: Attribute.PRIME_1,
            ck.CKA_PRIME_2: Attribute.PRIME_2,
        }
    else:
        wanted = {ck.CKA_EC_PARAMS: Attribute.EC_PARAMS, ck.CKA_VALUE: Attribute.VALUE}
    return parts.private_key(kind, {ours: bytes(key[theirs]) for ours, theirs in wanted.items()}).pkcs8()
