"""How long to wait until what failed is tried again: quickly a few times, then it counts as failed and is tried ever less often."""

from __future__ import annotations

QUICK = (0.05, 0.2, 0.5)  #: seconds after the first failures
_FAILED, _LONGEST = 10.0, 300.0
STEADY = 5.0  #: seconds of life after which a death counts as the first one again


def quick(failures: int) -> bool:
    """Says whether that many failures in a row are still few."""
    return failures <= len(QUICK)


def after(failures: int) -> float:
    """Returns seconds."""
    if quick(failures):
        return QUICK[failures - 1] if failures else 0.0
    return lasting(failures)


def lasting(failures: int) -> float:
    """Returns seconds, for what counts as failed."""
    return min(_FAILED * 2.0 ** max(0, failures - len(QUICK)), _LONGEST)
