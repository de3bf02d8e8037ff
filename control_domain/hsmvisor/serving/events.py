"""What happened lately, for those who follow: a ring of events with rising ids, kept over a restart of the service.

A follower is a place in the ring.  One that falls behind the ring's end is cut off with an error; nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hsmvisor.serving import limits
from hsmvisor.serving.errors import Exhausted, Lost, StorageUnavailable, Unavailable

_log = logging.getLogger(__name__)

_STORE_EVERY = 0.5  #: seconds; what happened in the last moments before a kill may be missing after it


@dataclass(frozen=True)
class EventRow:
    id: int
    at_ms: int
    kind: str
    subject: str  #: the module, or whatever a service has
    detail: str


class Store(Protocol):
    """Where events are kept over a restart; each method may raise StorageUnavailable."""

    async def events(self) -> list[EventRow]: ...

    async def add_events(self, events: Iterable[EventRow]) -> None: ...


class Events:
    """`service` is what they tell of ("host"); `begin_anew` what a follower does who has lost its place."""

    def __init__(self, store: Store, service: str, begin_anew: str, size: int = limits.EVENT_RING) -> None:
        self._kept, self._service, self._begin_anew = store, service, begin_anew
        self._ring: deque[EventRow] = deque(maxlen=size)
        self._last_id = 0
        self._unstored: list[EventRow] = []
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        for row in await self._kept.events():
            self._ring.append(row)
            self._last_id = row.id
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def emit(self, kind: str, subject: str = "", detail: Mapping[str, Any] | None = None, at_ms: int = 0) -> None:
        """Adds an event.  Ids are microseconds since 1970 made to rise: no id is given twice, also after a lost tail."""
        now = time.time()
        self._last_id = max(self._last_id + 1, int(now * 1e6))
        row = EventRow(self._last_id, at_ms or int(now * 1000), kind, subject, json.dumps(detail or {}))
        self._ring.append(row)
        if len(self._unstored) < limits.EVENT_RING:
            self._unstored.append(row)
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, after_id: int, subject: str) -> AsyncIterator[EventRow]:
        """Yields events after `after_id` (0: from now on) as they happen; `subject` "" is all.

        Raises Lost, Exhausted, Unavailable.
        """
        place = after_id or self._last_id
        if after_id and self._ring and after_id < self._ring[0].id - 1 and len(self._ring) == self._ring.maxlen:
            raise Lost("EVENTS_LOST", f"events after {after_id} are not kept any more", self._begin_anew)
        while not self._closed:
            news = self._news
            for row in self._after(place):
                if not subject or row.subject == subject:
                    yield row
                place = row.id
                if self._ring[0].id > place and len(self._ring) == self._ring.maxlen:
                    raise Exhausted("SLOW_CONSUMER", f"reading is too slow: cut off after event {place}", f"resume after {place}")
            if self._last_id <= place:
                await news.wait()
        raise Unavailable("STOPPING", f"the {self._service} service stops", f"connect again and resume after {place}")

    def _after(self, place: int) -> list[EventRow]:
        """The newest rows behind `place`, oldest first."""
        rows = []
        for row in reversed(self._ring):
            if row.id <= place:
                break
            rows.append(row)
        return rows[::-1]

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_STORE_EVERY)
            await self._store()

    async def _store(self) -> None:
        if not self._unstored:
            return
        rows, self._unstored = self._unstored, []
        try:
            await self._kept.add_events(rows)
        except StorageUnavailable as error:
            _log.warning("events are not kept over a restart: %s", error.detail)

    async def close(self) -> None:
        """Ends the followers and stores what is left."""
        self._closed = True
        self._news.set()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._store()
