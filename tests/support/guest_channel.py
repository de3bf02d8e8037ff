"""The other end of scripts/guest/agent.py: requests to a guest over its virtio-serial port, several at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import struct
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

Reply = tuple[dict[str, Any], bytes]


class Channel:
    """A request waits in QEMU until the guest's agent is there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._numbers = itertools.count(1)
        self._pending: dict[int, Future[Reply]] = {}
        self._lock = threading.Lock()
        self._reason = ""
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # so that a guest that reads nothing blocks nobody
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def call(self, header: dict[str, Any], body: bytes, within: float) -> Reply:
        """Raises TimeoutError, ConnectionError (closed meanwhile, and why), or OSError with what the agent said."""
        number, future = next(self._numbers), Future[Reply]()
        with self._lock:
            if self._reason:
                raise ConnectionError(self._reason)
            self._pending[number] = future
        packed = json.dumps(header | {"id": number}).encode()
        self._outbox.put(struct.pack("!II", len(packed), len(body)) + packed + body)
        try:
            reply, data = future.result(within)
        finally:
            with self._lock:
                self._pending.pop(number, None)
        if "error" in reply:
            raise OSError(f"in the guest: {reply['error']}")
        return reply, data

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._socket.sendall(message)
        except OSError as error:
            self._end(f"the channel to the guest broke: {error}")

    def _receive(self) -> None:
        try:
            with self._socket.makefile("rb") as file:
                while head := file.read(8):
                    header, body = struct.unpack("!II", head)
                    reply, data = json.loads(file.read(header)), file.read(body)
                    with self._lock:
                        future = self._pending.get(reply["id"])
                    if future is not None:
                        future.set_result((reply, data))
            self._end("QEMU closed the channel to the guest")
        except (OSError, ValueError, struct.error) as error:
            self._end(f"the channel to the guest broke: {error}")

    def _end(self, reason: str) -> None:
        with self._lock:
            self._reason = self._reason or reason
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(ConnectionError(self._reason))

    def close(self, reason: str = "the channel to the guest is closed") -> None:
        """Whoever waits for a reply gets a ConnectionError with `reason`."""
        self._end(reason)
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._socket.close()
