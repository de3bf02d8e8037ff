"""What the keystore answers, as the return values that a program sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.keystore import pin
from hsmvisord.keystore.keystore import StorageError


@contextmanager
def stored() -> Iterator[None]:
    """A change that could not be written is CKR_DEVICE_ERROR."""
    try:
        yield
    except StorageError as error:
        raise CkError(ck.CKR_DEVICE_ERROR, str(error)) from None


def bounded(attempt: bytes) -> bytes:
    """Returns b"", which is never the PIN and counts like any other, for a length that no PIN has."""
    return attempt if pin.MIN_PIN <= len(attempt) <= pin.MAX_PIN else b""


def judge(right: bool | None) -> None:
    """Raises CKR_PIN_LOCKED for None (the attempt was not taken), CKR_PIN_INCORRECT for False."""
    if right is None:
        raise CkError(ck.CKR_PIN_LOCKED, "too many wrong PINs: wait")
    if not right:
        raise CkError(ck.CKR_PIN_INCORRECT)
