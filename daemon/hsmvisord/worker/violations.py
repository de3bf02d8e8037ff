"""What a module's policy refused its guest: each kind is told at once, and counted from then on for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from hsmvisord import ck

PAUSE = 10.0  #: seconds between two events of one kind


@dataclass
class _Kind:
    count: int = 0  #: since it was told
    told_at: float = float("-inf")


class Violations:
    """`refused` is the reactor's threads', `count` the clock thread's."""

    def __init__(self, tell: Callable[..., None], monotonic: Callable[[], float], wake: Callable[[], None]) -> None:
        """`tell(kind, **report)` sends an event; `wake` has the clock thread call `count` soon."""
        self._tell, self._monotonic, self._wake = tell, monotonic, wake
        self._kinds: dict[tuple[str, int, str], _Kind] = {}  #: by what, mechanism, key: the token knows few of each
        self._lock = threading.Lock()

    def refused(self, what: str, mechanism: int, key: str) -> None:
        with self._lock:
            kind = self._kinds.setdefault((what, mechanism, key), _Kind())
            kind.count += 1
            first = kind.count == 1
        if first:
            self._wake()

    def count(self) -> None:
        """Tells of those that are due."""
        now, due = self._monotonic(), []
        with self._lock:
            for of, kind in self._kinds.items():
                if kind.count and now - kind.told_at >= PAUSE:
                    due.append((of, kind.count))
                    kind.count, kind.told_at = 0, now
        for (what, mechanism, key), count in due:
            self._tell("policy-refused", what=what, mechanism=ck.mechanism_name(mechanism), key=key, count=count)
