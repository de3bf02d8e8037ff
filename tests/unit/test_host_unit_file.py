"""The systemd unit: systemd itself finds nothing wrong, and it keeps the promises that the service relies on."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import hsmvisor.host
import pytest

UNIT = Path(hsmvisor.host.__file__).parent / "hsmvisor-host.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_analyze_verify(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/bin/hsmvisor-host", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_outlive_the_service_and_keep_their_sockets() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["StateDirectoryMode"] == "0700"
    assert service["LimitCORE"] == "0"
