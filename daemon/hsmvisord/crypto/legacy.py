"""What is old or weak, kept for software that still needs it: there where the operator's policy says `legacy`, and only in slot 1.

No such key ever wraps a sensitive one (`token/rules.py`, keeps_secrets).
"""

from __future__ import annotations

from hsmvisord import ck
from hsmvisord.crypto import des, dh, dsa
from hsmvisord.crypto.interface import KeyKind

KEY_TYPES = frozenset((ck.CKK_DES2, ck.CKK_DES3, ck.CKK_DSA, ck.CKK_DH))
RSA_BITS = 1024  #: from here on an RSA key is not legacy
EC_BITS = 224
RSA_LEAST = 512  #: of a public key: nothing is signed with so short a one
EC_LEAST = 192

_CRYPT = ck.CKF_ENCRYPT | ck.CKF_DECRYPT
_WRAP = ck.CKF_WRAP | ck.CKF_UNWRAP
_SIGN_ONCE = ck.CKF_SIGN | ck.CKF_VERIFY | ck.CKF_MESSAGE_SIGN | ck.CKF_MESSAGE_VERIFY  #: in one part
_SIGN = _SIGN_ONCE | ck.CKF_MULTI_MESSAGE
_DES = (ck.CKK_DES2, ck.CKK_DES3)
_DSA, _DH = (ck.CKK_DSA,), (ck.CKK_DH,)

#: Mechanism -> key types, smallest and largest key, flags: rows of mechanisms.GUEST_TABLE.
ROWS: dict[int, tuple[tuple[int, ...], int, int, int]] = {
    ck.CKM_DES2_KEY_GEN: ((ck.CKK_DES2,), 16, 16, ck.CKF_GENERATE),
    ck.CKM_DES3_KEY_GEN: ((ck.CKK_DES3,), 24, 24, ck.CKF_GENERATE),
    ck.CKM_DES3_ECB: (_DES, 16, 24, _CRYPT),
    ck.CKM_DES3_CBC: (_DES, 16, 24, _CRYPT | _WRAP),
    ck.CKM_DES3_CBC_PAD: (_DES, 16, 24, _CRYPT | _WRAP),
    ck.CKM_AES_MAC: ((ck.CKK_AES,), 16, 32, _SIGN),
    ck.CKM_AES_MAC_GENERAL: ((ck.CKK_AES,), 16, 32, _SIGN),
    ck.CKM_DSA_PARAMETER_GEN: (_DSA, min(dsa.SIZES), max(dsa.SIZES), ck.CKF_GENERATE),
    ck.CKM_DSA_KEY_PAIR_GEN: (_DSA, min(dsa.SIZES), max(dsa.SIZES), ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_DSA: (_DSA, min(dsa.SIZES), max(dsa.SIZES), _SIGN_ONCE),
    **dict.fromkeys(dsa.HASHED, (_DSA, min(dsa.SIZES), max(dsa.SIZES), _SIGN)),
    ck.CKM_DH_PKCS_PARAMETER_GEN: (_DH, min(dh.GENERATED), max(dh.GENERATED), ck.CKF_GENERATE),
    ck.CKM_DH_PKCS_KEY_PAIR_GEN: (_DH, dh.LEAST, dh.MOST, ck.CKF_GENERATE_KEY_PAIR),
    ck.CKM_DH_PKCS_DERIVE: (_DH, dh.LEAST, dh.MOST, ck.CKF_DERIVE),
}
assert set(des.CIPHERS) <= set(ROWS)


def is_legacy(key_type: int, bits: int) -> bool:
    """Says whether such a key is old or weak; `bits` of a curve or a modulus, 0: not known yet."""
    if key_type == ck.CKK_RSA:
        return 0 < bits < RSA_BITS
    return 0 < bits < EC_BITS if key_type == ck.CKK_EC else key_type in KEY_TYPES


def is_kind(kind: KeyKind) -> bool:
    return is_legacy(kind.key_type, kind.bits)
