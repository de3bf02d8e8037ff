"""Tables of what was measured, for a terminal and for Markdown alike."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchlib.plot import KEYS, TITLES

#: what the shim must reach against each set-up, by (key, threads)
GOALS = {
    ("p256", 1): {"softhsm": 1.8, "p11kit-softhsm": 2.8},
    ("p256", 8): {"softhsm": 1.6, "p11kit-softhsm": 3.5},
    ("rsa2048", 1): {"softhsm": 2.2, "p11kit-softhsm": 2.4},
    ("rsa2048", 8): {"softhsm": 2.8, "p11kit-softhsm": 3.5},
}


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        "?",
    )
    return {"processor": model, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def place() -> str:
    """The machine in words, for parts that were not measured on the same one."""
    told = machine()
    return f"{told['processor']}, {told['cores']} cores, Linux {told['kernel'].split('-')[0]}, Python {told['python']}"


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def before(directory: Path | None, name: str) -> dict[str, Any]:
    """What an earlier run left in its directory, for the parts that are not run again."""
    path = directory / name if directory else None
    found: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    found.setdefault("times", {})
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def signing_table(rows: list[dict[str, Any]]) -> str:
    head = ["key", "threads", "set-up", "signatures/s", "p50 µs", "p99 µs", "p99.9 µs", "hsmvisor is"]
    order = list(TITLES)
    lines = []
    for row in sorted(rows, key=lambda r: (list(KEYS).index(r["key"]), r["threads"], order.index(r["setup"]))):
        ratio = next(
            (
                r["ratio"].get(row["setup"])
                for r in rows
                if (r["key"], r["threads"], r["setup"]) == (row["key"], row["threads"], "hsmvisor")
            ),
            None,
        )
        figures = [f"{row['ops_per_s']:,.0f}", f"{row['p50_us']:,.0f}", f"{row['p99_us']:,.0f}", f"{row['p999_us']:,.0f}"]
        lines.append([KEYS[row["key"]], str(row["threads"]), TITLES[row["setup"]], *figures, f"{ratio:.2f}x" if ratio else ""])
    return table(head, lines)


def goals(rows: list[dict[str, Any]], limits: dict[str, float]) -> tuple[str, bool]:
    """The table of goals, and whether all that were measured are met.  With it what there would be if signatures alone took time,
    on all cores (`limits`, signatures a second): no goal above that can be met here."""
    lines, all_met = [], True
    for (key, threads), wanted in GOALS.items():
        ours = next((r for r in rows if (r["key"], r["threads"], r["setup"]) == (key, threads, "hsmvisor")), None)
        for other, goal in wanted.items():
            if ours and other in ours["ratio"]:
                met = ours["ratio"][other] >= goal
                all_met &= met
                rival = next(r for r in rows if (r["key"], r["threads"], r["setup"]) == (key, threads, other))
                limit = f"{limits[key] / rival['ops_per_s']:.2f}x" if threads > 1 and limits.get(key) else ""
                figures = [f"{goal}x", f"{ours['ratio'][other]:.2f}x", limit, "met" if met else "MISSED"]
                lines.append([KEYS[key], str(threads), TITLES[other], *figures])
    return table(["key", "threads", "against", "goal", "measured", "signatures alone", ""], lines), all_met


def hostile_table(rows: list[dict[str, Any]], goal: float) -> str:
    """A victim's latencies beside each neighbour; `cores` is what the neighbour's client, its module and the supervisor use."""
    head = ["neighbour", "p50 µs", "p99 µs", "p99 ratio", f"goal {goal}x", "cores", "module MB"]
    lines = []
    for row in rows:
        cores = " + ".join(f"{row.get(part, 0):.2f}" for part in ("client_cpu", "module_cpu", "supervisor_cpu"))
        figures = [f"{row['p50_us']:,.0f}", f"{row['p99_us']:,.0f}", f"{row['ratio']:.2f}x"]
        lines.append([row["neighbour"], *figures, "met" if row["ratio"] <= goal else "MISSED", cores, f"{row['module_mb']:.1f}"])
    return table(head, lines)


def facts_table(facts: dict[str, Any]) -> str:
    """Nested figures as dotted names."""

    def flat(prefix: str, value: Any) -> list[list[str]]:
        if isinstance(value, dict):
            return [row for name, inner in value.items() for row in flat(f"{prefix}.{name}" if prefix else name, inner)]
        return [[prefix, str(value)]]

    return table(["figure", "value"], flat("", facts))
