"""Real managers: killed, two on one database, and what hosts meet that come with what is not theirs.  Hosts are light ones."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import grpc
import pytest
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.fleet_processes import Manager
from support.host_process import new_id
from support.light_fleet import LightFleet, join
from support.light_host import LightHost, RecipientKey, shared_recipient
from support.postgres import Postgres

WEB = {"material": "tls", "names": ["dns:{name}.example.net"], "selector": {"env": "prod"}}


async def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> float:
    """Returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_guest_that_appears_has_its_material_without_a_look_by_the_clock(database: str, request: pytest.FixtureRequest) -> None:
    """Each step wakes the next one: a manager that looks by itself each half minute only has it there long before."""
    url = request.getfixturevalue("postgres").database() if database == "postgresql" else ""

    async def scenario(manager: Manager) -> list[float]:
        fleet = LightFleet(manager.token, shared_recipient())
        link = await fleet.add("host-1", ["vm-0"], env="prod")
        manager.apply(**WEB)
        await until(lambda: fleet.holding("tls", 1) == 1, "the first")
        took = []
        for number in range(1, 6):
            link.host.add(f"vm-{number}", env="prod")
            link.changed()
            took.append(await until(lambda n=number: fleet.holding("tls", 1) == n + 1, "the material"))  # type: ignore[misc]
        await fleet.close()
        return took

    with Manager(url=url, module="support.patient_manager") as manager:
        took = asyncio.run(scenario(manager))
    assert max(took) < 20, took


def rotate(manager: Manager, id: str) -> None:
    manager.requests.Rotate(pb.RotateRequest(request_id=new_id(), id=id, why="a test"), timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_manager_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing() -> None:
    """On SQLite, with the manager alone; each kill comes a little later in the rotation."""
    modules, rounds = 12, 4

    async def scenario(manager: Manager) -> LightFleet:
        fleet = LightFleet(manager.token, shared_recipient())
        await fleet.grow(2, modules // 2, env="prod")
        asked = manager.apply(**WEB)
        await until(lambda: fleet.holding("tls", 1) == modules, "the first generation")
        for number in range(rounds):
            rotate(manager, asked.id)
            await asyncio.sleep(0.05 + 0.12 * number)
            await asyncio.to_thread(manager.stop, signal.SIGKILL)
            await asyncio.to_thread(manager.start)
            await until(lambda n=number: fleet.holding("tls", n + 2) == modules, f"rotation {number}", 150)  # type: ignore[misc]
        await until(lambda: {line.stage for line in manager.request(asked.id).lines} == {"serving"}, "what hosts tell of the last")
        for line in manager.request(asked.id).lines:
            serving = [g.number for g in line.generations if g.state == "serving"]
            assert serving == [line.generation] == [rounds + 1]
        await fleet.close()
        return fleet

    with Manager() as manager:
        fleet = asyncio.run(scenario(manager))
    for guest in fleet.guests:
        states = [g.state for g in guest.module.materials["tls"].values()]
        assert states.count("current") == 1
        assert guest.module.activations == rounds + 1  # none came twice, and none without being asked for


def looks(manager: Manager) -> float:
    """How often it has looked at a line since it started."""
    text = manager.fleet.GetMetrics(pb.GetFleetMetricsRequest(), timeout=30).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("hsmvisor_manager_looks_total "))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_managers_on_one_database_share_the_work_and_one_may_die(postgres: Postgres) -> None:
    modules, url = 24, postgres.database()

    async def scenario(one: Manager, other: Manager) -> tuple[LightFleet, LightFleet]:
        mine, theirs = (LightFleet(manager.token, shared_recipient()) for manager in (one, other))
        await mine.grow(1, modules // 2, env="prod")
        await theirs.grow(1, modules // 2, first=1, env="prod")
        asked = one.apply(**WEB)
        everywhere = lambda n: mine.holding("tls", n) + theirs.holding("tls", n) == modules  # noqa: E731
        await until(lambda: everywhere(1), "the first generation")
        before = [looks(manager) for manager in (one, other)]
        rotate(other, asked.id)  # hosts of one are told by commands that the other made
        await until(lambda: everywhere(2), "a rotation by both")
        shares = [looks(manager) - those for manager, those in zip((one, other), before, strict=True)]
        assert all(share > 0 for share in shares), shares
        rotate(one, asked.id)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(one.stop, signal.SIGKILL)
        await until(lambda: theirs.holding("tls", 3) == modules // 2, "what the other's hosts hold", 150)
        await asyncio.to_thread(one.start)
        await until(lambda: everywhere(3), "the rest", 150)
        await mine.close()
        await theirs.close()
        return mine, theirs

    with Manager(url=url) as one, Manager(url=url, fleet=one.state / "fleet") as other:
        fleets = asyncio.run(scenario(one, other))
    for guest in (guest for fleet in fleets for guest in fleet.guests):
        assert guest.module.activations == 3
        assert [g.state for g in guest.module.materials["tls"].values()].count("current") == 1


def test_a_join_token_that_was_stolen_is_good_for_nothing_and_told() -> None:
    async def scenario(manager: Manager) -> None:
        token = manager.token("host-1")
        mine, thief = (LightHost(name, b"", time.time, RecipientKey) for name in ("host-1", "host-1"))
        await join("host-1", mine, token)
        for name in ("host-1", "host-2"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await join(name, thief, token)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "used already, by another host" in (caught.value.details() or "")

    with Manager() as manager:
        asyncio.run(scenario(manager))
        (host,) = manager.fleet.ListHosts(pb.ListHostsRequest(), timeout=20).hosts
        assert host.name == "host-1"
        assert len(manager.events("host_refused")) == 2
