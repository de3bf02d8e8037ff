"""Guests' connections that come to us first: accepted, and passed on to the worker of the module that they are for.

The supervisor reads and writes no byte of them.  What a guest can have it hold is bounded for each module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.throttle import Throttle
from hsmvisor_rpc.internal import messages as m

_log = logging.getLogger(__name__)

_AT_ONCE = 16  #: connections that are accepted before others have their turn
_PAUSE = 0.1  #: seconds until accepting is tried again when there are no descriptors left
_TRIES = 3  #: a worker that is being replaced refuses, or ends, and the next one takes it

#: Has the worker take the descriptor; raises ServiceError, PeerError, LinkClosed, TimeoutError.
Give = Callable[[m.TakeConnection, int], Awaitable[None]]


class Passing:
    """The connections that are on their way to one module's worker."""

    def __init__(self, name: str, give: Give) -> None:
        self._name, self._give = name, give
        self._tasks: set[asyncio.Task[None]] = set()
        self._said = Throttle(5, 0.1)

    def pass_on(self, sock: socket.socket, peer: str) -> None:
        """Takes `sock` over; one too many is closed."""
        if len(self._tasks) >= limits.MAX_PASSING:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._pass(sock, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, sock: socket.socket, peer: str) -> None:
        with sock:
            for _ in range(_TRIES):
                try:
                    await self._give(m.TakeConnection(peer), sock.fileno())
                    return
                except PeerError as error:
                    why = error.error.detail
                    if error.error.reason != m.REASON_PHASE:
                        break
                except LinkClosed as error:  # it answers before it reads: what is not answered, the next one takes from the start
                    why = str(error)
                except (ServiceError, TimeoutError) as error:
                    why = str(error) or "no answer"
                    break
        if self._said.admit():
            _log.warning("module %s: a connection (%s) is closed, for its worker did not take it: %s", self._name, peer, why)


class Intake:
    """Accepts at `listener`, which becomes its own.  `arrived` gets each connection and the address of its other end."""

    def __init__(self, listener: socket.socket, arrived: Callable[[socket.socket, Any], None]) -> None:
        self._listener, self._arrived = listener, arrived
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._listener)
                self._again = self._loop.call_later(_PAUSE, self._loop.add_reader, self._listener, self._accept)
                return
            self._arrived(sock, address)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        with contextlib.suppress(ValueError):
            self._loop.remove_reader(self._listener)
        self._listener.close()
