"""A back-end of a vhost-user-vsock device that answers what QEMU asks until the guest's driver starts, and no more."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

from support.host_process import wait_for

GET_FEATURES, SET_OWNER, GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_CONFIG = 1, 3, 11, 15, 24
_VERSION, _REPLY, _NEED_REPLY = 1, 1 << 2, 1 << 3
_HEADER = struct.Struct("=III")  # request, flags, size of what follows
_FEATURES = 1 << 32 | 1 << 30  # VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES
_PROTOCOL_FEATURES = 1 << 9 | 1 << 3  # CONFIG, REPLY_ACK


def answer(request: int, flags: int, body: bytes, cid: int) -> bytes | None:
    """Returns the reply to a message, None where none is wanted."""
    replies = {
        GET_FEATURES: struct.pack("=Q", _FEATURES),
        GET_PROTOCOL_FEATURES: struct.pack("=Q", _PROTOCOL_FEATURES),
        GET_CONFIG: body[:12] + struct.pack("<Q", cid),
        GET_VRING_BASE: body[:4] + bytes(4),
    }
    payload = replies.get(request)
    if payload is None:
        if not flags & _NEED_REPLY:
            return None
        payload = bytes(8)
    return _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


class Backend:
    """Listens at `path` from the start; `seen` are the requests of the connection that is there now.

    `refuse`: closes each connection at once, as a module that has just died does.  `mute`: never answers.
    """

    def __init__(self, path: Path, cid: int = 1024, refuse: bool = False, mute: bool = False) -> None:
        self.path, self.cid, self.refuse, self.mute = path, cid, refuse, mute
        self.seen: list[int] = []
        self._connections: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connected(self) -> bool:
        return bool(self._connections)

    def wait_gone(self) -> None:
        wait_for(lambda: not self._connections, what="the end of QEMU's connection")

    def drop(self) -> None:
        """Closes all connections, and listens on."""
        for connection in list(self._connections):
            connection.shutdown(socket.SHUT_RDWR)
        self.wait_gone()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse:
                connection.close()
                continue
            self._connections.add(connection)
            self.seen = []
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while (head := self._exactly(connection, _HEADER.size)) is not None:
                request, flags, size = _HEADER.unpack(head)
                body = self._exactly(connection, size)
                if body is None:
                    return
                self.seen.append(request)
                if not self.mute and (reply := answer(request, flags, body, self.cid)) is not None:
                    connection.sendall(reply)
        except OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.close()

    def _exactly(self, connection: socket.socket, size: int) -> bytes | None:
        got = b""
        while len(got) < size:
            part, descriptors, _, _ = socket.recv_fds(connection, size - len(got), 8)
            for descriptor in descriptors:
                os.close(descriptor)
            if not part:
                return None
            got += part
        return got
