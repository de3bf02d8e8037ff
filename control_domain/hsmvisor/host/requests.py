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
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.audit import Audit
from hsmvisor.host.errors import HostError
from hsmvisor.host.state import Request, State, reused

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Who asks, and why (as the caller says)."""

    who: str
    why: str = ""


def request(untrusted_request_id: str, method: str, *content: bytes) -> Request:
    """Returns the request; `content` is everything that makes two requests different.  Raises Invalid."""
    digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in content)).digest()
    return Request(limits.request_id(untrusted_request_id), method, digest)


class Requests:
    def __init__(self, state: State, audit: Audit) -> None:
        self._state, self._audit = state, audit
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
            stored = await self._state.answer(request)
            if stored is not None:
                await note(result="repeated")
                return stored
            answer = await work()
        except HostError as error:
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
