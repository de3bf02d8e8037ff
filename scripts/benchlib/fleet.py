"""A fleet that grows: what a renewal costs the manager and its database, what hosts cost in which nothing happens, how long a
rotation of all takes, and how much memory.

Hosts and modules are light ones (tests/support/light_fleet.py) that speak the real API: each host joins with a token, has a
certificate of its own, and modules make real keys and check every command's signature.  The manager is the real service.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.fleet_processes import Manager
from support.host_process import new_id
from support.light_fleet import LightFleet
from support.light_host import shared_recipient
from support.postgres import Postgres

from benchlib import report

HOSTS, GUESTS = 200, 100  #: of the large fleet; guests of each host
FEW = 5  #: hosts of the small one, to see how the cost grows
KINDS = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
IDLE = 60.0  #: seconds in which nothing happens: three heartbeats
PATIENCE = 7200.0  #: seconds for one rotation
IN_LINE = 1.5  #: times that a renewal of the large fleet may cost one of the small fleet
CALL_WITHIN = 300.0  #: seconds: of a call that concerns all modules
QUIET = 5  #: seconds in a row without a look, after which the manager has settled
MATERIAL = "tls"

#: What is shown, by its name in a row, with the form of its number.
FIGURES = {
    "joined_seconds": ("all hosts have joined, s", ".1f"),
    "first_seconds": ("first certificates of all, s", ".1f"),
    "rotation_seconds": ("rotation of all, s", ".1f"),
    "renewal_ms": ("a renewal, ms", ".1f"),
    "processor_ms": ("processor time a renewal, ms", ".1f"),
    "statements_a_renewal": ("statements a renewal", ".1f"),
    "transactions_a_renewal": ("transactions a renewal", ".1f"),
    "idle_statements": ("statements a minute, nothing happens", ",.0f"),
    "statements_without_hosts": ("statements a minute without hosts", ",.0f"),
    "idle_statements_a_host": ("a host and minute, nothing happens", ".1f"),
    "added_by_a_host": ("of them not there without hosts", ".1f"),
    "memory_mb": ("memory of the manager, MB", ".0f"),
    "memory_mb_without_hosts": ("memory without hosts, MB", ".0f"),
    "failures": ("exchanges that failed", "d"),
    "refused": ("commands that were refused", "d"),
}
#: That grow in line with the fleet, or do not: what manager and database spend.  How long it takes depends on the light hosts too,
#: which share the processors with them.
COSTS = ("processor_ms", "statements_a_renewal")


class Watched:
    """A manager's own counters."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def read(self) -> dict[str, float]:
        get = self._manager.fleet.GetMetrics
        text = (await asyncio.to_thread(get, pb.GetFleetMetricsRequest(), timeout=CALL_WITHIN)).text
        found = re.findall(r"^(hsmvisor_\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.M)
        return {name: float(value) for name, value in found}


def _since(before: dict[str, float], after: dict[str, float], name: str) -> float:
    key = f"hsmvisor_manager_{name}_total"
    return after[key] - before[key]


def _processor_seconds(roots: Sequence[int]) -> float:
    """Returns the processor time of these processes and of all that they have started (proc(5), fields 4 and 14 to 17 of stat)."""
    parents, spent = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile, and its parent has its time
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], spent[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    ours = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")


async def _told(watched: Watched, count: int) -> None:
    """Returns when the manager has heard of so many resources."""
    for _ in range(int(PATIENCE)):
        if (await watched.read())["hsmvisor_fleet_resources"] >= count:
            return
        await asyncio.sleep(1)
    raise TimeoutError("the manager has not heard of all")


async def _settled(watched: Watched) -> None:
    """Returns when the manager has taken in what modules did: it looks at no material any more."""
    before, quiet, ends = await watched.read(), 0, time.monotonic() + PATIENCE
    while quiet < QUIET:
        if time.monotonic() > ends:
            raise TimeoutError("the manager does not come to rest")
        await asyncio.sleep(1)
        after = await watched.read()
        quiet = 0 if _since(before, after, "looks") else quiet + 1
        before = after


async def _until(fleet: LightFleet, least: int, all_of_them: int) -> float:
    """Returns how many seconds it took until all modules have generation `least`."""
    began, pause = time.monotonic(), min(1.0, all_of_them / 5000)  # to look takes time as well
    while fleet.holding(MATERIAL, least) < all_of_them:
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"{fleet.holding(MATERIAL, least)} of {all_of_them} after {PATIENCE:.0f} s")
        await asyncio.sleep(pause)
    return time.monotonic() - began


async def _statements_a_minute(watched: Watched, seconds: float) -> float:
    before = await watched.read()
    await asyncio.sleep(seconds)
    return _since(before, await watched.read(), "statements") * 60 / seconds


async def _measured(
    manager: Manager, processes: Sequence[int], hosts: int, guests: int, idle: float, found: dict[str, Any]
) -> None:
    """Writes into `found` as far as it comes; `processes` are those of manager and database."""
    watched, count = Watched(manager), hosts * guests
    fleet = LightFleet(manager.token, shared_recipient())
    found["memory_mb_without_hosts"] = (await watched.read())["hsmvisor_manager_resident_bytes"] / 2**20
    found["statements_without_hosts"] = await _statements_a_minute(watched, idle)
    try:
        began = time.monotonic()
        await fleet.grow(hosts, guests, env="prod")
        await _told(watched, count)
        found["joined_seconds"] = time.monotonic() - began
        spec = pb.RequestSpec(
            material=MATERIAL, names=["dns:{name}.example.net"], selector={"env": "prod"}, lifetime_seconds=7 * 86400
        )
        apply = pb.ApplyRequest(request_id=new_id(), owner="alice", spec=spec)
        asked = await asyncio.to_thread(manager.requests.Apply, apply, timeout=CALL_WITHIN)
        found["first_seconds"] = await _until(fleet, 1, count)
        await _settled(watched)
        before, spent = await watched.read(), _processor_seconds(processes)
        rotate = pb.RotateRequest(request_id=new_id(), id=asked.id, why="the bench")
        began = time.monotonic()
        await asyncio.to_thread(manager.requests.Rotate, rotate, timeout=CALL_WITHIN)
        await _until(fleet, 2, count)
        found["rotation_seconds"] = time.monotonic() - began
        await _settled(watched)
        after = await watched.read()
        found["processor_ms"] = (_processor_seconds(processes) - spent) * 1000 / count
        found["renewal_ms"] = found["rotation_seconds"] * 1000 / count
        found["statements_a_renewal"] = _since(before, after, "statements") / count
        found["transactions_a_renewal"] = _since(before, after, "transactions") / count
        found["memory_mb"] = after["hsmvisor_manager_resident_bytes"] / 2**20
        found["idle_statements"] = await _statements_a_minute(watched, idle)
        found["idle_statements_a_host"] = found["idle_statements"] / hosts
        found["added_by_a_host"] = (found["idle_statements"] - found["statements_without_hosts"]) / hosts
    finally:
        found["failures"] = sum(link.failures for link in fleet.links)
        found["refused"] = sum(link.refused for link in fleet.links)
        await fleet.close()


@contextlib.contextmanager
def _database(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Gives its URL, and its processes where they are not the manager's own."""
    if kind == "sqlite":
        yield "", ()
        return
    with contextlib.closing(Postgres(syncs=True)) as server:
        yield server.database(), (server.pid,)


def _one(kind: str, hosts: int, guests: int, idle: float) -> dict[str, Any]:
    """`ended`: why it came to no end, where it did not."""
    row: dict[str, Any] = {"database": kind, "hosts": hosts, "modules": hosts * guests, "begun": report.now()}
    with _database(kind) as (url, processes), Manager(url=url) as manager:
        assert manager.process is not None
        try:
            asyncio.run(_measured(manager, (manager.process.pid, *processes), hosts, guests, idle, row))
        except Exception as error:  # the other database's figures stay
            row["ended"] = " ".join(f"{type(error).__name__}: {error}".split())
            print("\n".join(line[:200] for line in manager.log.read_text().splitlines()[-60:]), file=sys.stderr)
    print(row, file=sys.stderr, flush=True)
    return row


def measure(
    before: list[dict[str, Any]], databases: Sequence[str], hosts: int = HOSTS, guests: int = GUESTS, idle: float = IDLE
) -> list[dict[str, Any]]:
    """One fleet after the other: manager and light hosts use a processor each.  `before`: rows of an earlier run, of which those of
    other databases stay."""
    rows = [row for row in before if row["database"] not in databases]
    for kind in databases:
        for part in dict.fromkeys((min(FEW, hosts), hosts)):
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:
                rows.append(apart.submit(_one, kind, part, guests, idle).result())
    return rows


def text(rows: list[dict[str, Any]]) -> list[str]:
    """One column for each fleet, and how many times the small one's the large one's figures are."""
    head, columns, begun = ["figure"], [], []
    for kind, title in KINDS.items():
        sizes = [row for row in rows if row["database"] == kind]
        if not sizes:
            continue
        begun += [f"{title} {row['begun']}" for row in sizes[:1] if "begun" in row]
        head += [f"{title}, {row['hosts']} hosts, {row['modules']:,} modules" for row in sizes]
        columns += [[_shown(row, name) for name in FIGURES] for row in sizes]
        if len(sizes) > 1:
            head.append("times")
            columns.append([_grown(sizes, name) for name in FIGURES])
    body = [[title, *figures] for (title, _), *figures in zip(FIGURES.values(), *columns, strict=True)]
    said = [f"- {wrong}" for wrong in judge(rows)]
    goals = f"Goals: nothing fails, and a renewal of the large fleet costs at most {IN_LINE} times one of the small fleet: "
    when = [f"Begun: {'; '.join(begun)}."] if begun else []
    return [*when, report.table(head, body), goals + ("MISSED:" if said else "met."), *said]


def _shown(row: dict[str, Any], name: str) -> str:
    return format(row[name], FIGURES[name][1]) if name in row else "-"


def _grown(sizes: list[dict[str, Any]], name: str) -> str:
    small, large = (row.get(name, 0) for row in (sizes[0], sizes[-1]))
    return f"{large / small:.2f}x" if small and large else ""


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What failed, and what does not grow in line."""
    wrong = []
    for row in rows:
        where = f"{KINDS[row['database']]}, {row['hosts']} hosts"
        if "ended" in row:
            wrong.append(f"{where}: it did not end: {row['ended']}")
        wrong += [f"{where}: {row[name]} {FIGURES[name][0]}" for name in ("failures", "refused") if row.get(name)]
    for kind, title in KINDS.items():
        sizes = [row for row in rows if row["database"] == kind]
        if not sizes:
            continue
        small, large = sizes[0], sizes[-1]
        for name in COSTS:
            if name not in small or name not in large:
                wrong.append(f"{title}: {FIGURES[name][0]}: not measured")
            elif large[name] > IN_LINE * small[name]:
                wrong.append(f"{title}: {FIGURES[name][0]}: more than {IN_LINE} times those of the small fleet")
    return wrong
