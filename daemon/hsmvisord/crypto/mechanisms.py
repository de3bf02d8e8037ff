"""The mechanisms of the token: one table.  What signs also verifies, what decrypts also encrypts (Java disables the
unsymmetric)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import ec, rsa
from hsmvisord.crypto.digests import DIGESTS
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.wire.calls import Mechanism

_SIGN = ck.CKF_SIGN | ck.CKF_VERIFY
_CRYPT = ck.CKF_ENCRYPT | ck.CKF_DECRYPT
_EC = ck.CKF_EC_F_P | ck.CKF_EC_NAMEDCURVE | ck.CKF_EC_UNCOMPRESS


@dataclass(frozen=True)
class Row:
    """Key sizes in the standard's unit: bits (for ML-DSA bytes of the public key; digests have none)."""

    key_types: tuple[int, ...]
    smallest: int
    largest: int
    flags: int


def _rsa(flags: int) -> Row:
    return Row((ck.CKK_RSA,), rsa.MIN_BITS, rsa.MAX_BITS, flags)


def _ec(flags: int) -> Row:
    return Row((ck.CKK_EC,), 256, 521, flags | _EC)


TABLE: dict[int, Row] = {
    ck.CKM_RSA_PKCS: _rsa(_SIGN | _CRYPT),
    ck.CKM_RSA_X_509: _rsa(_SIGN | _CRYPT),
    ck.CKM_RSA_PKCS_OAEP: _rsa(_CRYPT),
    ck.CKM_RSA_PKCS_PSS: _rsa(_SIGN),
    **dict.fromkeys(rsa.HASHED_PKCS1, _rsa(_SIGN)),
    **dict.fromkeys(rsa.HASHED_PSS, _rsa(_SIGN)),
    ck.CKM_ECDSA: _ec(_SIGN),
    **dict.fromkeys(ec.HASHED, _ec(_SIGN)),
    ck.CKM_ECDH1_DERIVE: _ec(ck.CKF_DERIVE),
    ck.CKM_ECDH1_COFACTOR_DERIVE: _ec(ck.CKF_DERIVE),
    ck.CKM_EDDSA: Row((ck.CKK_EC_EDWARDS,), 255, 448, _SIGN | _EC),
    ck.CKM_ML_DSA: Row((ck.CKK_ML_DSA,), 1312, 2592, _SIGN),
    **dict.fromkeys(DIGESTS, Row((), 0, 0, ck.CKF_DIGEST)),
}

_LIST = tuple(sorted(TABLE))


def mechanism_list() -> tuple[int, ...]:
    return _LIST


def mechanism_info(mechanism: int) -> tuple[int, int, int]:
    """Returns the smallest and largest key and the flags; raises CKR_MECHANISM_INVALID."""
    row = TABLE.get(mechanism)
    if row is None:
        raise CkError(ck.CKR_MECHANISM_INVALID)
    return row.smallest, row.largest, row.flags


def check_mechanism(mechanism: Mechanism, allowed: Container[int], kind: KeyKind, function: int) -> None:
    """Raises unless a key of this kind may use the mechanism for `function`, a CKF_ of CK_MECHANISM_INFO."""
    row = TABLE.get(mechanism.type)
    if row is not None and row.flags & function and mechanism.type in allowed:
        return
    name = ck.mechanism_name(mechanism.type)
    if row is None or not row.flags & function:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{name} is not a mechanism of this function")
    if kind.key_type not in row.key_types:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{name} and a key of type {kind.name}")
    raise CkError(ck.CKR_MECHANISM_INVALID, f"{name} is not among the key's allowed mechanisms")
