"""hsmvisor-host: the service of one host."""

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
from hsmvisor.host import config as configuration
from hsmvisor.host import foundation, measures
from hsmvisor.host.config import Config
from hsmvisor.host.foundation import Foundation
from hsmvisor.host.measures import Measure
from hsmvisor.host.places import Places
from hsmvisor.serving import log
from hsmvisor.serving.errors import Broken
from hsmvisor.serving.notify import notify

_log = logging.getLogger("hsmvisor.host")

EX_CONFIG = 78  #: sysexits.h: something is configured wrongly
EX_FAILED = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; default /etc/hsmvisor/host.toml if there is one."
)
@click.option("--check", is_flag=True, help="Read the configuration, say whether it is good, and end.")
@click.option("--stop-workers", is_flag=True, help="End the workers that a stopped service left serving, and end.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Overrides the configuration.")
@click.version_option(package_name="hsmvisor", prog_name="hsmvisor-host")
def main(path: Path | None, check: bool, stop_workers: bool, log_level: str | None) -> None:
    """Runs a host's modules: authenticates, launches, stores, audits.

    The state directory holds ciphertext, the runtime directory the sockets.  SIGHUP reads roles and keys again; SIGTERM ends
    the service and leaves the workers serving for the next one.

    Exit codes: 0 ended as it was told to, 1 it cannot run (the message says why and what to do), 2 wrong usage, 78 wrong
    configuration.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # helpers are started by exec, nothing of gRPC lives in them
    try:
        config = configuration.load(path)
    except Broken as error:
        _end(error, EX_CONFIG)
    log.set_up(config.log.format, log_level or config.log.level, journal="JOURNAL_STREAM" in os.environ)
    if check:
        click.echo("the configuration is good")
        return
    try:
        if stop_workers:
            asyncio.run(_stop_workers(config))
        else:
            applied = measures.apply_all(config)
            asyncio.run(_serve(foundation.lay(config), applied, path))
    except Broken as error:
        _end(error, EX_FAILED)
    except OSError as error:
        _end(Broken("SYSTEM", f"{error.filename or 'a system call'}: {error.strerror}"), EX_FAILED)


def _end(error: Broken, code: int) -> NoReturn:
    hint = f"\n  {error.hint}" if error.hint else ""
    click.echo(f"hsmvisor-host: {error.detail}{hint}", err=True)
    notify(f"STATUS={error.detail}")
    sys.exit(code)


async def _serve(laid: Foundation, applied: tuple[Measure, ...], path: Path | None) -> None:
    from hsmvisor.host.supervisor import Supervisor  # gRPC takes its time to load; the helpers start up meanwhile

    applied += (measures.confine(laid.config),)
    loop = asyncio.get_running_loop()
    end, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    supervisor = Supervisor(laid, applied)
    await supervisor.start()
    notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={len(supervisor.modules.all())} modules")
    reloading = loop.create_task(_reload_when(again, supervisor.reload, path))
    await end.wait()
    notify("STOPPING=1")
    reloading.cancel()
    await supervisor.stop(leave_workers=not laid.config.workers.stop_with_host)
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


async def _stop_workers(config: Config) -> None:
    """For the time when no service runs: what it left serving is drained and ended."""
    from hsmvisor.host.adoption import end_all

    lock = foundation.lock_state(config.state)
    ended = await end_all(Places(config.runtime), config.workers.drain_seconds)
    click.echo(f"{ended} workers ended")
    os.close(lock)


if __name__ == "__main__":
    main()
