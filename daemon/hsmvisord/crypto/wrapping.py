"""RSA AES key wrap (PKCS#11 3.1, 6.1.16): a new AES key by RSA-OAEP, then what is wrapped by AES-KWP with that key.

CK_RSA_AES_KEY_WRAP_PARAMS comes as its fields: AES key bits, then those of CK_RSA_PKCS_OAEP_PARAMS.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import Cipher
from hsmvisord.crypto.operations import ReadyCipher
from hsmvisord.crypto.secret import AES_SIZES, SecretKey
from hsmvisord.wire.calls import Mechanism

_KWP = Mechanism(ck.CKM_AES_KEY_WRAP_KWP)


def _parameter(mechanism: Mechanism) -> tuple[int, Mechanism]:
    """Returns the AES key's bytes and the mechanism that wraps it."""
    match mechanism.parameter:
        case (int(bits), *oaep) if bits % 8 == 0 and bits // 8 in AES_SIZES:
            return bits // 8, Mechanism(ck.CKM_RSA_PKCS_OAEP, tuple(oaep))
    raise CkError(
        ck.CKR_MECHANISM_PARAM_INVALID, "CK_RSA_AES_KEY_WRAP_PARAMS: an AES key of 128, 192 or 256 bits, OAEP's parameter"
    )


def _aes(value: bytes) -> SecretKey:
    return SecretKey(ck.CKK_AES, value)


def wrapper(mechanism: Mechanism, size: int, encrypter: Callable[[Mechanism], Cipher]) -> ReadyCipher:
    """`size`: bytes of the modulus; `encrypter`: of the RSA key."""
    length, oaep = _parameter(mechanism)
    outer = encrypter(oaep)

    def run(data: bytes) -> bytes:
        value = os.urandom(length)
        return outer.run(value) + _aes(value).encrypter(_KWP).run(data)

    return ReadyCipher(lambda data: size + -(-data // 8) * 8 + 8, run)


def unwrapper(mechanism: Mechanism, size: int, decrypter: Callable[[Mechanism], Cipher]) -> ReadyCipher:
    length, oaep = _parameter(mechanism)
    outer = decrypter(oaep)

    def run(data: bytes) -> bytes:
        if len(data) < size + 16:
            raise CkError(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, f"such a wrapped key has at least {size + 16} bytes")
        value = outer.run(data[:size])
        if len(value) != length:
            raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID, "the AES key in it has another length")
        return _aes(value).decrypter(_KWP).run(data[size:])

    return ReadyCipher(lambda data: max(0, data - size), run)
