"""What slot 0 says of itself (PKCS#11 3.1, 3.2): fixed texts and numbers."""

from __future__ import annotations

from collections.abc import Callable

from hsmvisord import ck
from hsmvisord.keystore.state import GuestToken, Pin

MANUFACTURER = b"hsmvisor"
MODEL = b"hsmvisor"
LIBRARY = b"hsmvisor virtual HSM"
CRYPTOKI_VERSION = (3, 0)
VERSION = (0, 1)
MANAGED_SLOT = 0
GUEST_SLOT = 1

Version = tuple[int, int]


def padded(text: bytes, width: int) -> bytes:
    """Returns `text` blank padded to exactly `width` bytes, cut between UTF-8 characters."""
    cut = text[:width].decode("utf-8", "ignore").encode()
    return cut.ljust(width)


def library_info() -> tuple[Version, bytes, int, bytes, Version]:
    return CRYPTOKI_VERSION, padded(MANUFACTURER, 32), 0, padded(LIBRARY, 32), VERSION


def slot_info(module: str, present: bool) -> tuple[bytes, bytes, int, Version, Version]:
    flags = ck.CKF_REMOVABLE_DEVICE | ck.CKF_HW_SLOT | (ck.CKF_TOKEN_PRESENT if present else 0)
    return padded(f"hsmvisor module {module}".encode(), 64), padded(MANUFACTURER, 32), flags, VERSION, VERSION


def guest_slot_info(module: str) -> tuple[bytes, bytes, int, Version, Version]:
    name = padded(f"hsmvisor module {module}, own keys".encode(), 64)
    return name, padded(MANUFACTURER, 32), ck.CKF_TOKEN_PRESENT, VERSION, VERSION


def guest_token_flags(guest: GuestToken, locked: Callable[[Pin], bool]) -> int:
    flags = ck.CKF_RNG | ck.CKF_LOGIN_REQUIRED
    if not guest:
        return flags
    flags |= ck.CKF_TOKEN_INITIALIZED
    if guest.user:
        flags |= ck.CKF_USER_PIN_INITIALIZED
    for role, low, shut in (
        (guest.user, ck.CKF_USER_PIN_COUNT_LOW, ck.CKF_USER_PIN_LOCKED),
        (guest.so, ck.CKF_SO_PIN_COUNT_LOW, ck.CKF_SO_PIN_LOCKED),
    ):
        flags |= low * bool(role.failures) | shut * locked(role)
    return flags


def token_flags(pin_set: bool, failures: int, locked: bool) -> int:
    flags = ck.CKF_RNG | ck.CKF_WRITE_PROTECTED | ck.CKF_TOKEN_INITIALIZED | ck.CKF_USER_PIN_INITIALIZED
    if pin_set:
        flags |= ck.CKF_LOGIN_REQUIRED
        if failures:
            flags |= ck.CKF_USER_PIN_COUNT_LOW
        if locked:
            flags |= ck.CKF_USER_PIN_LOCKED
    return flags
