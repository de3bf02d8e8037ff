"""What a host keeps of a module's TPM: sealed, of this module and this moment, in its backup, and gone with the module."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.command import Command
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.leaks import Needles
from support.tpm_guest import DIGEST, verify
from support.tpm_host import FIRST, create, machine, serving

NV = 0x01500001


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def rows(host: Host) -> dict[bytes, tuple[int, bytes]]:
    """Version and sealed state, by module."""
    with closing(sqlite3.connect(host.process.state / "state.db")) as database:
        return {module: (version, sealed) for module, version, sealed in database.execute("SELECT * FROM tpms")}


def row(module: Module) -> tuple[int, bytes]:
    return rows(module.host)[module.status().module_id]


def test_no_key_of_a_tpm_lies_in_a_file(host: Host) -> None:
    module, keys = create(host, "sealed", h0="web", h1="mail"), [new_key("p256"), new_key("rsa2048")]
    for material, key in zip(("web", "mail"), keys, strict=True):
        module.push(material, key)
    with machine(module) as (_, guest):
        wait_for(lambda: len(guest.handles(FIRST)) == 2, what="the keys")
        needles = Needles(keys)
        assert len(row(module)[1]) > 1000
        assert needles.in_files(host.process.state, host.process.run) == {}
        assert needles.found_in(host.process.log.read_bytes()) == set()
        assert needles.in_process(host.pid()) == set()
        assert needles.in_process(serving(module).pid), "the TPM has them, and the search finds them"


def test_a_state_that_is_not_its_own_is_refused(host: Host) -> None:
    """A byte of it, another module's, an older one in the newer one's place; the module serves, and so do others' TPMs."""
    module, other = create(host, "its-own", h0="web"), create(host, "another", h0="web")
    module_id, key = module.status().module_id, new_key("p256")
    older = row(module)
    module.push("web", key)
    with machine(module) as (_, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
    others = row(other)[1]
    for change in (bent, lambda sealed: others, lambda sealed: older[1], lambda sealed: sealed[:-1], lambda sealed: b""):
        pid = serving(module).pid
        host.stop(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        version, right = rows(host)[module_id]
        assert version > older[0]
        wrong = change(right)
        put(host, module_id, wrong)
        host.start()
        wait_for(lambda: module.status().tpm.state == "failed", 20, "the failure")
        failure = module.status().tpm.failure
        assert "state" in failure, failure
        assert module.status().state == "serving" and serving(other)
        assert row(module) == (version, wrong), "nothing is made anew in its place"
        host.stop(signal.SIGKILL)
        put(host, module_id, right)
        host.start()
        serving(module)
        with machine(module) as (_, guest):
            verify(key, DIGEST, guest.sign(FIRST, DIGEST)[1])


def bent(sealed: bytes) -> bytes:
    changed = bytearray(sealed)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def put(host: Host, module_id: bytes, sealed: bytes) -> None:
    with closing(sqlite3.connect(host.process.state / "state.db")) as database, database:
        database.execute("UPDATE tpms SET sealed = ? WHERE module_id = ?", (sealed, module_id))


def test_a_backup_has_it(host: Host, tmp_path: Path) -> None:
    """What a guest has put into its TPM is there on a new machine, and it is the same TPM."""
    process, hsmvisor = host.process, Command(f"unix:{host.process.socket}", host.authority.directory)
    module, key = create(host, "kept", h0="web"), new_key("p256")
    module.push("web", key)
    with machine(module) as (_, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        assert guest.nv_define(NV, 8) == 0
    asked = pb.GetTpmIdentityRequest(name="kept")
    identity = process.modules.GetTpmIdentity(asked, timeout=10).endorsement_certificates
    file = tmp_path / "host.backup"
    hsmvisor("backup", "--out", file)
    assert not Needles([key]).found_in(file.read_bytes())
    master_key = (process.state / "master.key").read_bytes()
    host.stop(signal.SIGKILL)
    assert process.launch(["--stop-workers"]).wait(20) == 0
    shutil.rmtree(process.state)
    shutil.rmtree(process.run)
    process.state.mkdir(mode=0o700)
    (process.state / "master.key").write_bytes(master_key)
    (process.state / "master.key").chmod(0o600)
    hsmvisor("restore", file, "--config", process.config)
    host.start()
    serving(module)
    assert process.modules.GetTpmIdentity(asked, timeout=10).endorsement_certificates == identity
    with machine(module) as (_, guest):
        assert NV in guest.handles(0x01000000)
        verify(key, DIGEST, guest.sign(FIRST, DIGEST)[1])


def test_it_goes_with_its_module(host: Host) -> None:
    """So does an emptied module's: it has another TPM then."""
    module = create(host, "going")
    asked = pb.GetTpmIdentityRequest(name="going")
    before, module_id = host.process.modules.GetTpmIdentity(asked, timeout=10), module.status().module_id
    breaks = pb.BreakGlassRequest(request_id=new_id(), name="going", new_root=host.process.root_public, empty_it=True)
    host.process.modules.BreakGlass(breaks, metadata=(("hsmvisor-why", "its root is lost"),), timeout=20)
    serving(module)
    now = module.status().module_id
    assert module_id not in rows(host) and now in rows(host)
    assert host.process.modules.GetTpmIdentity(asked, timeout=10).endorsement_certificates != before.endorsement_certificates
    module.destroy()
    assert rows(host) == {}
