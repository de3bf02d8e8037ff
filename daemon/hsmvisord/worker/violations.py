"""What a module's policy refused its guest: each kind is told at once, and counted from then on for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from hsmvisord import ck

PAUSE = 10.0  #: seconds between two events of one kind
MOST = 256  #: kinds that are told one by one


@dataclass
class _Kind:
    count: int = 0  #: since it was told
    told_at: float = float("-inf")


class Violations:
    """`refused` is the reactor's threads', `count` the clock thread's."""

    def __init__(self, tell: Callable[..., None], monotonic: Callable[[], float], wake: Callable[[], None]) -> None:
        """`tell(kind, **report)` sends an event; `wake` has the clock thread call `count` soon."""
        self._tell, self._monotonic, self._wake = tell, monotonic, wake
        self._kinds: dict[tuple[str, int, str], _Kind] = {}  #: by what, mechanism, key
        self._lock = threading.Lock()

    def refused(self, what: str, mechanism: int, key: str) -> None:
        with self._lock:
            of = (what, mechanism, key)
            if of not in self._kinds and len(self._kinds) >= MOST:
                of = (what, ck.CK_UNAVAILABLE_INFORMATION, "and others")  # a guest's own keys have many sizes
            kind = self._kinds.setdefault(of, _Kind())
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
            name = "" if mechanism == ck.CK_UNAVAILABLE_INFORMATION else ck.mechanism_name(mechanism)
            self._tell("policy-refused", what=what, mechanism=name, key=key, count=count)
