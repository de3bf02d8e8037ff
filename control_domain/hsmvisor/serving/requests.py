"""Changing calls, once: the same request id with the same content is carried out once and answered the same way.

That holds while the first one runs, after it, and after a restart; a caller that goes away stops nothing half-way.
Each one stands in the audit log, with its outcome, before it is acknowledged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hsmvisor.serving import limits
from hsmvisor.serving.errors import Conflict, ServiceError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Who asks, and why (as the caller says)."""

    who: str
    why: str = ""


@dataclass(frozen=True)
class Request:
    """A changing call: its id, its method and the SHA-256 of what it asks."""

    request_id: str
    method: str
    content: bytes


class Answers(Protocol):
    """Where answers are kept, with what was changed."""

    async def answer(self, request: Request) -> bytes | None:
        """Returns what an equal call was answered before, or None; raises Conflict when that one asked for something else."""


class Log(Protocol):
    """The audit log, as far as it is needed here."""

    def demand_working(self) -> None:
        """Raises Unavailable while lines cannot be written."""

    async def record(self, kind: str, **fields: Any) -> None:
        """Returns when the line is on the disk."""


def reused(request_id: str) -> Conflict:
    return Conflict("REQUEST_ID_REUSED", f"request_id {request_id!r} was used with other content", "use a new id for a new request")


def digest(*parts: bytes) -> bytes:
    """Returns the SHA-256 of the parts, each with its length."""
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def request(untrusted_request_id: str, method: str, *content: bytes) -> Request:
    """Returns the request; `content` is everything that makes two requests different.  Raises Invalid."""
    return Request(limits.request_id(untrusted_request_id), method, digest(*content))


class Requests:
    def __init__(self, answers: Answers, audit: Log) -> None:
        self._answers, self._audit = answers, audit
        self._running: dict[str, tuple[Request, asyncio.Task[bytes]]] = {}

    async def once(
        self, origin: Origin, kind: str, request: Request, fields: dict[str, Any], work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """Returns the answer of `work`, which stores it together with what it changes; of an earlier equal call its stored answer.

        Raises Conflict when the id was used for something else, Unavailable while the audit log cannot be written, and what
        `work` raises.  `fields` and `kind` are for the audit log.
        """
        if request.request_id in self._running:
            earlier, task = self._running[request.request_id]
            if earlier != request:
                raise reused(request.request_id)
        else:
            task = asyncio.get_running_loop().create_task(self._carry_out(origin, kind, request, fields, work))
            self._running[request.request_id] = request, task
            task.add_done_callback(lambda t: self._done(request, t))
        return await asyncio.shield(task)

    def _done(self, request: Request, task: asyncio.Task[bytes]) -> None:
        del self._running[request.request_id]
        if not task.cancelled():
            task.exception()  # the caller may be gone

    async def _carry_out(
        self, origin: Origin, kind: str, request: Request, fields: dict[str, Any], work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        self._audit.demand_working()

        async def note(**outcome: str) -> None:
            # `fields` is read now: what was done may be known better than before
            await self._audit.record(kind, who=origin.who, why=origin.why, request_id=request.request_id, **fields, **outcome)

        try:
            stored = await self._answers.answer(request)
            if stored is not None:
                await note(result="repeated")
                return stored
            answer = await work()
        except ServiceError as error:
            await note(result="refused", reason=error.reason, detail=error.detail)
            error.noted = True
            raise
        except Exception as error:
            _log.exception("%s failed", kind)
            await note(result="failed", reason=type(error).__name__)
            raise
        await note(result="ok")
        return answer

    async def finish(self) -> None:
        """Waits for what is being carried out."""
        await asyncio.gather(*(task for _, task in self._running.values()), return_exceptions=True)
