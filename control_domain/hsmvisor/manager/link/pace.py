"""How much of a manager's work a host may cause: as much as it has at the beginning, and then what guests that change now and then
come to.  Whoever has had more than that waits."""

from __future__ import annotations

from collections.abc import Callable

from hsmvisor.manager import limits

BURST = 5.0 * limits.MAX_GUESTS
RATE = 50.0  #: a second
UNCHANGED = 0.1  #: what a guest that is told of costs where nothing changed


class Pace:
    """What is done is charged afterwards, so there may be debts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` does not go backwards."""
        self._clock, self._left, self._at = clock, BURST, clock()

    @property
    def wait(self) -> float:
        """Seconds until the debts are paid."""
        now = self._clock()
        self._left = min(BURST, self._left + (now - self._at) * RATE)
        self._at = now
        return max(-self._left / RATE, 0.0)

    def charge(self, work: float) -> None:
        self._left -= work
