"""AES-MAC (PKCS#11 3.1, 6.13.5; FIPS 113): CBC from an IV of zeros over the data, filled up with zeros; its last block, cut.

Messages of different lengths under one key can be made to have one MAC: CMAC is the one to use.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hsmvisord import ck
from hsmvisord.crypto.macs import Mac, size_of
from hsmvisord.wire.calls import Mechanism

MACS = (ck.CKM_AES_MAC, ck.CKM_AES_MAC_GENERAL)
_BLOCK = 16
_USUAL = 8  #: bytes of CKM_AES_MAC: half a block


class _Context:
    __slots__ = ("_encryptor", "_last", "_taken")

    def __init__(self, algorithm: algorithms.AES) -> None:
        self._encryptor = Cipher(algorithm, modes.CBC(bytes(_BLOCK))).encryptor()
        self._last, self._taken = b"", 0

    def update(self, data: bytes) -> None:
        self._taken += len(data)
        self._last = self._encryptor.update(data)[-_BLOCK:] or self._last

    def digest(self) -> bytes:
        if self._taken % _BLOCK or not self._taken:
            self.update(bytes(_BLOCK - self._taken % _BLOCK))
        return self._last


def mac(algorithm: algorithms.AES, mechanism: Mechanism) -> Mac:
    general = mechanism.type == ck.CKM_AES_MAC_GENERAL
    size = size_of(mechanism, _BLOCK if general else _USUAL, general)
    return Mac(lambda: _Context(algorithm), lambda context: bytes(context.digest()), size)
