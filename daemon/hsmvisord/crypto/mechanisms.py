"""The mechanisms of each slot's token: two tables.  What signs also verifies, what decrypts also encrypts (Java disables the
unsymmetric)."""

from __future__ import annotations

import functools
from collections.abc import Container
from dataclasses import dataclass, replace

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import ec, encrypted_data, legacy, macs, rsa
from hsmvisord.crypto.digests import DIGESTS
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.wire.calls import Mechanism

_MESSAGES = ck.CKF_MESSAGE_SIGN | ck.CKF_MESSAGE_VERIFY
_SIGN_ONCE = ck.CKF_SIGN | ck.CKF_VERIFY | _MESSAGES  #: in one part
_SIGN = _SIGN_ONCE | ck.CKF_MULTI_MESSAGE
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
    ck.CKM_RSA_PKCS: _rsa(_SIGN_ONCE | _CRYPT),
    ck.CKM_RSA_X_509: _rsa(_SIGN_ONCE | _CRYPT),
    ck.CKM_RSA_PKCS_OAEP: _rsa(_CRYPT),
    ck.CKM_RSA_PKCS_PSS: _rsa(_SIGN_ONCE),
    **dict.fromkeys(rsa.HASHED_PKCS1, _rsa(_SIGN)),
    **dict.fromkeys(rsa.HASHED_PSS, _rsa(_SIGN)),
    ck.CKM_ECDSA: _ec(_SIGN_ONCE),
    **dict.fromkeys(ec.HASHED, _ec(_SIGN)),
    ck.CKM_ECDH1_DERIVE: Row((ck.CKK_EC, ck.CKK_EC_MONTGOMERY), 255, 521, ck.CKF_DERIVE | _EC),
    ck.CKM_ECDH1_COFACTOR_DERIVE: _ec(ck.CKF_DERIVE),
    ck.CKM_EDDSA: Row((ck.CKK_EC_EDWARDS,), 255, 448, _SIGN | _EC),
    ck.CKM_ML_DSA: Row((ck.CKK_ML_DSA,), 1312, 2592, _SIGN),
    **dict.fromkeys(DIGESTS, Row((), 0, 0, ck.CKF_DIGEST)),
}

_WRAP = ck.CKF_WRAP | ck.CKF_UNWRAP
_RECOVER = ck.CKF_SIGN_RECOVER | ck.CKF_VERIFY_RECOVER
_CRYPT_MESSAGES = _CRYPT | ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT | ck.CKF_MULTI_MESSAGE


def _aes(flags: int) -> Row:
    return Row((ck.CKK_AES,), 16, 32, flags)


def _more(mechanism: int, key_types: tuple[int, ...], flags: int) -> Row:
    """A row of slot 0 with more key types and flags."""
    row = TABLE[mechanism]
    return replace(row, key_types=row.key_types + key_types, flags=row.flags | flags)


_SECRETS = (ck.CKK_GENERIC_SECRET, *ck.HMAC_KEY_TYPES, ck.CKK_AES)

#: The mechanisms of slot 1: those of slot 0, and what guests do with keys of their own.  Sizes of secret keys are bytes.
GUEST_TABLE: dict[int, Row] = TABLE | {
    ck.CKM_RSA_PKCS: _more(ck.CKM_RSA_PKCS, (), _WRAP | _RECOVER),
    ck.CKM_RSA_X_509: _more(ck.CKM_RSA_X_509, (), _RECOVER),
    ck.CKM_RSA_PKCS_OAEP: _more(ck.CKM_RSA_PKCS_OAEP, (), _WRAP),
    ck.CKM_RSA_AES_KEY_WRAP: _rsa(_WRAP),
    ck.CKM_ML_KEM: Row((ck.CKK_ML_KEM,), 1184, 1568, ck.CKF_ENCAPSULATE | ck.CKF_DECAPSULATE),
    ck.CKM_AES_ECB: _aes(_CRYPT),
    ck.CKM_AES_CBC: _aes(_CRYPT | _WRAP),
    ck.CKM_AES_CBC_PAD: _aes(_CRYPT | _WRAP),
    ck.CKM_AES_CTR: _aes(_CRYPT),
    ck.CKM_AES_GCM: _aes(_CRYPT_MESSAGES | _WRAP),
    ck.CKM_AES_CCM: _aes(_CRYPT_MESSAGES | _WRAP),
    ck.CKM_AES_KEY_WRAP: _aes(_CRYPT | _WRAP),
    ck.CKM_AES_KEY_WRAP_KWP: _aes(_CRYPT | _WRAP),
    **dict.fromkeys(macs.AES_MACS, _aes(_SIGN)),
    **dict.fromkeys(encrypted_data.AES, _aes(ck.CKF_DERIVE)),
    ck.CKM_AES_GMAC: _aes(ck.CKF_SIGN | ck.CKF_VERIFY),  # no messages: each would need an IV of its own
    ck.CKM_CHACHA20_POLY1305: Row((ck.CKK_CHACHA20,), 32, 32, _CRYPT_MESSAGES),
    **{
        mechanism: Row(
            (ck.CKK_GENERIC_SECRET, *(kind for kind, of in ck.HMAC_KEY_TYPES.items() if of == name)), 1, limits.MAX_SECRET, _SIGN
        )
        for mechanism, (name, _) in macs.HMACS.items()
    },
    **dict.fromkeys((ck.CKM_HKDF_DERIVE, ck.CKM_HKDF_DATA), Row(_SECRETS, 1, limits.MAX_SECRET, ck.CKF_DERIVE)),
    ck.CKM_SP800_108_COUNTER_KDF: Row(_SECRETS, 1, limits.MAX_SECRET, ck.CKF_DERIVE),
    ck.CKM_RSA_PKCS_KEY_PAIR_GEN: _rsa(ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_EC_KEY_PAIR_GEN: _ec(ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_EC_EDWARDS_KEY_PAIR_GEN: Row((ck.CKK_EC_EDWARDS,), 255, 448, ck.CKF_GENERATE_KEY_PAIR | _EC),
    ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN: Row((ck.CKK_EC_MONTGOMERY,), 255, 448, ck.CKF_GENERATE_KEY_PAIR | _EC),
    ck.CKM_ML_DSA_KEY_PAIR_GEN: Row((ck.CKK_ML_DSA,), 1312, 2592, ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_ML_KEM_KEY_PAIR_GEN: Row((ck.CKK_ML_KEM,), 1184, 1568, ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_AES_KEY_GEN: _aes(ck.CKF_GENERATE),
    ck.CKM_CHACHA20_KEY_GEN: Row((ck.CKK_CHACHA20,), 32, 32, ck.CKF_GENERATE),
    ck.CKM_GENERIC_SECRET_KEY_GEN: Row((ck.CKK_GENERIC_SECRET,), 1, limits.MAX_SECRET, ck.CKF_GENERATE),
}

#: Those that are there where the policy says `legacy`.
LEGACY: dict[int, Row] = {mechanism: Row(*row) for mechanism, row in legacy.ROWS.items()}
GUEST_TABLE |= LEGACY

GUEST_TABLE |= {
    mechanism: replace(row, smallest=rsa.OWN_MIN_BITS) for mechanism, row in GUEST_TABLE.items() if ck.CKK_RSA in row.key_types
}

_TABLES = (TABLE, GUEST_TABLE)  #: by slot
_LISTS = tuple(tuple(sorted(table)) for table in _TABLES)


def mechanism_list(slot: int) -> tuple[int, ...]:
    return _LISTS[slot]


@functools.cache
def of_key_type(key_type: int) -> frozenset[int]:
    """Returns the mechanisms of slot 1 for keys of a type."""
    return frozenset(mechanism for mechanism, row in GUEST_TABLE.items() if key_type in row.key_types)


#: The smallest keys of a type with `legacy`; RSA keys of such a size are there to verify with.
_SMALLEST = {ck.CKK_RSA: (legacy.RSA_LEAST, ck.CKF_VERIFY), ck.CKK_EC: (legacy.EC_LEAST, -1)}


def mechanism_info(mechanism: int, slot: int, with_legacy: bool = False) -> tuple[int, int, int]:
    """Returns the smallest and largest key and the flags; raises CKR_MECHANISM_INVALID."""
    row = _TABLES[slot].get(mechanism)
    if row is None:
        raise CkError(ck.CKR_MECHANISM_INVALID)
    least, function = _SMALLEST.get(row.key_types[0], (0, 0)) if slot and with_legacy and row.key_types else (0, 0)
    return least if function & row.flags else row.smallest, row.largest, row.flags


def check_mechanism(mechanism: Mechanism, allowed: Container[int], kind: KeyKind, function: int) -> None:
    """Raises unless a key of this kind may use the mechanism for `function`, a CKF_ of CK_MECHANISM_INFO."""
    row = GUEST_TABLE.get(mechanism.type)
    if row is not None and row.flags & function and mechanism.type in allowed:
        return
    name = ck.mechanism_name(mechanism.type)
    if row is None or not row.flags & function:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{name} is not a mechanism of this function")
    if kind.key_type not in row.key_types:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{name} and a key of type {kind.name}")
    raise CkError(ck.CKR_MECHANISM_INVALID, f"{name} is not among the key's allowed mechanisms")
