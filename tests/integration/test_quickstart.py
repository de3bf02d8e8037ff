"""The quickstart: what it shows, with one guest, a fleet and a virtual machine; and what it leaves behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.guest import REPOSITORY
from support.guest_machine import image
from support.host_process import wait_for

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE = 200  #: seconds for a whole tour, many times what it needs


@pytest.fixture
def place() -> Iterator[Path]:
    """The directory of its files: short, as names of sockets are; the services' own users come through it."""
    with tempfile.TemporaryDirectory(prefix="hsmq.") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def machine_image() -> None:
    image()


@dataclass
class Quickstart:
    place: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __call__(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [REPOSITORY / "scripts/quickstart", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.place)},
            start_new_session=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def start(place: Path) -> Iterator[Quickstart]:
    """What a test that fails has left running is interrupted."""
    quickstart = Quickstart(place)
    yield quickstart
    for process in quickstart.started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def told_until(process: subprocess.Popen[str], words: str) -> str:
    """Returns what it has told when it tells `words`."""
    assert process.stdout is not None and process.stderr is not None
    told = ""
    while words not in told:
        line = process.stdout.readline()
        assert line, told + process.stderr.read()
        told += line
    return told


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


def nothing_is_left(place: Path) -> None:
    assert not list(place.iterdir())
    wait_for(lambda: not processes_of(place))


# ---- one guest ------------------------------------------------------------------------------------------------------


def test_an_owner_asks_once_and_the_certificate_is_renewed(start: Quickstart, place: Path) -> None:
    process = start()
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told + errors
    assert "this host has joined as host-1" in told and "guest web-1 is registered" in told
    assert told.count("request apply") == 1 and "request rotate" not in told
    assert told.count("openssl verifies that signature") == 2, "by both libraries"
    assert "signed by the module of web-1" in told
    assert "clients meet certificate 3, " in told
    assert "because its certificate nears its end" in told
    assert re.search(r"signatures made in the module: \d{3,}, failed: 0\n", told)
    assert re.search(r"TLS handshakes: \d{3,}, failed: 0\n", told)
    assert told.endswith("Nothing was left behind.\n")
    nothing_is_left(place)


def test_what_is_kept_can_be_used_as_it_says(start: Quickstart, place: Path) -> None:
    process = start("--keep")
    told = told_until(process, "It runs until you press Ctrl-C")
    lines = [line.strip() for line in told.partition("Try next:\n")[2].splitlines()[:-1]]
    exports = "\n".join(line for line in lines if line.startswith("export "))
    commands = [line.partition("  #")[0].strip() for line in lines if line.startswith(("hsmvisor ", "curl "))]
    assert len(commands) > 5
    for command in commands:
        command = command.replace("--follow", "--limit 5")
        done = subprocess.run(["bash", "-c", f"{exports}\n{command}"], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, command + done.stdout + done.stderr
        if command.startswith("curl"):
            assert done.stdout == "signed by the module of web-1\n"
    as_alice = next(line for line in lines if "# as alice:" in line).partition(":")[2]
    done = subprocess.run(["bash", "-c", f"{exports}\n{as_alice}"], capture_output=True, text=True, timeout=100, check=False)
    assert "alice" in done.stdout, done.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    nothing_is_left(place)


def test_what_was_called_wrongly_is_told() -> None:
    for arguments, why in ((["--vm", "--fleet"], "exclude each other"), (["--flet"], "unknown argument --flet")):
        done = subprocess.run([REPOSITORY / "scripts/quickstart", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and why in done.stderr, shlex.join(arguments)


# ---- a fleet --------------------------------------------------------------------------------------------------------


def test_a_fleet_serves_while_guests_come_and_go(start: Quickstart, place: Path) -> None:
    process = start("--fleet")
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told + errors
    assert "postgresql://" in told
    for name, host in (("web-1", "host-1"), ("web-2", "host-1"), ("web-3", "host-2"), ("web-4", "host-2")):
        assert re.search(rf"tls +{host}/{name} +serving", told), told
    came = re.search(r"key and certificate serve (\d+\.\d+) s after", told)
    assert came is not None and float(came[1]) < 20, "two seconds, of a machine that does nothing else"
    assert "web-5 sees 1 private keys" in told and "web-5 sees 0 private keys" in told
    assert "generation 2 serves" in told
    assert re.search(r"TLS handshakes: \d{3,}, failed: 0; 8 certificates were met\n", told)
    assert told.endswith("Nothing was left behind.\n")
    nothing_is_left(place)


def test_a_fleet_is_interrupted(start: Quickstart, place: Path) -> None:
    process = start("--fleet")
    told_until(process, "Alice asks once")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 130, told + errors
    assert "Interrupted: nothing is left behind." in told and "Traceback" not in errors
    nothing_is_left(place)


# ---- a virtual machine ----------------------------------------------------------------------------------------------


def test_a_machines_key_is_used_renewed_and_not_found_in_it(start: Quickstart, place: Path, machine_image: None) -> None:
    process = start("--vm")
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told + errors
    assert "it sees no module" in told and "module web-1 is plugged in" in told
    assert "signed by a module, served by a virtual machine" in told
    assert "clients meet certificate 3, " in told
    assert re.search(r"TLS handshakes: \d{3,}, failed: 0\n", told)
    assert "none in the 256 MiB" in told and "in the module's worker" in told
    assert told.endswith("Nothing was left behind.\n")
    nothing_is_left(place)


def test_it_is_interrupted(start: Quickstart, place: Path, machine_image: None) -> None:
    process = start("--vm")
    told_until(process, "Plug the module")
    os.killpg(process.pid, signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 130, told + errors
    assert "Interrupted: nothing is left behind." in told
    assert "Traceback" not in errors
    nothing_is_left(place)


def test_a_machine_that_does_not_start_is_told(place: Path, machine_image: None) -> None:
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
