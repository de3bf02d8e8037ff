"""The history: events and what is to be told of them, written together with what happened."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from hsmvisor.manager.history import cleaning, limits, rows
from hsmvisor.manager.history.bell import Bell
from hsmvisor.manager.history.following import AWAY, Following
from hsmvisor.manager.history.happened import Event, Happened, Kind
from hsmvisor.manager.history.rows import Wanted
from hsmvisor.manager.store.database import Database
from hsmvisor.serving.errors import Invalid
from hsmvisor.serving.limits import page_size
from sqlalchemy import event as happenings
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["Channel", "Event", "Happened", "History", "Kind"]

_log = logging.getLogger(__name__)


class Channel(Protocol):
    """One who is told of events (hsmvisor.manager.notify.channels)."""

    @property
    def name(self) -> str: ...

    def wants(self, kind: str, owner: str) -> bool: ...


class History:
    def __init__(
        self,
        database: Database,
        channels: Sequence[Channel] = (),
        clock: Callable[[], float] = time.time,
        most: int = limits.MOST_EVENTS,
        longest: float = limits.LONGEST_KEPT,
    ) -> None:
        """`most`, `longest`: how many events are kept, and for how many seconds."""
        self._database, self._channels, self._clock = database, tuple(channels), clock
        self._most, self._longest = most, longest
        self.news = Bell()  #: rings when this process has written an event
        self._mark = f"hsmvisor.history.{id(self)}"
        self._following = Following(database, self.news)
        happenings.listen(database.engine.sync_engine, "checkin", self._returned)

    # ---- writing ----------------------------------------------------------------------------------------------------

    async def add(self, connection: AsyncConnection, happened: Happened, but: str = "") -> int:
        """Writes the event, and a notice for each channel that wants it but for `but`, in the transaction of `connection`.

        The caller has nothing to do after its commit: followers and the notifier of this process wake when the connection goes back
        to its pool, which is right after the end of `Database.transaction()`; other managers look at the table.  After a rollback
        they wake in vain.  Call it as late in the transaction as it suits: followers of all managers wait for those events with
        lower ids that are not committed yet.
        """
        if self._mark not in connection.info:
            connection.info[self._mark] = True
            if self._database.kind == "postgresql":
                await rows.transaction_number(connection)  # before the event's id is taken: see following.py
        now, kind = self._clock(), str(Kind(happened.kind))
        owner = cleaning.printable(happened.owner, limits.MAX_OWNER)
        values: dict[str, Any] = {
            "at": now,
            "kind": kind,
            "owner": owner,
            "request_id": cleaning.printable(happened.request_id, limits.MAX_REQUEST),
            "material": cleaning.printable(happened.material, limits.MAX_MATERIAL),
            "resource_id": cleaning.printable(happened.resource_id, limits.MAX_RESOURCE),
            "host_id": cleaning.printable(happened.host_id, limits.MAX_HOST),
            "detail": cleaning.detail(happened.detail),
        }
        event_id = await rows.add(connection, values)
        if told := [c.name for c in self._channels if c.name != but and c.wants(kind, owner)]:
            await rows.add_notices(connection, event_id, now, told)
        return event_id

    def _returned(self, dbapi_connection: Any, record: Any) -> None:
        """A connection is back in its pool: committed, or rolled back."""
        if record is not None and record.info.pop(self._mark, False):
            self.news.ring()

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def follow(self, after_id: int = 0, kind: str = "", owner: str = "") -> AsyncGenerator[Event]:
        """Yields events after `after_id` (0: from now on) as they happen, in the order of their ids.

        One that reads slowly is read to from the database; nobody waits for it.  Raises Invalid, Lost, Unavailable.
        """
        if after_id < 0:
            raise Invalid("EVENTS", "after_id is the id of an event, or 0: from now on")
        wanted = Wanted(kind=_kind(kind), owner=owner)
        following = self._following.follow(after_id, wanted)
        try:
            async for event in following:
                yield event
        finally:
            await following.aclose()

    async def page(
        self, size: int = 0, token: str = "", kind: str = "", owner: str = "", request_id: str = "", resource_id: str = ""
    ) -> tuple[list[Event], str]:
        """Returns events, newest first, and the token of the next page; empty: this is the last.

        The token is good with the same filters.  Raises Invalid, DatabaseError.
        """
        size = page_size(size)
        if token and not (token.isascii() and token.isdigit() and 0 < int(token[:20]) < 2**63 and len(token) < 20):
            raise Invalid("EVENTS", "page_token is none that was given out: begin with the first page")
        wanted = Wanted(_kind(kind), owner, request_id, resource_id)
        async with self._database.transaction() as connection:
            found = await rows.newest(connection, int(token or 0), size + 1, wanted)
        return found[:size], str(found[size - 1].id) if len(found) > size else ""

    # ---- forgetting -------------------------------------------------------------------------------------------------

    async def prune(self) -> int:
        """Forgets what is too old or too much, oldest first; returns how many events.  The newest stays: ids go on rising."""
        count = 0
        for _ in range(limits.MOST_BATCHES):
            async with self._database.transaction() as connection:
                _, highest = await rows.ends(connection)
                last = self._last_to_forget(await rows.oldest_times(connection, limits.PRUNED_AT_ONCE), highest)
                if not last:
                    break
                count += await rows.forget(connection, last)
            await asyncio.sleep(0)  # others write in between
        return count

    def _last_to_forget(self, oldest: list[tuple[int, float]], highest: int) -> int:
        too_old, last = self._clock() - self._longest, 0
        for event_id, at in oldest:
            if event_id >= highest or (event_id > highest - self._most and at >= too_old):
                break
            last = event_id
        return last

    async def run(self) -> None:
        """Prunes from time to time, until it is cancelled."""
        while True:
            try:
                if count := await self.prune():
                    _log.info("%d old events are forgotten", count)
            except AWAY as error:
                _log.warning("old events are not forgotten: %s", type(error).__name__)
            await asyncio.sleep(limits.PRUNE_EVERY)

    async def close(self) -> None:
        """Ends the followers: they get Unavailable."""
        await self._following.close()
        happenings.remove(self._database.engine.sync_engine, "checkin", self._returned)


def _kind(untrusted_kind: str) -> str:
    if untrusted_kind and untrusted_kind not in list(Kind):
        raise Invalid("EVENTS", f"there are no events of kind {untrusted_kind[:32]!r}: there are {', '.join(sorted(Kind))}")
    return untrusted_kind
