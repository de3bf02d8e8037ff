"""Curves that CKA_EC_PARAMS names in words: a PrintableString in place of an object identifier (PKCS#11 3.1, 6.3.5-6.3.8).

OpenSC asks for keys on Edwards and Montgomery curves that way.
"""

from __future__ import annotations


def _printable(name: str) -> bytes:
    return bytes((0x13, len(name))) + name.encode()


_OIDS = {
    _printable("edwards25519"): bytes.fromhex("06032b6570"),
    _printable("edwards448"): bytes.fromhex("06032b6571"),
    _printable("curve25519"): bytes.fromhex("06032b656e"),
    _printable("curve448"): bytes.fromhex("06032b656f"),
}


def as_oid(parameters: bytes) -> bytes:
    """Returns the object identifier (DER) of a curve that is named in words; other parameters as they are."""
    return _OIDS.get(parameters, parameters)
