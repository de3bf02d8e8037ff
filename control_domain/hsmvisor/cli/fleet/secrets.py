"""Secrets that a command shows, or writes into files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from hsmvisor.cli.context import USAGE, CommandError, Context, plain
from hsmvisor.files import write_private


def demand_place(path: Path | None) -> None:
    """Before a secret is made that is shown once.  Raises CommandError."""
    if path is None:
        return
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise CommandError(f"{path} cannot be written", USAGE, f"is {directory} a directory where you may?")


def give_token(ctx: Context, made: Any, out: Path | None, note: str) -> None:
    """The token of an answer: shown, or written as one line that its owner alone may read; `note`: more of it, for people.

    Raises OSError.
    """
    if out is not None:
        write_private(out.absolute(), made.token.encode() + b"\n")

    def text() -> None:
        if out is None:
            click.echo(made.token)
        click.echo(note, err=True)

    ctx.result(plain(made) | ({"file": str(out), "token": ""} if out is not None else {}), text)
