"""The threads that read all connections of a module: one leads, the others sign or wait to lead.

The leader answers what is quick itself.  Before a request that will take long (RSA) it gives up the lead, so that another thread
reads on meanwhile.  Measured on two cores with eight busy connections: a thread for each connection made 13,000 P-256 signatures a
second, because each blocking call hands Python's lock to another thread; one that leads makes 22,000.
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
        self._slow: deque[Connection] = deque()  #: have a request that will take long
        self._lead = threading.Lock()  #: held by the thread that reads; guards all that is not said to be for any thread
        self._answering: set[Connection] = set()  #: by threads that gave up the lead
        self._threads = 0
        self._waiting: SimpleQueue[Connection] = SimpleQueue()
        self._swept = monotonic()
        self._last: Connection | None = None
        self._streak = 0  #: requests of `_last` in a row
        self._vain = 0  #: looks for a request in a row that found none
        self._unlooked = 0  #: sleeps before the next look
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

    # ---- the threads --------------------------------------------------------------------------------------------

    def start(self) -> None:
        threading.Thread(target=self._wait_for_host, name="waiting", daemon=True).start()
        self._start_thread()

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._run, name="reactor", daemon=True).start()

    def _run(self) -> None:
        self._lead.acquire()
        while True:
            connection = self._read_until_slow()
            self._answering.add(connection)
            if len(self._answering) == self._threads < limits.THREADS:  # most modules never need more than one
                self._start_thread()
            self._lead.release()
            connection.work_pending()
            self._answering.discard(connection)
            if self._lead.acquire(blocking=False):
                self._back(connection)
            else:
                self._tell("back", connection)
                self._lead.acquire()

    def _wait_for_host(self) -> None:
        while True:
            connection = self._waiting.get()
            connection.work_pending()
            self._tell("back", connection)

    # ---- the leader -----------------------------------------------------------------------------------------------

    def _read_until_slow(self) -> Connection:
        poll, connections = self._epoll.poll, self._connections
        while True:
            if self._slow:
                return self._slow.popleft()
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
        """Looks a little while before it sleeps: to be woken costs more than a signature on some machines.

        Each look in vain makes the next one rarer."""
        if self._unlooked or self._answering:
            self._unlooked = max(self._unlooked - 1, 0)
            return poll(limits.SWEEP)
        until = perf_counter() + limits.SPIN
        while not (events := poll(0)):
            if perf_counter() > until:
                self._vain = min(self._vain + 1, limits.MOST_VAIN)
                self._unlooked = (1 << self._vain) - 2
                return poll(limits.SWEEP)
        self._vain = 0
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
            if connection.pending.call in WAITING:
                self._waiting.put(connection)
            else:
                self._slow.append(connection)
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
            elif what == "back":
                self._back(connection)
            elif connection.sock.fileno() in self._connections:
                self._epoll.modify(connection.sock, select.EPOLLOUT)

    def _back(self, connection: Connection) -> None:
        """Its request that took long is answered."""
        if connection.sock.fileno() in self._connections:
            self._epoll.modify(connection.sock, select.EPOLLIN)
            self._work(connection)

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
