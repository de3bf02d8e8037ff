"""Transactions that change the same lines wait for each other, and never in a circle; on PostgreSQL, which locks row by row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from hsmvisor.manager.store import lines
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.tables import lines as table
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from support.fleet import Fleet
from support.postgres import Postgres
from support.scenarios import WEB, played

ROUNDS, LINES = 40, 12

Work = Callable[[AsyncConnection, Sequence[str]], Awaitable[None]]


async def one_by_one(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """As what a host tells: one result after the other, in its own order."""
    await lines.lock_by_id(connection, ids)
    for id in ids:
        await lines.change_line(connection, id, why="told")


async def all_at_once(connection: AsyncConnection, ids: Sequence[str]) -> None:
    await lines.wake(connection, ids, 0.0)


async def whatever_there_is(connection: AsyncConnection, ids: Sequence[str]) -> None:
    await lines.wake_all(connection, 0.0)


async def again_and_again(database: Database, work: Work, ids: Sequence[str]) -> None:
    for _ in range(ROUNDS):
        async with database.transaction() as connection:
            await work(connection, ids)


def test_nobody_waits_in_a_circle(tmp_path: Path, postgres: Postgres) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        for number in range(LINES):
            host.add(f"web-{number}", env="prod")
        await fleet.settle()
        await fleet.ask(**WEB, selector={"env": "prod"})
        async with fleet.database.reading() as connection:
            ids = sorted((await connection.execute(select(table.c.id))).scalars())
        assert len(ids) == LINES
        works = [(one_by_one, ids), (one_by_one, ids[::-1]), (all_at_once, ids[::-1]), (whatever_there_is, ids)]
        await asyncio.gather(*(again_and_again(fleet.database, work, order) for work, order in works))

    played(tmp_path, postgres.database(), scenario)
