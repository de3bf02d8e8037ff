"""The guest's listening socket: accepts connections within the module's limit and gives each to the reactor."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable

from hsmvisord.token.token import Token
from hsmvisord.transport import limits
from hsmvisord.transport.connection import Connection
from hsmvisord.transport.parking import Parking
from hsmvisord.transport.reactor import Reactor


class Listener:
    """`opened` and `closed` tell the operator of each application that began and ended."""

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
        self._reactor = Reactor(self._ended)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._over: set[Connection] = set()  #: over the limit
        self._refused_slots = threading.Semaphore(limits.MAX_REFUSED)
        self._stopping = False
        self.accepted = 0
        self.refused = 0

    @property
    def connections(self) -> int:
        return len(self._connections)

    def start(self) -> None:
        self._reactor.start()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                if not self._stopping:
                    time.sleep(limits.ACCEPT_PAUSE)
                continue
            self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        refused = len(self._connections) >= self._token.settings.max_connections
        if refused:
            self.refused += 1
            self._refused_slots.acquire()
        connection = Connection(sock, peer_of(sock), self._token, self._parking, refused, self._opened)
        self.accepted += 1
        with self._lock:
            (self._over if refused else self._connections).add(connection)
        self._reactor.add(connection)

    def _ended(self, connection: Connection) -> None:
        with self._lock:
            refused = connection in self._over
            (self._over if refused else self._connections).discard(connection)
        if refused:
            self._refused_slots.release()
        if connection.caller is not None and connection.caller.application_or_none is not None:
            self._closed(connection)

    def stop(self) -> None:
        """No new connections; those there are stay."""
        self._stopping = True

    def close_connections(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()


def peer_of(sock: socket.socket) -> str:
    """Returns who connected, as the kernel tells it."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"unix uid={uid} pid={pid}"
    return "unknown"
