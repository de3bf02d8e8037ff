"""Sessions: who logged in how, until when.  They are in this manager's memory alone, and end with it.

What a browser keeps is a random name; here stands its hash.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from hsmvisor.manager.console import limits


@dataclass(frozen=True)
class Proof:
    """How somebody logged in: by an access token (its id), or by a client certificate (its SHA-256)."""

    token: str = ""
    certificate: str = ""


@dataclass
class Session:
    proof: Proof
    csrf: str = field(repr=False)
    began_at: float
    used_at: float
    streams: int = 0  #: that are open
    said: str = ""  #: is shown on the next page, once
    ended: bool = False


class Sessions:
    def __init__(self, longest: float, idle: float, ticks: Callable[[], float] = time.monotonic) -> None:
        """`longest`, `idle`: seconds after which a session ends, in any case and when it is not used."""
        self._longest, self._idle, self._ticks = longest, idle, ticks
        self._known: OrderedDict[bytes, Session] = OrderedDict()  # the one that was used last comes last

    def begin(self, proof: Proof) -> tuple[str, Session]:
        """Returns the name that the browser gets, and the session."""
        now = self._ticks()
        for digest in [digest for digest, session in self._known.items() if self._is_over(session, now)]:
            self._end(digest)
        same = [digest for digest, session in self._known.items() if session.proof == proof]
        for digest in same[: max(0, len(same) - limits.MOST_OF_ONE + 1)]:
            self._end(digest)
        while len(self._known) >= limits.MOST_SESSIONS:
            self._end(next(iter(self._known)))
        name, session = secrets.token_urlsafe(32), Session(proof, secrets.token_urlsafe(32), now, now)
        self._known[_digest(name)] = session
        return name, session

    def find(self, untrusted_name: str, used: bool = True) -> Session | None:
        """`used`: somebody acts; what a page asks for by itself keeps no session alive."""
        digest, now = _digest(untrusted_name), self._ticks()
        session = self._known.get(digest)
        if session is None:
            return None
        if self._is_over(session, now):
            self._end(digest)
            return None
        if used:
            session.used_at = now
            self._known.move_to_end(digest)
        return session

    def lives(self, session: Session) -> bool:
        return not self._is_over(session, self._ticks())

    def end(self, untrusted_name: str) -> None:
        self._end(_digest(untrusted_name))

    def _end(self, digest: bytes) -> None:
        if (session := self._known.pop(digest, None)) is not None:
            session.ended = True

    def left(self, session: Session) -> float:
        """Returns the seconds until it ends in any case."""
        return max(0.0, session.began_at + self._longest - self._ticks())

    def _is_over(self, session: Session, now: float) -> bool:
        return session.ended or now >= session.began_at + self._longest or now >= session.used_at + self._idle


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "replace")).digest()
