"""The host service and what surrounds it: the service manager, the scraper, the journal, disks that are full or read-only."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support import other_user
from support.guest import free_port
from support.host_process import HostProcess, gone, new_id, reason, wait_for

C = grpc.StatusCode
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_the_service_manager_is_told() -> None:
    host = HostProcess()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(host.directory / "notify"))
        manager.settimeout(10)
        host.environment = {"NOTIFY_SOCKET": str(host.directory / "notify")}
        with host:
            assert manager.recv(1000).decode().startswith(f"READY=1\nMAINPID={host.process.pid}\n")  # type: ignore[union-attr]
            host.stop()
            assert manager.recv(1000) == b"STOPPING=1"


def test_prometheus_scrapes_over_http() -> None:
    port = free_port()
    with HostProcess(f'[metrics]\naddress = "127.0.0.1:{port}"\n') as host:
        host.create("scraped")

        def get(method: str, path: str) -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, text = get("GET", "/metrics")
        assert status == 200
        assert 'hsmvisor_module_up{module="scraped"} 1.0' in text
        assert get("GET", "/")[0] == 404
        assert get("POST", "/metrics")[0] == 405
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"x" * 20_000)
            sock.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(10) == b""


def test_the_log_can_be_json() -> None:
    with HostProcess('[log]\nformat = "json"\n') as host:
        lines = [json.loads(line) for line in host.log.read_text().splitlines()]
        assert any(line["message"].startswith("ready") and line["level"] == "info" for line in lines)


def test_a_signal_ends_it_cleanly_and_streams_are_told() -> None:
    with HostProcess() as host:
        stream = host.events.StreamEvents(pb.StreamEventsRequest())
        watch = host.modules.WatchModules(pb.WatchModulesRequest())
        time.sleep(0.3)  # both have arrived
        assert host.process is not None
        host.process.send_signal(signal.SIGINT)
        for call in (stream, watch):
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert reason(caught.value) == (C.UNAVAILABLE, "STOPPING")
        assert host.process.wait(10) == 0
        assert not host.socket.exists()


AS_NOBODY = """
import os, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
os.environ["HOME"] = "/"
os.execv(sys.executable, [sys.executable, "-m", "hsmvisor.host.main", *sys.argv[1:]])
"""


@needs_root
def test_it_runs_as_an_ordinary_user_too() -> None:
    host = HostProcess()
    os.chmod(host.directory, 0o755)
    for path in (host.state, host.run):
        path.mkdir()
        os.chown(path, 65534, 65534)
    python, sources = other_user.python()
    command = [python, "-c", AS_NOBODY, "--config", str(host.config)]
    with open(host.log, "wb") as log:
        host.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": sources}, stdout=log, stderr=log)
    wait_for(host._answers, what="the start")
    real, host.launch = host.launch, lambda arguments=(): host.process  # type: ignore[method-assign,assignment,return-value]
    host.start()
    host.launch = real  # type: ignore[method-assign]
    made = host.create("ordinary")
    assert os.stat(f"/proc/{made.pid}").st_uid in (0, 65534)  # not dumpable: shown as root's
    assert {m.name: m.applied for m in made.measures}["own-user"] is False
    assert list(host.host.GetHost(pb.GetHostRequest()).roles) == ["auditor", "manager", "operator"]
    host.stop()
    host.clean()


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "says"),
    [
        ("nonsense", ["--check"], 78, "host.toml"),
        ("[audit]\nrotate = 1\n", [], 78, "unknown key audit.rotate; known here: checkpoint_lines"),
        ("", ["--check"], 0, "the configuration is good"),
        ("", ["--nonsense"], 2, "No such option"),
    ],
)
def test_exit_codes_and_what_is_said(settings: str, arguments: list[str], code: int, says: str) -> None:
    host = HostProcess(settings)
    assert host.launch(arguments).wait(20) == code, host.log.read_text()
    assert says in host.log.read_text()
    assert "Traceback" not in host.log.read_text()
    shutil.rmtree(host.directory)


def test_a_second_service_on_the_same_state_is_refused_and_a_stopped_one_ends_well() -> None:
    host = HostProcess().start()
    assert host.launch().wait(20) == 1
    assert "another hsmvisor-host (pid" in host.log.read_text() and "stop it first" in host.log.read_text()
    assert host.stop() == 0
    host.clean()


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[HostProcess]:
    """A host whose state directory is a small disk of its own."""
    host = HostProcess()
    host.state.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(host.state)], capture_output=True).returncode:
        shutil.rmtree(host.directory)
        pytest.skip("cannot mount a tmpfs")
    try:
        host.start()
        yield host
    finally:
        if host.process is not None and host.process.poll() is None:
            host.stop()
        host.launch(["--stop-workers"]).wait(20)
        subprocess.run(["umount", str(host.state)], check=True)
        shutil.rmtree(host.directory)


def refused(host: HostProcess, name: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        host.create(name)
    return reason(caught.value)


def fill(path: Path) -> None:
    """Takes all that is left of a disk."""
    with pytest.raises(OSError), open(path, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@needs_root
def test_a_full_disk_refuses_changes_and_loses_nothing(small_disk: HostProcess) -> None:
    host = small_disk
    made = host.create("before")
    ballast = host.state / "ballast"
    for _ in range(4):
        fill(ballast)  # again each time: the service gives back what it can
        code, why = refused(host, "during")
        assert code == C.UNAVAILABLE
        assert why in ("STORAGE", "AUDIT", "WORKER")
    assert host.get("before").pid == made.pid  # its keys go on signing
    ballast.unlink()

    def works() -> bool:
        try:
            host.create("after")
        except grpc.RpcError as error:
            assert error.code() == C.UNAVAILABLE
            return False
        return True

    wait_for(works, what="recovery")
    host.create("during")
    host.restart()
    names = [m.name for m in host.modules.ListModules(pb.ListModulesRequest()).modules]
    assert names == ["after", "before", "during"]
    assert host.serving("before").pid == made.pid
    verdict = verify(host.state / "audit.log", host.host.GetHost(pb.GetHostRequest()).host_key)
    assert verdict.sound, verdict.findings


@needs_root
def test_a_read_only_disk_is_said_and_keys_go_on(small_disk: HostProcess) -> None:
    host = small_disk
    made = host.create("before")
    host.stop()
    subprocess.run(["mount", "-o", "remount,ro", str(host.state)], check=True)
    process = host.launch()
    assert process.wait(20) == 1
    text = host.log.read_text()
    assert "Read-only file system" in text and "Traceback" not in text
    assert not gone(made.pid)
    subprocess.run(["mount", "-o", "remount,rw", str(host.state)], check=True)
    host.start()
    assert host.serving("before").pid == made.pid
    host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name="before"))


def test_a_runtime_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    host = HostProcess()
    (host.directory / "run").write_text("a file")
    process = host.launch()
    assert process.wait(20) == 1
    assert "File exists" in host.log.read_text() and "Traceback" not in host.log.read_text()
    shutil.rmtree(host.directory)
