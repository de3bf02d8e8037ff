"""Where private keys are not: any process but the owning worker, any file.  The worker itself shows that the search works."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.certificates import Authority, new_key
from support.cores import allowed, found, left_by_an_ordinary_process, places
from support.guest import Guest, Library
from support.host import Host
from support.host_process import gone, wait_for
from support.leaks import Needles
from support.native_client import NativeClient
from support.processes import titled
from support.shell import Shell

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")]
KINDS = {"ec": "p256", "ec384": "p384", "rsa": "rsa2048", "ed": "ed25519", "ml": "mldsa65"}


@pytest.fixture
def host() -> Iterator[Host]:
    """Of its own: another test's authority would hold keys in this process alone, but its host would be searched too."""
    with Host() as host:
        yield host


def others(host: Host) -> dict[str, int]:
    pids = {"supervisor": host.pid()}
    for title in ("launcher", "key provider", "other"):
        pids[title] = titled(1, f"hsmvisord: {title}") if title == "other" else titled(host.pid(), f"hsmvisord: {title}")
    assert all(pids.values()), pids
    return pids


def test_keys_are_in_their_worker_alone(host: Host, library: Library, tmp_path: Path) -> None:
    owner, other = host.create("owner"), host.create("other")
    authority = Authority()
    keys = {name: new_key(kind) for name, kind in KINDS.items()}
    for name, key in keys.items():
        owner.push(name, key, () if name == "ml" else authority.chain(key))
    foreign = new_key("p256")
    other.push("foreign", foreign)
    needles = Needles(keys.values())
    with Shell(Guest(library, owner.address, tmp_path)) as client:
        for name in ("ec", "ec384"):
            for _ in range(20):
                client.tell("sign", client.private(name))
        searched = others(host) | {"client": client.process.pid, "other": other.pid}
        found = {title: needles.in_process(pid) for title, pid in searched.items()}
    assert found == {title: set() for title in searched}
    inside = needles.in_process(owner.pid)
    for number, name in enumerate(keys):
        assert any(hit.startswith(f"key {number} ") for hit in inside), f"the search does not find {name} where it must be"
    assert Needles([foreign]).in_process(other.pid)
    assert needles.in_files(host.process.state, host.process.run) == {}
    assert needles.found_in(host.process.log.read_bytes()) == set()


@pytest.mark.parametrize("kind", ["p256", "rsa2048", "ed25519", "mldsa65"])
def test_a_destroyed_key_is_gone_from_its_worker(host: Host, library: Library, tmp_path: Path, kind: str) -> None:
    module = host.create("owner")
    old, new = new_key(kind), new_key(kind)
    first = module.push("web", old)
    with Shell(Guest(library, module.address, tmp_path)) as client:
        held = client.private("web")
        if kind == "p256":
            for _ in range(20):
                client.tell("sign", held)
        assert Needles([old]).in_process(module.pid)
        module.push("web", new)
        module.destroy_generation("web", first)
        assert Needles([old]).in_process(module.pid) == set()
        assert Needles([new]).in_process(module.pid)


def test_no_core_dump_and_no_debugger(host: Host) -> None:
    """Not dumpable: /proc/pid belongs to root then, and a crash writes no core (prctl(2), PR_SET_DUMPABLE)."""
    worker = host.create("owner").pid
    assert os.stat(f"/proc/{worker}/mem").st_uid == 0
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")] == [["0", "0"]]


@pytest.fixture
def cores() -> Iterator[None]:
    with allowed():
        yield


def test_an_abort_leaves_no_core(cores: None, host: Host, tmp_path: Path) -> None:
    assert left_by_an_ordinary_process(tmp_path), "not even that leaves a core here"
    pids = {"worker": host.create("owner").pid, "supervisor": host.pid()}
    for title in ("launcher", "key provider"):
        pids[title] = titled(host.pid(), f"hsmvisord: {title}")
    directories = places(pids.values())
    before = found(directories)
    for title in ("worker", "launcher", "key provider", "supervisor"):
        os.kill(pids[title], signal.SIGABRT)
        wait_for(lambda p=pids[title]: gone(p))  # type: ignore[misc]
    assert host.process.process is not None and host.process.process.wait(10) == -signal.SIGABRT
    assert found(directories) == before


def test_another_process_of_the_same_user_cannot_dump_it(host: Host, tmp_path: Path) -> None:
    """gcore(1) as the worker's own user: refused; a process of that user that does not care about it can be dumped."""
    worker = host.create("owner").pid
    uid = int(next(line.split()[1] for line in Path(f"/proc/{worker}/status").read_text().splitlines() if line.startswith("Uid:")))
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o777 == 0o700:  # those that pytest has made
            parent.chmod(0o755)
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    with subprocess.Popen([*user, "sleep", "60"]) as ordinary:
        wait_for(lambda: b"sleep" in Path(f"/proc/{ordinary.pid}/cmdline").read_bytes()[:5])
        for name, pid in (("ordinary", ordinary.pid), ("worker", worker)):
            subprocess.run([*user, "gcore", "-o", str(tmp_path / name), str(pid)], capture_output=True, check=False, timeout=60)
        ordinary.kill()
    assert [path.name.partition(".")[0] for path in tmp_path.iterdir()] == ["ordinary"]


@pytest.mark.parametrize("kind", ["ed25519", "ed448"])
def test_a_destroyed_key_that_signed_with_a_context_is_gone(host: Host, kind: str) -> None:
    """Another library signs then, with what it makes of the key: seed, scalar and prefix are searched for.  Of the context and
    prehashed, in one part and in parts, by several contexts, and with an operation that is open when the key goes."""
    module = host.create("owner")
    old, new = new_key(kind), new_key(kind)
    first = module.push("web", old)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(module.address.removeprefix("unix:path="))
        client = NativeClient(sock)
        client.hello()
        session = client.open_session(0)
        (held,), _, _ = client.find_once(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY))
        for number in range(40):
            mechanism = Mechanism(ck.CKM_EDDSA, (number % 2, b"context %d" % number))
            signature = client.sign_once(session, mechanism, held, b"message")
            client.call(Call.SIGN_INIT, session, mechanism, held)
            client.call(Call.SIGN_UPDATE, session, b"message")
            assert client.call(Call.SIGN_FINAL, session, 114) == (signature,)
        client.call(Call.SIGN_INIT, session, mechanism, held)
        client.call(Call.SIGN_UPDATE, session, b"message")
        inside = Needles([old]).in_process(module.pid)
        for component in ("seed", "prefix"):
            assert any(component in hit for hit in inside), f"the search does not find the {component} where it must be: {inside}"
        module.push("web", new)
        module.destroy_generation("web", first)
        assert Needles([old]).in_process(module.pid) == set()
        assert Needles([new]).in_process(module.pid)
