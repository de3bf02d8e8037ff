"""Requests that wait (for a rotation, for a slot event): kept without a thread and asked again after each change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.wire.calls import Request


@dataclass(eq=False)
class Waiter:
    caller: Caller
    request: Request
    ready: Callable[[], tuple[Any, ...] | None]
    send: Callable[[bytes], None]
    frame: bytes  #: the request as it came
    deadline: float  #: monotonic seconds; infinite without one


class Parking:
    """Waiters of a module.  `wake` and `expire` run on the worker's clock thread, so a slow reader delays nobody but waiters."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()

    def park(
        self,
        caller: Caller,
        request: Request,
        ready: Callable[[], tuple[Any, ...] | None],
        send: Callable[[bytes], None],
        frame: bytes,
    ) -> None:
        """Raises CKR_HOST_MEMORY when the connection has too many waiting."""
        seconds = request.deadline_ms / 1000 if request.deadline_ms else float("inf")
        waiter = Waiter(caller, request, ready, send, frame, self._monotonic() + seconds)
        with self._lock:
            if caller.parked >= limits.MAX_PARKED or len(self._waiters) >= limits.MAX_PARKED_ALL:
                raise CkError(ck.CKR_HOST_MEMORY, "too many waiting calls")
            caller.parked += 1
            self._waiters.add(waiter)

    def remove(self, caller: Caller) -> None:
        """The connection has ended."""
        with self._lock:
            if caller.parked:
                self._waiters = {w for w in self._waiters if w.caller is not caller}
                caller.parked = 0

    def saved(self, caller: Caller) -> list[tuple[bytes, int]]:
        """Returns the connection's waiting requests, each with the milliseconds that it still waits (0 = for ever)."""
        now = self._monotonic()
        with self._lock:
            mine = [w for w in self._waiters if w.caller is caller]
        return [(w.frame, max(1, int((w.deadline - now) * 1000)) if w.request.deadline_ms else 0) for w in mine]

    def serve(self) -> None:
        """Answers those who are ready and those whose deadline is over."""
        with self._lock:
            waiters = list(self._waiters)
        now = self._monotonic()
        for waiter in waiters:
            reply = face.finish(waiter.caller, waiter.request, waiter.ready)
            if reply is None and now >= waiter.deadline:
                reply = face.expire(waiter.caller, waiter.request)
            if reply is not None:
                with self._lock:
                    if waiter not in self._waiters:
                        continue
                    self._waiters.remove(waiter)
                    waiter.caller.parked -= 1
                waiter.send(reply)

    @property
    def next_deadline(self) -> float:
        with self._lock:
            return min((w.deadline for w in self._waiters), default=float("inf"))
