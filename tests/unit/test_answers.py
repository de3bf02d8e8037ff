"""A change in whose way others are is carried out again; one that another manager made is answered as that one answered it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hsmvisor.manager import answers
from hsmvisor.manager.store.database import Conflict, IntegrityError

REQUEST: Any = object()


class Answers(answers.Answers):
    def __init__(self, earlier: bytes | None = None) -> None:
        self._earlier = earlier

    async def answer(self, request: Any) -> bytes | None:
        return self._earlier


def carried_out(failures: list[Exception], earlier: bytes | None = None) -> tuple[bytes, int]:
    """Returns the answer, and how many attempts it took."""
    attempts = 0

    async def work() -> bytes:
        nonlocal attempts
        attempts += 1
        if failures:
            raise failures.pop(0)
        return b"done"

    return asyncio.run(Answers(earlier).quickest(REQUEST, work)), attempts


def test_what_others_were_in_the_way_of_is_carried_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_PAUSES", (0.0, 0.0))
    assert carried_out([]) == (b"done", 1)
    assert carried_out([Conflict("deadlock"), Conflict("deadlock")]) == (b"done", 3)
    with pytest.raises(Conflict):
        carried_out([Conflict("deadlock")] * 3)


def test_another_manager_was_quicker() -> None:
    assert carried_out([IntegrityError("", {}, Exception())], b"theirs") == (b"theirs", 1)
    with pytest.raises(IntegrityError):  # something else is there twice
        carried_out([IntegrityError("", {}, Exception())])
