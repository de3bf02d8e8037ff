"""A TPM's state as its host keeps it: sealed (AES-256-GCM) for one module, one version."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_SIZE = 32  #: bytes
_NONCE, _TAG = 12, 16
OVERHEAD = _NONCE + _TAG  #: bytes that a sealed state has more


class NotOpened(Exception):
    """It is another module's, another version, or it was changed."""


@dataclass(frozen=True)
class Keys:
    """What is made of the key provider's key, each for one use (RFC 5869)."""

    stored: bytes = field(repr=False)
    blobs: bytes = field(repr=False)
    successor: bytes = field(repr=False)


def keys(of_provider: bytes) -> Keys:
    return Keys(
        *(HKDF(SHA256(), KEY_SIZE, None, b"hsmvisor TPM " + use).derive(of_provider) for use in (b"stored", b"blobs", b"successor"))
    )


class Sealer:
    """`kind`: what it is, so that no other thing of the module opens in its place."""

    def __init__(self, key: bytes, module_id: bytes, kind: bytes) -> None:
        self._key, self._bound = AESGCM(key), kind + b"\0" + module_id

    def seal(self, version: int, data: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._key.encrypt(nonce, data, self._with(version))

    def open(self, version: int, sealed: bytes) -> bytes:
        """Raises NotOpened."""
        try:
            return self._key.decrypt(sealed[:_NONCE], sealed[_NONCE:], self._with(version))
        except (InvalidTag, ValueError):
            raise NotOpened(f"the stored state of the TPM does not open as version {version}") from None

    def _with(self, version: int) -> bytes:
        return self._bound + version.to_bytes(8, "big")
