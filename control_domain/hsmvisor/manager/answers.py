"""Answers to changing calls, stored in the transaction of the change: the same call again is answered again, after a restart and
by another manager too.

No secret stands here: a token is made again from its id.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from hsmvisor.manager.access.callers import caller
from hsmvisor.manager.store.database import Conflict, Database, IntegrityError
from hsmvisor.manager.store.tables import answers
from hsmvisor.serving import gate, limits, requests
from hsmvisor.serving.requests import Request, Requests, reused
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

_PAUSES = (0.05, 0.2, 1.0)  #: seconds

Work = Callable[[AsyncConnection], Awaitable[bytes]]


class Answers:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock

    async def answer(self, request: Request) -> bytes | None:
        """Returns what an equal call was answered before, or None; raises Conflict when that one asked for something else."""
        async with self._database.reading() as connection:
            query = select(answers).where(answers.c.request_id == request.request_id)
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        if (row.method, bytes(row.digest)) != (request.method, request.content):
            raise reused(request.request_id)
        return bytes(row.answer)

    async def quickest(self, request: Request, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """Carries out `work`, which stores its answer; returns that, or the one of another manager that was quicker.

        Where others are in its way it is carried out again, a few times.
        """
        for pause in _PAUSES:
            try:
                return await self._quickest(request, work)
            except Conflict:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        return await self._quickest(request, work)

    async def _quickest(self, request: Request, work: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            return await work()
        except IntegrityError:
            if (earlier := await self.answer(request)) is None:
                raise
            return earlier

    async def store(self, connection: AsyncConnection, request: Request, answer: bytes) -> None:
        """In the transaction of the change.  Raises IntegrityError where another manager carries out the same request."""
        values = {
            "request_id": request.request_id,
            "method": request.method,
            "digest": request.content,
            "answer": answer,
            "at": int(self._clock()),
        }
        await connection.execute(insert(answers).values(values))

    async def prune(self) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(delete(answers).where(answers.c.at < int(self._clock()) - limits.REQUEST_KEPT))


def asked(untrusted_request_id: str, method: str, *content: bytes) -> Request:
    """Returns the request of whoever calls: another caller's under the same id is another one.  Raises Invalid."""
    return requests.request(untrusted_request_id, method, caller().scope.encode(), *content)


class Changes:
    """Changing calls: each is one transaction, with its answer in it, and stands in the audit log."""

    def __init__(self, database: Database, answers: Answers, requests: Requests) -> None:
        self._database, self._answers, self._requests = database, answers, requests

    async def once(self, kind: str, asked: Request, fields: dict[str, Any], work: Work) -> bytes:
        """Returns the answer of `work`, or of an earlier equal call.  `kind`, `fields`: for the audit log; `work` may add some.

        Raises what `work` raises, and as `Requests.once`.
        """

        async def carry_out() -> bytes:
            async with self._database.transaction() as connection:
                answer = await work(connection)
                await self._answers.store(connection, asked, answer)
            return answer

        return await self.outside(kind, asked, fields, carry_out)

    async def outside(self, kind: str, asked: Request, fields: dict[str, Any], work: Callable[[], Awaitable[bytes]]) -> bytes:
        """As `once`, for work that has transactions of its own: its last one stores the answer (`Answers.store`)."""
        return await self._requests.once(gate.origin(), kind, asked, fields, lambda: self._answers.quickest(asked, work))
