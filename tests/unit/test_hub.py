"""Whoever waits for commands hears of those that come while it looks for them, too."""

from __future__ import annotations

import asyncio

from hsmvisor.manager.engine.hub import Hub


async def _waits(hub: Hub, heard: list[bool], seconds: float = 30.0) -> None:
    with hub.wait_for_commands("h1", "a connection") as wait:
        await asyncio.sleep(0)  # it looks whether there are some already
        heard.append(await wait(seconds))


def test_what_comes_between_a_look_and_the_wait_is_heard() -> None:
    async def scenario() -> None:
        hub, heard = Hub(), list[bool]()
        waiting = asyncio.create_task(_waits(hub, heard))
        await asyncio.sleep(0)
        assert hub.waiting == ["h1"]
        hub.commands(["h2", "h1"])
        async with asyncio.timeout(20):
            await waiting
        assert heard == [True] and hub.waiting == []

    asyncio.run(scenario())


def test_an_older_one_is_let_go() -> None:
    async def scenario() -> None:
        hub, heard = Hub(), list[bool]()
        older = asyncio.create_task(_waits(hub, heard))
        await asyncio.sleep(0)
        newer = asyncio.create_task(_waits(hub, heard))
        async with asyncio.timeout(20):
            await older
            assert heard == [False] and hub.waiting == ["h1"]
            hub.commands(["h1"])
            await newer
        assert heard == [False, True] and hub.waiting == []

    asyncio.run(scenario())


def test_nothing_comes() -> None:
    heard: list[bool] = []
    asyncio.run(_waits(Hub(), heard, 0.01))
    assert heard == [True]


def test_one_of_another_connection_is_let_go() -> None:
    """The host has lost that connection, and what this one would hear would be lost too."""

    async def scenario() -> None:
        hub, heard = Hub(), list[bool]()
        waiting = asyncio.create_task(_waits(hub, heard))
        await asyncio.sleep(0)
        assert hub.is_waiting("h1", "a connection") and not heard
        assert not hub.is_waiting("h2", "a connection")
        assert not hub.is_waiting("h1", "another connection")
        async with asyncio.timeout(20):
            await waiting
        assert heard == [False] and hub.waiting == []

    asyncio.run(scenario())
