"""The audit log of a manager: whole while it is written, whole in an export, and a byte that was changed is found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor.serving.audit_verify import verify
from support.command import Command
from support.manager_process import ManagerProcess, exchange, guest

OK, FAILURE = 0, 1


class Log:
    """A manager's log, once it has done something; `told`: the command line."""

    def __init__(self, manager: ManagerProcess, directory: Path) -> None:
        self.manager, self._command, self._directory = manager, Command("", directory / "authority"), directory
        manager.join_token("alpha", request_id="known")
        host = manager.join("beta")
        exchange(host.stubs(manager), guests=[guest("web-1", env="prod")])
        manager.token("ann")
        self.path = manager.state / "audit.log"
        self.key = manager.local.who().audit_key

    def told(self, *words: str | Path, code: int = OK) -> str:
        environment = {"HSMVISOR_MANAGER": f"unix:{self.manager.socket}", "XDG_CONFIG_HOME": str(self._directory)}
        return self._command(*words, code=code, **environment)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    with ManagerProcess("[audit]\ncheckpoint_lines = 2") as manager:
        yield Log(manager, tmp_path_factory.mktemp("auditor"))


def test_it_is_whole_while_the_manager_runs_and_after_it_was_started_again(log: Log) -> None:
    before = verify(log.path, log.key, service="manager")
    assert before.sound and before.lines > 3 and before.checkpoints, before.findings
    kinds = [json.loads(line)["kind"] for line in log.manager.audit().splitlines()]
    assert {"manager.start", "fleet.create-join-token", "checkpoint"} <= set(kinds), kinds
    log.manager.restart()
    after = verify(log.path, log.key, service="manager")
    assert after.sound and after.lines > before.lines, after.findings
    assert log.key.hex() in log.told("fleet", "whoami"), "there an auditor finds the key"


def test_the_command_line_says_so(log: Log, tmp_path: Path) -> None:
    key = ("--host-key", log.key.hex())
    assert "the log is whole: lines 1 to" in log.told("audit", "verify", log.path, *key)
    exported = tmp_path / "exported"
    exported.write_text(log.told("fleet", "audit", "export"))
    assert "the log is whole: lines 1 to" in log.told("audit", "verify", exported, *key, "--exported")
    lines = exported.read_text().splitlines(keepends=True)
    exported.write_text("".join(lines[:2] + lines[3:]))
    assert "lines 3 to 3 were removed" in log.told("audit", "verify", exported, *key, "--exported", code=FAILURE)
    assert "is not signed by" in log.told("audit", "verify", log.path, "--host-key", os.urandom(32).hex(), code=FAILURE)


def test_a_byte_that_was_changed_is_found_at_its_line(log: Log, tmp_path: Path) -> None:
    whole, copy = log.path.read_bytes(), tmp_path / "audit.log"
    (tmp_path / "audit.log.head").write_bytes(log.path.with_name("audit.log.head").read_bytes())
    ends = [position for position, byte in enumerate(whole) if byte == ord("\n")]
    for line, end in enumerate(ends, 1):
        changed = bytearray(whole)
        changed[(end + (ends[line - 2] if line > 1 else 0)) // 2] ^= 1
        copy.write_bytes(changed)
        verdict = verify(copy, log.key, service="manager")
        assert not verdict.sound and verdict.findings[0].line == line
    assert "was changed" in log.told("audit", "verify", copy, "--host-key", log.key.hex(), code=FAILURE)
    copy.write_bytes(whole[: ends[-2] + 1])
    assert "were cut off" in str(verify(copy, log.key, service="manager").findings[-1])
