"""Worker, launcher and supervisor die at random under load: no wrong signature, no failed one, nothing acknowledged is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.host import Host
from support.killing import kill_under_load
from support.processes import descendants

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host.start()
    finally:
        host.clean()


@pytest.mark.timeout(300)
def test_twenty_kills_under_load(host: Host, tmp_path: Path) -> None:
    name = f"victim-{os.getpid()}"
    report = kill_under_load(host, name, tmp_path, kills=20)
    print(report.summary())
    assert report.failed_signatures == []
    assert report.wrong_signatures == 0
    assert report.lost == []
    assert report.signatures > 1000 and report.deliveries > 10
    assert max(report.recovery_s["worker"]) < 4
    assert max(report.recovery_s["supervisor"]) < 8
    assert not [line for line in descendants(1).values() if f"hsmvisord: {name}" in line], (
        "a worker of a destroyed module is still there"
    )
