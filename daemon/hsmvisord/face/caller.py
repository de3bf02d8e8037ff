"""What a handler knows of who calls: the connection's application and counters, and how to answer later."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.token.application import Application
from hsmvisord.token.statistics import Counters
from hsmvisord.token.token import Token
from hsmvisord.wire.codec import Codec

_numbers = itertools.count(1)


def take_number(number: int) -> int:
    """Returns the number of a connection that another process had; new ones count on from there."""
    global _numbers
    _numbers = itertools.count(max(next(_numbers), number + 1))
    return number


class Parked(Exception):
    """The handler has no answer yet: `ready` is asked again after each change and gives it then (None: not yet)."""

    def __init__(self, ready: Callable[[], tuple[Any, ...] | None]) -> None:
        super().__init__()
        self.ready = ready


@dataclass
class Caller:
    """One connection.  `peer` comes from the transport, never from the payload."""

    token: Token
    codec: Codec
    peer: str
    application_or_none: Application | None = None
    counters: Counters = field(default_factory=Counters)
    number: int = field(default_factory=lambda: next(_numbers))
    program: str = ""
    pid: int = 0
    parked: int = 0  #: its requests that wait; the parking's
    refused: bool = False  #: over the limit: every call answers CKR_HOST_MEMORY

    @property
    def application(self) -> Application:
        if self.application_or_none is None:
            raise CkError(ck.CKR_CRYPTOKI_NOT_INITIALIZED)
        return self.application_or_none


Args = tuple[Any, ...]
Handler = Callable[[Caller, Args], Args]


def shaped(act: Callable[[], Args], shape: Callable[[Args], Args]) -> Args:
    """Returns `shape` of what `act` returns; later, if that is parked."""

    def later() -> Args | None:
        values = parked.ready()
        return None if values is None else shape(values)

    try:
        return shape(act())
    except Parked as waits:
        parked = waits
    raise Parked(later)
