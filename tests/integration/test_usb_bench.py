"""scripts/bench usb, with the least that it can measure: every call is answered by every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.guest import REPOSITORY

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

QEMU = "qemu"  #: QEMU's own card, which now and then does not answer (scripts/benchlib/qemu_card.py)


def test_all_is_measured_and_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchlib.bench", "usb", "--rounds", "1", "--seconds", "0.1", "--output", str(tmp_path)]
    paths = os.pathsep.join([str(REPOSITORY / "scripts"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "bench.json").read_text())["usb"]
    assert len(measured["rows"]) == 35
    for row in measured["rows"]:
        assert row["calls"] > 0 or row["way"] == QEMU, row
        assert not row["failed"] or row["way"] == QEMU, row
    assert (tmp_path / "bench.md").read_text() == done.stdout.removesuffix("\n")
    shown = [line for line in done.stdout.splitlines() if line.startswith("| ") and " | usbredir " in line]
    assert len(shown) == 13
    assert "in a guest, round 1/1" in done.stderr, "what takes long says that it goes on"
