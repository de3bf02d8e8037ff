"""What the host service gives up, as the kernel tells it of a living one, and tried from inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor.host import measures
from hsmvisor.host.config import Config
from hsmvisor_rpc.confine import capabilities
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import SOURCES, HostProcess, wait_for
from support.processes import status

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


def test_the_kernel_says_so_of_a_living_one(host: HostProcess) -> None:
    assert host.process is not None
    said = status(host.process.pid)
    assert (said["Seccomp"], said["NoNewPrivs"]) == ("2", "1")
    kept = sum(1 << c for c in measures._wanted(Config()) & capabilities.permitted()) if ROOT else 0
    assert [int(said[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
    assert not ROOT or int(said["CapBnd"], 16) == kept
    assert "Max core file size        0                    0" in Path(f"/proc/{host.process.pid}/limits").read_text()


@pytest.mark.skipif(not ROOT, reason="only root goes before others")
def test_the_service_goes_before_its_modules(host: HostProcess) -> None:
    worker = host.create("ordinary").pid
    assert host.process is not None
    service = os.getpriority(os.PRIO_PROCESS, 0) - 5  # as the test started it
    assert (os.getpriority(os.PRIO_PROCESS, host.process.pid), os.getpriority(os.PRIO_PROCESS, worker)) == (
        service,
        max(service, 0),
    )


def test_all_are_listed_and_what_is_missing_is_said_at_start(host: HostProcess) -> None:
    listed = {m.name: m for m in host.host.GetHost(pb.GetHostRequest()).measures}
    assert {"capabilities", "seccomp", "landlock", "no-swap", "launcher: seccomp", "key provider: memory"} <= set(listed)
    missing = {name for name, m in listed.items() if not m.applied}
    assert not ROOT or missing <= {"no-swap"}, missing
    for name in missing:
        wait_for(lambda name=name: f"not applied: {name}: {listed[name].detail}" in host.log.read_text(), what="the warning")


@pytest.mark.skipif(not ROOT, reason="otherwise nothing outside is ours to write")
def test_a_living_one_changes_nothing_outside_its_directories(host: HostProcess, tmp_path: Path) -> None:
    """A link leads what it makes for a module out of its runtime directory."""
    modules = host.run / "modules"
    modules.rename(host.run / "moved")
    modules.symlink_to(tmp_path)
    try:
        with pytest.raises(grpc.RpcError):
            host.create("outside")
        assert not list(tmp_path.iterdir())
    finally:
        modules.unlink()
        (host.run / "moved").rename(modules)
    host.create("inside")


PROGRAM = """
import ctypes, os, signal, socket, subprocess, sys
from hsmvisor.host import measures
from hsmvisor.host.config import Config, Manager
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "refused")
listening, manager = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
port = manager.getsockname()[1]
config = Config(state_directory=sys.argv[1], runtime_directory=sys.argv[1], manager=Manager((port,)))
assert measures.reachable(config, ()) is None
applied = (*measures.apply_all(config), measures.confine(config))
assert {m.name for m in applied if not m.applied} <= {"no-swap"}, applied
print("confined", flush=True)
exec(sys.argv[2])
print("done")
"""


def inside(directory: Path, attempt: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCES}
    command = [sys.executable, "-c", PROGRAM, str(directory), attempt]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=30)


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{outside}/x', 'w')",
        "os.mkdir('{outside}/x')",
        "os.rename('{outside}/kept', '{outside}/x')",
        "os.truncate('{outside}/kept', 0)",
        "subprocess.run(['touch', '{outside}/x'], check=True)",
        "os.mknod(sys.argv[1] + '/x', 0o20600, os.makedev(1, 3))",  # a device in a directory of its own
        "socket.create_connection(listening.getsockname())",
        "call(101, 16, os.getppid(), 0, 0)",  # ptrace(PTRACE_ATTACH)
        "call(310, os.getppid(), 0, 0, 0, 0, 0)",  # process_vm_readv
        "call(438, os.pidfd_open(os.getppid()), 0, 0)",  # pidfd_getfd
        "call(321, 0, 0, 0)",  # bpf
        "call(425, 8, 0)",  # io_uring_setup
        "call(272, 0x10000000)",  # unshare(CLONE_NEWUSER)
        "call(165, 0, 0, 0, 0, 0)",  # mount
    ],
)
def test_what_it_has_no_use_for_is_refused(attempt: str, tmp_path: Path) -> None:
    own, outside = tmp_path / "own", tmp_path / "outside"
    own.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("x")
    done = inside(own, attempt.format(outside=outside))
    assert done.stdout == "confined\n", (done.stdout, done.stderr)
    assert "PermissionError" in done.stderr or "CalledProcessError" in done.stderr, done.stderr
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("kept", "x")]


def test_what_it_needs_is_left(tmp_path: Path) -> None:
    """Its files, helpers and sockets; to end what it did not start."""
    stranger = subprocess.Popen(["sleep", "60"], user=460_995 if ROOT else None)
    attempt = f"""
open(sys.argv[1] + "/x", "w").write("x"); os.rename(sys.argv[1] + "/x", sys.argv[1] + "/y")
open("/etc/passwd").close()
subprocess.run(["true"], check=True, stdin=subprocess.DEVNULL)
socket.socket(socket.AF_UNIX).bind(sys.argv[1] + "/socket")
socket.create_server(("127.0.0.1", 0))
socket.create_connection(manager.getsockname())
assert measures.reachable(config, applied) == {{port}}
signal.pidfd_send_signal(os.pidfd_open({stranger.pid}), signal.SIGKILL)
"""
    try:
        done = inside(tmp_path, attempt)
        assert done.stdout == "confined\ndone\n", done.stderr
        assert stranger.wait(10) == -9
    finally:
        stranger.kill()


def test_a_port_below_1024_needs_one_capability_more() -> None:
    from hsmvisor.host.config import parse

    low = parse('[tls]\naddress = "0.0.0.0:443"\n', "test")
    assert measures._wanted(low) - measures._wanted(Config()) == {capabilities.NET_BIND_SERVICE}
    assert measures._wanted(parse('[signed]\naddress = "0.0.0.0:8470"\n', "test")) == measures._wanted(Config())
