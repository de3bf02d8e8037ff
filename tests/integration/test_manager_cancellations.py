"""A call that is cancelled in the middle of a transaction gives its connection back whole, and locks nobody out."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.tables import hosts, managers
from hsmvisor.manager.store.whole import to_its_end
from sqlalchemy import func, insert, select
from support.databases import opened


async def work(database: Database) -> None:
    async with database.transaction() as connection:
        for _ in range(2):
            await connection.execute(select(hosts))
        await connection.execute(insert(managers).values(id=os.urandom(8).hex(), name="x", seen_at=1.0))


async def count(database: Database) -> int:
    async with database.transaction() as connection:
        return int((await connection.execute(select(func.count()).select_from(managers))).scalar_one())


def test_cancelled_calls_lock_nobody_out(url: str) -> None:
    """New connections each time: one that is being made is cancelled too."""

    async def story() -> None:
        for number in range(60):
            async with opened(url) as database:
                calls = [asyncio.create_task(work(database)) for _ in range(6)]
                await asyncio.sleep((number % 20) * 0.001)
                for call in calls[1:]:
                    call.cancel()
                began = time.monotonic()
                await asyncio.gather(*calls, return_exceptions=True)
                await work(database)
                assert time.monotonic() - began < 20  # one that is locked out waits for half a minute
                assert calls[0].exception() is None

    asyncio.run(story())


def test_what_was_cancelled_before_its_commit_is_not_there(url: str) -> None:
    async def story() -> None:
        async with opened(url) as database:
            entered = asyncio.Event()

            async def waiting() -> None:
                async with database.transaction() as connection:
                    await connection.execute(insert(managers).values(id="a", name="x", seen_at=1.0))
                    entered.set()
                    await asyncio.sleep(60)

            call = asyncio.create_task(waiting())
            await entered.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await count(database) == 0

    asyncio.run(story())


def test_work_is_waited_for_and_the_cancellation_counts_then() -> None:
    async def story() -> None:
        done, end = [], asyncio.Event()

        async def slow(fails: bool) -> int:
            await end.wait()
            done.append(1)
            if fails:
                raise ValueError
            return 7

        end.set()
        assert await to_its_end(slow(False)) == 7
        with pytest.raises(ValueError):
            await to_its_end(slow(True))
        for fails in (False, True):
            done.clear()
            end.clear()
            call = asyncio.create_task(to_its_end(slow(fails)))
            for _ in range(3):
                await asyncio.sleep(0.01)
                call.cancel()
            await asyncio.sleep(0.01)
            assert not call.done()
            end.set()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert done

    asyncio.run(story())
