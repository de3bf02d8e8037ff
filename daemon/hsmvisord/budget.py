"""An amount that all connections or sessions of a module share."""

from __future__ import annotations

import threading
from collections import deque


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
