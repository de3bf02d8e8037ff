"""The thread that reads all connections of a module, and the pool for what takes long.

Measured on two cores with eight busy connections: a thread for each connection made 13,000 P-256 signatures a second, because each
blocking call hands Python's lock to another thread; one reactor makes twice as many.  RSA signs in the pool, on all cores.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic, perf_counter

from hsmvisord.transport import limits
from hsmvisord.transport.connection import WAITING, Connection, Ended


class Pool:
    """A few threads for operations that take long, and one for calls that wait for the host."""

    def __init__(self, back: Callable[[Connection], None]) -> None:
        """`back` gives a connection back to its reactor."""
        self._back = back
        self._slow: SimpleQueue[Connection] = SimpleQueue()
        self._waiting: SimpleQueue[Connection] = SimpleQueue()
        self._started = 0
        self._start(self._waiting)

    def _start(self, queue: SimpleQueue[Connection]) -> None:
        threading.Thread(target=self._run, args=(queue,), daemon=True).start()

    def put(self, connection: Connection) -> None:
        request = connection.pending
        if request is not None and request.call in WAITING:
            self._waiting.put(connection)
            return
        if self._started < limits.POOL_THREADS:  # most modules never need them
            self._started += 1
            self._start(self._slow)
        self._slow.put(connection)

    def _run(self, queue: SimpleQueue[Connection]) -> None:
        while True:
            connection = queue.get()
            connection.work_pending()
            self._back(connection)


class Reactor:
    """`ended` is called for each connection that is over, after it gave everything back."""

    def __init__(self, ended: Callable[[Connection], None]) -> None:
        self._ended = ended
        self._epoll = select.epoll()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._inbox: deque[tuple[str, Connection]] = deque()
        self._ready: deque[Connection] = deque()  #: have whole requests in their buffers
        self._pool = Pool(lambda c: self._tell("back", c))
        self._swept = monotonic()
        self._last: Connection | None = None
        self._streak = 0  #: requests of `_last` in a row
        self.connections = 0  #: that it has, with those on their way to it

    # ---- any thread ---------------------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        self.connections += 1
        connection.write_wanted = lambda c: self._tell("write", c)
        self._tell("add", connection)

    def _tell(self, what: str, connection: Connection) -> None:
        self._inbox.append((what, connection))
        with contextlib.suppress(BlockingIOError):  # enough wakes are on their way
            os.write(self._wake, b"\0")

    # ---- its thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        poll, connections = self._epoll.poll, self._connections
        while True:
            events = poll(0) if self._ready else self._wait(poll)
            for descriptor, mask in events:
                connection = connections.get(descriptor)
                if connection is not None:
                    self._serve(connection, mask)
                elif descriptor == self._woken:
                    self._take_inbox()
            for _ in range(len(self._ready)):
                self._work(self._ready.popleft())
            if monotonic() - self._swept > limits.SWEEP:
                self._sweep()

    def _wait(self, poll: Callable[..., list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """Looks a little while before it sleeps: to be woken costs more than a signature on some machines."""
        until = perf_counter() + limits.SPIN
        while not (events := poll(0)):
            if perf_counter() > until:
                return poll(limits.SWEEP)
        return events

    def _serve(self, connection: Connection, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                if not connection.flush():
                    return
                self._epoll.modify(connection.sock, select.EPOLLIN)
            elif mask:
                connection.receive()
        except Ended as end:
            self._end(connection, str(end))
            return
        self._work(connection)

    def _work(self, connection: Connection) -> None:
        if connection.sock.fileno() not in self._connections:
            return
        if connection is self._last:
            self._streak += 1
        else:
            self._last, self._streak = connection, 0
        connection.alone = self._streak >= limits.ALONE
        try:
            more = connection.work()
        except Ended as end:
            self._end(connection, str(end))
            return
        if connection.pending is not None:
            self._epoll.modify(connection.sock, 0)
            self._pool.put(connection)
        elif more:
            self._ready.append(connection)

    def _take_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        while self._inbox:
            what, connection = self._inbox.popleft()
            if what == "add":
                self._connections[connection.sock.fileno()] = connection
                self._epoll.register(connection.sock, select.EPOLLIN)
            elif connection.sock.fileno() in self._connections:
                if what == "back":
                    self._epoll.modify(connection.sock, select.EPOLLIN)
                    self._work(connection)
                else:
                    self._epoll.modify(connection.sock, select.EPOLLOUT)

    def _end(self, connection: Connection, why: str) -> None:
        descriptor = connection.sock.fileno()
        self._epoll.unregister(descriptor)
        del self._connections[descriptor]
        self.connections -= 1
        if connection.why == "closed by the client":
            connection.why = why
        connection.end()
        self._ended(connection)

    def _sweep(self) -> None:
        """Closes connections whose frame or reader is overdue."""
        self._swept = now = monotonic()
        for connection in list(self._connections.values()):
            if connection.overdue_at < now:
                self._end(connection, f"nothing whole came or was read for {limits.FRAME_SECONDS} s")
