"""What a token's session says of what goes wrong, at its opening and inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from hsmvisor import pkcs11_token
from hsmvisor.pkcs11_token import TokenFault
from pkcs11 import exceptions as failures

WHERE = "token 'rack-7' in /lib/p11.so"


class Library:
    """One whose tokens fail to open, or open."""

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure

    def get_token(self, token_label: str) -> Library:
        assert token_label == "rack-7"
        return self

    @contextlib.contextmanager
    def open(self, rw: bool, user_pin: str) -> Iterator[str]:
        assert user_pin == "847362"
        if self._failure is not None:
            raise self._failure
        yield "session"


def opened(monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> Any:
    monkeypatch.setattr(pkcs11, "lib", lambda path: Library(failure))
    return pkcs11_token.session(Path("/lib/p11.so"), "rack-7", "847362")


@pytest.mark.parametrize(
    ("failure", "why", "pin"),
    [
        (failures.PinIncorrect(), "does not take the PIN (PinIncorrect)", True),
        (failures.PinLocked(), "does not take the PIN (PinLocked)", True),
        (failures.PinExpired(), "does not take the PIN (PinExpired)", True),
        (failures.NoSuchToken(), "is not there", False),
        (failures.DeviceError(), "failed: DeviceError", False),
        (failures.PKCS11Error("p11.so: cannot open shared object file"), "failed: p11.so: cannot open shared object file", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_fails_is_said_in_words(monkeypatch: pytest.MonkeyPatch, failure: Exception, why: str, pin: bool) -> None:
    with pytest.raises(TokenFault) as caught, opened(monkeypatch, failure):
        pass
    assert (str(caught.value), caught.value.pin) == (f"{WHERE} {why}", pin)
    with pytest.raises(TokenFault) as inside, opened(monkeypatch, None):
        raise failure
    assert str(inside.value) == str(caught.value)


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LookupError), opened(monkeypatch, None) as session:
        assert session == "session"
        raise LookupError
