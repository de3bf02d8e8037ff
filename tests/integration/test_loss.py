"""What an authority notices and mends: an older state that was restored, and a host that died with all it had."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, PrivateKey, chain_pem, new_key, private_pem, spki
from support.command import Command
from support.guest import Guest, library
from support.host import Host, Module
from support.host_process import new_id, reason
from support.shell import CkFailure, Shell

pytestmark = pytest.mark.slow
FAILURE, REFUSED = 1, 4


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def hsmvisor(host: Host) -> Command:
    return Command(f"unix:{host.process.socket}", host.process.directory / "authority")


def files(directory: Path, key: PrivateKey, name: str) -> tuple[str | Path, ...]:
    """The owner's files of a key with its chain, as arguments of material push."""
    key_file, cert_file = directory / f"{name}.key", directory / f"{name}.pem"
    key_file.write_bytes(private_pem(key))
    cert_file.write_bytes(chain_pem(Authority().chain(key)))
    return ("--key", key_file, "--cert", cert_file, "--profile", "any")


def test_an_older_state_is_noticed_by_the_authority_and_brought_up_to_date(host: Host, hsmvisor: Command, tmp_path: Path) -> None:
    process, backup = host.process, tmp_path / "host.backup"
    old, new, other = new_key("p256"), new_key("p256"), new_key("p256")
    hsmvisor("module", "create", "web-1")
    module = Module(host, "web-1", process.get("web-1").address)
    hsmvisor("material", "push", "web-1", "tls", *files(tmp_path, old, "old"))
    hsmvisor("backup", "--out", backup)
    # what the restored state will not know: another key, the old one destroyed, and one whose files are gone by then
    renewal = ("push", "web-1", "tls", *files(tmp_path, new, "new"))
    hsmvisor("material", *renewal)
    hsmvisor("material", "destroy", "web-1", "tls", "1", "--compromised", "--yes")
    hsmvisor("material", "push", "web-1", "other", *files(tmp_path, other, "other"))
    assert module.states("tls") == {1: "destroyed", 2: "current"}
    host.stop(signal.SIGTERM)
    hsmvisor("restore", backup, "--config", process.config, "--force")
    host.start()
    assert module.serving() and module.states("tls") == {1: "current"}, "the key that was destroyed is back"

    hsmvisor("material", "list", "web-1")
    assert "set back" in hsmvisor.errors and "hsmvisor material redeliver web-1" in hsmvisor.errors
    for words in (renewal, ("retire", "web-1", "tls", "1")):
        hsmvisor("material", *words, code=REFUSED)
        assert "set back" in hsmvisor.errors and "redeliver" in hsmvisor.errors
    assert module.states("tls") == {1: "current"}

    moved = tmp_path / "moved.key"
    (tmp_path / "other.key").rename(moved)
    said = hsmvisor("material", "redeliver", "web-1", code=FAILURE)
    assert "destroyed" in said and "hsmvisor material push web-1 other --key FILE" in said
    states = module.states("tls")
    assert (states[1], states[3]) == ("destroyed", "current"), "number 2 was given before and is not given again"
    assert module.material("tls").generations[-1].public_key == spki(new)
    hsmvisor("material", "list", "web-1")
    assert "does not have what was delivered to it before: other" in hsmvisor.errors
    hsmvisor("material", "redeliver", "web-1", "other", "--key", moved, "--cert", tmp_path / "other.pem")
    assert module.states("other") == {2: "current"}
    assert "has all" in hsmvisor("material", "redeliver", "web-1")
    hsmvisor("material", "list", "web-1")
    assert hsmvisor.errors == ""


def test_a_dead_hosts_module_is_made_anew_and_its_guest_goes_on(host: Host, hsmvisor: Command, tmp_path: Path) -> None:
    process, tls, ssh = host.process, new_key("p256"), new_key("p256")
    hsmvisor("module", "create", "web-1")
    address = process.get("web-1").address
    hsmvisor("material", "push", "web-1", "tls", *files(tmp_path, tls, "tls"))
    hsmvisor("material", "push", "web-1", "ssh", *files(tmp_path, ssh, "ssh"), "--alias-id", "0a0b")
    with Shell(Guest(library("ours"), address, tmp_path)) as shell:
        shell.tell("open")
        handle, other_handle = shell.private("tls"), shell.private("ssh")
        assert shell.signs_with(handle, tls) and shell.signs_with(other_handle, ssh)

        host.stop(signal.SIGKILL)
        assert process.launch(["--stop-workers"]).wait(20) == 0
        shutil.rmtree(process.state)
        shutil.rmtree(process.run)
        old_key = host.key
        host.start()  # a new machine under the old address
        assert host.key != old_key

        hsmvisor("module", "create", "web-1")
        hsmvisor("material", "push", "web-1", "tls", *files(tmp_path, tls, "again"), code=REFUSED)
        assert "WRONG_HOST" in hsmvisor.errors and "hsmvisor host enrol --replace" in hsmvisor.errors
        secret = hsmvisor("host", "new-secret").encode()
        hsmvisor("host", "enrol", "--secret-file", "-", stdin=secret, code=REFUSED)
        assert "another identity key" in hsmvisor.errors, "not without being told"
        secret = hsmvisor("host", "new-secret").encode()
        hsmvisor("host", "enrol", "--replace", "--secret-file", "-", stdin=secret)
        hsmvisor("material", "list", "web-1")
        assert "does not have what was delivered to it before: ssh, tls" in hsmvisor.errors

        with pytest.raises(CkFailure, match=r"0x60|0x82|HANDLE_INVALID"):
            shell.tell("sign", handle)
        done = hsmvisor.json("material", "redeliver", "web-1")["done"]
        assert {(o["material"], o["done"], o["generation"]) for o in done} == {("tls", "delivered", 1), ("ssh", "delivered", 1)}
        for stale in (handle, other_handle):
            with pytest.raises(CkFailure, match=r"0x60|0x82|HANDLE_INVALID"):
                shell.tell("sign", stale)  # it names no other key by chance
        shell.tell("open")
        assert shell.signs_with(shell.private("tls"), tls), "the same process, the same socket"
        assert shell.signs_with(shell.one(**{"class": "PRIVATE_KEY", "id": "0a0b"}), ssh), "as it was delivered before"
    hsmvisor("material", "list", "web-1")
    assert hsmvisor.errors == ""
    records = "".join(path.read_text() for path in (process.directory / "authority/modules").glob("*.json"))
    assert "PRIVATE" not in records and str(tmp_path / "tls.key") in records


def test_a_command_of_the_lost_time_is_not_carried_out_after_the_next_one(host: Host, hsmvisor: Command, tmp_path: Path) -> None:
    """Numbers of the lost time are not given again, so what was signed then stays behind what is signed now."""
    process, backup, kept = host.process, tmp_path / "host.backup", []
    module = host.create("web-1")
    module.push("tls", new_key("p256"))
    hsmvisor("backup", "--out", backup)
    execute = host.pusher._materials.Execute
    host.pusher._materials.Execute = lambda r, **more: (kept.append(r.signed_command), execute(r, **more))[1]  # type: ignore
    module.push("tls", new_key("p256"))
    host.stop(signal.SIGTERM)
    hsmvisor("restore", backup, "--config", process.config, "--force")
    host.start()
    module.serving()
    with host.pusher.catching_up("web-1"):
        host.pusher.retire("web-1", "tls", 1)
    for command in kept:
        with pytest.raises(grpc.RpcError) as caught:
            process.material.Execute(pb.ExecuteRequest(request_id=new_id(), module="web-1", signed_command=command), timeout=10)
        assert reason(caught.value)[1] == "STALE_SEQUENCE"
