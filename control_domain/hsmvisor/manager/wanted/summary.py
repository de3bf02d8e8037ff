"""How far a request is, in one word."""

from __future__ import annotations

from hsmvisor.manager.store.lines import Sums
from hsmvisor.manager.store.rows import RequestRow

_SETTLED = ("serving", "denied", "gone")


def summary(row: RequestRow, sums: Sums, denied: bool) -> str:
    """done, waiting, working, failing, denied, cancelled."""
    if row.state != "active":
        return "cancelled"
    if sums.failing:
        return "failing"
    if any(stage not in _SETTLED for stage in sums.stages):
        return "working"
    if denied:
        return "denied"
    return "done" if sums.total else "waiting"
