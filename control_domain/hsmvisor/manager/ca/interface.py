"""What the manager asks of a certification authority.

An order is issued once: asked again with the same id, an authority gives the same certificate.  What it has to remember while it
works (the URL of an ACME order) it gives to `keep`, and finds in `Order.kept` when it is asked again, after a restart too.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from hsmvisor.manager.ca.names import Name


class Reason(enum.StrEnum):
    """Why a certificate is revoked (RFC 5280, 5.3.1)."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key_compromise"
    AFFILIATION_CHANGED = "affiliation_changed"
    SUPERSEDED = "superseded"
    CESSATION = "cessation_of_operation"


@dataclass(frozen=True)
class Order:
    id: str
    csr: bytes  #: PKCS #10, DER; its key and its proof of possession count, its names have to be among `names`
    profile: str
    names: tuple[Name, ...]  #: what policy allowed: these, all of them
    lifetime: int = 0  #: seconds; 0: the profile's
    replaces: bytes = b""  #: the certificate (DER) that this one follows
    kept: str = ""  #: what the authority gave to `keep` the last time


@dataclass(frozen=True)
class Issued:
    chain: tuple[bytes, ...]  #: DER; the leaf first, each certified by the next, without the root
    shown: tuple[str, ...] = ()  #: names of which control was shown for this certificate, where the authority demands it
    known: tuple[str, ...] = ()  #: names of which it knew it from before: nobody was asked again


@dataclass(frozen=True)
class Window:
    """When a certificate should be renewed (RFC 9773, 4.2).  Seconds since 1970."""

    start: float
    end: float
    ask_again: float  #: seconds from now
    why: str = ""  #: a page that explains it


class CaError(Exception):
    """The message is for people and holds no secret."""


class Refused(CaError):
    """The authority does not issue this; asking again is of no use."""


class Later(CaError):
    """It cannot now; `seconds`: not before then, 0 where it did not say."""

    def __init__(self, message: str, seconds: float = 0) -> None:
        super().__init__(message)
        self.seconds = seconds


class NotYet(Later):
    """Others come first; nothing has failed."""


Keep = Callable[[str], Awaitable[None]]


class Ca(Protocol):
    @property
    def kind(self) -> str: ...  #: "builtin", "acme", "command"

    async def issue(self, order: Order, keep: Keep) -> Issued:
        """Raises Refused, Later."""
        ...

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        """Of one that it issued; one that is revoked already stays as it is.  Raises Refused, Later."""
        ...

    async def window(self, certificate: bytes) -> Window | None:
        """Returns None where the authority says nothing of it.  Raises Later."""
        ...

    async def close(self) -> None: ...
