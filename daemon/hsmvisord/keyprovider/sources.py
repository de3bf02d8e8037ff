"""Where the master key lives: a file, or the host's TPM, which unseals it.  An HSM, which derives, would have this interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from hsmvisord.keyprovider import keyfile
from hsmvisord.keyprovider.keyfile import KEY_SIZE, HeldKey, SourceError

KINDS = ("file", "tpm")


class KeySource(Protocol):
    """A master key that stays inside: what an HSM keeps need never come out of it."""

    def derive(self, info: bytes) -> bytes:
        """Returns the KEY_SIZE bytes that belong to `info`: always the same, and those of one tell nothing of another's.
        Raises SourceError."""
        ...


class FileSource(HeldKey):
    """A file of KEY_SIZE random bytes that its owner alone may read; made where it is missing."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError."""
        try:
            if not path.exists():
                keyfile.write(path, os.urandom(KEY_SIZE))
        except OSError as error:
            raise SourceError(f"the master key cannot be made in {path}: {error.strerror}") from None
        super().__init__(keyfile.read(path))
