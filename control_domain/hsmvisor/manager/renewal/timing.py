"""Points in time: when a certificate should be renewed, and when to try again.  All are seconds since 1970, or seconds.

A point is drawn once, as a number from 0 to 1 that is stored with the certificate: so many that were issued together are renewed
over a while, and a restart changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

DAY, HOUR = 86400.0, 3600.0
SHORT = 10 * DAY  #: a lifetime below this is halved, others are used to two thirds (Let's Encrypt's rule)
SPREAD = 1 / 12  #: of the lifetime: how early before that the earliest are
FIRST_PAUSE, LONGEST_PAUSE = HOUR, 32 * HOUR  #: after the first failure, doubling (cert-manager's)
SHORTEST = 1 / 240  #: of the lifetime: no pause is shorter, however little is left,
LEAST, ENOUGH = 1.0, 60.0  #: but one of a second is too short, and one of a minute long enough


@dataclass(frozen=True)
class Lifetime:
    not_before: float
    not_after: float

    @property
    def seconds(self) -> float:
        return max(self.not_after - self.not_before, LEAST)

    def left(self, now: float) -> float:
        return self.not_after - now


def due(life: Lifetime, drawn: float, lead: float = 0) -> float:
    """Returns when to renew.  `lead`: so long before the end, where the rule says so; one that is as long as the lifetime would
    have every certificate renewed at once and for ever: then a third is taken."""
    if lead > 0:
        before = max(lead, LEAST) if lead < life.seconds else life.seconds / 3
    else:
        before = life.seconds / 2 if life.seconds < SHORT else life.seconds / 3
    latest = life.not_after - before
    earliest = max(life.not_before, latest - life.seconds * SPREAD)
    return earliest + (latest - earliest) * drawn


def within(start: float, end: float, drawn: float) -> float:
    """Returns the point of a window that an authority suggests (RFC 9773, 4.2)."""
    return start + (end - start) * drawn


def pause(failures: int, life: Lifetime | None, now: float) -> float:
    """Returns how long to wait after so many failures in a row: doubling, but never so long that the rest of the certificate's life
    passes with fewer than four more attempts; once it is over, a fraction of its lifetime."""
    if failures <= 0:
        return 0.0
    usual = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE)
    if life is None:
        return usual
    shortest = min(max(life.seconds * SHORTEST, LEAST), ENOUGH)
    left = life.left(now)
    return max(min(usual, left / 4 if left > 0 else life.seconds / 8), shortest)
