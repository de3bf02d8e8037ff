"""Wakes those in this process that wait for news."""

from __future__ import annotations

import asyncio
import contextlib


class Bell:
    """Take `next()`, look whether there is something to do, then `wait` for it: no ring is missed in between."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def next(self) -> asyncio.Event:
        return self._next

    def ring(self) -> None:
        rung, self._next = self._next, asyncio.Event()
        rung.set()

    @staticmethod
    async def wait(event: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
