"""Where private keys lie in their worker: in memory that the kernel neither swaps nor dumps, and that stays small."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bare_worker import BareWorker
from support.certificates import new_key
from support.guest import Guest, library
from support.host import Host
from support.host_process import SOURCES
from support.leaks import Needles
from support.load import Signer
from support.processes import flags, regions, status, titled

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
KINDS = {"ec": "p256", "rsa": "rsa2048"}


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def unlocked(pid: int, needles: Needles) -> dict[str, set[str]]:
    """What of the keys lies where it may be swapped or dumped, by place; that there are keys elsewhere is asserted."""
    found, kept = {}, 0
    known = flags(pid)
    for span, data in regions(pid):
        flag = known.get(span, {"wr"})
        if "wr" in flag and (hits := needles.found_in(data)):
            if {"lo", "lf", "dd"} <= flag:
                kept += 1
            else:
                found[f"{span[0]:x}-{span[1]:x}"] = hits
    assert kept, "the search finds no key at all"
    return found


@pytest.mark.real
def test_keys_lie_in_locked_memory_alone(host: Host, tmp_path: Path) -> None:
    """Under load, from several threads, with stacks and buffers in use; after rotations too."""
    module = host.create("owner")
    assert {m.name: m.applied for m in module.status().measures}["memory"]
    keys = {name: new_key(kind) for name, kind in KINDS.items()}
    for name, key in keys.items():
        module.push(name, key)
    guest = Guest(library("ours"), module.address, tmp_path)
    signers = [Signer(guest, name, name, threads=4, name=name) for name in KINDS]
    try:
        keys["again"] = new_key("p256")
        module.push("ec", keys["again"])
        assert unlocked(module.pid, Needles(keys.values())) == {}
    finally:
        made = [one for signer in signers for one in signer.stop()]
    assert made and not [one.error for one in made if one.error]


@pytest.mark.real
def test_the_master_key_lies_in_locked_memory_alone(host: Host) -> None:
    pid = titled(host.pid(), "hsmvisord: key provider")
    master = (host.process.state / "master.key").read_bytes()
    known = flags(pid)
    holding = [span for span, data in regions(pid) if master in data]
    assert holding and all({"lo", "dd"} <= known[span] for span in holding)


def test_what_is_locked_is_what_is_used(tmp_path: Path) -> None:
    """Locked as it is touched: no page comes into being for it (mlock2(2), MLOCK_ONFAULT).  One heap, no arenas; small stacks."""
    tmp_path.chmod(0o755)
    worker = BareWorker(tmp_path, uid=460_994)
    try:
        said = {name: int(value.split()[0]) for name, value in status(worker.pid).items() if name in ("VmLck", "VmRSS")}
        assert said["VmLck"] > 20_000 and said["VmRSS"] < said["VmLck"] + 30_000
        locked = [end - start for (start, end), flag in flags(worker.pid).items() if "lo" in flag]
        assert max(locked) > 16 << 20
        assert all(size <= 1 << 20 for size in locked if size != max(locked))
    finally:
        worker.stop()


def test_the_heap_is_followed_as_it_grows() -> None:
    """And a limit that is too low is said, at once or when it comes to that: what is new is locked as far as it goes."""
    program = """
import json, resource, sys
from hsmvisord import memory
from hsmvisor_rpc.confine import capabilities
if sys.argv[1] != "enough": resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 << 20, 4 << 20))
if sys.argv[1] == "low": capabilities.clear()
try: said = memory.keep()
except OSError as error: said = f"refused: {error}"
if sys.argv[1] == "outgrown": capabilities.clear()
grown = [bytes(1000) for _ in range(20_000)]
said = memory.follow() or said
locked = [line for line in open("/proc/self/status") if line.startswith("VmLck")][0].split()[1]
print(json.dumps([said, int(locked), (memory._end() - memory._heap) >> 10]))
"""
    from hsmvisor.environment import child_environment

    environment = child_environment() | {"PYTHONPATH": SOURCES}

    def run(how: str) -> tuple[str, int, int]:
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, env=environment, check=True)
        said, locked, heap = json.loads(done.stdout)
        return said, locked, heap

    said, locked, heap = run("enough")
    assert said.startswith("heap of") and locked >= heap > 20_000
    said, locked, heap = run("low")
    assert said.startswith("refused: RLIMIT_MEMLOCK is 4096 KiB"), said
    assert 2000 < locked <= 4096 < heap
    said, locked, heap = run("outgrown")
    assert said.startswith(f"the heap has grown to {heap >> 10} MiB"), said
    assert 8000 < locked < heap


def test_a_worker_has_bounded_memory() -> None:
    program = """
from hsmvisord.confined import sandbox
sandbox.enter(460_993)
try: bytearray(sandbox.MAX_DATA)
except MemoryError: print("refused", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": SOURCES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "refused\n", done.stderr
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
