"""What launcher and key provider give up, as the kernel tells it of living ones, and tried from inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor.host.config import Workers
from hsmvisor_rpc.confine import capabilities
from support.host import Host, wait_for
from support.host_process import SOURCES
from support.processes import status, titled

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def inside(confinement: str, attempt: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that confines itself, says so, and tries something."""
    program = (
        "import ctypes, os, socket, subprocess\nfrom hsmvisord import memory\nfrom hsmvisord.confined import sandbox\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(*arguments):\n    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
        f"for m in {confinement}: assert m['applied'] or m['name'] in ('own-user', 'memory'), m\n"
        f"print('confined', flush=True)\n{attempt}\nprint('done')"
    )
    environment = os.environ | {"PYTHONPATH": SOURCES}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


def confined(host: Host, name: str) -> tuple[int, dict[str, str]]:
    """A helper's pid and status, once it is through with it."""
    pid = wait_for(lambda: titled(host.pid(), f"hsmvisord: {name}"))
    return pid, wait_for(lambda: (said := status(pid))["Seccomp_filters"] == "2" and said)


def test_the_key_provider_has_nothing_but_its_socket(host: Host) -> None:
    pid, said = confined(host, "key provider")
    assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1")
    assert {said[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    if ROOT:
        assert said["CapBnd"] == "0" * 16
        assert said["Uid"].split() == said["Gid"].split() == [str(Workers().provider_uid)] * 4
        opened = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        assert not [path for path in opened if path.endswith("master.key")]


def test_the_launcher_keeps_what_its_children_need(host: Host) -> None:
    _, said = confined(host, "launcher")
    kept = sum(1 << c for c in capabilities.FOR_WORKERS & capabilities.permitted()) if ROOT else 0
    assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1")
    assert [int(said[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
    assert not ROOT or int(said["CapBnd"], 16) == kept


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/tmp/hsmvisor-escaped', 'w')",
        "os.mkdir('/tmp/hsmvisor-escaped')",
        "os.unlink('{file}')",
        "open('{file}')",
        "os.listdir('/')",
        "os.execv('/bin/true', ['true'])",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_INET)",
        "call(101, 16, os.getppid(), 0, 0)",  # ptrace(PTRACE_ATTACH)
        "call(310, os.getppid(), 0, 0, 0, 0, 0)",  # process_vm_readv
        "call(272, 0x10000000)",  # unshare(CLONE_NEWUSER)
        "call(56, 0x10000011, 0, 0, 0, 0)",  # clone(CLONE_NEWUSER | SIGCHLD)
        "os.kill(os.getppid(), 0)",
    ],
)
def test_the_launcher_reaches_nothing(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("x")
    done = inside("sandbox.enter_launcher()", attempt.format(file=file))
    assert done.stdout == "confined\n", (done.stdout, done.stderr)
    assert "PermissionError" in done.stderr, done.stderr
    assert file.exists() and not Path("/tmp/hsmvisor-escaped").exists()


def test_the_launcher_does_what_it_must() -> None:
    attempt = "open('/proc/self/status').close()\npid = os.fork()\nif not pid: os._exit(0)\nos.pidfd_open(pid)\nos.waitpid(pid, 0)"
    done = inside("sandbox.enter_launcher()", attempt)
    assert done.stdout == "confined\ndone\n", done.stderr


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/hostname')",
        "socket.create_connection(('127.0.0.1', 9))",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "memory._libc.mmap(0, 4096, 7, 34, -1, 0)",  # memory that is written and executed
    ],
)
def test_the_key_provider_reaches_nothing(attempt: str) -> None:
    done = inside(f"sandbox.enter({460_996 if ROOT else 0}, threads=0)", attempt)
    assert done.stdout == "confined\n", done.stderr
    assert done.returncode != 0
