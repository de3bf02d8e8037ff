"""The issuer's own secrets, in files that their owner alone may read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hsmvisor.files import OthersRead, read_private, write_private
from hsmvisor.manager.issuer import limits
from hsmvisor_rpc.sealed.envelope import PRIVATE_SIZE, RecipientKey


class BadFile(Exception):
    """The message says what is wrong with the file, and what to do."""


def kept_secret(path: Path, size: int, make: Callable[[], bytes], what: str) -> bytes:
    """Returns the file's bytes; a file that is missing is made.  Raises BadFile."""
    try:
        if not path.exists():
            write_private(path, make())
        found = _read(path, what)
    except OSError as error:
        raise BadFile(f"{what} in {path}: {error.strerror}") from None
    if len(found) != size:
        raise BadFile(f"{what} in {path} has {len(found)} bytes instead of {size}: restore it from the backup")
    return found


def recipient_key(path: Path) -> RecipientKey:
    """To which owners seal.  Raises BadFile."""
    return RecipientKey(kept_secret(path, PRIVATE_SIZE, lambda: RecipientKey().private_bytes(), "the issuer's key"))


def pin(path: Path) -> str:
    """The file's one line.  Raises BadFile."""
    try:
        found = _read(path, "the PIN")
        text = found.decode().removesuffix("\n")
    except OSError as error:
        raise BadFile(f"the PIN's file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadFile(f"the PIN's file {path} is not UTF-8 text") from None
    if not text or "\n" in text or len(found) > limits.MAX_PIN:
        raise BadFile(f"the PIN's file {path} has one line of 1 to {limits.MAX_PIN} bytes")
    return text


def _read(path: Path, what: str) -> bytes:
    """Raises OSError, BadFile."""
    try:
        return read_private(path)
    except OthersRead:
        raise BadFile(f"others may read {what} in {path}: chmod 600 it, and think of who may have read it") from None
