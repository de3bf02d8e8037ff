"""The systemd units: systemd itself finds nothing wrong, and they keep the promises that the services rely on."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import hsmvisor.host
import hsmvisor.manager
import pytest

UNIT = Path(hsmvisor.host.__file__).parent / "hsmvisor-host.service"
MANAGER = Path(hsmvisor.manager.__file__).parent / "hsmvisor-manager.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", [UNIT, MANAGER], ids=lambda unit: unit.stem)
def test_systemd_analyze_verify(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(f"/usr/bin/{unit.stem}", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def section(path: Path) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(path)
    return unit["Service"]


def test_a_managers_secrets_are_its_own() -> None:
    service = section(MANAGER)
    assert service["Type"] == "notify"
    assert service["StateDirectoryMode"] == "0700"
    assert (service["LimitCORE"], service["MemorySwapMax"]) == ("0", "0")


def test_workers_outlive_the_service_and_keep_their_sockets() -> None:
    service = section(UNIT)
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["StateDirectoryMode"] == "0700"
    assert service["LimitCORE"] == "0"
