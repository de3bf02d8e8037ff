"""Wakes whoever waits inside this manager.  Other managers find out by looking."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable


class Hub:
    def __init__(self) -> None:
        self._lines = asyncio.Event()
        self._hosts: dict[str, asyncio.Event] = {}

    def lines(self) -> None:
        """There is a line to look at."""
        self._lines.set()

    async def wait_for_lines(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._lines.wait()
        self._lines.clear()

    def commands(self, hosts: Iterable[str]) -> None:
        """There are commands for these hosts."""
        for id in hosts:
            if (waiting := self._hosts.get(id)) is not None:
                waiting.set()

    @property
    def waiting(self) -> list[str]:
        """The hosts that wait here for commands."""
        return list(self._hosts)

    def waits(self, host: str) -> bool:
        return host in self._hosts

    async def wait_for_commands(self, host: str, seconds: float) -> bool:
        """Returns False when nothing came.  One waits for a host at a time: an older one is let go."""
        if (older := self._hosts.get(host)) is not None:
            older.set()
        event = self._hosts[host] = asyncio.Event()
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            if self._hosts.get(host) is event:
                del self._hosts[host]
        return True
