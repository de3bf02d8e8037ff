"""One exchange with a host: what it tells is taken in one transaction, then it waits for what there is to carry out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hsmvisor.manager import limits
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.results import Result, Results
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.inventory.reports import NotTaken, Report, Reports, Taken
from hsmvisor.manager.link.pace import UNCHANGED, Pace
from hsmvisor.manager.store import commands, inventory, lines, locks
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import CommandRow, HostRow
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid
from hsmvisor.serving.text import clean
from sqlalchemy.ext.asyncio import AsyncConnection

GIVEN_AGAIN = 30.0  #: seconds after which a command without a result is given again in the same session
MOST_GIVEN = 2000  #: commands that a host is carrying out
TO_SPARE = 30  #: seconds that a command has to be valid when it is given
SEEN_EVERY = limits.HEARTBEAT / 2  #: seconds: how often it is written down that a host was heard of
MOST_DELAY = 20.0  #: seconds that an exchange of a host is held up that tells too much


@dataclass(frozen=True)
class Exchange:
    """As a host says it, without protobuf."""

    session: str
    number: int
    all: bool
    reports: Sequence[Report]
    gone: Sequence[str]
    results: Sequence[Result]
    wait: float
    version: str
    undecided: Sequence[str] = ()  #: commands that the host could not carry out now: they are given again
    peer: str = ""  #: the connection that it came by


@dataclass(frozen=True)
class Answer:
    tell_all: bool = False
    commands: Sequence[CommandRow] = ()
    refused: Sequence[NotTaken] = ()


@dataclass
class _Session:
    """What this manager remembers of a host's session; nothing depends on it."""

    id: str
    peer: str  #: its connection; what an earlier one was given may not have arrived
    given: dict[str, float] = field(default_factory=dict)


class Exchanges:
    def __init__(
        self, database: Database, history: History, reports: Reports, results: Results, hub: Hub, clock: Callable[[], float]
    ) -> None:
        self._database, self._history, self._reports, self._results = database, history, reports, results
        self._hub, self._clock = hub, clock
        self._sessions: dict[str, _Session] = {}
        self._paces: dict[str, Pace] = {}
        self.count = 0  #: of exchanges since the beginning

    async def exchange(self, host: HostRow, told: Exchange) -> Answer:
        """Raises Invalid, Forbidden, Exhausted, DatabaseError."""
        self.count += 1
        _check(told)
        if told.session != host.session and not told.all:
            return Answer(tell_all=True)
        session = self._session(host, told)
        refused: Sequence[NotTaken] = ()
        tells = told.all or told.reports or told.gone or told.results
        now = self._clock()
        back = host.is_silent(now) or told.session != host.session
        if tells or back:
            refused = await self._heard(host, told, int(now), back)
            self._hub.lines()
        elif host.seen_at + SEEN_EVERY <= now:
            async with self._database.transaction() as connection:
                await inventory.change_host(connection, host.id, seen_at=int(now), away=0)
        had_no_room = len(session.given) >= MOST_GIVEN
        for id in (*(result.id for result in told.results), *told.undecided):
            session.given.pop(id, None)
        if told.undecided or had_no_room:  # nothing new comes, and something may be given all the same
            self._hub.commands([host.id])
        found = await self._commands(host, session, 0 if refused else told.wait)
        return Answer(commands=found, refused=refused)

    def _session(self, host: HostRow, told: Exchange) -> _Session:
        session = self._sessions.get(host.id)
        if session is None or (session.id, session.peer) != (told.session, told.peer):
            session = self._sessions[host.id] = _Session(told.session, told.peer)
        return session

    async def _heard(self, host: HostRow, told: Exchange, now: int, back: bool) -> Sequence[NotTaken]:
        """Raises Exhausted."""
        pace = self._paces.setdefault(host.id, Pace(time.monotonic))
        if (wait := pace.wait) > MOST_DELAY:
            raise Exhausted("TOO_MUCH", f"this host has told more than can be taken: it is heard again in {wait:.0f} s")
        await asyncio.sleep(wait)
        async with self._database.transaction() as connection:
            taken = await self._take(connection, host, told, now, back)
        pace.charge(len(told.reports) * UNCHANGED + len(told.results) + len(told.gone) + taken.changed + len(taken.refused) + 1)
        return taken.refused

    async def _take(self, connection: AsyncConnection, host: HostRow, told: Exchange, now: int, back: bool) -> Taken:
        if told.all or told.reports or told.gone:
            await locks.members(connection)
        values = {"seen_at": now, "away": 0, "version": clean(told.version, limits.MAX_VERSION)}
        if not await inventory.note_exchange(connection, host.id, told.session, told.number, **values):
            there = await inventory.host(connection, host.id)
            if there is None or there.state != "joined":  # a host that is removed meanwhile stays removed
                raise Forbidden("HOST", "this host was removed or revoked")
            return Taken()  # it was taken already, or what was told after it: that is newer
        await self._results.take(connection, host, told.results)
        taken = await self._reports.take(connection, host, told.reports, told.gone, told.all)
        if back:
            await commands.forget_late(connection, host.id, now)
            if host.away:
                detail = {"name": host.name, "away_seconds": now - host.seen_at}
                await self._history.add(connection, Happened(Kind.HOST_BACK, host_id=host.id, detail=detail))
            on_it = await inventory.resources_on(connection, host.id)
            await lines.wake_pending(connection, [resource.id for resource in on_it], self._clock())
        return taken

    async def _commands(self, host: HostRow, session: _Session, seconds: float) -> list[CommandRow]:
        """One that does not wait leaves them to the one that does by the same connection, and does not take its place."""
        if seconds <= 0:
            return [] if self._hub.is_waiting(host.id, session.peer) else await self._there(host, session)
        ends = time.monotonic() + seconds
        with self._hub.wait_for_commands(host.id, session.peer) as wait:
            while True:
                found = await self._there(host, session)
                left = ends - time.monotonic()
                if found or left <= 0:
                    return found
                if not await wait(left):
                    return []  # a newer exchange waits in our place

    async def _there(self, host: HostRow, session: _Session) -> list[CommandRow]:
        now = self._clock()
        session.given = {id: at for id, at in session.given.items() if now - at < GIVEN_AGAIN}
        if len(session.given) >= MOST_GIVEN:
            return []
        async with self._database.reading() as connection:  # those that one module does not answer keep no other's back
            given = list(session.given)
            found = await commands.queued(connection, host.id, limits.MAX_COMMANDS, now, now + TO_SPARE, given)
        for row in found:
            session.given[row.id] = now
        return found


def _check(told: Exchange) -> None:
    for what, count, most in (
        ("guests", len(told.reports), limits.MAX_GUESTS if told.all else limits.MAX_REPORTED),
        ("gone", len(told.gone), limits.MAX_GUESTS),
        ("results", len(told.results) + len(told.undecided), limits.MAX_RESULTS),
    ):
        if count > most:
            raise Invalid("LIMIT", f"{count} {what} in one exchange, at most {most}")
    if not 1 <= len(told.session) <= 64 or not told.session.isprintable():
        raise Invalid("SESSION", "a session has 1 to 64 printable characters")
    if told.number > limits.MAX_SEQUENCE:
        raise Invalid("NUMBER", f"an exchange's number is at most {limits.MAX_SEQUENCE}")
    for report in told.reports:
        if len(report.materials) > limits.MAX_MATERIALS:
            raise Invalid("LIMIT", f"a guest has at most {limits.MAX_MATERIALS} materials")
        if any(len(told) > limits.MAX_GENERATIONS for told in report.materials.values()):
            raise Invalid("LIMIT", f"a material has at most {limits.MAX_GENERATIONS} generations")
