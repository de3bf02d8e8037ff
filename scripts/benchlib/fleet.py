"""A fleet that grows: what a renewal and a heartbeat cost the database, how long a rotation of all takes, and how much memory.

Hosts and modules are light ones (tests/support/light_host.py) that speak the real API: each host joins with a token, has a
certificate of its own, and modules make real keys and check every command's signature.  The manager is the real service.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.fleet_processes import Manager
from support.host_process import new_id
from support.light_fleet import LightFleet
from support.light_host import shared_recipient
from support.postgres import Postgres

from benchlib import report

HOSTS, GUESTS = 200, 100  #: of the largest fleet
KINDS = ("sqlite", "postgresql")
SMALL = 10  #: its tenth, to see how the cost grows
IDLE = 45.0  #: seconds of heartbeats alone
PATIENCE = 3600.0  #: seconds for one rotation
MATERIAL = "tls"


class Watched:
    """A manager's own counters."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def read(self) -> dict[str, float]:
        text = self._manager.fleet.GetMetrics(pb.GetFleetMetricsRequest(), timeout=60).text
        found = re.findall(r"^(hsmvisor_\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.M)
        return {name: float(value) for name, value in found}


def _since(before: dict[str, float], after: dict[str, float], name: str) -> float:
    key = f"hsmvisor_manager_{name}_total"
    return after[key] - before[key]


async def _told(watched: Watched, count: int) -> None:
    """Returns when the manager has heard of so many resources."""
    for _ in range(int(PATIENCE)):
        if watched.read()["hsmvisor_fleet_resources"] >= count:
            return
        await asyncio.sleep(1)
    raise TimeoutError("the manager has not heard of all")


async def _until(fleet: LightFleet, least: int, all_of_them: int) -> float:
    """Returns how many seconds it took until all modules have generation `least`."""
    began = time.monotonic()
    while fleet.holding(MATERIAL, least) < all_of_them:
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"{fleet.holding(MATERIAL, least)} of {all_of_them} after {PATIENCE:.0f} s")
        await asyncio.sleep(0.25)
    return time.monotonic() - began


async def _measured(manager: Manager, hosts: int, guests: int) -> dict[str, Any]:
    watched, count = Watched(manager), hosts * guests
    fleet = LightFleet(manager.token, shared_recipient())
    found: dict[str, Any] = {"hosts": hosts, "modules": count}
    try:
        began = time.monotonic()
        await fleet.grow(hosts, guests, env="prod")
        await _told(watched, count)
        found["joined_seconds"] = time.monotonic() - began
        asked = await asyncio.to_thread(
            manager.apply, material=MATERIAL, names=["dns:{name}.example.net"], selector={"env": "prod"}, lifetime_seconds=7 * 86400
        )
        found["first_seconds"] = await _until(fleet, 1, count)
        await asyncio.sleep(5)
        before = watched.read()
        rotate = pb.RotateRequest(request_id=new_id(), id=asked.id, why="the bench")
        await asyncio.to_thread(manager.requests.Rotate, rotate, timeout=300)
        found["rotation_seconds"] = await _until(fleet, 2, count)
        await asyncio.sleep(2)
        after = watched.read()
        found["statements_a_renewal"] = _since(before, after, "statements") / count
        found["transactions_a_renewal"] = _since(before, after, "transactions") / count
        found["memory_mb"] = after["hsmvisor_manager_resident_bytes"] / 2**20
        await asyncio.sleep(10)
        before = watched.read()
        await asyncio.sleep(IDLE)
        after = watched.read()
        exchanges = _since(before, after, "exchanges")
        found["statements_a_heartbeat"] = _since(before, after, "statements") / exchanges
        found["heartbeats_a_second"] = exchanges / IDLE
        found["failures"] = sum(link.failures for link in fleet.links)
    finally:
        await fleet.close()
    return found


@contextlib.contextmanager
def _database(kind: str) -> Iterator[str]:
    if kind == "sqlite":
        yield ""
        return
    with contextlib.closing(Postgres()) as server:
        yield server.database()


def _one(kind: str, hosts: int, guests: int) -> dict[str, Any]:
    with _database(kind) as url, Manager(url=url) as manager:
        row = {"database": kind} | asyncio.run(_measured(manager, hosts, guests))
    print(row, flush=True)
    return row


def measure(hosts: int = HOSTS, guests: int = GUESTS) -> list[dict[str, Any]]:
    """Both databases side by side: a manager uses one processor."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(len(KINDS), get_context("spawn")) as side_by_side:
        for part in dict.fromkeys((max(1, hosts // SMALL), hosts)):
            rows += side_by_side.map(_one, KINDS, [part] * len(KINDS), [guests] * len(KINDS))
    return rows


def text(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "database",
        "hosts",
        "modules",
        "first, s",
        "rotation of all, s",
        "a second",
        "statements a renewal",
        "a heartbeat",
        "memory, MB",
    ]
    body = [
        [
            row["database"],
            str(row["hosts"]),
            f"{row['modules']:,}",
            f"{row['first_seconds']:.0f}",
            f"{row['rotation_seconds']:.0f}",
            f"{row['modules'] / row['rotation_seconds']:.0f}",
            f"{row['statements_a_renewal']:.0f}",
            f"{row['statements_a_heartbeat']:.1f}",
            f"{row['memory_mb']:.0f}",
        ]
        for row in rows
    ]
    return [report.table(head, body)]
