"""hsmvisor-host: the service of one host."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click
from hsmvisor.host import config as configuration
from hsmvisor.host import foundation, measures
from hsmvisor.host.config import Config
from hsmvisor.host.foundation import Foundation
from hsmvisor.host.measures import Measure
from hsmvisor.host.places import Places
from hsmvisor.serving import log
from hsmvisor.serving.process import failing, serve

NAME = "hsmvisor-host"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; default /etc/hsmvisor/host.toml if there is one."
)
@click.option("--check", is_flag=True, help="Read the configuration, say whether it is good, and end.")
@click.option("--stop-workers", is_flag=True, help="End the workers that a stopped service left serving, and end.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Overrides the configuration.")
@click.version_option(package_name="hsmvisor", prog_name=NAME)
def main(path: Path | None, check: bool, stop_workers: bool, log_level: str | None) -> None:
    """Runs a host's modules: authenticates, launches, stores, audits.

    The state directory holds ciphertext, the runtime directory the sockets.  SIGHUP reads roles and keys again; SIGTERM ends
    the service and leaves the workers serving for the next one.

    Exit codes: 0 ended as it was told to, 1 it cannot run (the message says why and what to do), 2 wrong usage, 78 wrong
    configuration.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # helpers are started by exec, nothing of gRPC lives in them
    with failing(NAME):
        config = configuration.load(path)
        log.set_up(config.log.format, log_level or config.log.level, journal="JOURNAL_STREAM" in os.environ)
        if check:
            click.echo("the configuration is good")
        elif stop_workers:
            asyncio.run(_stop_workers(config))
        else:
            applied = measures.apply_all(config)
            asyncio.run(_serve(foundation.lay(config), applied, path))


async def _serve(laid: Foundation, applied: tuple[Measure, ...], path: Path | None) -> None:
    from hsmvisor.host.supervisor import Supervisor  # gRPC takes its time to load; the helpers start up meanwhile

    applied += (measures.confine(laid.config),)
    await serve(lambda: Supervisor(laid, applied), lambda: configuration.load(path))


async def _stop_workers(config: Config) -> None:
    """For the time when no service runs: what it left serving is drained and ended."""
    from hsmvisor.host.adoption import end_all

    lock = foundation.lock_state(config.state)
    ended = await end_all(Places(config.runtime), config.workers.drain_seconds)
    click.echo(f"{ended} workers ended")
    os.close(lock)


if __name__ == "__main__":
    main()
