"""A manager's audit log is checked by those who have its key and what it printed, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import Command
from support.fleet_processes import Manager

pytestmark = [pytest.mark.real, pytest.mark.slow]
FAILURE, USAGE = 1, 2


def test_what_a_manager_exported_is_verified_with_its_key(tmp_path: Path) -> None:
    command = Command("unix:/nowhere", tmp_path / "authority")
    with Manager() as manager:
        at = {"HSMVISOR_MANAGER": f"unix:{manager.socket}"}
        for number in range(3):
            command("fleet", "host", "token", "--for", f"rack{number}", **at)
        manager.stop()  # the end of a log is signed
        manager.start()
        key = command("fleet", "whoami", **at).splitlines()[-1].split()[-1]
        file = tmp_path / "manager.audit"
        file.write_text(command("fleet", "audit", "export", **at))
    asked = ("audit", "verify", "--service", "manager", "--exported")
    assert "the log is whole" in command(*asked, "--host-key", key, file)
    command(*asked, file, code=USAGE)
    assert "whoami" in command.errors
    assert "this manager's key" in command(*asked, "--host-key", "11" * 32, file, code=FAILURE)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[2:]))
    assert "removed" in command(*asked, "--host-key", key, file, code=FAILURE)
