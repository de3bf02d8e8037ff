"""Curves by explicit parameters (PKCS#11 3.1, 6.3.3: ECParameters of ANSI X9.62; SEC 1, C.2): taken where they are those of a named
curve, and of no other, for what is not one of them is anything that its sender likes (CVE-2020-0601)."""

from __future__ import annotations

import functools

from cryptography.hazmat.primitives.asymmetric import ec

from hsmvisord.crypto.der import BIT_STRING, OBJECT_IDENTIFIER, OCTET_STRING, SEQUENCE, Elements
from hsmvisord.crypto.ec import CURVES, NAMED

_PRIME_FIELD = bytes.fromhex("2a8648ce3d0101")  #: 1.2.840.10045.1.1

#: Curve -> prime of its field (SEC 2, 2.2.2, 2.4.1, 2.4.2, 2.5.1, 2.6.1) and coefficient a.
_FIELDS = {
    "secp192r1": (2**192 - 2**64 - 1, -3),
    "secp256r1": (2**256 - 2**224 + 2**192 + 2**96 - 1, -3),
    "secp384r1": (2**384 - 2**128 - 2**96 + 2**32 - 1, -3),
    "secp521r1": (2**521 - 1, -3),
    "secp256k1": (2**256 - 2**32 - 977, 0),
}
assert set(_FIELDS) == set(CURVES)

#: p, a, b, x and y of the base point, its order.
Curve = tuple[int, int, int, int, int, int]


@functools.cache
def _named() -> dict[Curve, bytes]:
    """Parameters -> DER of the curve's OID."""
    curves: dict[Curve, bytes] = {}
    for name, (_, _, oid) in CURVES.items():
        p, a = _FIELDS[name]
        base = ec.derive_private_key(1, NAMED[name]).public_key().public_numbers()
        b = (base.y**2 - base.x**3 - a * base.x) % p
        curves[p, a % p, b, base.x, base.y, NAMED[name].group_order] = oid
    return curves


def _point(raw: bytes, p: int, a: int, b: int) -> tuple[int, int]:
    """All primes here are 3 modulo 4."""
    size = (p.bit_length() + 7) // 8
    if raw[:1] == b"\4" and len(raw) == 1 + 2 * size:
        return int.from_bytes(raw[1 : 1 + size]), int.from_bytes(raw[1 + size :])
    if raw[:1] not in (b"\2", b"\3") or len(raw) != 1 + size:
        raise ValueError("not a point")
    x = int.from_bytes(raw[1:])
    y = pow(x**3 + a * x + b, (p + 1) // 4, p)
    return x, y if y & 1 == raw[0] & 1 else p - y


def oid(parameters: bytes) -> bytes:
    """Returns the DER of the curve's OID: of CKA_EC_PARAMS that are one already, or that describe a curve which has one.

    Raises ValueError for parameters of no named curve.
    """
    if parameters[:1] == bytes((OBJECT_IDENTIFIER,)):
        return parameters
    whole = Elements(parameters)
    fields = Elements(whole.next(SEQUENCE))
    whole.end()
    if fields.number() not in (1, 2, 3):
        raise ValueError("the version of ECParameters")
    field = Elements(fields.next(SEQUENCE))
    if field.next(OBJECT_IDENTIFIER) != _PRIME_FIELD:
        raise ValueError("not a prime field")
    p = field.number()
    field.end()
    if p not in {prime for prime, _ in _FIELDS.values()}:
        raise ValueError("the field of no curve here")
    curve = Elements(fields.next(SEQUENCE))
    a, b = int.from_bytes(curve.next(OCTET_STRING)), int.from_bytes(curve.next(OCTET_STRING))
    if curve.more:
        curve.next(BIT_STRING)  # the seed of its making says nothing about the curve
    curve.end()
    x, y = _point(fields.next(OCTET_STRING), p, a % p, b % p)
    order = fields.number()
    if fields.more and fields.number() != 1:
        raise ValueError("the cofactor")
    fields.end()
    found = _named().get((p, a, b, x, y, order))
    if found is None:
        raise ValueError("the parameters of no named curve")
    return found
