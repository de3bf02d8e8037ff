"""A token bucket: what others cause must not fill a disk."""

from __future__ import annotations

import time


class Throttle:
    """`burst` may come at once, `rate` a second after that; `suppressed` counts what did not pass."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self._allowance, self._at = burst, time.monotonic()
        self.suppressed = 0

    def admit(self) -> bool:
        now = time.monotonic()
        self._allowance = min(self._burst, self._allowance + (now - self._at) * self._rate)
        self._at = now
        if self._allowance < 1:
            self.suppressed += 1
            return False
        self._allowance -= 1
        return True

    def take_suppressed(self) -> int:
        """Returns how many did not pass since the last call."""
        count, self.suppressed = self.suppressed, 0
        return count
