"""Options that say how a new generation is to be used, wherever its key comes from: the fields of authority.Staging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from hsmvisor.cli.parameters import Duration, HexBytes

PROFILES = ("tls", "ssh", "request-signing", "decrypt", "card", "any")

_OPTIONS = (
    click.option(
        "--mode", type=click.Choice(["pin", "follow"]), default="pin", show_default=True,
        help="follow: a bare key whose handle signs with the newest generation.",
    ),
    click.option("--profile", type=click.Choice(PROFILES), default="tls", show_default=True, help="What the key may do."),
    click.option("--alias-id", type=HexBytes(), default=b"", help="CKA_ID that finds it too, for clients configured by id."),
    click.option(
        "--drain", "drain_seconds", type=Duration(), default=0,
        help="How long it serves after it retires; default: until its certificate expires.",
    ),
    click.option(
        "--after-drain", type=click.Choice(["extend", "refuse"]), default="extend", show_default=True,
        help="Whether who holds it may go on when that time is over, as long as it is used.",
    ),
    click.option(
        "--on-expiry", type=click.Choice(["keep", "refuse"]), default="keep", show_default=True,
        help="Whether the key signs on after its certificate expired.",
    ),
    click.option(
        "--self-signed", is_flag=True, help="Show a bare key with a self-signed certificate (Java hides keys without one)."
    ),
)  # fmt: skip


def staging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
