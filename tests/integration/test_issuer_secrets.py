"""Where private keys of the issuer are not, and what its processes cannot reach."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key
from hsmvisor.bundle import Bundle
from hsmvisor.client.importing import seal_import
from hsmvisor.environment import child_environment
from hsmvisor.manager.issuer.client import Issuer
from support.certificates import new_key, pkcs8, spki
from support.cores import allowed, found, left_by_an_ordinary_process, places
from support.host_process import SOURCES, gone, wait_for
from support.issuing import Manager, Target, children_of, many, measures_of, pid_of, targets, tell
from support.leaks import Needles
from support.processes import dumped, memory, status

ROOT = os.geteuid() == 0
NEEDS_ROOT = pytest.mark.skipif(not ROOT, reason="reading another process's memory needs root")


# ---- where keys are not ---------------------------------------------------------------------------------------------------


def copied(pid: int) -> list[bytes]:
    return list(memory(pid))


@NEEDS_ROOT
@pytest.mark.parametrize("key_type", ["P-256", "RSA-2048", "Ed25519"])
def test_no_key_stays_in_any_process_or_file(tmp_path: Path, key_type: str) -> None:
    """After a key was made, after one was imported, and after a kept one was sealed again."""
    modules = targets(2)
    with Manager(tmp_path) as manager:
        control = Needles([load_der_private_key(manager.held(), None)])  # type: ignore[list-item]
        needles = []
        for line in ("", "kept"):
            made = manager.ask("make", modules, key_type=key_type, names=["a.example"], line=line)
            needles.append(Needles([modules[0].opened(made.envelopes[0])]))
        again = manager.ask("reseal", modules[1:], wrapped=made.wrapped.hex(), line="kept")
        assert spki(modules[1].opened(again.envelopes[0])) == made.public_key
        own = new_key({"P-256": "p256", "RSA-2048": "rsa2048", "Ed25519": "ed25519"}[key_type])
        envelope = seal_import(Bundle.make(pkcs8(own)), manager.recipient, "request")
        told = {"request": "request", "envelope": envelope.hex(), "public_key": spki(own).hex(), "certificates": [], "line": "own"}
        taken = manager.ask("take", modules, **told)
        assert spki(modules[0].opened(taken.envelopes[0])) == spki(own)
        needles.append(Needles([own]))
        for pid in (manager.pid, manager.issuer):
            assert [one.in_process(pid) for one in needles] == [set(), set(), set()]
        assert [one.in_files(tmp_path) for one in needles] == [{}, {}, {}]
        assert control.in_process(manager.pid) and not control.in_process(manager.issuer)
        secret = Needles([])
        secret.add("scalar", (tmp_path / "issuer.key").read_bytes()[64:])
        secret.add("escrow", (tmp_path / "escrow.key").read_bytes())
        assert {hit.split()[0] for hit in secret.in_process(manager.issuer)} == {"scalar", "escrow"}, "what it must hold is found"
        assert not secret.in_process(manager.pid)


@NEEDS_ROOT
@pytest.mark.parametrize("key_type", ["P-256", "RSA-2048", "Ed25519"])
def test_the_key_is_in_its_child_alone_while_it_is_sealed(tmp_path: Path, key_type: str) -> None:
    """The search finds it there: so what it does not find elsewhere is not there."""
    module = Target(1)
    with Manager(tmp_path) as manager:
        issuer = manager.issuer
        manager.begin("make", [module] * 5000, key_type=key_type, names=["a.example"])
        child = wait_for(lambda: children_of(issuer))[0]
        # it seals: some of its time has gone by
        wait_for(lambda: sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13])) > 20)
        os.kill(child, signal.SIGSTOP)
        inside, others = copied(child), [copied(pid) for pid in (manager.pid, issuer)]
        os.kill(child, signal.SIGCONT)
        key = module.opened(manager.result().envelopes[-1])
        needles = Needles([key])
        assert any(needles.found_in(region) for region in inside)
        for regions in others:
            assert not any(needles.found_in(region) for region in regions)
        wait_for(lambda: gone(child))


# ---- what it gave up -----------------------------------------------------------------------------------------------------------


def confined(pid: int) -> int:
    """Returns how many filters it has loaded, the one of this machine included."""
    said = status(pid)
    assert (said["Seccomp"], said["NoNewPrivs"], said["Threads"]) == ("2", "1", "1")
    assert {said[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert not ROOT or said["CapBnd"] == "0" * 16
    assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
    assert Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0") == b"hsmvisor-manager: issuer"
    return int(said["Seccomp_filters"])


def test_the_kernel_says_so_of_a_living_one(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        call = asyncio.create_task(issuer.make("P-256", (), many(5000), None))
        (child, *_) = await asyncio.to_thread(wait_for, lambda: children_of(pid_of(issuer)))
        own = confined(pid_of(issuer)) + 1  # a child's own is stricter
        await asyncio.to_thread(wait_for, lambda: int(status(child)["Seccomp_filters"]) == own)
        assert confined(child) == own
        assert {one.name for one in measures_of(issuer) if not one.applied} <= {"memory"}
        assert {"landlock", "seccomp", "capabilities", "allocator", "core-dumps"} <= {one.name for one in measures_of(issuer)}
        await call

    tell(tmp_path, story)


ATTEMPTS = [
    "open('/tmp/hsmvisor-escaped', 'w')",
    "open('{file}')",
    "os.listdir('/')",
    "os.unlink('{file}')",
    "os.execv('/bin/true', ['true'])",
    "socket.socket(socket.AF_UNIX)",
    "socket.socket(socket.AF_INET)",
    "call(101, 16, os.getppid(), 0, 0)",  # ptrace(PTRACE_ATTACH)
    "call(310, os.getppid(), 0, 0, 0, 0, 0)",  # process_vm_readv
    "call(272, 0x10000000)",  # unshare(CLONE_NEWUSER)
    "call(56, 0x10000011, 0, 0, 0, 0)",  # clone(CLONE_NEWUSER | SIGCHLD)
    "os.kill(os.getppid(), 0)",
]


def inside(confinement: str, attempt: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import ctypes, mmap, os, socket\nfrom hsmvisor.manager.issuer import sandbox, syscalls\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(*arguments):\n    if libc.syscall(*arguments) < 0: raise PermissionError(ctypes.get_errno(), 'refused')\n"
        "rules = syscalls.for_children()\nsandbox.prepare()\n"
        f"{confinement}\nprint('confined', flush=True)\n{attempt}\nprint('done')"
    )
    environment = child_environment() | {"PYTHONPATH": SOURCES}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_it_reaches_nothing(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("x")
    done = inside("sandbox.enter(None)", attempt.format(file=file))
    assert done.stdout == "confined\n" and "PermissionError" in done.stderr, (done.stdout, done.stderr)
    assert file.exists() and not Path("/tmp/hsmvisor-escaped").exists()


@pytest.mark.parametrize("attempt", [*ATTEMPTS, "os.fork()", "mmap.mmap(-1, 4096, prot=7)"])
def test_a_child_that_asks_no_token_reaches_nothing(attempt: str, tmp_path: Path) -> None:
    """Although its issuer has a token, and so may read files."""
    file = tmp_path / "kept"
    file.write_text("x")
    confinement = "sandbox.enter(sandbox.Needs())\nsandbox.enter_child(False, rules)"
    done = inside(confinement, attempt.format(file=file))
    assert done.stdout == "confined\n" and "PermissionError" in done.stderr, (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "attempt", [one for one in ATTEMPTS if not one.startswith(("open('{file}')", "os.listdir", "socket.socket(socket.AF_UNIX"))]
)
def test_one_with_a_token_reads_files_and_no_more(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("x")
    done = inside("sandbox.enter(sandbox.Needs())\nsandbox.enter_child(True, rules)", attempt.format(file=file))
    assert done.stdout == "confined\n" and "PermissionError" in done.stderr, (done.stdout, done.stderr)
    assert file.exists() and not Path("/tmp/hsmvisor-escaped").exists()


@NEEDS_ROOT
def test_another_process_of_the_same_user_cannot_dump_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Manager(tmp_path) as manager:
        assert dumped(out, issuer=manager.issuer) == {"ordinary"}


def test_an_abort_leaves_no_core(tmp_path: Path) -> None:
    with allowed(), Manager(tmp_path) as manager:
        assert left_by_an_ordinary_process(tmp_path), "not even that leaves a core here"
        issuer = manager.issuer
        directories = places([manager.pid, issuer])
        before = found(directories)
        os.kill(issuer, signal.SIGABRT)
        wait_for(lambda: gone(issuer))
        assert found(directories) == before


def test_without_the_allocators_settings_that_is_said() -> None:
    said = inside("told = {m.name: m for m in sandbox.enter(None)}", "print(told['allocator'].applied)")
    assert said.stdout == "confined\nTrue\ndone\n", said.stderr
    program = "from hsmvisor.manager.issuer import sandbox\nprint({m.name: m for m in sandbox.enter(None)}['allocator'])"
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("PYTHONMALLOC", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"PYTHONPATH": SOURCES}, capture_output=True, text=True
    )
    assert "applied=False" in done.stdout and "not overwritten" in done.stdout
