"""The front of the control socket: learns each client's peer credentials and hands them to gRPC as a name.

gRPC for Python does not tell a unix client's credentials, but the name that its peer is bound to.  So this relay accepts, asks the
kernel who connected (SO_PEERCRED), binds its own end to the abstract name `\\0PREFIX-uid-gid-pid-random` and connects that to
gRPC's socket, which lies in a directory that nobody else can enter.  Bytes pass unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.serving import sockets

_log = logging.getLogger(__name__)

LOCAL = "hsm"  #: prefix of callers that are known by their credentials
SIGNED = "hss"  #: prefix of callers on the socket for signed requests
_MAX_OF_ONE_USER = 128  #: connections
_MAX = 512
_CHUNK = 65536
_PEER = re.compile(r"unix-abstract:(hsm|hss)-(\d+)-(\d+)-(\d+)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Credentials:
    """A peer at the time it connected."""

    uid: int
    gid: int
    pid: int


def parse_peer(peer: str) -> tuple[str, Credentials] | None:
    """Returns prefix and credentials of a peer that came through a relay, by gRPC's name of it."""
    match = _PEER.fullmatch(peer)
    return (match[1], Credentials(int(match[2]), int(match[3]), int(match[4]))) if match else None


class Relay:
    def __init__(self, prefix: str, upstream: Path) -> None:
        self._prefix, self._upstream = prefix, upstream
        self._server: asyncio.Server | None = None
        self._open: Counter[int] = Counter()
        self._writers: set[asyncio.StreamWriter] = set()
        self._path: Path | None = None

    async def start(self, path: Path, mode: int, group: str) -> None:
        sock = sockets.listen(path, mode, group, 128)
        sock.setblocking(False)
        self._path = path
        self._server = await asyncio.start_unix_server(self._serve, sock=sock)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        caller: Credentials | None = None
        try:
            sock: socket.socket = writer.get_extra_info("socket")
            pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if self._open[uid] >= _MAX_OF_ONE_USER or self._open.total() >= _MAX:
                _log.warning("uid %d has too many connections to the control socket", uid)
                return
            caller = Credentials(uid, gid, pid)
            self._open[uid] += 1
            upstream_reader, upstream_writer = await self._connect(caller)
            try:
                await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))
            finally:
                upstream_writer.close()
        except OSError:
            pass  # one of the ends is gone
        finally:
            if caller is not None:
                self._open[caller.uid] -= 1
            writer.close()
            self._writers.discard(writer)

    async def _connect(self, caller: Credentials) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind(f"\0{self._prefix}-{caller.uid}-{caller.gid}-{caller.pid}-{secrets.token_hex(8)}")
            await asyncio.get_running_loop().sock_connect(sock, os.fspath(self._upstream))
            return await asyncio.open_unix_connection(sock=sock)
        except BaseException:
            sock.close()
            raise


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end, then passes the end on."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
