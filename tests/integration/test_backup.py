"""Backup of a running host and its restore: what comes back, what is refused, and a kill at each step."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor.host.backup_file import read_manifest
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.command import Command
from support.guest import Guest, library
from support.host import SETTINGS, Host
from support.host_process import HostProcess, gone, new_id
from support.leaks import Needles
from support.shell import Shell

pytestmark = pytest.mark.slow
REFUSED = 4


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def command_for(process: HostProcess) -> Command:
    return Command(f"unix:{process.socket}", process.directory / "authority")


def audited(process: HostProcess, kind: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, process.audit_lines()) if line["kind"] == kind]


def lose_the_machine(host: Host) -> bytes:
    """Nothing of the host is left; returns the copy of the master key that its operator keeps elsewhere."""
    process = host.process
    master_key = (process.state / "master.key").read_bytes()
    host.stop(signal.SIGKILL)
    assert process.launch(["--stop-workers"]).wait(20) == 0
    shutil.rmtree(process.state)
    shutil.rmtree(process.run)
    return master_key


def put_master_key(process: HostProcess, key: bytes) -> None:
    process.state.mkdir(mode=0o700, exist_ok=True)
    path = process.state / "master.key"
    path.write_bytes(key)
    path.chmod(0o600)


def test_a_lost_machine_comes_back_from_its_backup(host: Host, tmp_path: Path) -> None:
    process, hsmvisor = host.process, command_for(host.process)
    key, module = new_key("p256"), host.create("web-1")
    module.push("tls", key)
    process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="web-1", pin=b"1234"))
    file = tmp_path / "host.backup"
    report = hsmvisor.json("backup", "--out", file, "--why", "nightly")
    assert (report["modules"], report["bytes"], report["host_known"]) == (["web-1"], file.stat().st_size, False)
    assert file.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [file]
    assert not list(process.state.glob(".backup-*"))
    hsmvisor("backup", "--out", file, code=REFUSED)
    assert "exists" in hsmvisor.errors
    hsmvisor("backup", "--out", file, "--force")
    assert [(line["why"], line["result"]) for line in audited(process, "host.backup")] == [("nightly", "ok"), ("", "ok")]

    # who steals it learns no key: not the guest's, not the host's, not the master key
    content = file.read_bytes()
    assert not Needles([key]).found_in(content)
    for secret in ("host.key", "master.key"):
        assert (process.state / secret).read_bytes()[:16] not in content
    assert "web-1" in hsmvisor("backup", "show", file) and "web-1" in hsmvisor(
        "backup", "verify", file, "--host-key", host.key.hex()
    )
    hsmvisor("backup", "verify", file, "--host-key", bytes(32).hex(), code=REFUSED)

    identity = process.modules.GetIdentity(pb.GetIdentityRequest(name="web-1")).signed_identity
    position = read_manifest(file.open("rb")).audit_sequence
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        shell.tell("open")
        process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="web-1", pin=b""))  # after the backup
        handle = shell.private("tls")
        master_key = lose_the_machine(host)

        hsmvisor("restore", file, "--config", process.config, code=REFUSED)
        assert "MASTER_KEY_MISSING" in hsmvisor.errors and not (process.state / "master.key").exists()
        put_master_key(process, bytes(32))
        hsmvisor("restore", file, "--config", process.config, code=REFUSED)
        assert "MASTER_KEY_WRONG" in hsmvisor.errors and not (process.state / "state.db").exists()
        put_master_key(process, master_key)
        assert "nothing was changed" in hsmvisor("restore", file, "--config", process.config, "--check")
        assert not (process.state / "state.db").exists()
        assert "1 modules" in hsmvisor("restore", file, "--config", process.config, "--why", "new disk")
        assert "already" in hsmvisor("restore", file, "--config", process.config), "idempotent"

        host.start()
        assert module.serving().pin_set, "as it was"
        assert process.modules.GetIdentity(pb.GetIdentityRequest(name="web-1")).signed_identity == identity
        process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="web-1", pin=b""))
        assert shell.signs_with(handle, key), "the application that runs goes on with the handle that it has"

    (restored,) = audited(process, "host.restore")
    assert (restored["seq"], restored["why"], restored["backup"]) == (
        position,
        "new disk",
        hsmvisor.json("backup", "show", file)["backup"],
    )
    assert verify(process.state / "audit.log", host.key, first=position).sound
    assert f"--first {position}" in verify(process.state / "audit.log", host.key).findings[0].what, "the older lines were lost"
    host.stop(signal.SIGTERM)
    host.start()
    assert len(audited(process, "host.restore")) == 1, "told once"


def test_what_is_there_is_not_overwritten_unasked_and_kept_when_asked(host: Host, tmp_path: Path) -> None:
    process, hsmvisor, file = host.process, command_for(host.process), tmp_path / "host.backup"
    module = host.create("old")
    secret = process.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id=new_id(), lifetime_seconds=600)).secret
    hsmvisor("backup", "--out", file)
    host.create("new")
    words = ("restore", file, "--config", process.config)
    hsmvisor(*words, code=REFUSED)
    assert "LOCKED" in hsmvisor.errors, "while the service runs"
    host.stop(signal.SIGTERM)
    before = {path: path.read_bytes() for path in process.state.iterdir() if path.suffix in (".db", ".key", ".log")}
    hsmvisor(*words, code=REFUSED)
    assert "STATE_EXISTS" in hsmvisor.errors
    whole = file.read_bytes()
    for damage, said in (  # each byte: tests/unit/test_host_backup.py
        (whole[:-1], "cut off"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "state.db in it is damaged"),
        (b"hsmvisor-backup 2\n" + whole[18:], "newer release"),
    ):
        file.write_bytes(damage)
        hsmvisor(*words, "--force", code=REFUSED)
        assert said in hsmvisor.errors
    file.write_bytes(whole)
    assert {path: path.read_bytes() for path in before} == before
    assert not gone(module_pid := process_of(process, "old")), "a refusal ends no worker"
    answer = json.loads(hsmvisor("--json", *words, "--force"))
    assert gone(module_pid), "they hold a newer state than what was restored"
    aside = process.state / answer["aside"]
    assert {path.name for path in aside.iterdir()} >= {"state.db", "host.key"}
    assert aside.stat().st_mode & 0o077 == 0

    host.start()
    assert module.serving()
    assert [m.name for m in process.modules.ListModules(pb.ListModulesRequest()).modules] == ["old"]
    (restored,) = audited(process, "host.restore")
    assert restored["aside"] == answer["aside"]
    assert verify(process.state / "audit.log", host.key).sound, "the chain goes on"
    hsmvisor("host", "enrol", "--secret-file", "-", stdin=secret.encode(), code=5)
    assert hsmvisor.errors, "a one-time secret does not come back"


def process_of(process: HostProcess, name: str) -> int:
    """The worker that a stopped service left."""
    notes = [json.loads(path.read_bytes()) for path in (process.run / "workers").glob("*.json")]
    return next(n["pid"] for n in notes if f"hsmvisord: {name}".encode() in Path(f"/proc/{n['pid']}/cmdline").read_bytes())


def test_a_backup_of_another_host_takes_the_audit_log_of_this_one_aside(host: Host, tmp_path: Path) -> None:
    process, file = host.process, tmp_path / "host.backup"
    host.create("web-1")
    command_for(process)("backup", "--out", file)
    with HostProcess(SETTINGS) as other:  # a new machine whose service was started already
        other.stop()
        shutil.copy(process.state / "master.key", other.state / "master.key")
        hsmvisor = command_for(other)
        hsmvisor("restore", file, "--config", other.config, code=REFUSED)
        assert "STATE_EXISTS" in hsmvisor.errors
        aside = json.loads(hsmvisor("--json", "restore", file, "--config", other.config, "--force"))["aside"]
        other.start()
        assert other.host.GetHost(pb.GetHostRequest()).host_key == host.key
        assert other.serving("web-1")
        (restored,) = audited(other, "host.restore")
        assert verify(other.state / "audit.log", host.key, first=restored["seq"]).sound
        assert {p.name for p in (other.state / aside).iterdir()} >= {"state.db", "host.key", "audit.log", "audit.log.head"}


#: place of the kill -> whether the restore has happened by then
STEPS = {
    "hsmvisor.host.backup_file:unpack:after": False,
    "hsmvisor.host.restored:move:before": False,  # all is checked, the workers are ended
    "hsmvisor.host.restored:move:after": True,
    "hsmvisor.host.restored:move:after2": True,  # the old state is aside, the new one not there yet
}


def test_a_restore_killed_at_any_step_leaves_the_old_state_or_the_new_one_whole(host: Host, tmp_path: Path) -> None:
    """Each move of a file is enumerated in tests/unit/test_host_backup.py."""
    process, hsmvisor, file = host.process, command_for(host.process), tmp_path / "host.backup"
    module = host.create("old")
    module.push("tls", new_key("p256"))
    hsmvisor("backup", "--out", file)
    host.create("new")
    host.stop(signal.SIGTERM)
    assert process.launch(["--stop-workers"]).wait(20) == 0
    kept = tmp_path / "state"
    shutil.copytree(process.state, kept)
    hsmvisor.module = "support.crashing_command"
    for step, has_happened in STEPS.items():
        shutil.rmtree(process.state)
        shutil.copytree(kept, process.state)
        words = ("restore", file, "--config", process.config, "--force")
        hsmvisor(*words, code=-signal.SIGKILL, HSMVISOR_CRASH=step)
        host.start()
        names = [m.name for m in process.modules.ListModules(pb.ListModulesRequest()).modules]
        assert names == (["old"] if has_happened else ["new", "old"]), step
        assert len(audited(process, "host.restore")) == has_happened, step
        assert not list(process.state.glob("restore*")), step
        assert module.serving() and module.states("tls") == {1: "current"}, step
        assert verify(process.state / "audit.log", host.key).sound, step
        host.stop(signal.SIGTERM)
        assert process.launch(["--stop-workers"]).wait(20) == 0
    host.start()
