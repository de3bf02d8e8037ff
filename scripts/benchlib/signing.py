"""Signing speed: p11bench on every set-up, interleaved round by round, so that what the machine does meanwhile meets all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib.setups import MECHANISMS, Setup


@dataclass(frozen=True)
class Plan:
    keys: list[str]
    threads: list[int]
    rounds: int
    seconds: float


def run_once(program: Path, setup: Setup, key: str, threads: int, seconds: float, label: str = "") -> dict[str, Any]:
    command = [
        str(program),
        "--module",
        str(setup.module),
        "--label",
        label or key,
        "--mech",
        MECHANISMS[key],
        "--threads",
        str(threads),
    ]
    command += ["--seconds", str(seconds), "--warmup", "0.3", "--latency", *(["--pin", setup.pin] if setup.pin else [])]
    result = subprocess.run(
        command, env=os.environ | setup.environment, capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    if not result.stdout:
        raise RuntimeError(f"p11bench on {setup.name}, {key}: {result.stderr.strip()}")
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def measure(program: Path, setups: list[Setup], plan: Plan) -> list[dict[str, Any]]:
    """Rows: key, threads, setup; medians of signatures a second and of the latencies; the ratio to each other set-up, which is the
    median of the rounds' own ratios."""
    runs: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for number in range(plan.rounds):
        turn = number % len(setups)
        for key in plan.keys:
            for threads in plan.threads:
                print(f"\rround {number + 1}/{plan.rounds}: {key}, {threads} threads      ", end="", file=sys.stderr, flush=True)
                for setup in setups[turn:] + setups[:turn]:
                    if key not in setup.lacks:
                        runs[key, threads, setup.name].append(run_once(program, setup, key, threads, plan.seconds))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return [_row(place, runs) for place in runs]


def _row(place: tuple[str, int, str], runs: dict[tuple[str, int, str], list[dict[str, Any]]]) -> dict[str, Any]:
    key, threads, name = place
    values = runs[place]
    row: dict[str, Any] = {"key": key, "threads": threads, "setup": name, "rounds": len(values)}
    for figure in ("ops_per_s", "p50_us", "p90_us", "p99_us", "p999_us"):
        row[figure] = round(statistics.median(v[figure] for v in values), 1)
    rates = [v["ops_per_s"] for v in values]
    row["errors"] = sum(v["errors"] for v in values)
    row["spread"] = round((max(rates) - min(rates)) / statistics.median(rates), 3)
    row["ratio"] = {
        other: round(statistics.median(a / b["ops_per_s"] for a, b in zip(rates, others, strict=True)), 2)
        for (other_key, other_threads, other), others in runs.items()
        if (other_key, other_threads) == (key, threads) and other != name
    }
    return row
