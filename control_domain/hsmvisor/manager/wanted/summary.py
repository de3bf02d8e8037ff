"""How far a request is, in one word."""

from __future__ import annotations

from collections.abc import Sequence

from hsmvisor.manager.store.rows import LineRow, RequestRow


def summary(row: RequestRow, lines: Sequence[LineRow], denied: bool) -> str:
    """done, waiting, working, failing, denied, cancelled."""
    if row.state != "active":
        return "cancelled"
    if any(line.failures for line in lines):
        return "failing"
    if any(line.stage not in ("serving", "denied", "gone") for line in lines):
        return "working"
    if denied:
        return "denied"
    return "done" if lines else "waiting"
