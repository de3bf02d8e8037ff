"""A database that is away: said as that by all transactions, and used again when it is back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor.manager.store.database import Database, DatabaseError
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from support.databases import opened
from support.postgres import Postgres

pytestmark = pytest.mark.every_way


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One of this module's own: a test stops it."""
    with contextlib.closing(Postgres()) as server:
        yield server


async def ask(database: Database) -> int:
    async with database.transaction() as connection:
        await asyncio.sleep(0.01)
        return int((await connection.execute(text("SELECT 1"))).scalar_one())


def test_a_server_that_stops_and_starts_under_load(postgres: Postgres) -> None:
    async def story() -> None:
        async with opened(postgres.database()) as database:
            said: list[str] = []
            is_over = False

            async def go_on() -> None:
                while not is_over:
                    try:
                        assert await ask(database) == 1
                    except DatabaseError as error:
                        said.append(str(error))
                        await asyncio.sleep(0.01)

            asking = [asyncio.ensure_future(go_on()) for _ in range(5)]
            for _ in range(3):
                await asyncio.sleep(0.2)
                await asyncio.to_thread(postgres.stop)
                await asyncio.sleep(0.2)
                await asyncio.to_thread(postgres.start)
            await asyncio.sleep(0.2)
            is_over = True
            await asyncio.gather(*asking)
            assert said and all(one.startswith("postgresql://postgres@/") for one in said)
            assert await ask(database) == 1

    asyncio.run(story())


def test_what_others_raise_in_a_transaction_stays_what_it_is(tmp_path: Path, postgres: Postgres) -> None:
    async def story() -> None:
        for url in (f"sqlite:///{tmp_path}/fleet.db", postgres.database()):
            async with opened(url) as database:
                with pytest.raises(FileNotFoundError):
                    async with database.transaction():
                        raise FileNotFoundError
        async with opened(postgres.database()) as database:
            with pytest.raises(ProgrammingError):
                async with database.transaction() as connection:
                    await connection.execute(text("SELECT nothing"))

    asyncio.run(story())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    async def story() -> None:
        database = Database(f"sqlite:///{tmp_path}/none/fleet.db")
        with pytest.raises(DatabaseError, match="unable to open database file"):
            await ask(database)
        await database.close()
        await asyncio.sleep(0.1)  # the driver's thread has a last word

    asyncio.run(story())


def test_two_that_wait_for_each_other_are_told_to_try_again(postgres: Postgres) -> None:
    """PostgreSQL ends one of them: it may be made again, and is no fault of this program."""

    async def story() -> None:
        async with opened(postgres.database()) as database:
            async with database.transaction() as connection:
                await connection.execute(text("CREATE TABLE of_test (id INT PRIMARY KEY, n INT)"))
                await connection.execute(text("INSERT INTO of_test VALUES (1, 0), (2, 0)"))
            both = asyncio.Barrier(2)

            async def change(first: int, then: int) -> None:
                async with database.transaction() as connection:
                    await connection.execute(text("UPDATE of_test SET n = n + 1 WHERE id = :id"), {"id": first})
                    await both.wait()
                    await connection.execute(text("UPDATE of_test SET n = n + 1 WHERE id = :id"), {"id": then})

            ended = await asyncio.gather(change(1, 2), change(2, 1), return_exceptions=True)
            assert sorted(type(one).__name__ for one in ended) == ["Conflict", "NoneType"], ended

    asyncio.run(story())
