"""Where the master key lives: a file today; a TPM, which unseals it, and an HSM, which derives inside, have the same interface."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_SIZE = 32


class SourceError(Exception):
    """There is no master key to be had; the message says why and what to do."""


class KeySource(Protocol):
    """A master key that stays inside: what an HSM keeps need never come out of it."""

    def derive(self, info: bytes) -> bytes:
        """Returns the KEY_SIZE bytes that belong to `info`: always the same, and those of one tell nothing of another's.
        Raises SourceError."""
        ...


class FileSource:
    """A file of KEY_SIZE random bytes that its owner alone may read; HKDF-SHA256 (RFC 5869) derives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if not path.exists():
                self._create()
        except OSError as error:
            raise SourceError(f"the master key cannot be made in {path}: {error.strerror}") from None
        self._key = self._read()

    def __repr__(self) -> str:
        return "FileSource()"

    def derive(self, info: bytes) -> bytes:
        return HKDF(hashes.SHA256(), KEY_SIZE, salt=None, info=info).derive(self._key)

    def _create(self) -> None:
        temporary = self._path.with_name(self._path.name + ".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, os.urandom(KEY_SIZE))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _read(self) -> bytes:
        try:
            mode = self._path.stat()
            key = self._path.read_bytes()
        except OSError as error:
            raise SourceError(f"the master key {self._path} cannot be read: {error.strerror}") from None
        if stat.S_IMODE(mode.st_mode) & 0o077:
            raise SourceError(f"others may read the master key {self._path}: chmod 600 it, and think of who may have read it")
        if len(key) != KEY_SIZE:
            raise SourceError(f"the master key {self._path} has {len(key)} bytes instead of {KEY_SIZE}: restore it from the backup")
        return key


SOURCES: dict[str, Callable[[Path], KeySource]] = {"file": FileSource}
