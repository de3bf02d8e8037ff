"""Where things stand in the chart of certificates: from now, at the left, to their renewal and their end.

The scale is logarithmic, so that what ends within hours is told apart although something else lasts for years.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, LABELS, RIGHT = 1000, 310, 24
TOP, ROW, BOTTOM = 28, 26, 10
_HOUR, _DAY = 3600.0, 86400.0
_TICKS = (
    (_HOUR / 4, "15 min"),
    (_HOUR, "1 h"),
    (6 * _HOUR, "6 h"),
    (_DAY, "1 day"),
    (3 * _DAY, "3 days"),
    (7 * _DAY, "1 week"),
    (14 * _DAY, "2 weeks"),
    (30 * _DAY, "1 month"),
    (90 * _DAY, "3 months"),
    (180 * _DAY, "6 months"),
    (365 * _DAY, "1 year"),
    (2 * 365 * _DAY, "2 years"),
    (5 * 365 * _DAY, "5 years"),
    (10 * 365 * _DAY, "10 years"),
)
_LEAST_GAP = 62  #: between two ticks, for their texts


@dataclass(frozen=True)
class Certificate:
    """One that serves.  `renews_at` 0: nothing renews it."""

    request_id: str
    material: str
    owner: str
    resource: str  #: empty: several share it
    generation: int
    names: tuple[str, ...]
    ends_at: float
    renews_at: float
    why: str

    def state(self, now: float) -> str:
        """expired, overdue (its renewal is), unrenewed (nothing renews it before its end), good."""
        if self.ends_at <= now:
            return "expired"
        if self.renews_at and self.renews_at <= now:
            return "overdue"
        if not self.renews_at or self.renews_at >= self.ends_at:
            return "unrenewed"
        return "good"


@dataclass(frozen=True)
class Bar:
    certificate: Certificate
    state: str
    y: int
    middle: int
    renews_x: float  #: 0: it is not renewed
    ends_x: float


@dataclass(frozen=True)
class Tick:
    x: float
    text: str


@dataclass(frozen=True)
class Chart:
    height: int
    bottom: int
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]

    width, row, now_x, labels = WIDTH, ROW, LABELS, LABELS - 12


def chart(certificates: Sequence[Certificate], now: float) -> Chart:
    furthest = max((c.ends_at - now for c in certificates), default=_DAY)
    horizon = max(furthest, _HOUR) * 1.04
    knee = horizon / 60

    def x(at: float) -> float:
        ahead = min(max(at - now, 0.0), horizon)
        return round(LABELS + (WIDTH - LABELS - RIGHT) * math.log1p(ahead / knee) / math.log1p(horizon / knee), 1)

    bars = []
    for number, one in enumerate(certificates):
        y = TOP + number * ROW
        renews = x(one.renews_at) if one.renews_at else 0.0
        bars.append(Bar(one, one.state(now), y, y + ROW // 2, renews, x(one.ends_at)))
    ticks, last = [], float(LABELS)
    for ahead, text in _TICKS:
        at = x(now + ahead)
        if ahead <= horizon and at - last >= _LEAST_GAP:
            ticks.append(Tick(at, text))
            last = at
    bottom = TOP + len(bars) * ROW
    return Chart(bottom + BOTTOM, bottom, tuple(bars), tuple(ticks))
