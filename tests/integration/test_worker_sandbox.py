"""The sandboxes, proved from inside: a process confined as a worker, or as a TPM's process, tries each forbidden thing and is
refused."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hsmvisord import limits
from hsmvisord.confined import scheduling, seccomp
from support.bare_worker import BareWorker, m
from support.guest import REPOSITORY
from support.processes import status

#: turns have a length of their own since Linux 6.12; Debian 12's kernel is older
SHORT_TURNS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12)
PROGRAM = REPOSITORY / "tests/integration/programs/confined.py"
sys.path.insert(0, str(PROGRAM.parent))
from confined import ALLOWED, FORBIDDEN, TPM_ALLOWED, TPM_FORBIDDEN  # noqa: E402


def attempt(who: str, name: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, PROGRAM, who, name], capture_output=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("who", "name"),
    [
        *[(who, name) for who in ("worker", "tpm") for name in FORBIDDEN],
        *[("tpm", name) for name in TPM_FORBIDDEN],
        *[("worker", name) for name in TPM_ALLOWED],
    ],
)
def test_forbidden(who: str, name: str) -> None:
    done = attempt(who, name)
    assert b"missing:" in done.stdout, done.stderr
    assert b"done" not in done.stdout
    assert done.returncode == -signal.SIGSYS or b"PermissionError" in done.stderr or b"refused" in done.stderr, done.stderr
    assert not Path("/tmp/hsmvisor-escaped").exists()


@pytest.mark.parametrize(
    ("who", "name"),
    [*itertools.product(("worker", "tpm"), [n for n in ALLOWED if n != "sign"]), *itertools.product(("tpm",), TPM_ALLOWED)],
)
def test_allowed(who: str, name: str) -> None:
    done = attempt(who, name)
    assert done.stdout.endswith(b"done\n"), done.stderr


def test_a_tpms_process_may_less_than_a_worker() -> None:
    workers, tpms = (set(itertools.chain(*allowed.values())) for allowed in (seccomp.ALLOWED, seccomp.ALLOWED_TPM))
    assert tpms - workers == set(seccomp.OF_TPM_ALONE)
    assert workers - tpms >= {"pipe2", "accept"}


def test_a_living_worker(tmp_path: Path) -> None:
    """What the kernel says of a worker that serves."""
    tmp_path.chmod(0o755)
    uid = 460_998 if os.geteuid() == 0 else 0
    worker = BareWorker(tmp_path, uid=uid)
    try:
        said = status(worker.pid)
        assert said["Seccomp"] == "2" and said["NoNewPrivs"] == "1"
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if uid else [])):
            assert int(said[kind], 16) == 0, kind
        if uid:
            assert said["Uid"].split() == [str(uid)] * 4
            assert said["Gid"].split() == [str(uid)] * 4
            assert said["Groups"] == ""
        said_limits = Path(f"/proc/{worker.pid}/limits").read_text()
        assert "Max core file size        0                    0" in said_limits
        opened = {os.readlink(f"/proc/{worker.pid}/fd/{n}").split(":")[0] for n in os.listdir(f"/proc/{worker.pid}/fd")}
        own = {"socket", "pipe", "anon_inode", f"/proc/{worker.pid}/smaps_rollup"}
        assert {path for path in opened if not path.startswith(("/dev/", "/tmp"))} <= own
        turns = {scheduling.turn(int(thread.name)) for thread in Path(f"/proc/{worker.pid}/task").iterdir()}
        assert turns == {limits.TURN} or not SHORT_TURNS
        assert isinstance(worker.ask(m.QueryStatus()), m.Report)
    finally:
        worker.stop()


def test_every_measure_is_applied_here(tmp_path: Path) -> None:
    """What this kernel has; the report says what it lacks."""
    import json

    tmp_path.chmod(0o755)
    worker = BareWorker(tmp_path, uid=460_997 if os.geteuid() == 0 else 0)
    try:
        measures = json.loads(worker.booted.report)["measures"]
        missing = {x["name"]: x["detail"] for x in measures if not x["applied"]}
        beyond = (set() if SHORT_TURNS else {"short-turns"}) | (set() if os.geteuid() == 0 else {"own-user"})
        assert set(missing) == beyond, missing
    finally:
        worker.stop()
