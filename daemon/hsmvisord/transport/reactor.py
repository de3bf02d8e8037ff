"""The threads that read all connections of a module: one leads, the others sign or wait to lead.

Connections that ask for the same signature again and again are given lanes (express.py): these need no interpreter, and until one
comes back its connection is away.  The others:

The leader answers what is quick itself.  Before a request that will take long (RSA) it gives up the lead, so that another thread
reads on meanwhile.  Measured on two cores with eight busy connections: a thread for each connection made 13,000 P-256 signatures a
second, because each blocking call hands Python's lock to another thread; one that leads made 22,000.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from time import monotonic, perf_counter
from typing import TypeVar

from hsmvisord import limits, memory
from hsmvisord.transport.connection import Connection, Ended
from hsmvisord.transport.express import Express

T = TypeVar("T")


class Reactor:
    """`ended` is called for each connection that is over, after it gave everything back."""

    def __init__(self, listener: socket.socket, acceptable: Callable[[], None], ended: Callable[[Connection], None]) -> None:
        """`acceptable` is called by the leader when a connection waits to be accepted."""
        self._listener, self._acceptable, self._ended = listener, acceptable, ended
        self._accepting = False
        self._epoll = select.epoll()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._ready: deque[Connection] = deque()  #: have whole requests in their buffers; each stands there once
        self._starved: dict[Connection, None] = {}  #: are not read until there is room; oldest first
        self._hung_up: set[Connection] = set()  #: ended at the other end while a request of theirs is answered
        self._slow: deque[Connection] = deque()  #: have a request that will take long
        self._lead = threading.Lock()  #: held by the thread that reads; guards all that is not said to be for any thread
        self._away: set[Connection] = set()  #: a request of theirs is another thread's, until `_back`; the leader's
        self._answering: set[Connection] = set()  #: by threads that gave up the lead
        self._threads = 0
        self._asks = False  #: a thread waits for the host
        self._waiting: SimpleQueue[Connection] = SimpleQueue()
        self._swept = monotonic()
        self.failed: Callable[[BaseException], None] = lambda error: None  #: called when a thread of it ends by a fault of ours
        self.swept: Callable[[], None] = lambda: None  #: called by the leader once in a while
        self._last: Connection | None = None
        self._streak = 0  #: requests of `_last` in a row
        self._express = Express()
        self._laned = True  #: connections get lanes
        self._vain = 0  #: looks for a request in a row that found none
        self._look_at = 0.0  #: before then it sleeps at once (perf_counter)

    # ---- any thread ---------------------------------------------------------------------------------------------

    def tell(self, work: Callable[[], None]) -> None:
        """Has the leader do it soon."""
        self._inbox.append(work)
        with contextlib.suppress(BlockingIOError):  # enough wakes are on their way
            os.write(self._wake, b"\0")

    @property
    def lanes(self) -> int:
        """Returns how many are in use."""
        return self._express.busy

    def recall(self) -> None:
        """Has all lanes end, each after the request that it is at."""
        self._express.recall()

    def ask(self, work: Callable[[], T]) -> T:
        """Has the leader do it, and returns or raises what comes of it."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(error)

        self.tell(run)
        return answer.result()

    # ---- the threads --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.accept(True)
        self._start_thread()

    def _start_thread(self) -> None:
        self._threads += 1
        memory.start_thread("reactor", self._run)

    def _run(self) -> None:
        try:
            self._take_turns()
        except BaseException as error:
            self.failed(error)
            raise

    def _take_turns(self) -> None:
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
                self.tell(partial(self._back, connection))
                self._lead.acquire()

    def _ask_host(self, connection: Connection) -> None:
        if not self._asks:  # most modules have no PIN
            self._asks = True
            memory.start_thread("waiting", self._wait_for_host)
        self._waiting.put(connection)

    def _wait_for_host(self) -> None:
        while True:
            connection = self._waiting.get()
            connection.work_pending()
            self.tell(partial(self._back, connection))

    # ---- the leader -----------------------------------------------------------------------------------------------

    def accept(self, wanted: bool) -> None:
        if wanted != self._accepting:
            self._accepting = wanted
            if wanted:
                self._epoll.register(self._listener, select.EPOLLIN)
            else:
                self._epoll.unregister(self._listener)

    def add(self, connection: Connection) -> None:
        connection.write_wanted = lambda c: self.tell(partial(self._want_write, c))
        self._connections[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLIN)
        self._queue(connection)

    def forget(self, connection: Connection) -> None:
        """It is another process's from now on."""
        self._epoll.unregister(connection.sock)
        del self._connections[connection.sock.fileno()]
        self._starved.pop(connection, None)

    def _queue(self, connection: Connection) -> None:
        connection.queued = True
        self._ready.append(connection)

    def at_rest(self, connection: Connection) -> bool:
        """Says whether no thread answers a request of it."""
        return connection not in self._away

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
                elif descriptor == self._express.descriptor:
                    self._take_express()
                elif self._accepting and descriptor == self._listener.fileno():
                    self._acceptable()
            for _ in range(len(self._ready)):
                connection = self._ready.popleft()
                connection.queued = False
                self._work(connection)
            if self._starved:
                self._feed()
            if monotonic() - self._swept > limits.SWEEP:
                self._sweep()

    def _wait(self, poll: Callable[..., list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """Looks a little while before it sleeps: to be woken costs more than a signature on some machines.

        Each look in vain is followed by a longer pause without."""
        now = perf_counter()
        if self._answering or now < self._look_at:
            return poll(limits.SWEEP)
        until = now + limits.SPIN
        while not (events := poll(0)):
            if (now := perf_counter()) > until:
                self._vain = min(self._vain + 1, limits.MOST_VAIN)
                self._look_at = now + limits.LOOK_PAUSE * ((1 << self._vain) - 2)
                return poll(limits.SWEEP)
        self._vain = 0
        return events

    def _serve(self, connection: Connection, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                if not connection.flush():
                    return
                self._epoll.modify(connection.sock, select.EPOLLIN)
            if connection.queued:
                return  # it has its turn, and is read when its buffer is empty
            if mask & select.EPOLLHUP and not self.at_rest(connection):
                self._hung_up.add(connection)
                self._epoll.unregister(connection.sock)  # else it would be told again and again
                return
            if not mask & select.EPOLLOUT:
                connection.receive()
        except Ended as end:
            self._end(connection, str(end))
            return
        self._work(connection)

    def _work(self, connection: Connection) -> None:
        if connection.sock.fileno() not in self._connections or connection in self._away:
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
            self._away.add(connection)
            self._epoll.modify(connection.sock, 0)
            if connection.waits:
                self._ask_host(connection)
            else:
                self._slow.append(connection)
        elif connection.prepared is not None:
            self._enter_lane(connection)
        elif more:
            self._queue(connection)
        elif connection.starved:
            self._epoll.modify(connection.sock, 0)
            self._starved[connection] = None

    def _enter_lane(self, connection: Connection) -> None:
        prepared, connection.prepared = connection.prepared, None
        if prepared is None or connection.unsent or not self._laned:
            return
        try:
            if not self._express.started:
                self._express.start()
                self._epoll.register(self._express.descriptor, select.EPOLLIN)
            entered = self._express.enter(connection, prepared)
        except MemoryError:  # nor threads
            self._laned = entered = False
        if entered:
            self._away.add(connection)
            self._epoll.modify(connection.sock, 0)

    def _take_express(self) -> None:
        for connection in self._express.collect():
            self._back(connection)

    def use_lanes(self, wanted: bool) -> bool:
        """For the leader.  Returns whether none is in use."""
        self._laned = wanted
        if not wanted:
            self._express.recall()
        return not self._express.busy

    def _feed(self) -> None:
        connection = next(iter(self._starved))
        if connection.feed():
            del self._starved[connection]
            self._epoll.modify(connection.sock, select.EPOLLIN)

    def _take_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        while self._inbox:
            self._inbox.popleft()()

    def _want_write(self, connection: Connection) -> None:
        if connection.sock.fileno() in self._connections and self.at_rest(connection):  # else `_back` does it
            self._epoll.modify(connection.sock, select.EPOLLOUT)

    def _back(self, connection: Connection) -> None:
        """Its request that took long is answered."""
        self._away.discard(connection)
        if connection in self._hung_up:
            self._end(connection, "closed by the client")
        elif connection.sock.fileno() in self._connections:
            self._epoll.modify(connection.sock, select.EPOLLOUT if connection.unsent else select.EPOLLIN)
            self._work(connection)

    def _end(self, connection: Connection, why: str) -> None:
        descriptor = connection.sock.fileno()
        if connection in self._hung_up:
            self._hung_up.discard(connection)
        else:
            self._epoll.unregister(descriptor)
        del self._connections[descriptor]
        self._starved.pop(connection, None)
        if connection.why == "closed by the client":
            connection.why = why
        connection.end()
        self._ended(connection)

    def _sweep(self) -> None:
        """Closes connections whose frame or reader is overdue; accepts again after a pause."""
        self._swept = now = monotonic()
        self.swept()
        for connection in list(self._connections.values()):
            if connection.overdue_at < now:
                self._end(connection, connection.late)
