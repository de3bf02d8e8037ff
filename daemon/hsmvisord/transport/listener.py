"""The guest's listening socket: accepts connections within the module's limit and gives each to the reactor."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from functools import partial
from time import monotonic, sleep

from hsmvisord import limits
from hsmvisord.token.token import Token
from hsmvisord.transport.connection import Connection
from hsmvisord.transport.parking import Parking
from hsmvisord.transport.reactor import Reactor


class Listener:
    """`opened` tells the operator of each connection whose application began, `closed` of each that ended."""

    def __init__(
        self,
        sock: socket.socket,
        token: Token,
        parking: Parking,
        opened: Callable[[Connection], None],
        closed: Callable[[Connection], None],
    ) -> None:
        self._sock, self._token, self._parking = sock, token, parking
        self._opened, self._closed = opened, closed
        self.reactor = Reactor(sock, self._accept, self._ended)
        self.reactor.swept = self._swept
        token.recall = self.reactor.recall
        self._connections: set[Connection] = set()  #: these two are changed by the reactor's leader alone
        self._over: set[Connection] = set()  #: over the limit
        self._stopping = False
        self.accepted = 0
        self.refused = 0
        sock.setblocking(False)

    @property
    def connections(self) -> int:
        return len(self._connections)

    def all(self) -> list[Connection]:
        """For the leader."""
        return [*self._connections, *self._over]

    def start(self) -> None:
        self.reactor.start()

    # ---- the leader ---------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(limits.ACCEPTS_AT_ONCE):
            if len(self._over) >= limits.MAX_REFUSED:
                self.reactor.accept(False)  # the others wait in the backlog
                return
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError:
                self.reactor.accept(False)  # no descriptors left: until the next sweep
                return
            self._start(sock, peer_of(sock))

    def end_accepting(self) -> None:
        self._stopping = True
        self.reactor.accept(False)

    def _swept(self) -> None:
        if not self._stopping and len(self._over) < limits.MAX_REFUSED:
            self.reactor.accept(True)

    def _take(self, sock: socket.socket, peer: str) -> None:
        if self._stopping:
            sock.close()
        else:
            self._start(sock, peer)

    def _start(self, sock: socket.socket, peer: str) -> None:
        refused = len(self._connections) >= self._token.settings.max_connections
        if refused and len(self._over) >= limits.MAX_REFUSED:  # of one that came by another way than the backlog
            sock.close()
            return
        self.refused += refused
        self.accepted += 1
        self.add(Connection(sock, peer, self._token, self._parking, refused, self._opened))

    def add(self, connection: Connection) -> None:
        (self._over if connection.refused else self._connections).add(connection)
        self.reactor.add(connection)

    def forget(self, connection: Connection) -> None:
        """It is another process's from now on, which does not learn of an application that has ended."""
        (self._over if connection.refused else self._connections).discard(connection)
        self.reactor.forget(connection)
        if connection.told and connection.caller is not None and connection.caller.application_or_none is None:
            connection.why = "its application had ended when it was handed over"
            self._closed(connection)

    def _ended(self, connection: Connection) -> None:
        (self._over if connection.refused else self._connections).discard(connection)
        if connection.refused:
            self._swept()
        self._closed(connection)

    # ---- any thread ---------------------------------------------------------------------------------------------

    def take(self, sock: socket.socket, peer: str) -> None:
        """A connection that came by another way than the listening socket; over the limit, and after `stop`, it is closed."""
        self.reactor.tell(partial(self._take, sock, peer))

    def drop(self, peer: str) -> None:
        """Ends the connections of `peer`, those that lanes have too."""
        self.reactor.tell(partial(self._drop, peer))

    def _drop(self, peer: str) -> None:
        for connection in self.all():
            if connection.peer == peer:
                with contextlib.suppress(OSError):  # the other end was first
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """No new connections; those there are stay."""
        self.reactor.ask(self.end_accepting)

    def go_on(self) -> None:
        self._stopping = False
        self.reactor.tell(self._go_on)

    def _go_on(self) -> None:
        self.reactor.use_lanes(True)
        self._swept()

    def end_lanes(self) -> None:
        """Every connection is the reactor's again, unless a signature of it takes long."""
        until = monotonic() + limits.LANE_SECONDS
        while not self.reactor.ask(partial(self.reactor.use_lanes, False)) and monotonic() < until:
            sleep(0.001)


def peer_of(sock: socket.socket) -> str:
    """Returns who connected, as the kernel tells it."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"unix uid={uid} pid={pid}"
    return "unknown"
