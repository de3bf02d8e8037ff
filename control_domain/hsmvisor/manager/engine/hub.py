"""Wakes whoever waits inside this manager.  Other managers find out by looking."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

#: Returns after so many seconds, or when commands came: whether this one waits still, and no newer one in its place.
Wait = Callable[[float], Awaitable[bool]]


@dataclass(frozen=True, eq=False)
class _Waiting:
    event: asyncio.Event
    peer: str  #: its connection


class Hub:
    def __init__(self) -> None:
        self._lines = asyncio.Event()
        self._hosts: dict[str, _Waiting] = {}

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
                waiting.event.set()

    @property
    def waiting(self) -> list[str]:
        """The hosts that wait here for commands."""
        return list(self._hosts)

    def is_waiting(self, host: str, peer: str) -> bool:
        """Whether one waits by this connection.  One of another connection is let go: the host has lost that one."""
        waiting = self._hosts.get(host)
        if waiting is not None and waiting.peer != peer:
            del self._hosts[host]
            waiting.event.set()
            return False
        return waiting is not None

    @contextlib.contextmanager
    def wait_for_commands(self, host: str, peer: str) -> Iterator[Wait]:
        """What comes from now on is heard.  One waits for a host at a time: an older one is let go."""
        if (older := self._hosts.get(host)) is not None:
            older.event.set()
        event = asyncio.Event()
        mine = self._hosts[host] = _Waiting(event, peer)

        async def wait(seconds: float) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(seconds, 0)):
                    await event.wait()
            event.clear()
            return self._hosts.get(host) is mine

        try:
            yield wait
        finally:
            if self._hosts.get(host) is mine:
                del self._hosts[host]
