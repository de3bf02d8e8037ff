"""Keys from the parts that PKCS#11 names them by, and back (3.1, 6.1.2-6.1.3, 6.3.3-6.3.10; 3.2, 6.67 and 6.68).

Parts are values by CKA_ type; integers are big-endian bytes.  What is no key answers CKR_ATTRIBUTE_VALUE_INVALID, in words that
show nothing of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, mlkem, rsa, x448, x25519

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import dh, dsa, explicit, legacy
from hsmvisord.crypto.curve_names import as_oid
from hsmvisord.crypto.ec import CURVES, NAMED, EcPrivateKey, EcPublicKey, octet_string
from hsmvisord.crypto.edwards import EDWARDS, ML_DSA, EdwardsPrivateKey, EdwardsPublicKey, MlDsaPrivateKey, MlDsaPublicKey
from hsmvisord.crypto.interface import PrivateKey, PublicKey
from hsmvisord.crypto.mlkem import ML_KEM, MlKemPrivateKey, MlKemPublicKey
from hsmvisord.crypto.montgomery import MONTGOMERY, MontgomeryPrivateKey, MontgomeryPublicKey
from hsmvisord.crypto.rsa import MAX_BITS, MAX_EXPONENT_BITS, OWN_MIN_BITS, RsaPrivateKey, RsaPublicKey, big_endian

Parts = Mapping[int, Any]

SEED = {ck.CKK_ML_DSA: 32, ck.CKK_ML_KEM: 64}  #: bytes of CKA_SEED (FIPS 204, 5.1; FIPS 203, 7.1)
_CURVES = {oid: name for name, (_, _, oid) in CURVES.items()}


def _no_key(detail: str = "the parts are of no key") -> CkError:
    return CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, detail)


def _number(parts: Parts, kind: int) -> int:
    value: bytes = parts[kind]
    if not value or len(value) > MAX_BITS // 8 + 1:
        raise _no_key(f"attribute 0x{kind:x}: a number of {len(value)} bytes")
    return int.from_bytes(value)


def _raw(point: bytes) -> bytes:
    """A point raw or as DER OCTET STRING."""
    for size in (32, 49, 56, 57, 65, 97, 133):
        if len(point) == len(octet_string(bytes(size))) and point == octet_string(point[-size:]):
            return point[-size:]
    return point


# ---- RSA ----------------------------------------------------------------------------------------------------------------


def _check_sizes(n: int, e: int, least: int = OWN_MIN_BITS) -> None:
    if not least <= n.bit_length() <= MAX_BITS or e.bit_length() > MAX_EXPONENT_BITS:
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"{least} to {MAX_BITS} bits, exponents at most {MAX_EXPONENT_BITS}")


def _rsa_public(parts: Parts) -> PublicKey:
    n, e = _number(parts, ck.CKA_MODULUS), _number(parts, ck.CKA_PUBLIC_EXPONENT)
    _check_sizes(n, e, legacy.RSA_LEAST)
    return RsaPublicKey(rsa.RSAPublicNumbers(e, n).public_key())


def _rsa_private(parts: Parts) -> PrivateKey:
    """The primes are found where they are not given; exponents and coefficient are computed, and must be those that are given."""
    n, e, d = (_number(parts, kind) for kind in (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT, ck.CKA_PRIVATE_EXPONENT))
    _check_sizes(n, e)
    if not 1 < d < n or not e & 1 or e < 3:
        raise _no_key()
    if ck.CKA_PRIME_1 in parts and ck.CKA_PRIME_2 in parts:
        p, q = _number(parts, ck.CKA_PRIME_1), _number(parts, ck.CKA_PRIME_2)
    else:
        p, q = rsa.rsa_recover_prime_factors(n, e, d)
    if p * q != n or min(p, q) < 3:
        raise _no_key()
    dmp1, dmq1, iqmp = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    derived = {ck.CKA_EXPONENT_1: dmp1, ck.CKA_EXPONENT_2: dmq1, ck.CKA_COEFFICIENT: iqmp}
    if ck.CKA_PRIME_1 in parts and any(kind in parts and _number(parts, kind) != value for kind, value in derived.items()):
        raise _no_key()
    return RsaPrivateKey(rsa.RSAPrivateNumbers(p, q, d, dmp1, dmq1, iqmp, rsa.RSAPublicNumbers(e, n)).private_key())


def _rsa_parts(key: Any) -> dict[int, Any]:
    numbers = key.private_numbers()
    values = {
        ck.CKA_PRIVATE_EXPONENT: numbers.d,
        ck.CKA_PRIME_1: numbers.p,
        ck.CKA_PRIME_2: numbers.q,
        ck.CKA_EXPONENT_1: numbers.dmp1,
        ck.CKA_EXPONENT_2: numbers.dmq1,
        ck.CKA_COEFFICIENT: numbers.iqmp,
    }
    return {kind: big_endian(value) for kind, value in values.items()}


# ---- curves -------------------------------------------------------------------------------------------------------------


def _curve(parts: Parts) -> ec.EllipticCurve:
    try:
        name = _CURVES[explicit.oid(parts[ck.CKA_EC_PARAMS])]
    except (ValueError, KeyError):
        raise CkError(ck.CKR_CURVE_NOT_SUPPORTED) from None
    return NAMED[name]


def _ec_public(parts: Parts) -> PublicKey:
    return EcPublicKey(ec.EllipticCurvePublicKey.from_encoded_point(_curve(parts), _raw(parts[ck.CKA_EC_POINT])))


def _ec_private(parts: Parts) -> PrivateKey:
    return EcPrivateKey(ec.derive_private_key(_number(parts, ck.CKA_VALUE), _curve(parts)))


def _ec_parts(key: Any) -> dict[int, Any]:
    return {ck.CKA_VALUE: key.private_numbers().private_value.to_bytes((key.curve.key_size + 7) // 8)}


def _edwards(parts: Parts, of_25519: Any, of_448: Any) -> Any:
    oids = {row[0].parameters: row[0].bits for row in EDWARDS.values()}
    return _one_of(oids, parts, of_25519, of_448)


def _montgomery(parts: Parts, of_25519: Any, of_448: Any) -> Any:
    oids = {row[0].parameters: row[0].bits for row in MONTGOMERY.values()}
    return _one_of(oids, parts, of_25519, of_448)


def _one_of(oids: Mapping[bytes, int], parts: Parts, of_25519: Any, of_448: Any) -> Any:
    bits = oids.get(as_oid(parts[ck.CKA_EC_PARAMS]))
    if bits is None:
        raise CkError(ck.CKR_CURVE_NOT_SUPPORTED)
    return of_25519 if bits == 255 else of_448


def _edwards_public(parts: Parts) -> PublicKey:
    cls = _edwards(parts, ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)
    return EdwardsPublicKey(cls.from_public_bytes(_raw(parts[ck.CKA_EC_POINT])))


def _edwards_private(parts: Parts) -> PrivateKey:
    cls = _edwards(parts, ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)
    return EdwardsPrivateKey(cls.from_private_bytes(parts[ck.CKA_VALUE]))


def _montgomery_public(parts: Parts) -> PublicKey:
    cls = _montgomery(parts, x25519.X25519PublicKey, x448.X448PublicKey)
    return MontgomeryPublicKey(cls.from_public_bytes(_raw(parts[ck.CKA_EC_POINT])))


def _montgomery_private(parts: Parts) -> PrivateKey:
    cls = _montgomery(parts, x25519.X25519PrivateKey, x448.X448PrivateKey)
    return MontgomeryPrivateKey(cls.from_private_bytes(parts[ck.CKA_VALUE]))


def _value(key: Any) -> dict[int, Any]:
    return {ck.CKA_VALUE: key.private_bytes_raw()}


# ---- lattices: a private key is its seed --------------------------------------------------------------------------------

_DSA = {
    ck.CKP_ML_DSA_44: (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
    ck.CKP_ML_DSA_65: (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
    ck.CKP_ML_DSA_87: (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
}
_KEM = {
    ck.CKP_ML_KEM_768: (mlkem.MLKEM768PrivateKey, mlkem.MLKEM768PublicKey),
    ck.CKP_ML_KEM_1024: (mlkem.MLKEM1024PrivateKey, mlkem.MLKEM1024PublicKey),
}
assert {row[1] for row in ML_DSA.values()} == set(_DSA)
assert {row[1] for row in ML_KEM.values()} == set(_KEM)


def _of_set(table: Mapping[int, tuple[Any, Any]], parts: Parts) -> tuple[Any, Any]:
    classes = table.get(parts[ck.CKA_PARAMETER_SET])
    if classes is None:
        raise _no_key("CKA_PARAMETER_SET")
    return classes


def _seed(parts: Parts) -> bytes:
    if ck.CKA_SEED not in parts:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_SEED: a private key without its seed is not supported")
    if ck.CKA_VALUE in parts:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "CKA_SEED alone is the key")
    seed: bytes = parts[ck.CKA_SEED]
    return seed


def _dsa_private(parts: Parts) -> PrivateKey:
    return MlDsaPrivateKey(_of_set(_DSA, parts)[0].from_seed_bytes(_seed(parts)))


def _dsa_public(parts: Parts) -> PublicKey:
    return MlDsaPublicKey(_of_set(_DSA, parts)[1].from_public_bytes(parts[ck.CKA_VALUE]))


def _kem_private(parts: Parts) -> PrivateKey:
    return MlKemPrivateKey(_of_set(_KEM, parts)[0].from_seed_bytes(_seed(parts)))


def _kem_public(parts: Parts) -> PublicKey:
    return MlKemPublicKey(_of_set(_KEM, parts)[1].from_public_bytes(parts[ck.CKA_VALUE]))


def _seed_of(key: Any) -> dict[int, Any]:
    return {ck.CKA_SEED: key.private_bytes_raw()}


# ---- by key type --------------------------------------------------------------------------------------------------------

_PRIVATE: dict[int, Callable[[Parts], PrivateKey]] = {
    ck.CKK_RSA: _rsa_private,
    ck.CKK_EC: _ec_private,
    ck.CKK_EC_EDWARDS: _edwards_private,
    ck.CKK_EC_MONTGOMERY: _montgomery_private,
    ck.CKK_ML_DSA: _dsa_private,
    ck.CKK_ML_KEM: _kem_private,
    ck.CKK_DSA: dsa.private_key,
    ck.CKK_DH: dh.private_key,
}
_PUBLIC: dict[int, Callable[[Parts], PublicKey]] = {
    ck.CKK_RSA: _rsa_public,
    ck.CKK_EC: _ec_public,
    ck.CKK_EC_EDWARDS: _edwards_public,
    ck.CKK_EC_MONTGOMERY: _montgomery_public,
    ck.CKK_ML_DSA: _dsa_public,
    ck.CKK_ML_KEM: _kem_public,
    ck.CKK_DSA: dsa.public_key,
    ck.CKK_DH: dh.public_key,
}
_SECRET_PARTS: dict[int, Callable[[Any], dict[int, Any]]] = {
    ck.CKK_RSA: _rsa_parts,
    ck.CKK_EC: _ec_parts,
    ck.CKK_EC_EDWARDS: _value,
    ck.CKK_EC_MONTGOMERY: _value,
    ck.CKK_ML_DSA: _seed_of,
    ck.CKK_ML_KEM: _seed_of,
    ck.CKK_DSA: dsa.secret_parts,
    ck.CKK_DH: dh.secret_parts,
}


def private_key(key_type: int, parts: Parts) -> PrivateKey:
    try:
        return _PRIVATE[key_type](parts)
    except (ValueError, UnsupportedAlgorithm, OverflowError, ZeroDivisionError):
        raise _no_key() from None


def public_key(key_type: int, parts: Parts) -> PublicKey:
    try:
        return _PUBLIC[key_type](parts)
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key() from None


def secret_parts(key: PrivateKey) -> dict[int, Any]:
    """Returns the parts that CKA_SENSITIVE hides, of a key that does not hide them."""
    parsed = serialization.load_der_private_key(key.pkcs8(), None)
    return _SECRET_PARTS[key.kind.key_type](parsed)
