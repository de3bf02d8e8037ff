"""The quickstart with a virtual machine: its story, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guest import REPOSITORY
from support.guest_machine import image
from support.host_process import wait_for

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def place() -> Iterator[Path]:
    """The directory of its files: short, as names of sockets are."""
    image()
    with tempfile.TemporaryDirectory(prefix="hsmq.") as directory:
        yield Path(directory)


def start(place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [REPOSITORY / "scripts/quickstart", "--vm"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
        start_new_session=True,
    )


def processes_of(place: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(place) in line:
            found.append(line)
    return found


def test_a_machines_key_is_used_replaced_and_not_found_in_it(place: Path) -> None:
    process = start(place)
    told, errors = process.communicate(timeout=200)
    assert process.returncode == 0, told + errors
    assert "it sees no module" in told and "module web-1 is plugged in" in told
    assert "signed by a module, served by a virtual machine" in told
    assert re.search(r"TLS handshakes: \d{3,}, failed: 0\n", told)
    assert "none in the 256 MiB" in told and "in the module's worker" in told
    assert told.endswith("Nothing was left behind.\n")
    assert not list(place.iterdir())
    wait_for(lambda: not processes_of(place))


def test_it_is_interrupted(place: Path) -> None:
    process = start(place)
    assert process.stdout is not None and process.stderr is not None
    told = ""
    while "Plug the module" not in told:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        told += line
    os.killpg(process.pid, signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 130, told + errors
    assert "Interrupted: nothing is left behind." in told
    assert "Traceback" not in errors
    assert not list(place.iterdir())
    wait_for(lambda: not processes_of(place))


def test_a_machine_that_does_not_start_is_told(place: Path) -> None:
    programs = place / "bin"
    programs.mkdir()
    broken = programs / "qemu-system-x86_64"
    broken.write_text("#!/bin/sh\necho no memory today >&2\nexit 1\n")
    broken.chmod(0o755)
    done = subprocess.run(
        [REPOSITORY / "scripts/quickstart", "--vm"],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(place), "PATH": f"{programs}:{os.environ['PATH']}"},
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "(Boot it in QEMU" in done.stderr and "no memory today" in done.stderr and "what to do: " in done.stderr
    assert "Traceback" not in done.stderr
    wait_for(lambda: not processes_of(place))
