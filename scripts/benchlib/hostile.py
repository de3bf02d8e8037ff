"""What a hostile guest costs another one: latencies of a module that signs while a neighbour's guest misbehaves, beside those while
the neighbour is honest and busy.  Interleaved round by round.

The neighbour's client is a process of this machine, flat out: an honest one signs with 8 threads, a hostile one has one.  It has
the lowest priority, so that what is compared is what its module does to the other one: how the processors are shared among guests
is the hypervisor's to say.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.c_programs import build_p11bench
from support.certificates import new_key
from support.guest import library
from support.host import Host, Module
from support.host_process import new_id
from support.hostile import BEHAVIOURS, socket_of
from support.processes import pss

from benchlib.setups import Setup
from benchlib.signing import run_once

ALONE, HONEST = "nobody", "honest, busy"
GOAL, AIM = 1.25, 1.1
PIN = b"123456"
_TICK = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _setup(module: Module) -> Setup:
    ours = library("ours")
    return Setup(module.name, module.name, ours.path, {ours.variable: module.address})


@contextmanager
def neighbour(name: str, module: Module, program: Path, seconds: float) -> Iterator[int]:
    """Runs while the context lasts; gives its process id, 0 for nobody."""
    if name == ALONE:
        yield 0
        return
    if name == HONEST:
        command = [str(program), "--module", str(library("ours").path), "--label", "key", "--mech", "ecdsa", "--threads", "8"]
        command += ["--seconds", str(seconds + 5), "--warmup", "0.1"]
    else:
        command = [sys.executable, "-m", "support.hostile", name, socket_of(module.address), str(seconds + 5)]
    environment = os.environ | _setup(module).environment
    command = ["nice", "-n", "19", *command]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)  # it has begun
        if process.poll() is not None:
            raise RuntimeError(f"the neighbour ({name}) has ended with {process.returncode}")
        yield process.pid
    finally:
        process.kill()
        process.wait(10)


def one(name: str, host: Host, victim: Module, other: Module, program: Path, seconds: float) -> dict[str, float]:
    setup, worker = _setup(victim), other.pid
    with neighbour(name, other, program, seconds) as pid:
        pids = {"client": pid, "module": worker, "supervisor": host.pid()}
        before = {part: cpu(p) for part, p in pids.items() if p}
        began = time.monotonic()
        measured = run_once(program, setup, "p256", 1, seconds, label="key")
        passed = time.monotonic() - began
        used = {f"{part}_cpu": (cpu(p) - before[part]) / passed for part, p in pids.items() if p}
    if measured["errors"]:
        raise RuntimeError(f"beside {name}: {measured['errors']} signatures failed")
    return {figure: measured[figure] for figure in ("p50_us", "p99_us", "ops_per_s")} | used | {"module_mb": pss(worker) / 2**20}


def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows: neighbour; medians; `ratio` is the median of the rounds' p99 over that beside the honest one."""
    names = [ALONE, HONEST, *BEHAVIOURS]
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    host = Host()
    try:
        host.start()
        victim, guesses = host.create("victim"), host.create("guessed")
        others = {name: guesses if name == "PIN guessing" else host.create(f"other-{n}") for n, name in enumerate(names)}
        for module in {victim.name: victim, **{m.name: m for m in others.values()}}.values():
            module.push("key", new_key("p256"))
        host.process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=guesses.name, pin=PIN), timeout=10)
        with tempfile.TemporaryDirectory(prefix="hsmb.") as directory:
            program = build_p11bench(Path(directory))
            for number in range(rounds):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    print(f"\rhostile guests, round {number + 1}/{rounds}: {name:24}", end="", file=sys.stderr, flush=True)
                    runs[name].append(one(name, host, victim, others[name], program, seconds))
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    finally:
        host.clean()
    return [_row(name, runs) for name in names]


def _row(name: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    values = runs[name]
    row: dict[str, Any] = {"neighbour": name, "rounds": len(values)}
    for figure in sorted({figure for value in values for figure in value}):
        row[figure] = round(statistics.median(v[figure] for v in values if figure in v), 2)
    row["ratio"] = round(statistics.median(a["p99_us"] / b["p99_us"] for a, b in zip(values, runs[HONEST], strict=True)), 2)
    return row


def verdict(rows: list[dict[str, Any]]) -> bool:
    return all(row["ratio"] <= GOAL for row in rows)
