"""Secrets that a command writes into files."""

from __future__ import annotations

from pathlib import Path

from hsmvisor.files import write_private


def write_secret(path: Path, secret: str) -> None:
    """Writes one line that its owner alone may read.  Raises OSError."""
    write_private(path.absolute(), secret.encode() + b"\n")
