"""The connections that have a lane, and the threads that serve lanes; these begin when the first connection gets one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial

from hsmvisord import limits, memory
from hsmvisord.face.prepared import Prepared
from hsmvisord.lanes.lanes import Lane, Pool
from hsmvisord.token.statistics import BOUNDS, Cell
from hsmvisord.transport.connection import Connection


class Express:
    """The reactor's leader calls it, but for `recall` and the counters' `settle`, which are any thread's."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self.descriptor = -1  #: readable when lanes have come back
        self._connections: dict[Lane, tuple[Connection, Cell]] = {}
        self._served: dict[Lane, int] = {}
        self._lock = threading.Lock()  #: of what lanes have counted

    @property
    def started(self) -> bool:
        return self._pool is not None

    @property
    def busy(self) -> int:
        """Returns how many lanes are in use."""
        return len(self._connections)

    def start(self) -> None:
        self._pool = Pool(limits.SPIN, limits.ALONE, BOUNDS)
        self.descriptor = self._pool.descriptor
        for _ in range(min(limits.LANE_THREADS, len(os.sched_getaffinity(0)))):
            memory.start_thread("lane", self._pool.serve)

    def enter(self, connection: Connection, prepared: Prepared) -> bool:
        """Says whether the connection has a lane now."""
        assert self._pool is not None and connection.caller is not None
        lane = Lane(connection.sock.fileno(), prepared.plan)
        self._connections[lane], self._served[lane] = (connection, prepared.cell), 0
        connection.caller.counters.settle = partial(self._settle, lane, prepared.cell)
        if self._pool.enter(lane):
            return True
        del self._connections[lane], self._served[lane]
        connection.caller.counters.settle = None
        return False

    def _settle(self, lane: Lane, cell: Cell) -> None:
        with self._lock:
            if lane in self._served:
                counts = lane.counts()
                if counts.count:
                    cell.add_lane(counts)
                    self._served[lane] += counts.count

    def collect(self) -> Iterator[Connection]:
        """Gives the connections whose lanes have come back, with what these received and could not send."""
        assert self._pool is not None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while (lane := self._pool.collect()) is not None:
            connection, cell = self._connections.pop(lane)
            self._settle(lane, cell)
            with self._lock:
                served = self._served.pop(lane)
            assert connection.caller is not None
            connection.caller.counters.settle = None
            connection.back(served, lane.received(), lane.unsent())
            yield connection

    def recall(self) -> None:
        if self._pool is not None:
            self._pool.recall()
