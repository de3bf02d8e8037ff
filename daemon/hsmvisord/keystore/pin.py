"""The operator's PIN for slot 0: a salted verifier, wrong ones counted and slowed, across restarts.

From the third wrong PIN on, the token is locked for a time that doubles with each further one, up to five minutes;
the right PIN then sets the count back.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import replace

from hsmvisord.keystore.state import Pin

MIN_PIN = 4  #: bytes
MAX_PIN = 64
FREE_ATTEMPTS = 3
MAX_DELAY = 300  #: seconds
_COST = {"n": 2**12, "r": 8, "p": 1}  # 4 MiB and about 10 ms an attempt: what a guest can make a worker spend


def make(pin: bytes) -> Pin:
    salt = os.urandom(16)
    return Pin(salt, _derive(pin, salt))


def _derive(pin: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(pin, salt=salt, dklen=32, **_COST)


def matches(pin: Pin, attempt: bytes) -> bool:
    return hmac.compare_digest(pin.verifier, _derive(attempt, pin.salt))


def locked_until(pin: Pin) -> int:
    """Returns the second at which the next attempt is taken; 0 = at once."""
    if pin.failures < FREE_ATTEMPTS:
        return 0
    return pin.failed_at + min(1 << min(pin.failures - FREE_ATTEMPTS, 20), MAX_DELAY)


def failed(pin: Pin, now: int) -> Pin:
    return replace(pin, failures=pin.failures + 1, failed_at=now)


def succeeded(pin: Pin) -> Pin:
    return replace(pin, failures=0, failed_at=0)
