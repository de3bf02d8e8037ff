"""A service as a process: it runs until a signal ends it, and says what keeps it from running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, TypeVar

import click
from hsmvisor.serving.errors import BadConfig, Broken, ServiceError
from hsmvisor.serving.notify import notify

_log = logging.getLogger(__name__)

EX_CONFIG = 78  #: sysexits.h: something is configured wrongly
EX_FAILED = 1

C = TypeVar("C")
_Config = TypeVar("_Config", contravariant=True)


class Service(Protocol[_Config]):
    @property
    def status(self) -> str:
        """What the service manager shows of it once it has started."""
        ...

    async def start(self) -> None:
        """Raises ServiceError, OSError."""
        ...

    async def reload(self, config: _Config) -> None:
        """Raises ServiceError; then all stays as it was."""
        ...

    async def stop(self) -> None: ...


@contextlib.contextmanager
def failing(name: str) -> Iterator[None]:
    """Around what `name` does before and while it serves: what it cannot go on with is said, and ends the process."""
    try:
        yield
    except ServiceError as error:
        _end(name, error, EX_CONFIG if isinstance(error, BadConfig) else EX_FAILED)
    except OSError as error:
        _end(name, Broken("SYSTEM", f"{error.filename or 'a system call'}: {error.strerror}"), EX_FAILED)


def _end(name: str, error: ServiceError, code: int) -> NoReturn:
    hint = f"\n  {error.hint}" if error.hint else ""
    click.echo(f"{name}: {error.detail}{hint}", err=True)
    notify(f"STATUS={error.detail}")
    sys.exit(code)


async def serve(make: Callable[[], Service[C]], load: Callable[[], C]) -> None:
    """Returns once SIGTERM or SIGINT has ended the service; SIGHUP has it take over what `load` returns.

    Raises ServiceError, OSError.
    """
    loop = asyncio.get_running_loop()
    end, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    service = make()
    await service.start()
    notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={service.status}")
    reloading = loop.create_task(_reload_when(again, service, load))
    await end.wait()
    notify("STOPPING=1")
    reloading.cancel()
    await service.stop()
    _log.info("ended")


async def _reload_when(again: asyncio.Event, service: Service[C], load: Callable[[], C]) -> None:
    while True:
        await again.wait()
        again.clear()
        try:
            await service.reload(load())
            _log.info("the configuration is read again")
        except ServiceError as error:
            _log.error("the old configuration stays: %s", error.detail)
