"""A TPM's state as it leaves its process: always sealed (AES-256-GCM), for QEMU asks for it in the clear, and whoever has QEMU
would have every key."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_MAGIC = b"hsmvisor TPM blob 2\0"
_NONCE, _TAG = 12, 16
CAPTURE = 16  #: bytes that name a capture: blobs of several kinds, of one moment
_SEALED = len(_MAGIC) + CAPTURE + _NONCE  #: where what is sealed begins
OVERHEAD = _SEALED + _TAG  #: bytes that a sealed blob has more


class BadBlob(Exception):
    """It is none of this module's, not of this kind, or it was changed."""


class Blobs:
    def __init__(self, key: bytes, module_id: bytes) -> None:
        """`key`: 32 bytes, of this module's TPM alone, the same on whichever host the module is."""
        self._key, self._module_id = AESGCM(key), module_id

    def seal(self, kind: int, capture: bytes, data: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return _MAGIC + capture + nonce + self._key.encrypt(nonce, data, self._bound(kind, capture))

    def open(self, kind: int, sealed: bytes) -> tuple[bytes, bytes]:
        """Returns the capture and what it has.  Raises BadBlob."""
        if len(sealed) < OVERHEAD or not sealed.startswith(_MAGIC):
            raise BadBlob("it is not sealed")
        capture, nonce = sealed[len(_MAGIC) : _SEALED - _NONCE], sealed[_SEALED - _NONCE : _SEALED]
        try:
            return capture, self._key.decrypt(nonce, sealed[_SEALED:], self._bound(kind, capture))
        except InvalidTag:
            raise BadBlob("it is another module's, of another kind, or it was changed") from None

    def _bound(self, kind: int, capture: bytes) -> bytes:
        return _MAGIC + bytes([kind]) + capture + self._module_id
