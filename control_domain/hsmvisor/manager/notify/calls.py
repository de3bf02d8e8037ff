"""Calls of libraries that block, each in a thread, with an end that the other side cannot put off.

The libraries' own timeouts begin anew with each byte.  Here the connection is shut down when the time is over, whatever the thread
waits for, and the thread ends; it is a daemon, so that a resolver that hangs does not keep the manager from stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from hsmvisor.manager.notify import limits
from hsmvisor.manager.notify.errors import Undelivered

T = TypeVar("T")


class Connection:
    """The one that a call makes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None  # of its own: TLS takes the other one's place
        self._is_cut = False

    def open(self, host: str, port: int) -> socket.socket:
        """Raises OSError."""
        made = socket.create_connection((host, port), limits.CONNECT)
        with self._lock:
            if self._is_cut:
                made.close()
                raise TimeoutError
            self._socket = made.dup()
        made.settimeout(limits.STEP)
        return made

    def cut(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._is_cut = True
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


async def call(work: Callable[[Connection], T], seconds: float = limits.WHOLE) -> T:
    """Returns what `work` returns, or raises what it raises; Undelivered when the time is over."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()
    connection = Connection()

    def tell(result: T | None, error: BaseException | None) -> None:
        if ended.cancelled():
            return
        if error is not None:
            ended.set_exception(error)
            ended.exception()  # it was seen, also where nobody waits any more
        else:
            ended.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work(connection)
        except BaseException as error:
            failure = error
        finally:
            connection.close()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="notify", daemon=True).start()
    try:
        done, _ = await asyncio.wait([ended], timeout=seconds)
    except asyncio.CancelledError:
        connection.cut()
        raise
    if not done:
        connection.cut()
        await asyncio.wait([ended], timeout=limits.AFTER_CUT)
        raise Undelivered(f"it took longer than {seconds:.0f} seconds")
    return ended.result()
