"""A module as a device of a guest: the socket at which the guest's QEMU plugs it in."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from hsmvisor.host import limits, places
from hsmvisor.host.config import Config
from hsmvisor.host.places import Places


class Device:
    """Accepts one connection at a time and keeps it."""

    def __init__(self, where: Places, config: Config, name: str, number: int) -> None:
        self.path, self.cid = where.device(name), limits.FIRST_CID + number
        self._where, self._config, self._name = where, config, name
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._changed = asyncio.Event()

    @property
    def plugged(self) -> bool:
        return self._connection is not None

    async def wait_plugged(self, within: float) -> None:
        """Raises TimeoutError."""
        await self._wait(True, within)

    async def wait_unplugged(self, within: float) -> None:
        """Raises TimeoutError."""
        await self._wait(False, within)

    async def _wait(self, plugged: bool, within: float) -> None:
        async with asyncio.timeout(within):
            while self.plugged is not plugged:
                self._changed.clear()
                await self._changed.wait()

    # ---- the socket ---------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Raises OSError, HostError."""
        if self._listener is None:
            self._listener = places.listen_for_device(self._where, self._name, self._config)
            self._listener.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self._drop()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            if self._connection is not None:
                connection.close()  # a module is in one guest
                return
            connection.setblocking(False)
            self._connection = connection
            asyncio.get_running_loop().add_reader(connection, self._read)
            self._changed.set()

    def _read(self) -> None:
        assert self._connection is not None
        try:
            ended = not self._connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection)
            self._connection.close()
            self._connection = None
            self._changed.set()
