"""The requests that made an open operation, kept so that a successor of the worker can carry them out again.

A hash that is half done cannot be saved; the few requests that lead to it can.
"""

from __future__ import annotations

import threading
import weakref

from hsmvisord import limits


class Journal:
    """`whole` False: there were too many bytes, or what nobody can repeat; the operation cannot be handed over."""

    __slots__ = ("__weakref__", "frames", "size", "whole")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size = 0
        self.whole = True


class Journals:
    """All journals of a module: small ones are free, large ones share a budget."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._large: weakref.WeakSet[Journal] = weakref.WeakSet()
        self._used = 0  #: bytes of the large ones; those that are gone are taken off when it matters

    def add(self, journal: Journal, frame: bytes) -> None:
        if not journal.whole:
            return
        if self._has_room(journal, len(frame)):
            journal.frames.append(frame)
            journal.size += len(frame)
        else:
            journal.whole = False
            self._keep_first(journal)

    def rewind(self, journal: Journal) -> None:
        """A message-based process is between two messages: what made it is its Init alone."""
        self._keep_first(journal)
        journal.whole = bool(journal.frames)

    @staticmethod
    def _keep_first(journal: Journal) -> None:
        del journal.frames[1:]
        journal.size = sum(map(len, journal.frames))

    def _has_room(self, journal: Journal, more: int) -> bool:
        size = journal.size + more
        if size <= limits.SMALL_JOURNAL:
            return True
        if size > limits.MAX_JOURNAL:
            return False
        with self._lock:
            if journal in self._large:
                self._used += more
            else:
                self._large.add(journal)
                self._used += size
            if self._used > limits.MAX_JOURNALS:
                self._used = sum(j.size for j in self._large) + more
            return self._used <= limits.MAX_JOURNALS
