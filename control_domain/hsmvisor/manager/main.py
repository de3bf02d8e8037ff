"""hsmvisor-manager: the management plane of a fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import click
from hsmvisor.manager import config as configuration
from hsmvisor.manager import foundation, measures
from hsmvisor.manager.config import Config
from hsmvisor.manager.foundation import Foundation
from hsmvisor.serving import log
from hsmvisor.serving.errors import BadConfig, Broken
from hsmvisor.serving.measures import Measure
from hsmvisor.serving.notify import notify

_log = logging.getLogger("hsmvisor.manager")

EX_CONFIG = 78  #: sysexits.h: something is configured wrongly
EX_FAILED = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; default /etc/hsmvisor/manager.toml if there is one."
)
@click.option("--check", is_flag=True, help="Read the configuration, say whether it is good, and end.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Overrides the configuration.")
@click.version_option(package_name="hsmvisor", prog_name="hsmvisor-manager")
def main(path: Path | None, check: bool, log_level: str | None) -> None:
    """Says who may have which key and certificate, has them made, delivered and renewed, on all hosts of a fleet.

    A first start begins a fleet.  A further manager of the same fleet has the same PostgreSQL database, and a copy of the first
    one's STATE/fleet.  SIGHUP reads again who may call; SIGTERM ends the service.

    Exit codes: 0 ended as it was told to, 1 it cannot run (the message says why and what to do), 2 wrong usage, 78 wrong
    configuration.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # programs are started by exec, nothing of gRPC lives in them
    try:
        config = configuration.load(path)
    except Broken as error:
        _end(error, EX_CONFIG)
    log.set_up(config.log.format, log_level or config.log.level, journal="JOURNAL_STREAM" in os.environ)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if check:
        click.echo("the configuration is good")
        return
    try:
        applied = measures.apply_all(config)
        asyncio.run(_serve(foundation.lay(config), applied, path))
    except Broken as error:
        _end(error, EX_CONFIG if isinstance(error, BadConfig) else EX_FAILED)
    except OSError as error:
        _end(Broken("SYSTEM", f"{error.filename or 'a system call'}: {error.strerror}"), EX_FAILED)


def _end(error: Broken, code: int) -> NoReturn:
    hint = f"\n  {error.hint}" if error.hint else ""
    click.echo(f"hsmvisor-manager: {error.detail}{hint}", err=True)
    notify(f"STATUS={error.detail}")
    sys.exit(code)


async def _serve(laid: Foundation, applied: tuple[Measure, ...], path: Path | None) -> None:
    from hsmvisor.manager.plane import Plane  # all is imported before the last measure

    applied += (measures.confine(laid.config),)
    loop = asyncio.get_running_loop()
    end, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    plane = Plane(laid, applied)
    await plane.start()
    notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={laid.config.manager}")
    reloading = loop.create_task(_reload_when(again, plane.reload, path))
    await end.wait()
    notify("STOPPING=1")
    reloading.cancel()
    await plane.stop()
    _log.info("ended")


async def _reload_when(again: asyncio.Event, reload: Callable[[Config], Awaitable[None]], path: Path | None) -> None:
    while True:
        await again.wait()
        again.clear()
        try:
            await reload(configuration.load(path))
            _log.info("the configuration is read again")
        except Broken as error:
            _log.error("the old configuration stays: %s", error.detail)


if __name__ == "__main__":
    main()
