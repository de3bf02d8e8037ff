"""Keys derived by encrypting data (PKCS#11 3.1, 6.27): the derived key is the first bytes of the ciphertext.

Parameters come as the fields of their structures:
    CK_KEY_DERIVATION_STRING_DATA      data
    CK_AES_CBC_ENCRYPT_DATA_PARAMS     IV, data
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.wire.calls import Mechanism

AES = (ck.CKM_AES_ECB_ENCRYPT_DATA, ck.CKM_AES_CBC_ENCRYPT_DATA)
_BLOCK = 16


def derive(algorithm: algorithms.AES, mechanism: Mechanism, length: int) -> bytes:
    """Returns `length` bytes; 0: all of the ciphertext.  Raises CkError(MECHANISM_PARAM_INVALID)."""
    mode: modes.ECB | modes.CBC
    match mechanism.type, mechanism.parameter:
        case ck.CKM_AES_ECB_ENCRYPT_DATA, (bytes(data),):
            mode = modes.ECB()
        case ck.CKM_AES_CBC_ENCRYPT_DATA, (bytes(iv), bytes(data)) if len(iv) == _BLOCK:
            mode = modes.CBC(iv)
        case _:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"not the parameter of {ck.mechanism_name(mechanism.type)}")
    if not data or len(data) % _BLOCK or len(data) > limits.MAX_SECRET:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"the data is whole blocks of {_BLOCK} bytes, {limits.MAX_SECRET} at most")
    if length > len(data):
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"{len(data)} bytes of data make no key of {length}")
    encrypted = Cipher(algorithm, mode).encryptor().update(data)
    return encrypted[:length] if length else encrypted
