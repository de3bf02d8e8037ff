"""An amount that all connections or sessions of a module share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Budget:
    """For any thread; `give` also for finalizers, which may run while this very object is locked."""

    __slots__ = ("_given", "_left", "_lock")

    def __init__(self, amount: int) -> None:
        self._lock = threading.Lock()
        self._left = amount
        self._given: deque[int] = deque()

    def take(self, amount: int) -> bool:
        """Says whether there was so much left; then it is the caller's until `give`."""
        with self._lock:
            while self._given:
                self._left += self._given.popleft()
            if amount > self._left:
                return False
            self._left -= amount
            return True

    def give(self, amount: int) -> None:
        self._given.append(amount)


class Pace:
    """How often something may be done: so many times at once, so many a second after that.  Used with a lock of the owner's."""

    def __init__(self, burst: float, rate: float, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; one that is set back gives nothing."""
        self._burst, self._rate, self._clock = burst, rate, clock
        self._left, self._at = float(burst), clock()

    def may(self) -> bool:
        now = self._clock()
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now
        return self._left >= 1

    def take(self) -> None:
        self._left -= 1
