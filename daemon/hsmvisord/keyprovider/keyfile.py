"""A master key in memory, and the files that it comes from: written whole or not at all, and readable by nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_SIZE = 32


class SourceError(Exception):
    """There is no master key to be had; the message says why and what to do."""


class HeldKey:
    """HKDF-SHA256 (RFC 5869) derives; the key is never shown."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def derive(self, info: bytes) -> bytes:
        return HKDF(hashes.SHA256(), KEY_SIZE, salt=None, info=info).derive(self._key)


def write(path: Path, data: bytes) -> None:
    """Returns when it is on the disk.  Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_private(path: Path) -> bytes:
    """Raises SourceError, also where others may read it."""
    try:
        mode = path.stat()
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"the master key {path} cannot be read: {error.strerror}") from None
    if stat.S_IMODE(mode.st_mode) & 0o077:
        raise SourceError(f"others may read the master key {path}: chmod 600 it, and think of who may have read it")
    return data


def read(path: Path) -> bytes:
    """A key in the clear.  Raises SourceError."""
    key = read_private(path)
    if len(key) != KEY_SIZE:
        raise SourceError(f"the master key {path} has {len(key)} bytes instead of {KEY_SIZE}: restore it from the backup")
    return key
