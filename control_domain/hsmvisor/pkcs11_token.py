"""A session in a PKCS #11 token (an HSM, or SoftHSM2), and what goes wrong there in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import exceptions as failures

_WRONG_PIN = (failures.PinIncorrect, failures.PinInvalid, failures.PinLenRange, failures.PinLocked, failures.PinExpired)


class TokenFault(Exception):
    """The message names the token, its library, and what failed.  `pin`: it does not take the PIN, and may count attempts."""

    def __init__(self, detail: str, pin: bool = False) -> None:
        super().__init__(detail)
        self.pin = pin


@contextlib.contextmanager
def session(library: Path, token: str, pin: str, rw: bool = False) -> Iterator[Any]:
    """A session of the user's with `token`, by its label.  Raises TokenFault, for what fails in the session too."""
    where = f"token {token!r} in {library}"
    try:
        with pkcs11.lib(str(library)).get_token(token_label=token).open(rw=rw, user_pin=pin) as opened:
            yield opened
    except _WRONG_PIN as error:
        raise TokenFault(f"{where} does not take the PIN ({type(error).__name__})", pin=True) from None
    except failures.NoSuchToken:
        raise TokenFault(f"{where} is not there") from None
    except failures.PKCS11Error as error:
        why = type(error).__name__ if type(error) is not failures.PKCS11Error else error  # the loader's words
        raise TokenFault(f"{where} failed: {why}") from None
