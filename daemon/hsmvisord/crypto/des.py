"""Triple DES with two and three keys (PKCS#11 3.1, 6.10, 6.11; NIST SP 800-67).

The least bit of each byte of a key is its parity: odd, or it is no key.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import modes

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import ciphers
from hsmvisord.crypto.operations import ReadyCipher, no_parameter
from hsmvisord.wire.calls import Mechanism

BLOCK = 8
#: Bytes of a key, with its parity.
SIZES = {ck.CKK_DES2: 16, ck.CKK_DES3: 24}


def with_parity(value: bytes) -> bytes:
    return bytes(byte & 0xFE | (byte >> 1).bit_count() & 1 ^ 1 for byte in value)


def algorithm(value: bytes) -> TripleDES:
    """Raises CkError(ATTRIBUTE_VALUE_INVALID) for a key without its parity.  Two keys are K1, K2, K1."""
    if with_parity(value) != value:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "a DES key whose bytes do not have odd parity")
    return TripleDES(value if len(value) == SIZES[ck.CKK_DES3] else value + value[:BLOCK])


def _iv(mechanism: Mechanism) -> bytes:
    if not isinstance(mechanism.parameter, bytes) or len(mechanism.parameter) != BLOCK:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"the IV has {BLOCK} bytes")
    return mechanism.parameter


def _ecb(key: TripleDES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    no_parameter(mechanism.parameter)
    return ciphers.blocks(key, modes.ECB(), encrypting)


def _cbc(key: TripleDES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    return ciphers.blocks(key, modes.CBC(_iv(mechanism)), encrypting)


def _cbc_pad(key: TripleDES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    return ciphers.padded(key, modes.CBC(_iv(mechanism)), encrypting)


#: Mechanism -> what makes its operation of a key.
CIPHERS: dict[int, Callable[[TripleDES, Mechanism, bool], ReadyCipher]] = {
    ck.CKM_DES3_ECB: _ecb,
    ck.CKM_DES3_CBC: _cbc,
    ck.CKM_DES3_CBC_PAD: _cbc_pad,
}
