"""The soak's parts that run tests do so as often as they are told to, and add up what failed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from support.guest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from benchlib import soak


@pytest.mark.parametrize(
    ("said", "code", "walks", "failed"),
    [("9 passed in 700 s", 0, 18, 0), ("2 failed, 6 passed, 1 error in 9 s", 1, 12, 6), ("Killed", -9, 0, 2)],
)
@pytest.mark.parametrize("part", ["fleet", "hosts", "ways"])
def test_each_round_counts(monkeypatch: pytest.MonkeyPatch, part: str, said: str, code: int, walks: int, failed: int) -> None:
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, said, "")

    monkeypatch.setattr(soak.subprocess, "run", run)
    found = getattr(soak, part)(2)
    assert found == {"rounds": 2, "tests" if part == "ways" else "walks": walks, "failed": failed} and len(asked) == 2
    assert bool(soak.judge({part: found})) == bool(failed)
