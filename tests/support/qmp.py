"""QEMU's machine protocol for code without asyncio: one monitor socket, a thread that serves it, and the events that came."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient

Event = dict[str, Any]
T = TypeVar("T")


class Monitor:
    """Connects at once.  `on_event` is called in the monitor's own thread and must not call `execute`."""

    def __init__(self, path: Path, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self._on_event = on_event
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._client, self._listener = self._do(self._connect(path), 10)
        except BaseException:
            self._stop()
            raise

    async def _connect(self, path: Path) -> tuple[QMPClient, asyncio.Task[None]]:
        client = QMPClient("tests")
        await client.connect(str(path))
        return client, asyncio.create_task(self._listen(client))

    async def _listen(self, client: QMPClient) -> None:
        async for message in client.events:
            event = dict(message)
            self._on_event(event)
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()

    def _do(self, work: Coroutine[Any, Any, T], within: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(within)
        except TimeoutError:
            future.cancel()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, within: float = 30) -> Any:
        """Raises qemu.qmp.ExecuteError (QEMU refused), qemu.qmp.QMPError (it is gone) or TimeoutError."""
        try:
            return self._do(self._client.execute(command, arguments), within)
        except TimeoutError:
            raise TimeoutError(f"QEMU has not answered {command} within {within} s") from None

    def mark(self) -> int:
        """How many events have come until now, for `wait`."""
        return len(self._events)

    def wait(self, name: str, since: int = 0, within: float = 30, **data: Any) -> Event:
        """Returns the first event `name` after `since` whose data include `data`; raises TimeoutError."""

        def found() -> Event | None:
            for event in self._events[since:]:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return event
            return None

        with self._changed:
            if event := self._changed.wait_for(found, within):
                return event
            seen = [event["event"] for event in self._events[since:]]
        raise TimeoutError(f"no {name} {data or ''} within {within} s, but {seen}")

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _disconnect(self) -> None:
        self._listener.cancel()
        await self._client.disconnect()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # QEMU may be gone, or may have sent rubbish as it went
            self._do(self._disconnect(), 5)
        self._stop()
