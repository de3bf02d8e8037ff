"""A caller of a manager: as which owner it asks, or which host it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hsmvisor.manager.store.rows import HostRow
from hsmvisor.serving import gate
from hsmvisor.serving.access import Caller
from hsmvisor.serving.errors import Forbidden


@dataclass(frozen=True)
class FleetCaller(Caller):
    owner: str = ""  #: empty: it is none
    groups: frozenset[str] = frozenset()
    host: HostRow | None = None
    may_join_as: str | None = None  #: the host's name with which its certificate may join without a token
    token: str = ""  #: id of the access token that it showed
    token_ends_at: int = 0

    @property
    def scope(self) -> str:
        """Whose request ids are its own: nobody is answered with what another one was."""
        return f"host:{self.host.id}" if self.host else f"owner:{self.owner}"


def caller() -> FleetCaller:
    """Returns who calls the method that runs."""
    return cast(FleetCaller, gate.caller())


def host_of(who: FleetCaller) -> HostRow:
    """Returns the host that calls.  Raises Forbidden."""
    if who.host is None:
        raise Forbidden("HOST", "this is for hosts that have joined")
    return who.host
