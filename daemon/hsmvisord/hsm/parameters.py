"""From a mechanism's parameter, as it comes in a call, to what python-pkcs11 takes."""

from __future__ import annotations

import struct
from typing import Any

from pkcs11.mechanisms import KDF, MGF, GCMParams, Mechanism

from hsmvisord import ck
from hsmvisord.ck import CkError


def of(mechanism: int, parameter: Any) -> tuple[Mechanism, Any]:
    """Raises CkError(MECHANISM_INVALID, MECHANISM_PARAM_INVALID)."""
    try:
        known = Mechanism(mechanism)
    except ValueError:
        raise CkError(ck.CKR_MECHANISM_INVALID, ck.mechanism_name(mechanism)) from None
    try:
        return known, _parameter(mechanism, parameter)
    except (ValueError, TypeError, struct.error):
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"not the parameter of {ck.mechanism_name(mechanism)}") from None


def _parameter(mechanism: int, parameter: Any) -> Any:
    match mechanism, parameter:
        case _, None | b"" | ():
            return None
        case ck.CKM_RSA_PKCS_PSS, (alg, mask, salt):
            return Mechanism(alg), MGF(mask), int(salt)
        case ck.CKM_RSA_PKCS_OAEP, (alg, mask, _source, label):
            return Mechanism(alg), MGF(mask), label or None
        case ck.CKM_ECDH1_DERIVE, (kdf, shared, peer):
            return KDF(kdf), shared or None, peer
        case ck.CKM_AES_GCM, (iv, _bits, more, tag):
            return GCMParams(iv, more or None, int(tag))
        case ck.CKM_AES_CTR, (bits, block):
            return struct.pack("=L16s" if struct.calcsize("@L") == 4 else "=Q16s", bits, block)
        case _, bytes():
            return parameter
    raise ValueError
