"""The audit log: every line is kept, and every way to tamper with it is found and placed."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hsmvisor.host.identity import HostIdentity
from hsmvisor.serving import audit as module
from hsmvisor.serving.audit import Audit, seal_line
from hsmvisor.serving.audit_verify import Verdict, verify
from hsmvisor.serving.errors import Broken, Unavailable

HOST = HostIdentity(bytes(range(32)))


def write(path: Path, work: Callable[[Audit], Awaitable[None]], **options: float) -> None:
    async def run() -> None:
        settings = {"rotate_bytes": 10**9, "checkpoint_lines": 1000, "checkpoint_seconds": 1000.0, **options}
        audit = Audit(path, HOST.sign, service="host", **settings)  # type: ignore[arg-type]
        audit.start()
        try:
            await work(audit)
        finally:
            await audit.close()

    asyncio.run(run())


async def ten(audit: Audit) -> None:
    for i in range(10):
        await audit.record("test", who="me", number=i)


def check(path: Path) -> Verdict:
    return verify(path, HOST.public)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.log"
    write(path, ten)
    assert check(path).sound
    return path


def change(path: Path, edit: Callable[[list[str]], list[str]]) -> list[str]:
    """Edits the lines; returns what the verifier finds."""
    path.write_text("".join(line + "\n" for line in edit(path.read_text().splitlines())))
    return [f.what for f in check(path).findings]


def test_lines_are_chained_and_end_with_a_checkpoint(log: Path) -> None:
    verdict = check(log)
    assert (verdict.lines, verdict.first, verdict.last, verdict.checkpoints, verdict.signed_until) == (11, 1, 11, 1, 11)
    values = [json.loads(line) for line in log.read_text().splitlines()]
    assert [v["seq"] for v in values] == list(range(1, 12))
    assert all(b["prev"] == a["hash"] for a, b in itertools.pairwise(values))
    assert oct(log.stat().st_mode & 0o777) == "0o600"


def test_a_changed_line_is_found(log: Path) -> None:
    what = change(log, lambda lines: [*lines[:4], lines[4].replace('"number":4', '"number":5'), *lines[5:]])
    assert what == ["line 5 was changed: its hash does not fit its bytes"]


def test_a_changed_line_with_a_new_hash_is_found(log: Path) -> None:
    def edit(lines: list[str]) -> list[str]:
        values = json.loads(lines[4])
        del values["hash"]
        values["number"] = 99
        return [*lines[:4], seal_line(values)[0], *lines[5:]]

    assert change(log, edit) == ["line 6 does not follow line 5: one of them was replaced"]


def test_a_removed_line_is_found(log: Path) -> None:
    assert change(log, lambda lines: lines[:4] + lines[6:]) == ["lines 5 to 6 were removed"]


def test_reordered_lines_are_found(log: Path) -> None:
    what = change(log, lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]])
    assert any("reordered" in w for w in what)


def test_a_repeated_line_is_found(log: Path) -> None:
    assert change(log, lambda lines: [*lines[:3], lines[2], *lines[3:]]) == ["line 3 stands after line 3: reordered or repeated"]


def test_an_inserted_line_is_found(log: Path) -> None:
    what = change(log, lambda lines: [*lines[:3], '{"seq":4,"at":"","kind":"x","prev":"","hash":""}', *lines[3:]])
    assert what


@pytest.mark.parametrize("kept", [0, 1, 5, 10])
def test_lines_cut_off_at_the_end_are_found(log: Path, kept: int) -> None:
    assert change(log, lambda lines: lines[:kept]) == [f"the log ends with line {kept}; lines up to 11 were cut off"]


def test_a_line_cut_in_the_middle_is_found(log: Path) -> None:
    os.truncate(log, log.stat().st_size - 10)
    what = [f.what for f in check(log).findings]
    assert any("cut off after" in w for w in what)


def test_a_rewritten_chain_is_found_by_its_checkpoint(log: Path) -> None:
    def edit(lines: list[str]) -> list[str]:
        made, prev = [], "0" * 64
        for line in lines:
            values = json.loads(line)
            del values["hash"]
            values["prev"] = prev
            if values.get("number") == 3:
                values["who"] = "somebody else"
            text, prev = seal_line(values)
            made.append(text)
        return made

    assert "the checkpoint in line 11 is not signed by this host's key" in change(log, edit)


def test_another_hosts_log_is_not_ours(log: Path) -> None:
    other = HostIdentity(bytes(32))
    assert not verify(log, other.public).sound


def test_a_missing_head_is_said(log: Path) -> None:
    log.with_name("audit.log.head").unlink()
    assert "cannot be told" in check(log).findings[0].what


def test_what_was_cut_off_before_a_start_is_said_by_the_chain_itself(log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]))
    write(log, ten)
    findings = check(log).findings
    assert [f.what for f in findings] == ["lines up to 11 had been cut off when the host service began"]
    assert findings[0].sequence == 6


def test_a_torn_last_line_is_cut_off_and_said(log: Path) -> None:
    with open(log, "a") as file:
        file.write('{"seq":12,"at":"20')
    write(log, ten)
    verdict = check(log)
    assert verdict.sound, verdict.findings
    values = [json.loads(line) for line in log.read_text().splitlines()]
    assert (values[11]["kind"], values[11]["torn_bytes"]) == ("audit.recovered", 18)


def test_a_last_line_that_is_nonsense_is_not_written_over(log: Path) -> None:
    with open(log, "a") as file:
        file.write("nonsense\n")
    before = log.read_bytes()
    with pytest.raises(Broken) as caught:
        write(log, ten)
    assert caught.value.reason == "AUDIT_DAMAGED"
    assert log.read_bytes() == before


def test_rotation_keeps_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"

    async def many(audit: Audit) -> None:
        for i in range(60):
            await audit.record("test", who="me", number=i)

    write(path, many, rotate_bytes=3000)
    files = module.rotated(path)
    assert len(files) > 3
    verdict = check(path)
    assert verdict.sound, verdict.findings
    assert verdict.first == 1 and verdict.last >= 60
    files[1].unlink()
    assert "were removed" in check(path).findings[0].what
    write(path, ten)  # and it goes on
    files[0].unlink()
    assert check(path).first > 1


def test_checkpoints_come_by_lines_and_by_time(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, ten, checkpoint_lines=3)
    assert check(path).checkpoints == 4

    async def slow(audit: Audit) -> None:
        await audit.record("test", who="me")
        await asyncio.sleep(0.3)

    other = tmp_path / "other.log"
    write(other, slow, checkpoint_seconds=0.1)
    assert check(other).checkpoints == 1  # nothing new, no new one


def test_many_at_once_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), real(fd))[1])

    async def many(audit: Audit) -> None:
        await asyncio.gather(*(audit.record("test", who="me", number=i) for i in range(500)))

    path = tmp_path / "audit.log"
    write(path, many)
    assert check(path).lines == 501
    assert len(synced) < 50


def test_a_full_disk_loses_no_line_and_acknowledges_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY", 0.05)
    path = tmp_path / "audit.log"
    full = []
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        if full:
            real(descriptor, bytes(data)[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    async def work(audit: Audit) -> None:
        await audit.record("before", who="me")
        full.append(1)
        monkeypatch.setattr(os, "write", short)
        with pytest.raises(Unavailable):
            await audit.record("during", who="me")
        with pytest.raises(Unavailable):
            audit.demand_working()
        assert check(path).lines == 1
        full.clear()
        await asyncio.sleep(0.2)
        await audit.record("after", who="me")

    write(path, work)
    assert check(path).sound, check(path).findings
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["before", "during", "after", "checkpoint"]


def test_lines_that_found_no_room_are_counted_in_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 10)

    async def work(audit: Audit) -> None:
        for i in range(15):
            audit.note("told", number=i)
        await asyncio.sleep(0.2)
        await audit.record("after", who="me")

    write(tmp_path / "audit.log", work)
    values = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert [v["kind"] for v in values] == ["told"] * 10 + ["audit.dropped", "after", "checkpoint"]
    assert values[10]["count"] == 5
