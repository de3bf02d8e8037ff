"""What is done together: so that a renewal costs a manager of many hosts what it costs one of few."""

from __future__ import annotations

import asyncio

from hsmvisor.manager.store import lines
from support.fleet import Fleet, told_by
from support.host_process import wait_for
from support.light_host import LightHost
from support.scenarios import WEB, Play

HOSTS, GUESTS = 4, 3


async def _one_guest(fleet: Fleet) -> LightHost:
    host = await fleet.host("h1")
    host.add("web")
    await fleet.settle()
    return host


async def _ask(fleet: Fleet) -> None:
    """There is a command for the guest."""
    await fleet.ask(**WEB, resources=("h1/web",))
    await fleet.engine.turn()


def test_what_is_due_at_one_moment_is_looked_at_host_by_host(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        hosts = [await fleet.host(f"h{number}") for number in range(HOSTS)]
        for number in range(GUESTS):
            for host in hosts:  # one after the other, so that they lie mixed in the database
                host.add(f"web-{number}", env="prod")
                await fleet.settle()
        request = await fleet.ask(**WEB, selector={"env": "prod"})
        await fleet.settle()
        fleet.clock.pass_(1)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", False, False, "", "a test", "")
        taken = []
        for _ in hosts:
            async with fleet.database.transaction() as connection:
                taken.append(await lines.claim(connection, "a test", fleet.clock(), 30, GUESTS))
        assert [{row.resource_id.partition("/")[0] for row in some} for some in taken] == [{host.name} for host in hosts]
        assert sum(map(len, taken)) == HOSTS * GUESTS

    play(scenario)


def test_who_tells_leaves_commands_to_the_exchange_that_waits(play: Play) -> None:
    """It was let go whenever something was told: two exchanges more for each result."""

    async def scenario(fleet: Fleet) -> None:
        host = await _one_guest(fleet)
        waiting = asyncio.create_task(fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, wait=20)))
        await asyncio.to_thread(wait_for, lambda: fleet.hub.is_waiting(host.id.hex(), ""), 10, "the exchange")
        await asyncio.sleep(0.3)  # it has looked
        await fleet.ask(**WEB, resources=("h1/web",))
        waits, fleet.hub.commands = fleet.hub.commands, lambda hosts: None  # type: ignore[method-assign]
        await fleet.engine.turn()
        telling = await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host))
        assert not telling.commands and not waiting.done()
        waits([host.id.hex()])
        async with asyncio.timeout(10):
            assert [command.module for command in (await waiting).commands] == ["web"]
        assert not fleet.hub.is_waiting(host.id.hex(), "")

    play(scenario)


def test_where_none_waits_who_tells_is_given_them(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await _one_guest(fleet)
        await _ask(fleet)
        telling = await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host))
        assert [command.module for command in telling.commands] == ["web"]

    play(scenario)


def test_what_a_host_could_not_decide_is_given_again_to_the_exchange_that_waits(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await _one_guest(fleet)
        await _ask(fleet)
        (command,) = (await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, wait=5))).commands
        waiting = asyncio.create_task(fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, wait=20)))
        await asyncio.sleep(0.3)
        assert not waiting.done(), "it was given already"
        await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, undecided=[command.id]))
        async with asyncio.timeout(5):
            assert [one.id for one in (await waiting).commands] == [command.id]

    play(scenario)


def test_a_host_that_comes_by_another_connection_is_given_what_the_first_one_lost(play: Play) -> None:
    """The manager notices that a connection is gone later than the host."""

    async def scenario(fleet: Fleet) -> None:
        host = await _one_guest(fleet)
        lost = asyncio.create_task(fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, wait=20, peer="lost")))
        await asyncio.to_thread(wait_for, lambda: fleet.hub.is_waiting(host.id.hex(), "lost"), 10, "the exchange")
        await _ask(fleet)
        assert len((await lost).commands) == 1, "into a connection where nobody hears it"
        again = await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, peer="new"))
        assert len(again.commands) == 1

    play(scenario)
