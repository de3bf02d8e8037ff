"""What happened, and what happens: a page, and the stream that it follows (Server-Sent Events)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

from hsmvisor.manager.console import limits
from hsmvisor.manager.console.door import Door
from hsmvisor.manager.console.rendering import told
from hsmvisor.manager.console.visit import Visit
from hsmvisor.manager.history.events import Event, Kind
from hsmvisor.manager.store.database import DatabaseError
from hsmvisor.serving.errors import Exhausted, Invalid, Lost, Unauthenticated, Unavailable
from starlette.responses import Response, StreamingResponse

_KINDS = sorted(map(str, Kind))


async def listed(visit: Visit) -> Response:
    kind, token = visit.asked("kind", 32), visit.asked("page", 20)
    events, more = await visit.parts.history.page(limits.PAGE, token, kind, visit.owner)
    return visit.page("events.html", events=events, kind=kind, kinds=_KINDS, more=more, live=not token)


class Streams:
    """Those that are open: so many, and they end with the manager."""

    def __init__(self, door: Door) -> None:
        self._door, self._count = door, 0
        self._end = asyncio.Event()

    def close(self) -> None:
        self._end.set()

    async def open(self, visit: Visit) -> Response:
        """After the last event that the browser saw, or the one that its page names; otherwise from now.  Raises Exhausted."""
        last = visit.request.headers.get("last-event-id") or visit.asked("after", 20)
        if last and not (last.isascii() and last.isdigit() and len(last) < 19):
            raise Invalid("EVENTS", "after is the number of an event")
        kind, request_id, resource_id = visit.asked("kind", 32), visit.asked("request", 32), visit.asked("resource", 130)
        if kind and kind not in _KINDS:
            raise Invalid("EVENTS", "there are no events of that kind")
        if self._count >= limits.MOST_STREAMS or visit.session.streams >= limits.STREAMS_OF_ONE:
            raise Exhausted("STREAMS", "too many pages follow events", "close some")

        def fits(event: Event) -> bool:
            return request_id in ("", event.request_id) and resource_id in ("", event.resource_id)

        async def stream() -> AsyncIterator[str]:
            self._count += 1
            visit.session.streams += 1
            try:
                yield "retry: 3000\n\n"
                async for event in self._events(visit, int(last or 0), kind):
                    if event is None:
                        yield ": still here\n\n"
                    elif isinstance(event, str):
                        yield f"event: {event}\ndata: {{}}\n\n"
                    elif fits(event):
                        yield f"id: {event.id}\ndata: {json.dumps(told(event))}\n\n"
            finally:
                self._count -= 1
                visit.session.streams -= 1

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _events(self, visit: Visit, after: int, kind: str) -> AsyncGenerator[Event | str | None]:
        """None now and then, so that one who has gone is noticed; `lost`, `over`: what the page has to know."""
        history = visit.parts.history
        following = history.follow(after, kind, visit.owner)
        ending = asyncio.ensure_future(self._end.wait())
        coming: asyncio.Future[Event] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(following))
                await asyncio.wait((coming, ending), timeout=limits.HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    return
                if not await self._still(visit):
                    yield "over"
                    return
                if not coming.done():
                    yield None
                    continue
                try:
                    event = await coming
                except Lost:
                    yield "lost"
                    following = history.follow(0, kind, visit.owner)
                except (Unavailable, StopAsyncIteration):
                    return  # the browser comes again
                else:
                    yield event
                coming = None
        finally:
            ending.cancel()
            if coming is not None:
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming
            await following.aclose()

    async def _still(self, visit: Visit) -> bool:
        """Whether whoever follows may still: nobody learns more after a logout, or when a token was revoked."""
        try:
            who = await self._door.who(visit.request, visit.session)
        except Unauthenticated:
            return False
        except DatabaseError:
            return True  # nothing comes out of it either
        return who.owner == visit.who.owner and who.roles == visit.who.roles
