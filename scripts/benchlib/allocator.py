"""What it costs that freed memory is overwritten (PYTHONMALLOC, GLIBC_TUNABLES): two hosts side by side, one without."""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from support.certificates import new_key
from support.guest import library
from support.host import Host
from support.processes import pss

from benchlib.report import table
from benchlib.setups import KEYS, Setup
from benchlib.signing import run_once

KINDS, THREADS = ("p256", "rsa2048", "ed25519"), (1, 8)
OVERWRITING, PLAIN = "overwriting", "plain"


def measure(program: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of signatures a second of both, and of the ratio of the two runs of a round; PSS of each worker after them."""
    keys = {kind: new_key(KEYS[kind]) for kind in KINDS}
    ours = library("ours")
    with ExitStack() as stack:
        setups, modules = [], {}
        for name in (OVERWRITING, PLAIN):
            host = Host()
            stack.callback(host.clean)
            if name == PLAIN:
                host.process.module = "support.plain_allocator_host"
            modules[name] = host.start().create(f"allocator-{name}")
            for kind, key in keys.items():
                modules[name].push(kind, key)
            setups.append(Setup(name, name, ours.path, {ours.variable: modules[name].address}))
        rates: dict[tuple[str, int, str], list[float]] = {}
        for number in range(rounds):
            print(f"\rallocator: round {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
            for kind in KINDS:
                for threads in THREADS:
                    for setup in setups if number % 2 else setups[::-1]:
                        run = run_once(program, setup, kind, threads, seconds)
                        rates.setdefault((kind, threads, setup.name), []).append(run["ops_per_s"])
        print(file=sys.stderr)
        sizes = {name: round(pss(module.pid) / 2**20, 2) for name, module in modules.items()}
    rows = [
        _row(kind, threads, rates[kind, threads, OVERWRITING], rates[kind, threads, PLAIN]) for kind in KINDS for threads in THREADS
    ]
    return {"rounds": rounds, "rows": rows, "worker_pss_mb": sizes}


def _row(kind: str, threads: int, overwriting: list[float], plain: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(overwriting, plain, strict=True))
    return {
        "key": kind,
        "threads": threads,
        OVERWRITING: round(statistics.median(overwriting)),
        PLAIN: round(statistics.median(plain)),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def text(measured: dict[str, Any]) -> str:
    head = ["key", "threads", "signatures/s", "without overwriting", "ratio (median)", "ratio (least, most)"]
    rows = [
        [
            row["key"],
            str(row["threads"]),
            f"{row[OVERWRITING]:,}",
            f"{row[PLAIN]:,}",
            f"{row['ratio']:.2f}",
            f"{row['ratios'][0]:.2f}, {row['ratios'][-1]:.2f}",
        ]
        for row in measured["rows"]
    ]
    sizes = measured["worker_pss_mb"]
    return f"{table(head, rows)}\n\nA worker's PSS after it: {sizes[OVERWRITING]} MB, without overwriting {sizes[PLAIN]} MB."
