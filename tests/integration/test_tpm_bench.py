"""scripts/bench tpm, with the least that it can measure: every command, by both programs; a command that is slower is said, and is
the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.guest import REPOSITORY

pytestmark = [pytest.mark.real, pytest.mark.slow]

sys.path.insert(0, str(REPOSITORY / "scripts"))
from benchlib import bench, tpm  # noqa: E402


def test_all_is_measured_and_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchlib.bench", "tpm", "--rounds", "1", "--seconds", "0.2", "--output", str(tmp_path)]
    paths = os.pathsep.join([str(REPOSITORY / "scripts"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=110, check=False)
    missed = "MISSED" in done.stdout
    assert done.returncode == missed, done.stderr  # how quick it is, is not this test's question
    results = json.loads((tmp_path / "bench.json").read_text())
    measured = results["tpm"]
    assert [row["call"] for row in measured["calls"]] == list(tpm.CALLS)
    for row in measured["calls"]:
        for place in (tpm.APART, tpm.TOGETHER):
            assert min(row[place].values()) > 0
    assert 0 < measured["memory"]["swtpm"] < measured["memory"]["ours"] < 64 << 20
    assert (tmp_path / "bench.md").read_text() == done.stdout.removesuffix("\n")
    for row, ratio in zip(measured["calls"], (1.0, *[0.5] * 9), strict=False):
        row[tpm.APART]["ratio"] = ratio
    text, met = bench.written(results)
    assert not met and f"MISSED: {', '.join(list(tpm.CALLS)[1:])}." in "\n".join(text)
