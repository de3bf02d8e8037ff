"""AES-GCM (NIST SP 800-38D) with an IV of any length, composed of the GCM, CTR and ECB that `cryptography` has.

`cryptography` takes IVs of 8 to 128 bytes; CK_GCM_PARAMS has no such bounds.  Such IVs are rare, so this is short and not fast.
"""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE = bytes(12)
_COUNTERS = 1 << 32


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(len(one))


class Gcm:
    """`more` is the additional authenticated data; a tag has 16 bytes until it is cut."""

    def __init__(self, algorithm: algorithms.AES, iv: bytes) -> None:
        self._algorithm, self._gcm = algorithm, AESGCM(bytes(algorithm.key))
        self._first = self._ghash(b"", iv)  # J0 (7.1, step 2): the IV stands where the ciphertext stands otherwise

    def encrypt(self, data: bytes, more: bytes, size: int) -> bytes:
        """Returns the ciphertext and its tag of `size` bytes."""
        sealed = self._counted(data)
        return sealed + self.tag(sealed, more)[:size]

    def decrypt(self, data: bytes, more: bytes, size: int) -> bytes:
        """Raises InvalidTag."""
        sealed, tag = data[:-size], data[-size:]
        if not hmac.compare_digest(self.tag(sealed, more)[:size], tag):
            raise InvalidTag
        return self._counted(sealed)

    def tag(self, sealed: bytes, more: bytes) -> bytes:
        return _xor(self._ghash(more, sealed), self._block(self._first))

    def _block(self, block: bytes) -> bytes:
        return Cipher(self._algorithm, modes.ECB()).encryptor().update(block)

    def _ghash(self, more: bytes, sealed: bytes) -> bytes:
        """Returns GHASH (6.4) of both with their lengths: a tag of GCM under an IV whose keystream is known and taken off again."""
        stream = self._gcm.encrypt(_NONCE, bytes(len(sealed)), None)[:-16]
        tag = self._gcm.encrypt(_NONCE, _xor(sealed, stream), more)[-16:]
        return _xor(tag, self._block(_NONCE + (1).to_bytes(4)))

    def _counted(self, data: bytes) -> bytes:
        """GCTR (6.5) from inc32(J0) on: the last four bytes alone count, and come back to 0."""
        head, counter = self._first[:12], (int.from_bytes(self._first[12:]) + 1) % _COUNTERS
        out = b""
        while True:
            part = data[len(out) : len(out) + 16 * (_COUNTERS - counter)]
            out += Cipher(self._algorithm, modes.CTR(head + counter.to_bytes(4))).encryptor().update(part)
            if len(out) == len(data):
                return out
            counter = 0
