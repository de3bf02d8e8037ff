"""Worker, launcher, key provider and supervisor die at random under load: no signature wrong or failed, nothing lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.host import Host
from support.killing import kill_under_load

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.mark.timeout(300)
def test_kills_under_load(host: Host, tmp_path: Path) -> None:
    name = f"victim-{os.getpid()}"
    report = kill_under_load(host, name, tmp_path, kills=12)
    print(report.summary())
    assert report.failed_signatures == []
    assert report.wrong_signatures == 0
    assert report.lost == []
    assert report.signatures > 500 and report.deliveries > 6
    assert max(report.recovery_s["worker"]) < 4
    assert max(report.recovery_s["supervisor"]) < 8
    assert report.left_behind == []
    assert all(report.kills.values())
