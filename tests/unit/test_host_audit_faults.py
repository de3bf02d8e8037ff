"""The audit log under every single fault: any edit is found at its line, a death or an error at any system call loses nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hsmvisor.host import database
from hsmvisor.host.identity import HostIdentity
from hsmvisor.serving import audit as audit_module
from hsmvisor.serving.audit import Audit, rotated
from hsmvisor.serving.audit_verify import Verdict, verify
from hsmvisor.serving.errors import ServiceError
from hypothesis import given, settings
from hypothesis import strategies as st

HOST = HostIdentity(bytes(range(32)))
LINES = 24


def check(path: Path, first: int = 1) -> Verdict:
    return verify(path, HOST.public, first=first)


def opened(path: Path) -> Audit:
    return Audit(path, HOST.sign, service="host", rotate_bytes=1500, checkpoint_lines=5, checkpoint_seconds=1000.0)


async def record_all(path: Path, acknowledged: Callable[[int], None], numbers: range = range(LINES)) -> None:
    audit = opened(path)
    audit.start()
    for number in numbers:
        while True:
            try:
                await audit.record("test", who="me", number=number)
                break
            except ServiceError:  # the line is kept and tried again: what comes of it is in the log
                await asyncio.sleep(0.002)
        acknowledged(number)
    await audit.close()


# ---- edits ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    file: str
    line: int


class Log:
    """A copy of one sound log of several files, to be edited."""

    def __init__(self, files: dict[str, bytes], directory: Path) -> None:
        self.path = directory / "audit.log"
        for name, data in files.items():
            (directory / name).write_bytes(data)
        self.names = [p.name for p in (*rotated(self.path), self.path)]
        self.lines = [(name, line) for name in self.names for line in files[name].splitlines(keepends=True)]

    def write(self, lines: list[tuple[str, bytes]]) -> None:
        for name in self.names:
            (self.path.parent / name).write_bytes(b"".join(line for at, line in lines if at == name))

    def place(self, lines: list[tuple[str, bytes]], index: int) -> Place:
        """Where the line `index` of all stands; behind the last one: line 0 of the file."""
        if index == len(lines):
            return Place(self.path.name, 0)
        return Place(lines[index][0], sum(name == lines[index][0] for name, _ in lines[:index]) + 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("audit") / "audit.log"
    asyncio.run(record_all(path, lambda number: None))
    assert check(path).sound, check(path).findings
    assert len(rotated(path)) >= 3
    return {p.name: p.read_bytes() for p in path.parent.iterdir()}


def found_at(log: Log) -> Place:
    findings = check(log.path).findings
    assert findings, "the edit is not found"
    return Place(findings[0].file, findings[0].line)


def edit(lines: list[tuple[str, bytes]], data: st.DataObject) -> tuple[list[tuple[str, bytes]], int]:
    """Returns the lines after one edit, and the index of the line that must be named."""
    index = data.draw(st.integers(0, len(lines) - 1), "line")
    kind = data.draw(st.sampled_from(["change", "remove", "swap", "repeat", "cut"]), "edit")
    name, line = lines[index]
    if kind == "change":
        at, value = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 255))
        changed = line[:at] + bytes([value]) + line[at + 1 :]
        return ([*lines[:index], (name, changed), *lines[index + 1 :]], index) if changed != line else (lines, -1)
    if kind == "remove":
        count = data.draw(st.integers(1, len(lines) - index))
        return lines[:index] + lines[index + count :], index
    if kind == "cut":
        at = data.draw(st.integers(1, len(line) - 1))
        return [*lines[:index], (name, line[:at])], index
    other = data.draw(st.integers(0, len(lines) - 1), "other line")
    if kind == "swap":
        first, second = sorted((index, other))
        if first == second:
            return lines, -1
        swapped = list(lines)
        swapped[first], swapped[second] = (lines[first][0], lines[second][1]), (lines[second][0], lines[first][1])
        return swapped, first
    # a second copy of line `index`, before the line `other`; right before itself it is the original that is one too many
    return [*lines[:other], (lines[other][0], line), *lines[other:]], other + (other == index)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_single_edit_is_found_at_its_line(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = Log(files, Path(directory))
        lines, index = edit(log.lines, data)
        log.write(lines)
        if index < 0:
            assert check(log.path).sound
        else:
            assert found_at(log) == log.place(lines, index)


@pytest.mark.parametrize("number", range(3))
def test_a_missing_file_is_found(files: dict[str, bytes], tmp_path: Path, number: int) -> None:
    log = Log(files, tmp_path)
    (tmp_path / log.names[number]).unlink()
    finding = check(log.path).findings[0]
    assert finding.file == log.names[number + 1] and finding.line == 1
    assert "were removed" in finding.what


def test_older_files_may_be_kept_elsewhere_when_that_is_said(files: dict[str, bytes], tmp_path: Path) -> None:
    log = Log(files, tmp_path)
    (tmp_path / log.names[0]).unlink()
    first = int(log.names[1].rpartition(".")[2])
    assert f"--first {first}" in check(log.path).findings[0].what
    assert check(log.path, first).sound
    assert not check(log.path, first - 1).sound


def test_a_line_that_was_moved_is_said_to_be_reordered(files: dict[str, bytes], tmp_path: Path) -> None:
    log = Log(files, tmp_path)
    log.write([*log.lines[:3], log.lines[4], log.lines[3], *log.lines[5:]])
    assert [f.what for f in check(log.path).findings] == [
        "lines 4 to 4 come later: reordered",
        "line 4 stands after line 5: reordered or repeated",
    ]


@pytest.mark.parametrize(
    "line", [b"[" * 100_000 + b"\n", b'{"seq":1e999,"prev":"","hash":""}\n', b'{"seq":' + b"9" * 5000 + b"}\n"]
)
def test_a_line_that_is_made_to_break_the_verifier_is_a_finding(files: dict[str, bytes], tmp_path: Path, line: bytes) -> None:
    log = Log(files, tmp_path)
    log.write([*log.lines[:3], (log.names[0], line), *log.lines[3:]])
    assert found_at(log) == Place(log.names[0], 4)


# ---- deaths and errors ----------------------------------------------------------------------------------------------

CALLS = ("open", "write", "pwrite", "fdatasync", "fsync", "rename", "ftruncate", "close")


class System:
    """The module `os` with a fault at its `number`th call: `fault` gets the call's name, the real function and the arguments."""

    def __init__(self, number: int, fault: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self._number, self._fault, self.count = number, fault, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self._number:
                return self._fault(name, real, arguments)
            return real(*arguments)

        return call


def with_system(system: System) -> None:
    audit_module.os = database.os = system  # type: ignore[attr-defined]


def die(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if name == "write":
        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
    os._exit(9)


def killed_at(path: Path, number: int) -> tuple[list[int], bool]:
    """A process that dies at its `number`th call; returns the lines that it acknowledged, and whether it came to its end."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with_system(System(number, die))
            asyncio.run(record_all(path, lambda n: os.write(write, bytes([n])) and None))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as stream:
        acknowledged = list(stream.read())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return acknowledged, status == 0


def numbers(path: Path) -> list[int]:
    data = b"".join(p.read_bytes() for p in (*rotated(path), path))
    return [values["number"] for values in map(json.loads, data.splitlines()) if "number" in values]


def test_death_at_any_call_keeps_the_chain_and_every_acknowledged_line(tmp_path: Path) -> None:
    steps, ended = 0, False
    while not ended:
        steps += 1
        directory = tmp_path / str(steps)
        directory.mkdir()
        acknowledged, ended = killed_at(path := directory / "audit.log", steps)
        asyncio.run(record_all(path, lambda number: None, range(100, 103)))
        verdict = check(path)
        assert verdict.sound, (steps, verdict.findings)
        kept = numbers(path)
        assert kept[: len(acknowledged)] == acknowledged, steps
        assert kept[-3:] == [100, 101, 102] and len(kept) - 3 - len(acknowledged) in (0, 1), steps
        shutil.rmtree(directory)
    assert steps > 3 * LINES  # a write, a sync and a note for each line, and the steps of each rotation


def test_an_error_at_any_call_keeps_the_chain_and_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_RETRY", 0.001)

    def fail(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    begun = 8  #: a service that cannot even open its log does not start
    number, count = begun, begun + 1
    while number < count:
        path = tmp_path / str(number) / "audit.log"
        path.parent.mkdir()
        system = System(number, fail)
        with monkeypatch.context() as patched:
            patched.setattr(audit_module, "os", system)
            patched.setattr(database, "os", system)
            asyncio.run(record_all(path, lambda n: None))
        verdict = check(path)
        assert verdict.sound, (number, verdict.findings)
        assert list(dict.fromkeys(numbers(path))) == list(range(LINES)), number
        number, count = number + 1, system.count
    assert number > 3 * LINES
