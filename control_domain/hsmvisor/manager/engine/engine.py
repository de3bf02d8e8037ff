"""The engine: takes lines that are due, several at a time, and looks at each; several managers share the work.

A line that is looked at is leased.  The lease is kept up while the look lasts, and what a manager leaves behind that is no more is
looked at again when its lease is over.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

from hsmvisor.manager import limits
from hsmvisor.manager.engine import line as looking
from hsmvisor.manager.engine.beginning import life_of
from hsmvisor.manager.engine.obtaining import happened
from hsmvisor.manager.engine.outcome import Again, Failed, Outcome
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import gather
from hsmvisor.manager.history.events import Happened, Kind
from hsmvisor.manager.renewal import timing
from hsmvisor.manager.store import commands, inventory, lines, measurements, wanted
from hsmvisor.manager.store.database import Conflict, DatabaseError
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import LineRow
from sqlalchemy.ext.asyncio import AsyncConnection

_log = logging.getLogger(__name__)

LEASE = 30.0  #: seconds
KEEP_EVERY = 8.0
LOOK_EVERY = 0.5  #: seconds after which one asks the database whether another manager has something for us
LOOK_BACK = 5.0  #: seconds: how old a command may be that is seen there; clocks differ, and a commit takes its time
RESCUE_EVERY = 10.0
HICCUP = 5.0  #: seconds after an error of our own, or of the database's
WORKERS = 16
MOST_STEPS = 10  #: of one line before it is another one's turn


class Engine:
    def __init__(self, parts: Parts, workers: int = WORKERS, id: str = "") -> None:
        """`id`: this manager's, the same after a restart: then it goes on at once with what it was at when it ended."""
        self._parts, self._workers = parts, workers
        self.id = id or uuid.uuid4().hex
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = self._taken_back = False
        self._swept_at = self._looked_at = 0.0
        self.looks = 0  #: since the beginning

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._on_and_on(step)) for step in (self._take, self._keep, self._watch)]

    async def stop(self) -> None:
        """Looks that are under way end by themselves, for a while."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        at_work = list(self._at_work.values())
        if at_work:
            _, late = await asyncio.wait(at_work, timeout=10)
            for task in late:
                task.cancel()
        await asyncio.gather(*self._tasks, *at_work, return_exceptions=True)

    async def _on_and_on(self, step: Callable[[], Awaitable[None]]) -> None:
        """Whatever becomes of one step, the next one is taken."""
        while not self._stopping:
            try:
                await step()
            except DatabaseError as error:
                _log.error("%s", error)
                await asyncio.sleep(HICCUP)
            except Exception:
                _log.exception("the engine goes on")
                await asyncio.sleep(HICCUP)

    # ---- taking lines ----------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        if not self._taken_back:
            async with self._parts.database.transaction() as connection:
                await lines.take_back(connection, self.id)
            self._taken_back = True
        taken = await self._claim()
        for row in taken:
            task = asyncio.get_running_loop().create_task(self._look(row))
            self._at_work[row.id] = task
            task.add_done_callback(lambda done, id=row.id: self._ended(id))  # type: ignore[misc]
        if not taken:
            await self._parts.hub.wait_for_lines(LOOK_EVERY)

    async def turn(self) -> int:
        """Looks once at all lines that are due, one after the other; for those who keep the time themselves."""
        taken = await self._claim()
        for row in taken:
            await self._look(row)
        return len(taken)

    async def _claim(self) -> list[LineRow]:
        free = self._workers - len(self._at_work)
        if free <= 0:
            return []
        async with self._parts.database.transaction() as connection:
            return await lines.claim(connection, self.id, self._parts.clock(), LEASE, free)

    def _ended(self, id: str) -> None:
        self._at_work.pop(id, None)
        self._parts.hub.lines()

    async def _keep(self) -> None:
        """Keeps up our leases, and takes up what others left."""
        await asyncio.sleep(KEEP_EVERY if self._at_work else RESCUE_EVERY)
        now = self._parts.clock()
        async with self._parts.database.transaction() as connection:
            await lines.keep(connection, self.id, list(self._at_work), now + LEASE)
        if now - self._swept_at >= RESCUE_EVERY:
            self._swept_at = now
            await self.sweep()

    async def sweep(self) -> None:
        """Takes up what managers left that are no more, forgets what is over, and tells of hosts that have fallen silent."""
        now = self._parts.clock()
        async with self._parts.database.transaction() as connection:
            await lines.rescue(connection, now)
            await lines.prune_envelopes(connection, now)
            await commands.prune(connection, now)
            await measurements.prune(connection, now - limits.MEASUREMENTS_KEPT)
            await wanted.prune(connection, now - limits.CANCELLED_KEPT)
            await self._tell_silent_hosts(connection, now)

    async def _tell_silent_hosts(self, connection: AsyncConnection, now: float) -> None:
        for id, name, seen_at in await inventory.fallen_silent(connection, now - limits.AWAY):
            detail = {"name": name, "silent_seconds": int(now - seen_at)}
            await self._parts.history.add(connection, Happened(Kind.HOST_AWAY, host_id=id, detail=detail))

    async def _watch(self) -> None:
        """Commands that another manager made, for hosts that wait here; also those of the time of a look that failed."""
        await asyncio.sleep(LOOK_EVERY)
        began, waiting = self._parts.clock(), self._parts.hub.waiting
        if waiting and self._parts.database.kind != "sqlite":
            async with self._parts.database.reading() as connection:
                found = await commands.waiting_hosts(connection, waiting, (self._looked_at or began) - LOOK_BACK)
            self._parts.hub.commands(found)
        self._looked_at = began

    # ---- one line ----------------------------------------------------------------------------------------------------

    async def _look(self, row: LineRow) -> None:
        """Step after step, as long as the next one can be taken at once."""
        try:
            outcome = await self._outcome(row)
            for _ in range(MOST_STEPS):
                if outcome is None or outcome.look_at > self._parts.clock() or self._stopping:
                    break
                stage = outcome.stage
                outcome = await self._outcome(row)
                if outcome is not None and not outcome.stage:
                    outcome = replace(outcome, stage=stage)
            if outcome is not None:
                await self._release(row, outcome)
        except DatabaseError as error:
            _log.error("%s", error)  # the lease ends by itself
        except Exception:
            _log.exception("line %s", row.id)

    async def _outcome(self, row: LineRow) -> Outcome | None:
        self.looks += 1
        try:
            return await looking.look(self._parts, row)
        except Again as again:
            look_at = self._parts.clock() + again.seconds if again.seconds else 0.0
            return Outcome(look_at, again.stage, str(again))
        except Failed as failed:
            return await self._failed(row, failed)
        except Conflict as conflict:
            return Outcome(self._parts.clock() + random.uniform(0.1, 1), "", str(conflict))
        except DatabaseError:
            raise
        except Exception:
            _log.exception("line %s", row.id)
            return Outcome(self._parts.clock() + HICCUP * 12, "", "an error inside the manager: see its log")

    async def _failed(self, row: LineRow, failed: Failed) -> Outcome | None:
        """Counts it, and says when it is tried again."""
        now = self._parts.clock()
        async with self._parts.database.transaction() as connection:
            seen = await gather(connection, row, self._parts.pins, now)
            if seen is None:
                return None
            failures = seen.line.failures + 1
            not_before = now + failed.not_before if failed.not_before else 0.0
            told = {"failures": failures, "failed_at": now, "not_before": not_before}
            await lines.change_line(connection, row.id, **told)
            detail: dict[str, object] = {"why": str(failed), "failures": failures}
            await self._parts.history.add(connection, happened(seen, Kind.FAILED, detail))
        serving = seen.serving
        life = life_of(serving) if serving is not None else None
        again = max(now + timing.pause(failures, life, now), not_before)
        return Outcome(again, failed.stage, str(failed))

    async def _release(self, row: LineRow, outcome: Outcome) -> None:
        now = self._parts.clock()
        values: dict[str, object] = {"why": outcome.why}
        if outcome.stage:
            values["stage"] = outcome.stage
        async with self._parts.database.transaction() as connection:
            look_at = max(min(outcome.look_at, FAR), now)  # behind those that are due already
            await lines.release(connection, self.id, row.id, look_at, **values)
        if outcome.look_at <= now:
            self._parts.hub.lines()
