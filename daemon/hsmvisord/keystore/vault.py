"""Sealed state: each record AES-256-GCM under the module's storage key, bound to module, name and version.

A blob is `u64 version, 12 bytes nonce, ciphertext`.  The meta record lists the version of every other record, those of objects by
pages that list them, so records of different commits cannot be mixed.  An older copy of the whole state opens: that is noticed by
the manager, which knows the sequence number it has reached (DESIGN "Secrets and trust").
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hsmvisor_rpc.sealed.canonical import Record

KEY_SIZE = 32
META = "meta"
_NONCE = 12


class UnsealError(Exception):
    """The stored state does not open or is not whole; the message says which record and never shows content."""


@dataclass(frozen=True)
class SealContext(Record):
    """Associated data of one sealed record."""

    TYPE: ClassVar[str] = "seal-context"
    module_id: bytes
    name: str
    version: int


class Vault:
    """Seals and opens the records of one module.  Its repr shows nothing."""

    def __init__(self, module_id: bytes, storage_key: bytes) -> None:
        self._module_id = module_id
        self._aead = AESGCM(storage_key)

    def seal(self, name: str, version: int, plain: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        context = SealContext(self._module_id, name, version).encode()
        return version.to_bytes(8, "big") + nonce + self._aead.encrypt(nonce, plain, context)

    def open(self, name: str, blob: bytes, version: int | None = None) -> bytes:
        """Returns the plaintext; `version` is the one the manifest demands.  Raises UnsealError."""
        found = int.from_bytes(blob[:8], "big")
        if version is not None and found != version:
            raise UnsealError(f"record {name!r} has version {found}, the state expects {version}")
        context = SealContext(self._module_id, name, found).encode()
        try:
            return self._aead.decrypt(blob[8 : 8 + _NONCE], blob[8 + _NONCE :], context)
        except (InvalidTag, ValueError):
            raise UnsealError(f"record {name!r} does not open: altered, of another module, or sealed with another key") from None


@dataclass(frozen=True)
class Manifest:
    """The version of every record."""

    records: Mapping[str, int] = field(default_factory=dict)  #: of all but the meta record and objects
    pages: Mapping[int, Mapping[int, int]] = field(default_factory=dict)  #: page -> handle -> version of its record


def check_missing(wanted: Iterable[str], blobs: Mapping[str, bytes]) -> None:
    """Raises UnsealError when records are missing."""
    if missing := set(wanted) - set(blobs):
        raise UnsealError(f"{len(missing)} records of the state are missing, among them {min(missing)!r}")


def check_strange(wanted: Iterable[str], blobs: Mapping[str, bytes]) -> None:
    """Raises UnsealError when there are records that do not belong to the state."""
    if strange := set(blobs) - {META} - set(wanted):
        raise UnsealError(f"{len(strange)} records do not belong to the state, among them {min(strange)!r}")
