"""Tells of each guest connection: its application began, it ended, or it ended without ever having begun one.

One by one, as far as the host's log can bear; the others are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hsmvisord import limits
from hsmvisord.transport.connection import NOT_GREETED, Connection

PAUSE = 10.0  #: seconds between two counts


class Visits:
    """`began` and `ended` are the reactor's, `count` is the clock thread's."""

    def __init__(self, tell: Callable[..., None], monotonic: Callable[[], float]) -> None:
        """`tell(kind, **report)` sends an event."""
        self._tell, self._monotonic = tell, monotonic
        self._allowance, self._at = float(limits.EVENT_BURST), monotonic()
        self._untold: set[Connection] = set()  #: began untold, so their end is not told either
        self._began = self._ended = self._refused = 0
        self._counted, self._counted_at = 0, float("-inf")

    def _admit(self) -> bool:
        now = self._monotonic()
        self._allowance = min(limits.EVENT_BURST, self._allowance + (now - self._at) * limits.EVENT_RATE)
        self._at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def began(self, connection: Connection) -> None:
        if self._admit():
            self._tell("connection-opened", **_about(connection))
        else:
            self._untold.add(connection)
            self._began += 1

    def ended(self, connection: Connection) -> None:
        if not connection.told:
            self._end_of_none(connection)
        elif connection in self._untold:
            self._untold.discard(connection)
            self._ended += 1
        else:
            self._tell("connection-closed", **_about(connection), why=connection.why)

    def _end_of_none(self, connection: Connection) -> None:
        if not self._admit():
            self._refused += 1
            return
        greeting = {} if connection.greeting == NOT_GREETED else {"greeting": connection.greeting}
        self._tell("connection-refused", **_about(connection), **greeting, why=connection.why)

    def count(self) -> None:
        """Tells how many were not told, since the worker began."""
        now, began, ended, refused = self._monotonic(), self._began, self._ended, self._refused
        counted = began + ended + refused
        if counted == self._counted or now - self._counted_at < PAUSE:
            return
        self._counted, self._counted_at = counted, now
        self._tell("connections-suppressed", began=began, ended=ended, refused=refused)


def _about(connection: Connection) -> dict[str, Any]:
    caller = connection.caller
    if caller is None:
        return {"peer": connection.peer}
    return {
        "connection": caller.number,
        "peer": caller.peer,
        "dialect": caller.codec.dialect,
        "program": caller.program,
        "pid": caller.pid,
    }
