"""Kills, restarts and damage: what was acknowledged stays, what was half-done is finished or undone, nobody is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, gone, new_id, reason, wait_for

C = grpc.StatusCode


@pytest.fixture
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


def children(pid: int) -> dict[int, str]:
    """Returns the command lines of a process's children."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and not gone(int(entry.name)):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
    return found


def helper(host: HostProcess, title: str) -> int:
    assert host.process is not None
    pid = host.process.pid
    return wait_for(lambda: next((p for p, line in children(pid).items() if title in line), 0), what=title)


def sound_audit(host: HostProcess) -> None:
    verdict = verify(host.state / "audit.log", host.host.GetHost(pb.GetHostRequest()).host_key)
    assert verdict.sound, verdict.findings


def guest_can_connect(module: pb.Module) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(module.address.removeprefix("unix:path="))


# ---- workers --------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_back_soon_with_its_state(host: HostProcess) -> None:
    made = host.create("killed")
    host.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="killed", pin=b"9999"))
    identity = host.modules.GetIdentity(pb.GetIdentityRequest(name="killed")).signed_identity
    began = time.monotonic()
    os.kill(made.pid, signal.SIGKILL)
    guest_can_connect(made)  # the listener is still there: clients queue
    after = host.serving("killed", not_pid=made.pid)
    assert time.monotonic() - began < 2  # a generous bound; the target is 0.2 s
    assert after.pin_set and after.restarts == 1
    assert host.modules.GetIdentity(pb.GetIdentityRequest(name="killed")).signed_identity == identity
    guest_can_connect(after)
    assert any('"worker.ended"' in line for line in host.audit_lines())


def test_a_worker_that_dies_again_and_again_is_given_a_rest(host: HostProcess) -> None:
    pid = host.create("dying").pid
    for _ in range(4):
        os.kill(pid, signal.SIGKILL)
        pid = host.serving("dying", not_pid=pid).pid
    os.kill(pid, signal.SIGKILL)
    failed = wait_for(lambda: (m := host.get("dying")).state == "failed" and m)
    assert "5 times within 30 s" in failed.failure
    with pytest.raises(grpc.RpcError) as caught:
        host.modules.GetIdentity(pb.GetIdentityRequest(name="dying"), timeout=5)
    assert reason(caught.value) == (C.UNAVAILABLE, "MODULE_STATE")
    host.create("other")  # the others do not notice


def test_a_killed_launcher_or_key_provider_is_started_again_and_workers_go_on(host: HostProcess) -> None:
    made = host.create("before")
    for title in ("hsmvisord: launcher", "hsmvisord: key provider"):
        os.kill(helper(host, title), signal.SIGKILL)
        host.create("after-" + title.split()[1])
        assert host.get("before").pid == made.pid
    # a worker of the dead launcher is the supervisor's child now, and reaped when it dies
    os.kill(made.pid, signal.SIGKILL)
    host.serving("before", not_pid=made.pid)
    assert not Path(f"/proc/{made.pid}").exists()


# ---- the service ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_service_adopts_the_workers(host: HostProcess, number: int) -> None:
    made = [host.create(f"kept-{i}", log_signatures=True) for i in range(3)]
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(made[0].address.removeprefix("unix:path="))
    host.stop(number)
    assert not any(gone(m.pid) for m in made)
    guest_can_connect(made[1])
    began = time.monotonic()
    host.start()
    assert time.monotonic() - began < 5
    for module in made:
        after = host.serving(module.name)
        assert (after.pid, after.restarts) == (module.pid, 0)
        host.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=b"1234"))  # it stores with the new one
    connected.setblocking(False)
    with pytest.raises(BlockingIOError):
        connected.recv(1)  # still open
    connected.close()
    os.kill(made[0].pid, signal.SIGKILL)
    assert host.serving("kept-0", not_pid=made[0].pid).pin_set
    sound_audit(host)


def test_workers_that_died_meanwhile_are_started_again(host: HostProcess) -> None:
    made = host.create("died")
    host.stop(signal.SIGKILL)
    os.kill(made.pid, signal.SIGKILL)
    host.start()
    assert host.serving("died").pid != made.pid


def test_another_process_under_an_old_pid_is_not_taken_for_a_worker(host: HostProcess) -> None:
    made = host.create("reused")
    host.stop(signal.SIGKILL)
    os.kill(made.pid, signal.SIGKILL)
    note = host.run / "workers" / f"{made.module_id.hex()}.json"
    note.write_text(json.dumps({"pid": os.getpid(), "start_time": 1}))
    host.start()
    assert host.serving("reused").pid not in (made.pid, os.getpid())


def test_a_worker_of_which_no_note_is_left_is_replaced_not_doubled(host: HostProcess) -> None:
    made = host.create("unnoted")
    host.stop(signal.SIGKILL)
    (host.run / "workers" / f"{made.module_id.hex()}.json").unlink()
    host.start()
    assert host.serving("unnoted").pid != made.pid
    assert gone(made.pid)


def test_a_hung_worker_is_replaced(host: HostProcess) -> None:
    made = host.create("hung")
    host.stop()
    os.kill(made.pid, signal.SIGSTOP)
    host.configure("[workers]\nstart_timeout_seconds = 0.5\n")
    host.start()
    assert host.serving("hung", not_pid=made.pid)
    assert gone(made.pid)


def test_workers_can_be_stopped_with_the_service_or_after_it(host: HostProcess) -> None:
    pid = host.create("stopped").pid
    host.stop()
    assert host.launch(["--stop-workers"]).wait(20) == 0
    assert gone(pid)
    host.configure("[workers]\nstop_with_host = true\n")
    host.start()
    pid = host.serving("stopped").pid
    host.stop()
    assert gone(pid)


def test_a_service_whose_key_provider_does_not_start_can_be_stopped_at_any_time(host: HostProcess) -> None:
    """It hung where it was told to end while it waited for a storage key: that failed, and took the place of the cancellation."""
    host.configure("[workers]\nstop_with_host = true\n")
    host.restart()
    host.create("without-a-key")
    host.stop()
    (host.state / "master.key").chmod(0o640)  # it does not trust that
    for moment in range(8):
        began = host.log.read_text().count("others may read the master key")
        host.process = host.launch()
        wait_for(lambda began=began: host.log.read_text().count("others may read the master key") > began, 20, "its refusal")  # type: ignore[misc]
        time.sleep(moment / 10)
        assert host.stop() in (0, -signal.SIGTERM)  # the latter before it listens to signals
    (host.state / "master.key").chmod(0o600)
    host.start()
    host.serving("without-a-key")


def test_one_state_directory_has_one_service(host: HostProcess) -> None:
    second = host.launch()
    assert second.wait(20) == 1
    assert f"another hsmvisor-host (pid {host.process.pid})" in host.log.read_text()  # type: ignore[union-attr]
    host.create("still-there")


@pytest.mark.slow
def test_kills_of_anybody_leave_everything_as_it_was(host: HostProcess) -> None:
    """Which process dies is drawn from a fixed seed; the figures of recovery are the soak's to report."""
    draw = random.Random(4)
    host.create("soaked")
    host.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="soaked", pin=b"1234"))
    identity = host.modules.GetIdentity(pb.GetIdentityRequest(name="soaked")).signed_identity
    for i in range(10):
        victims = draw.sample(["worker", "launcher", "key provider", "host"], draw.choice([1, 1, 2]))
        pid = host.get("soaked").pid
        for victim in victims:
            if victim == "worker":
                os.kill(pid, signal.SIGKILL)
            elif victim != "host":
                os.kill(helper(host, f"hsmvisord: {victim}"), signal.SIGKILL)
        if "host" in victims:
            host.stop(signal.SIGKILL)
            host.start()
        host.serving("soaked", not_pid=pid if "worker" in victims else 0)
        assert host.modules.GetIdentity(pb.GetIdentityRequest(name="soaked")).signed_identity == identity
        assert host.get("soaked").pin_set
        if i % 4 == 3:
            time.sleep(7)  # five deaths in 30 s would be a rest for the worker, and that is another test
        if i % 5 == 4:
            name = f"fresh-{i}"
            host.create(name)
            host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=name))
    sound_audit(host)


# ---- damage ---------------------------------------------------------------------------------------------------------


def refuses_to_start(host: HostProcess, *words: str) -> None:
    # SQLite removes its own empty journal files when it closes
    before = {p: p.read_bytes() for p in host.state.iterdir() if p.name != "lock" and not p.name.endswith(("-wal", "-shm"))}
    said = len(host.log.read_text())
    assert host.launch().wait(20) == 1
    text = host.log.read_text()[said:]
    assert all(word in text for word in words), text
    assert "Traceback" not in text
    assert {p: p.read_bytes() for p in before} == before


def test_damaged_files_are_refused_and_nothing_is_written(host: HostProcess) -> None:
    made = host.create("damage")
    host.stop()
    state = host.state / "state.db"
    good = state.read_bytes()
    state.write_bytes(good[: len(good) // 2])
    refuses_to_start(host, "state.db", "malformed", "restore")
    state.write_bytes(b"")
    refuses_to_start(host, "truncated")
    state.unlink()
    refuses_to_start(host, "state.db is missing", "restore")
    state.write_bytes(good)
    for name, hint in (("host.key", "restore"), ("master.key", "put your copy of it to")):
        path = host.state / name
        path.rename(host.directory / name)
        refuses_to_start(host, name, "is missing", hint)
        (host.directory / name).rename(path)
    (host.state / "host.key").chmod(0o644)
    refuses_to_start(host, "others may read", "chmod 600")
    (host.state / "host.key").chmod(0o600)
    assert not gone(made.pid)  # its keys go on signing meanwhile
    host.start()
    assert host.serving("damage").pid == made.pid


def test_a_bad_configuration_ends_with_its_own_code(host: HostProcess) -> None:
    host.stop()
    host.configure("[workers]\nuid_bas = 1\n")
    assert host.launch().wait(20) == 78
    assert "unknown key workers.uid_bas" in host.log.read_text()
    assert host.launch(["--check"]).wait(20) == 78
    host.configure('[[signed.keys]]\nname = "a"\nkind = "hmac"\nfile = "/none"\nroles = []\n')
    assert host.launch().wait(20) == 78  # found out when the file is read
    assert "/none" in host.log.read_text()
    host.configure("")
    assert host.launch(["--check"]).wait(20) == 0


def test_a_state_of_another_master_key_fails_precisely(host: HostProcess) -> None:
    host.create("sealed")
    host.stop()
    host.launch(["--stop-workers"]).wait(20)
    (host.state / "master.key").write_bytes(os.urandom(32))
    host.start()
    failed = wait_for(lambda: (m := host.get("sealed")).state == "failed" and m, 20)
    assert "UNSEALED" in failed.failure
