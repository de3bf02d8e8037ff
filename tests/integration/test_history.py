"""Events: written with what they tell, in pages, as a stream that loses none and tells none twice; on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from hsmvisor.manager.history import following, limits
from hsmvisor.manager.history.events import Event, Happened, History, Kind
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.tables import events, notices
from hsmvisor.serving.errors import Invalid, Lost, Unavailable
from hsmvisor.serving.limits import MAX_PAGE
from sqlalchemy import func, select, text
from support.databases import new_url, opened
from support.postgres import Postgres

Story = Callable[[Database, History], Awaitable[None]]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One of this module's own: a test stops it."""
    with contextlib.closing(Postgres()) as server:
        yield server


@pytest.fixture
def postgresql_url(request: pytest.FixtureRequest) -> str:
    return new_url("postgresql", request)


def run(url: str, story: Story, **options: Any) -> None:
    async def all_of_it() -> None:
        async with opened(url) as database:
            history = History(database, **options)
            async with asyncio.timeout(60):
                await story(database, history)
            await history.close()

    asyncio.run(all_of_it())


async def add(database: Database, history: History, material: str = "web", kind: Kind = Kind.ROTATED, owner: str = "alice") -> int:
    async with database.transaction() as connection:
        return await history.add(connection, Happened(kind, owner, material=material))


async def take(stream: AsyncGenerator[Event], count: int) -> list[int]:
    return [(await asyncio.wait_for(anext(stream), 20)).id for _ in range(count)]


async def nothing(stream: AsyncGenerator[Event], seconds: float = 1.2) -> asyncio.Task[Event]:
    """Returns the question that is still open after `seconds`."""
    asked: asyncio.Task[Event] = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
    done, _ = await asyncio.wait([asked], timeout=seconds)
    assert not done, asked.result()
    return asked


class Everything:
    name = "ops"

    def wants(self, kind: str, owner: str) -> bool:
        return kind != "issued"


class Others(Everything):
    name = "others"

    def wants(self, kind: str, owner: str) -> bool:
        return owner == "bob"


# ---- writing ------------------------------------------------------------------------------------------------------------


def test_an_event_and_its_notices_are_written_in_the_callers_transaction(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        with pytest.raises(RuntimeError):
            async with database.transaction() as connection:
                await history.add(connection, Happened(Kind.DENIED, "bob"))
                raise RuntimeError
        await add(database, history, kind=Kind.ISSUED)
        bobs = await add(database, history, owner="bob")
        alices = await add(database, history)
        async with database.transaction() as connection:
            await history.add(connection, Happened(Kind.NOTICE_LOST), but="ops")
            assert (await connection.execute(select(func.count()).select_from(events))).scalar_one() == 4
            rows = (await connection.execute(select(notices).order_by(notices.c.event_id, notices.c.channel))).all()
        assert [(row.event_id, row.channel, row.next_at, row.attempts) for row in rows] == [
            (bobs, "ops", 1000.0, 0),
            (bobs, "others", 1000.0, 0),
            (alices, "ops", 1000.0, 0),
        ]

    run(url, story, channels=[Everything(), Others()], clock=lambda: 1000.0)


def test_texts_that_a_database_would_refuse(url: str) -> None:
    widths = {"owner": 128, "request_id": 32, "material": 64, "resource_id": 130, "host_id": 64}

    async def story(database: Database, history: History) -> None:
        for past in (0, 1):
            async with database.transaction() as connection:
                told: Any = {name: "x" * (width + past) for name, width in widths.items()}
                await history.add(connection, Happened(Kind.FAILED, **told, detail={"why": "a\0b\ud800", "pin": "1234"}))
        (cut, whole), _ = await history.page()
        assert all(getattr(whole, name) == "x" * width for name, width in widths.items())
        assert all(getattr(cut, name) == "x" * (width - 1) + "…" for name, width in widths.items())
        assert cut.detail == {"why": "a?b?", "pin": "(not shown)"}
        with pytest.raises(ValueError, match="nonsense"):
            async with database.transaction() as connection:
                await history.add(connection, Happened("nonsense"))  # type: ignore[arg-type]

    assert widths == {
        "owner": limits.MAX_OWNER,
        "request_id": limits.MAX_REQUEST,
        "material": limits.MAX_MATERIAL,
        "resource_id": limits.MAX_RESOURCE,
        "host_id": limits.MAX_HOST,
    } == {name: events.c[name].type.length for name in widths}  # type: ignore[attr-defined]  # fmt: skip
    assert max(map(len, Kind)) <= events.c.kind.type.length  # type: ignore[attr-defined]
    run(url, story)


# ---- pages --------------------------------------------------------------------------------------------------------------


def test_pages_newest_first_with_filters(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        ids = [await add(database, history, owner=("alice", "bob")[i % 2]) for i in range(7)]
        found, token = await history.page(3)
        assert [event.id for event in found] == ids[:3:-1] and token
        await add(database, history)  # what comes in between does not move the next page
        found, token = await history.page(3, token)
        assert [event.id for event in found] == ids[3:0:-1]
        found, token = await history.page(3, token)
        assert [event.id for event in found] == ids[:1] and token == ""
        found, token = await history.page(3, owner="bob")
        assert [event.id for event in found] == ids[5::-2] and token == ""
        assert await history.page(kind="denied") == ([], "")
        assert len((await history.page(MAX_PAGE + 1))[0]) == 8
        for bad in ("x", "-1", "0", "²", "9" * 19, "1" * 30):
            with pytest.raises(Invalid, match="page_token"):
                await history.page(token=bad)
        with pytest.raises(Invalid, match="not negative"):
            await history.page(-1)
        with pytest.raises(Invalid, match="no events of kind 'nonsense': there are cancelled, "):
            await history.page(kind="nonsense")

    run(url, story)


# ---- streams ------------------------------------------------------------------------------------------------------------


def test_a_stream_from_now_on_and_resumed(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        old = [await add(database, history) for _ in range(3)]
        stream = history.follow()
        asked = await nothing(stream, 0.3)
        fresh = [await add(database, history) for _ in range(2)]
        assert (await asked).id == fresh[0]
        assert await take(stream, 1) == fresh[1:]
        resumed = history.follow(old[0])
        assert await take(resumed, 4) == [*old[1:], *fresh]
        asked = await nothing(resumed, 0.3)
        last = await add(database, history, kind=Kind.DENIED)
        assert (await asked).id == last == (await take(stream, 1))[0]
        assert await take(history.follow(old[0], kind="denied"), 1) == [last]
        with pytest.raises(Lost, match="there has been no event 1000"):
            await take(history.follow(1000), 1)
        with pytest.raises(Invalid):
            await take(history.follow(-1), 1)
        with pytest.raises(Invalid):
            await take(history.follow(kind="nonsense"), 1)

    run(url, story)


def test_followers_of_this_manager_wake_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOOK_EVERY", 30.0)

    async def story(database: Database, history: History) -> None:
        streams = [history.follow(owner=owner) for owner in ("", "alice", "bob")]
        asked = [await nothing(stream, 0.1) for stream in streams]
        mine = await add(database, history)
        assert [(await asyncio.wait_for(one, 5)).id for one in asked[:2]] == [mine, mine]
        his = await add(database, history, owner="bob")
        assert (await asyncio.wait_for(asked[2], 5)).id == his

    run(url, story)


def test_events_of_another_process_with_one_look_for_all_followers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = following.rows.after

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return await real(*arguments, **options)

    monkeypatch.setattr(following.rows, "after", counted)

    async def story(database: Database, history: History) -> None:
        async def all_of(stream: AsyncGenerator[Event]) -> list[Any]:
            return [(await anext(stream)).detail["number"] for _ in range(30)]

        loop = asyncio.get_running_loop()
        asked = [asyncio.ensure_future(all_of(history.follow())) for _ in range(20)]
        await asyncio.sleep(0.5)
        began = loop.time()
        writer = await asyncio.create_subprocess_exec(sys.executable, "-m", "support.history_writer", url, "30", cwd="tests")
        assert await asyncio.gather(*asked) == [list(range(30))] * 20
        assert await writer.wait() == 0
        assert looks <= 5 + (loop.time() - began) / limits.LOOK_AGAIN

    run(url, story)


def test_a_follower_that_is_slow_reads_on_from_the_database(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMEMBERED", 5)
    monkeypatch.setattr(limits, "READ_AT_ONCE", 4)

    async def story(database: Database, history: History) -> None:
        stream, quick = history.follow(), history.follow()
        asked, other = await nothing(stream, 0.1), await nothing(quick, 0.1)
        ids = []
        for _ in range(30):
            ids.append(await add(database, history))
            await asyncio.sleep(0.02)
        assert [(await other).id, *await take(quick, 29)] == ids
        assert [(await asked).id, *await take(stream, 29)] == ids

    run(url, story)


def test_a_stop_ends_streams_and_says_where_to_resume(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        other = History(database)
        stream = other.follow()
        asked = await nothing(stream, 0.1)
        last = await add(database, other)
        assert (await asked).id == last
        asked = await nothing(stream, 0.1)
        await other.close()
        with pytest.raises(Unavailable) as caught:
            await asked
        assert (caught.value.reason, caught.value.hint) == ("STOPPING", f"connect again and resume after {last}")
        assert other._following._followers == 0

    run(url, story)


def test_the_reader_ends_with_its_last_follower(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        for _ in range(3):
            stream = history.follow()
            asked = await nothing(stream, 0.1)
            mine = await add(database, history)
            assert (await asked).id == mine
            await stream.aclose()
            while history._following._reader is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    run(url, story)


# ---- numbers that come out of order ---------------------------------------------------------------------------------------


def test_commits_out_of_order(postgresql_url: str) -> None:
    """Also for a follower that begins while the lower number is on its way, and for one that resumes."""

    async def story(database: Database, history: History) -> None:
        first = await add(database, history)
        early = history.follow()
        asked = await nothing(early, 0.2)
        async with database.transaction() as slow:
            low = await history.add(slow, Happened(Kind.ISSUED))
            high = await add(database, history)
            assert high == low + 1
            late, resumed = history.follow(), history.follow(first)
            waiting = [await nothing(late), await nothing(resumed, 0.1)]
            assert not asked.done()
        assert [(await asked).id, *await take(early, 1)] == [low, high]
        assert [(await waiting[1]).id, *await take(resumed, 1)] == [low, high]
        assert (await waiting[0]).id == low  # `high` was there before it came
        last = await add(database, history)
        assert await take(late, 1) == await take(early, 1) == await take(resumed, 1) == [last]

    run(postgresql_url, story)


def test_numbers_of_transactions_that_were_rolled_back_hold_nobody_up(postgresql_url: str) -> None:
    async def story(database: Database, history: History) -> None:
        stream = history.follow()
        asked = await nothing(stream, 0.2)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                async with database.transaction() as connection:
                    await history.add(connection, Happened(Kind.ISSUED))
                    raise RuntimeError
            began = asyncio.get_running_loop().time()
            mine = await add(database, history)
            assert (await asked).id == mine
            assert asyncio.get_running_loop().time() - began < 5
            asked = await nothing(stream, 0.1)

    run(postgresql_url, story)


def test_a_transaction_that_takes_too_long_is_told_late(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_HOLD", 0.5)

    async def story(database: Database, history: History) -> None:
        stream = history.follow()
        asked = await nothing(stream, 0.2)
        async with database.transaction() as slow:
            low = await history.add(slow, Happened(Kind.ISSUED))
            high = await add(database, history)
            assert (await asyncio.wait_for(asked, 10)).id == high
            asked = await nothing(stream)
        assert (await asked).id == low
        assert history._following._overdue == {}
        last = await add(database, history)
        assert await take(stream, 1) == [last]

    run(postgresql_url, story)


def test_what_never_comes_is_not_looked_for_for_ever(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_HOLD", 0.3)

    async def story(database: Database, history: History) -> None:
        stream = history.follow()
        asked = await nothing(stream, 0.2)
        with pytest.raises(RuntimeError):
            async with database.transaction() as slow:
                await history.add(slow, Happened(Kind.ISSUED))
                high = await add(database, history)
                assert (await asyncio.wait_for(asked, 10)).id == high
                assert len(history._following._overdue) == 1
                raise RuntimeError
        last = await add(database, history)
        assert await take(stream, 1) == [last]
        assert history._following._overdue == {}

    run(postgresql_url, story)


def test_a_crowd_of_writers_and_two_managers(postgresql_url: str) -> None:
    """Writers that overlap, of which some roll back: each follower of each manager gets each event once, in order."""
    numbers = iter(range(10**6))

    async def story(database: Database, history: History) -> None:
        other = History(database)
        streams = [(await nothing(s, 0.1), s) for s in (history.follow(), other.follow(), history.follow())]

        async def write(pause: float) -> None:
            for _ in range(15):
                with contextlib.suppress(RuntimeError):
                    async with database.transaction() as connection:
                        await history.add(connection, Happened(Kind.ISSUED))
                        await asyncio.sleep(pause)
                        if next(numbers) % 5 == 0:
                            raise RuntimeError

        await asyncio.gather(*(write(0.003 * i) for i in range(10)))
        async with database.transaction() as connection:
            there = list((await connection.execute(select(events.c.id).order_by(events.c.id))).scalars())
        for asked, stream in streams:
            assert [(await asked).id, *await take(stream, len(there) - 1)] == there
        await other.close()

    run(postgresql_url, story)


def test_a_jump_of_the_numbers_is_no_work(postgresql_url: str) -> None:
    async def story(database: Database, history: History) -> None:
        stream = history.follow()
        asked = await nothing(stream, 0.1)
        async with database.transaction() as connection:
            await connection.execute(text("SELECT setval('events_id_seq', 4000000000000)"))
        far = await add(database, history)
        assert (await asyncio.wait_for(asked, 10)).id == far > 2**40

    run(postgresql_url, story)


def test_a_database_that_goes_away_and_comes_back(postgres: Postgres, postgresql_url: str) -> None:
    async def story(database: Database, history: History) -> None:
        stream = history.follow()
        asked = await nothing(stream, 0.2)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(1.5)
        await asyncio.to_thread(postgres.start)
        last = await add(database, history)
        assert (await asyncio.wait_for(asked, 20)).id == last

    run(postgresql_url, story)


# ---- what is kept -------------------------------------------------------------------------------------------------------


def test_old_events_are_forgotten_in_batches(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRUNED_AT_ONCE", 3)
    monkeypatch.setattr(limits, "MOST_BATCHES", 2)
    now = 1000.0

    async def story(database: Database, history: History) -> None:
        nonlocal now
        ids = []
        for _ in range(12):
            now += 10
            ids.append(await add(database, history))

        async def kept() -> list[int]:
            return [event.id for event in reversed((await history.page())[0])]

        assert await history.prune() == 0
        now = 1010.0 + 200.0  # the first is as old as it may be
        assert await history.prune() == 0 and await kept() == ids
        now += 0.5
        assert await history.prune() == 1 and await kept() == ids[1:]
        assert await take(history.follow(ids[0]), 1) == [ids[1]]
        with pytest.raises(Lost, match=f"events after {ids[0]} are not kept any more"):
            now += 10
            await history.prune()
            await take(history.follow(ids[0]), 1)
        now += 10_000
        assert await history.prune() == 6, "bounded: two batches of three"
        assert await history.prune() == 3
        assert await kept() == ids[-1:], "the newest stays"
        async with database.transaction() as connection:
            assert (await connection.execute(select(notices.c.event_id))).scalars().all() == ids[-1:]
        assert await add(database, history) == ids[-1] + 1, "no number is given twice"

    run(url, story, channels=[Everything()], clock=lambda: now, longest=200.0)


def test_no_more_events_are_kept_than_said(url: str) -> None:
    async def story(database: Database, history: History) -> None:
        ids = [await add(database, history) for _ in range(5)]
        assert await history.prune() == 0
        ids.append(await add(database, history))
        assert await history.prune() == 1
        assert [event.id for event in (await history.page())[0]] == ids[:0:-1]

    run(url, story, most=5)
