"""What launcher and key provider give up, as the kernel tells it of living ones, and tried from inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.host import Host, wait_for
from support.host_process import SOURCES
from support.processes import titled

ROOT = os.geteuid() == 0
CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 6, 7, 8


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host.start()
    finally:
        host.clean()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def inside(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCES}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


def test_the_key_provider_has_nothing_but_its_socket(host: Host) -> None:
    said = status(wait_for(lambda: titled(host.pid(), "hsmvisord: key provider")))
    assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1")
    assert {said[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert not ROOT or said["CapBnd"] == "0" * 16


def test_the_launcher_keeps_what_its_children_need(host: Host) -> None:
    said = status(wait_for(lambda: titled(host.pid(), "hsmvisord: launcher")))
    kept = (1 << CAP_SETGID | 1 << CAP_SETUID | 1 << CAP_SETPCAP) if ROOT else 0
    assert said["NoNewPrivs"] == "1"
    assert [int(said[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
    assert not ROOT or int(said["CapBnd"], 16) == kept


@pytest.mark.parametrize(
    "attempt", ["open('/tmp/hsmvisor-escaped', 'w')", "os.mkdir('/tmp/hsmvisor-escaped')", "os.unlink('{file}')"]
)
def test_the_launcher_changes_no_file(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("x")
    done = inside(
        "import os\nfrom hsmvisord.worker import sandbox\n"
        "assert all(m['applied'] for m in sandbox.enter_launcher())\n"
        "open('/proc/self/status').close()\n" + attempt.format(file=file)
    )
    assert "PermissionError" in done.stderr, done.stderr
    assert file.exists() and not Path("/tmp/hsmvisor-escaped").exists()


@pytest.mark.parametrize("attempt", ["open('/etc/hostname')", "socket.create_connection(('127.0.0.1', 9))", "os.fork()"])
def test_the_key_provider_reaches_nothing(attempt: str) -> None:
    done = inside(
        "import os, socket\nfrom hsmvisord.worker import sandbox\n"
        "assert all(m['applied'] for m in sandbox.enter_key_provider())\nprint('confined', flush=True)\n"
        + attempt
        + "\nprint('done')"
    )
    assert done.stdout == "confined\n", done.stderr
    assert done.returncode != 0
