"""The policies that count: a version in the database, parsed once, the same in all managers within a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from importlib import resources

from hsmvisor.manager import limits
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.policy.engine import BadPolicies, Policies
from hsmvisor.manager.store import lines, locks, measurements, policies
from hsmvisor.manager.store.database import Database, DatabaseError, IntegrityError
from hsmvisor.manager.store.rows import PolicyRow
from hsmvisor.serving.errors import Broken, Conflict, Invalid, WrongState
from sqlalchemy.ext.asyncio import AsyncConnection

_log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  #: seconds
DEFAULT = resources.files("hsmvisor.manager.policy").joinpath("default.cedar")


class PolicyStore:
    """`woken` is called when lines are to be looked at again."""

    def __init__(self, database: Database, history: History, woken: Callable[[], None], clock: Callable[[], float]) -> None:
        self._database, self._history, self._woken, self._clock = database, history, woken, clock
        self._current: Policies | None = None
        self._unusable = 0  #: a version of which was said that it cannot be used
        self._task: asyncio.Task[None] | None = None

    def current(self) -> Policies:
        """Returns those that count; it waits for nothing, so it may be asked in the middle of a transaction."""
        assert self._current is not None, "before `open`"
        return self._current

    # ---- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Reads the version that counts; a fleet without one begins with the default.  Raises Broken, DatabaseError."""
        with contextlib.suppress(IntegrityError):  # another manager was quicker
            async with self._database.transaction() as connection:
                if not await policies.newest(connection):
                    text = DEFAULT.read_text(encoding="utf-8")
                    await policies.add(
                        connection, PolicyRow(1, text, int(self._clock()), "manager", "what a new fleet begins with")
                    )
        try:
            await self._read()
        except BadPolicies as error:
            raise Broken(
                "POLICIES", f"the policies in the database cannot be used: {error}", "they are of a newer release: install that one"
            ) from None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            with contextlib.suppress(DatabaseError):
                await self.refresh()

    async def refresh(self) -> None:
        """Takes over what another manager stored.  Raises DatabaseError."""
        before = self.current().version
        try:
            await self._read()
        except BadPolicies as error:
            _log.error("the policies of version %d cannot be used, those of version %d stay: %s", self._unusable, before, error)
        if self.current().version != before:  # what was decided here in between went by the old ones
            async with self._database.transaction() as connection:
                await look_again(connection, self._clock())
            self._woken()

    async def _read(self) -> None:
        """Raises BadPolicies, DatabaseError."""
        async with self._database.reading() as connection:
            newest = await policies.newest(connection)
            if newest in (self._unusable, self._current.version if self._current else 0):
                return
            row = await policies.version(connection, newest)
        assert row is not None
        try:
            self._current = await asyncio.to_thread(Policies, row.text, row.version)
        except BadPolicies:
            self._unusable = newest
            raise

    # ---- what PolicyService asks ----------------------------------------------------------------------------------

    async def check(self, untrusted_text: str, untrusted_comment: str) -> None:
        """Raises Invalid with the lines of what is wrong."""
        if len(untrusted_comment) > limits.MAX_COMMENT or not untrusted_comment.isprintable():
            raise Invalid("COMMENT", f"a comment has at most {limits.MAX_COMMENT} printable characters")
        try:
            await asyncio.to_thread(Policies, untrusted_text)
        except BadPolicies as error:
            raise Invalid("POLICIES", str(error), "hsmvisor policy check says the same of a file") from None

    async def upload(self, connection: AsyncConnection, text: str, comment: str, instead_of: int, by: str) -> PolicyRow:
        """Stores the next version of checked text; it counts once that is committed (`refresh`).

        `instead_of`: the version that has to be the newest; 0: whatever is.  Raises WrongState, Conflict.
        """
        await locks.members(connection)
        newest = await policies.newest(connection)
        if instead_of and instead_of != newest:
            why = f"these policies are meant to follow version {instead_of}, and version {newest} counts"
            raise WrongState("POLICY_VERSION", why, "look at what was changed, and upload again")
        row = PolicyRow(newest + 1, text, int(self._clock()), by[: limits.MAX_BY], comment)
        try:
            await policies.add(connection, row)
        except IntegrityError:
            raise Conflict("POLICY_VERSION", "somebody else uploaded policies at the same time", "look at those first") from None
        await look_again(connection, self._clock())
        detail = {"version": row.version, "by": by, "comment": comment}
        await self._history.add(connection, Happened(Kind.POLICY_UPLOADED, detail=detail))
        return row


async def look_again(connection: AsyncConnection, now: float) -> None:
    """What is allowed, or what a guest's boot has to be, may be another thing now."""
    await locks.members(connection)
    await lines.wake_all(connection, now)
    await measurements.try_again(connection)
