"""Secrets that a command writes into files."""

from __future__ import annotations

import os
from pathlib import Path

from hsmvisor.cli.context import USAGE, CommandError
from hsmvisor.files import write_private


def demand_place(path: Path | None) -> None:
    """Before a secret is made that is shown once.  Raises CommandError."""
    if path is None:
        return
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise CommandError(f"{path} cannot be written", USAGE, f"is {directory} a directory where you may?")


def write_secret(path: Path, secret: str) -> None:
    """Writes one line that its owner alone may read.  Raises OSError."""
    write_private(path.absolute(), secret.encode() + b"\n")
