"""Files of the host that are cut or changed: said precisely, nothing is written over, and the workers go on with what they hold."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, gone, wait_for


@pytest.fixture
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def kept(host: HostProcess) -> dict[Path, bytes]:
    """What stands in the state directory, without what SQLite makes for a reader."""
    found = {p: p.read_bytes() for p in host.state.iterdir() if p.name != "lock" and not p.name.endswith("-shm")}
    return {p: data for p, data in found.items() if data or not p.name.endswith("-wal")}


def refused(host: HostProcess, *words: str) -> None:
    """The service does not start, says why and what to do, and leaves everything as it is."""
    before, said = kept(host), len(host.log.read_text())
    assert host.launch().wait(20) == 1
    text = host.log.read_text()[said:]
    assert all(word in text for word in words), text
    assert "Traceback" not in text
    assert kept(host) == before


DAMAGES: list[tuple[str, Callable[[bytes], bytes], tuple[str, ...]]] = [
    ("host.key", half, ("host.key has 16 bytes instead of 32", "restore")),
    ("host.key", flipped, ("not signed by this host's key", "restore host.key")),
    ("audit.log", lambda data: data + b"not a line\n", ("is not a line of an audit log", "hsmvisor audit verify")),
    ("state.db", half, ("state.db", "restore")),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(DAMAGES)])
def test_a_damaged_file_is_refused(host: HostProcess, name: str, damage: Callable[[bytes], bytes], words: tuple[str, ...]) -> None:
    made = host.create("kept")
    host.stop()
    path = host.state / name
    good = path.read_bytes()
    path.write_bytes(damage(good))
    refused(host, *words)
    assert not gone(made.pid)  # its keys go on signing meanwhile
    path.write_bytes(good)
    host.start()
    assert host.serving("kept").pid == made.pid


def test_a_cut_master_key_starts_no_worker_and_is_not_replaced(host: HostProcess) -> None:
    made = host.create("kept")
    host.stop()
    path = host.state / "master.key"
    good = path.read_bytes()
    path.write_bytes(half(good))
    host.configure("[workers]\nstart_timeout_seconds = 1.0\n")
    host.start()
    assert host.serving("kept").pid == made.pid
    with pytest.raises(grpc.RpcError) as caught:
        host.create("new")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "16 bytes instead of 32: restore it from the backup" in host.log.read_text()
    assert path.read_bytes() == half(good)
    path.write_bytes(good)

    def works() -> bool:
        try:
            return host.create("new").state == "serving"
        except grpc.RpcError:
            return False

    wait_for(works, 20, "a new module with the key restored")


def test_a_cut_audit_log_is_told_by_the_log_itself(host: HostProcess) -> None:
    host.create("kept")
    host.stop()
    path = host.state / "audit.log"
    path.write_bytes(half(path.read_bytes()))
    host.start()
    assert host.serving("kept")
    findings = verify(path, host.host.GetHost(pb.GetHostRequest()).host_key).findings
    assert any("had been cut off when the host service began" in f.what for f in findings)


@pytest.mark.parametrize("damage", [half, flipped, lambda data: b""], ids=["cut", "changed", "emptied"])
def test_a_damaged_journal_is_not_taken_for_a_shorter_one(host: HostProcess, damage: Callable[[bytes], bytes]) -> None:
    """What a service that was killed had stored is in the journal alone; SQLite leaves out what is wrong in it and all behind."""
    made = host.create("kept")
    host.create("newest")
    host.stop(signal.SIGKILL)
    journal = host.state / "state.db-wal"
    good = journal.read_bytes()
    assert good
    journal.write_bytes(damage(good))
    refused(host, "state.db-wal was cut or damaged", "restore the journal")
    assert not gone(made.pid)
    journal.write_bytes(good)
    host.start()
    assert host.serving("kept").pid == made.pid and host.serving("newest")


def test_a_journal_without_its_state_file_is_refused(host: HostProcess) -> None:
    host.create("kept")
    host.stop(signal.SIGKILL)
    state = host.state / "state.db"
    state.rename(host.directory / "state.db")
    (host.state / "audit.log").rename(host.directory / "audit.log")  # else that is what tells of a loss
    (host.state / "audit.log.head").rename(host.directory / "audit.log.head")
    refused(host, "state.db-wal is there without state.db")
    (host.directory / "state.db").rename(state)
    host.start()
    assert host.serving("kept")


def test_an_older_copy_of_the_state_file_is_said_and_can_be_chosen(host: HostProcess) -> None:
    host.create("kept")
    host.stop()
    state = host.state / "state.db"
    older = state.read_bytes()
    host.start()
    host.create("newest")
    host.stop()
    state.write_bytes(older)
    refused(host, "older copy", "state.db.commits")
    os.unlink(host.state / "state.db.commits")
    host.start()
    assert host.serving("kept")
