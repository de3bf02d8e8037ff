"""How an attempt ends that did not deliver."""

from __future__ import annotations


class Undelivered(Exception):
    """`str()` says why, without any secret.  `after`: seconds that the other side asks to wait; 0: it did not say."""

    def __init__(self, why: str, after: float = 0) -> None:
        super().__init__(why)
        self.after = after


class Gone(Undelivered):
    """The other side wants nothing more."""
