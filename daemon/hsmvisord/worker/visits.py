"""Tells of each guest application that began and ended: one by one, as far as the host's log can bear; the others are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hsmvisord import limits
from hsmvisord.transport.connection import Connection

PAUSE = 10.0  #: seconds between two counts


class Visits:
    """`began` and `ended` are the reactor's, `count` is the clock thread's."""

    def __init__(self, tell: Callable[..., None], monotonic: Callable[[], float]) -> None:
        """`tell(kind, **report)` sends an event."""
        self._tell, self._monotonic = tell, monotonic
        self._allowance, self._at = float(limits.EVENT_BURST), monotonic()
        self._untold: set[Connection] = set()  #: began untold, so their end is not told either
        self._began = self._ended = 0
        self._counted, self._counted_at = 0, float("-inf")

    def began(self, connection: Connection) -> None:
        now = self._monotonic()
        self._allowance = min(limits.EVENT_BURST, self._allowance + (now - self._at) * limits.EVENT_RATE)
        self._at = now
        if self._allowance < 1:
            self._untold.add(connection)
            self._began += 1
            return
        self._allowance -= 1
        self._tell("connection-opened", **_about(connection))

    def ended(self, connection: Connection) -> None:
        if connection in self._untold:
            self._untold.discard(connection)
            self._ended += 1
        else:
            self._tell("connection-closed", **_about(connection), why=connection.why)

    def count(self) -> None:
        """Tells how many were not told, since the worker began."""
        now, counted = self._monotonic(), self._began + self._ended
        if counted == self._counted or now - self._counted_at < PAUSE:
            return
        began, ended = self._began, self._ended
        self._counted, self._counted_at = began + ended, now
        self._tell("connections-suppressed", began=began, ended=ended)


def _about(connection: Connection) -> dict[str, Any]:
    caller = connection.caller
    if caller is None:
        return {}
    return {
        "connection": caller.number,
        "peer": caller.peer,
        "dialect": caller.codec.dialect,
        "program": caller.program,
        "pid": caller.pid,
    }
