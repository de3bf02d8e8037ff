"""Followers of the table: one reader for all of this manager, each follower a place behind it.

On PostgreSQL an event gets its number before its transaction commits, so a higher number may be seen before a lower one.  Followers
resume after the last number that they saw, so events are given out in order: behind a missing number the reader waits until the
event is there, or until all transactions have ended that could hold it (then it was rolled back).  Which those are PostgreSQL says:
a transaction has its number before it takes one for an event (History.add), so a transaction of ours that begins after the missing
number was noticed has a higher one; when the oldest that runs is not lower than that, nothing is left to wait for.

A transaction that takes longer than LONGEST_HOLD holds nobody up any more: its event is given out when it comes, out of order.
SQLite has one writer at a time: numbers come in order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from hsmvisor.manager.history import limits, rows
from hsmvisor.manager.history.bell import Bell
from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.history.rows import Wanted
from hsmvisor.manager.store.database import Database, DatabaseError
from hsmvisor.serving.errors import Lost, Unavailable
from sqlalchemy.exc import DBAPIError

_log = logging.getLogger(__name__)

_BEGIN_ANEW = "list what there is, then begin from now"

AWAY = (DatabaseError, DBAPIError)  #: what a database raises that is not there, or in a state of its own


@dataclass(frozen=True)
class _Gap:
    """Numbers below `below` were missing at `since`; a transaction that is not older than `number` holds none of them."""

    below: int
    number: int
    since: float


class Following:
    def __init__(self, database: Database, news: Bell) -> None:
        """`news` rings when this process has written an event."""
        self._database, self._news = database, news
        self._numbered = database.kind == "postgresql"
        self._told: Bell = Bell()
        self._ring: deque[Event] = deque(maxlen=limits.REMEMBERED)
        self._count = 0  # of all that were ever in the ring
        self._place = 0  # up to here all is given out
        self._held: frozenset[int] = frozenset()  # ids that were seen behind it
        self._gap: _Gap | None = None
        self._overdue: dict[int, int] = {}  # those that are looked for: until which transaction
        self._followers = 0
        self._starting = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    # ---- a follower -------------------------------------------------------------------------------------------------

    async def follow(self, after_id: int, wanted: Wanted) -> AsyncGenerator[Event]:
        """Yields events as they happen.  Raises Lost, Unavailable."""
        self._followers += 1
        try:
            await self._have_reader()
            seen, at, skipped = await self._begin(after_id)
            while not self._closed:
                told = self._told.next()
                if at < self._count - len(self._ring):  # not in memory (any more)
                    at, top = self._count, self._place
                    async for event in self._stored(seen, top, wanted):
                        yield event
                        seen = event.id
                    seen = max(seen, top)
                for event in self._remembered(at):
                    at += 1
                    if event.id not in skipped and wanted.fits(event):
                        yield event
                    seen = max(seen, event.id)
                if at == self._count and not self._closed:
                    await told.wait()
            raise Unavailable("STOPPING", "the manager stops", f"connect again and resume after {seen}")
        finally:
            self._followers -= 1  # the reader ends with the last one

    async def _have_reader(self) -> None:
        async with self._starting:
            if self._reader is None and not self._closed:
                await self._start()
                self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _begin(self, after_id: int) -> tuple[int, int, frozenset[int]]:
        """Returns the last id that is known, a place in the ring (-1: none), and ids behind the reader's place that are no news."""
        place, count = self._place, self._count
        async with self._database.transaction() as connection:
            lowest, highest = await rows.ends(connection)
            known = frozenset(await rows.numbers(connection, place, after_id or highest))
        if not after_id:
            return place, count, known
        if after_id + 1 < lowest:
            raise Lost("EVENTS_LOST", f"events after {after_id} are not kept any more", _BEGIN_ANEW)
        if after_id > highest:
            why = f"there has been no event {after_id}: the database is another one, or an older copy"
            raise Lost("EVENTS_LOST", why, _BEGIN_ANEW)
        return after_id, -1, known

    def _remembered(self, at: int) -> list[Event]:
        """Those behind place `at` in the ring."""
        number = self._count - at
        return [self._ring[i] for i in range(len(self._ring) - number, len(self._ring))]

    async def _stored(self, place: int, top: int, wanted: Wanted) -> AsyncIterator[Event]:
        while place < top and not self._closed:
            async with self._database.transaction() as connection:
                found = await rows.between(connection, place, top, limits.READ_AT_ONCE, wanted)
            for event in found:
                yield event
            place = found[-1].id if len(found) == limits.READ_AT_ONCE else top

    async def close(self) -> None:
        """Ends the followers."""
        self._closed = True
        self._told.ring()
        self._news.ring()
        if self._reader is not None:
            await self._reader

    # ---- the reader -------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Takes its place behind all that there is, but for what is on its way."""
        number = await self._number()
        async with self._database.transaction() as connection:
            first = await rows.nth_newest(connection, limits.START_WINDOW)
            found, oldest = await rows.after(connection, first - 1, limits.START_WINDOW, numbered=self._numbered)
        self._ring.clear()
        self._overdue, self._place = {}, max(first - 1, 0)
        if found:
            self._gap = _Gap(found[-1].id, number, time.monotonic())
            self._settle(found, oldest)

    async def _number(self) -> int:
        if not self._numbered:
            return 0
        async with self._database.transaction() as connection:
            return await rows.transaction_number(connection)

    async def _read(self) -> None:
        """Ends by itself: it is not interrupted in a transaction."""
        is_away = False
        while self._followers and not self._closed:
            news, is_more = self._news.next(), False
            try:
                is_more = await self._look()
                is_away = False
            except AWAY as error:
                if not is_away:
                    _log.warning("followers of events wait for the database: %s", type(error).__name__)
                is_away = True
            except Exception:
                _log.exception("followers of events wait")
            await asyncio.sleep(limits.LEAST_PAUSE)
            if not is_more:
                pause = limits.LOOK_AGAIN if self._held and not is_away else limits.LOOK_EVERY
                await Bell.wait(news, pause - limits.LEAST_PAUSE)
        self._reader = None

    async def _look(self) -> bool:
        """Takes what is new; returns whether there is more."""
        async with self._database.transaction() as connection:
            found, oldest = await rows.after(
                connection, self._place, limits.READ_AT_ONCE, list(self._overdue), numbered=self._numbered
            )
        late = [event for event in found if event.id <= self._place]
        gone = {event.id for event in late} | {number for number, until in self._overdue.items() if oldest >= until}
        self._overdue = {number: until for number, until in self._overdue.items() if number not in gone}
        told = late + self._settle(found[len(late) :], oldest)
        self._ring.extend(told)
        self._count += len(told)
        if told:
            self._told.ring()
        if not self._held:
            self._gap = None
        elif self._gap is None or min(self._held) > self._gap.below:
            self._gap = _Gap(found[-1].id, await self._number(), time.monotonic())
        return len(found) == limits.READ_AT_ONCE and bool(told)

    def _settle(self, found: list[Event], oldest: int) -> list[Event]:
        """Goes on to the first number that may still come; returns what is in front of it."""
        settled: list[Event] = []
        for event in found:
            if event.id > self._place + 1 and not self._passes(event.id, oldest):
                break
            settled.append(event)
            self._place = event.id
        self._held = frozenset(event.id for event in found[len(settled) :])
        return settled

    def _passes(self, until: int, oldest: int) -> bool:
        """Whether nothing is to be waited for between here and `until`."""
        if not self._numbered:
            return True
        gap = self._gap
        if gap is None or until > gap.below:
            return False
        if oldest >= gap.number:
            return True
        if time.monotonic() - gap.since < limits.LONGEST_HOLD:
            return False
        missing = range(self._place + 1, until)
        _log.warning("events %d to %d are not there yet: followers get them late", missing[0], missing[-1])
        for number in missing[: limits.MOST_OVERDUE - len(self._overdue)]:
            self._overdue[number] = gap.number
        return True
