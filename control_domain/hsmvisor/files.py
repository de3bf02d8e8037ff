"""Files that are whole and on the disk once they have their name, and files that their owner alone may read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class OthersRead(Exception):
    """Others than its owner may read a file, or write to it."""

    def __init__(self, path: Path, mode: int) -> None:
        super().__init__(f"others may read {path} (mode {mode:o})")


def _at_once(name: str, flags: int) -> int:
    """Opens a FIFO without waiting for who writes to it."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_private(path: Path, most: int = 65536) -> bytes:
    """Returns the file's first `most` bytes.  Raises OSError, OthersRead: the mode is that of the very file that is read."""
    with open(path, "rb", buffering=0, opener=_at_once) as file:  # no buffer keeps what was read
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if stat.S_IMODE(mode) & 0o077:
            raise OthersRead(path, stat.S_IMODE(mode))
        return file.read(most)


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that its owner alone may read, durably and whole or not at all.  Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Brings a file's bytes, or a directory's names, to the disk.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
