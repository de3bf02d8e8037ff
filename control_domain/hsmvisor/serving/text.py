"""Text of others, made fit for a line of ours."""

from __future__ import annotations

_MAX_TEXT = 256


def clean(untrusted_text: str, most: int = _MAX_TEXT) -> str:
    """Returns text that can stand in a line: bounded, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in untrusted_text[:most])
