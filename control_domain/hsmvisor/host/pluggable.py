"""What somebody of a guest's side is connected to, or not, and who waits for either."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine
from typing import Any


class Pluggable:
    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def plugged(self) -> bool:
        """Says whether somebody is connected."""
        raise NotImplementedError

    async def wait_plugged(self, within: float) -> None:
        """Returns when somebody is connected; raises TimeoutError."""
        await self._wait(True, within)

    async def wait_unplugged(self, within: float) -> None:
        await self._wait(False, within)

    async def _wait(self, plugged: bool, within: float) -> None:
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(lambda: self.plugged is plugged)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _told_change(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._run(notify())


def unix_peer(sock: socket.socket) -> str:
    """Returns who connected to a unix socket, as the kernel tells it."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"unix uid={uid} pid={pid}"
