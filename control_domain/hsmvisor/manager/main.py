"""hsmvisor-manager: the management plane of a fleet."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import click
from hsmvisor.manager import config as configuration
from hsmvisor.manager import foundation, measures
from hsmvisor.manager.foundation import Foundation
from hsmvisor.serving import log
from hsmvisor.serving.measures import Measure
from hsmvisor.serving.process import failing, serve

NAME = "hsmvisor-manager"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; default /etc/hsmvisor/manager.toml if there is one."
)
@click.option("--check", is_flag=True, help="Read the configuration, say whether it is good, and end.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Overrides the configuration.")
@click.version_option(package_name="hsmvisor", prog_name=NAME)
def main(path: Path | None, check: bool, log_level: str | None) -> None:
    """Says who may have which key and certificate, has them made, delivered and renewed, on all hosts of a fleet.

    A first start begins a fleet.  A further manager of the same fleet has the same PostgreSQL database, and a copy of the first
    one's STATE/fleet.  SIGHUP reads again who may call, and what guests' boots have to be; SIGTERM ends the service.

    Exit codes: 0 ended as it was told to, 1 it cannot run (the message says why and what to do), 2 wrong usage, 78 wrong
    configuration.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # programs are started by exec, nothing of gRPC lives in them
    with failing(NAME):
        config = configuration.load(path)
        log.set_up(config.log.format, log_level or config.log.level, journal="JOURNAL_STREAM" in os.environ)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if check:
            click.echo("the configuration is good")
        else:
            applied = measures.apply_all(config)
            asyncio.run(_serve(foundation.lay(config), applied, path))


async def _serve(laid: Foundation, applied: tuple[Measure, ...], path: Path | None) -> None:
    from hsmvisor.manager.plane import Plane  # all is imported before the last measure

    applied += (measures.confine(laid.config),)
    await serve(lambda: Plane(laid, applied), lambda: configuration.load(path))


if __name__ == "__main__":
    main()
