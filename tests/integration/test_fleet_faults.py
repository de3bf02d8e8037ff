"""Errors inside a manager, and values that its database cannot keep: the next step is taken all the same; on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hsmvisor.manager.engine import engine as engines
from hsmvisor.manager.store import lines, wanted
from hsmvisor.serving.errors import Invalid
from support.fleet import Fleet
from support.scenarios import WEB, Play, held

pytestmark = pytest.mark.every_way


def test_an_engine_outlives_an_error_of_its_own(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, errors = lines.claim, [ZeroDivisionError("not foreseen")]

    async def claims(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return await claim(*arguments)

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1")
        await fleet.exchange(host)
        await fleet.ask(**WEB, resources=("h1/web-1",))
        monkeypatch.setattr(engines.lines, "claim", claims)
        monkeypatch.setattr(engines, "HICCUP", 0.01)
        fleet.engine.start()
        try:
            async with asyncio.timeout(60):
                while not held(guest):
                    await fleet.exchange(host)
                    await asyncio.sleep(0.02)
        finally:
            await fleet.engine.stop()
        assert not errors

    play(scenario)


def test_a_text_that_no_database_keeps_is_the_callers_mistake(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        try:
            async with fleet.database.reading() as connection:
                assert await wanted.request(connection, "a\0b") is None  # SQLite keeps it, and knows none
        except Invalid as error:
            assert fleet.database.kind == "postgresql" and error.reason == "TEXT"

    play(scenario)
