"""Who may ask what, and when: one table.  A message that is not in its row ends the connection, and a worker that
sends one is killed.

A worker's phases: `empty` (forked, knows nothing), `booting` (state is being loaded), `serving`, `leaving` (its
connections go to its successor), `closing`.
"""

from __future__ import annotations

import enum

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record


class Phase(enum.StrEnum):
    EMPTY = "empty"
    BOOTING = "booting"
    SERVING = "serving"
    LEAVING = "leaving"
    CLOSING = "closing"


_ALWAYS: frozenset[type[Record]] = frozenset({m.Attach, m.Shutdown})

#: What the supervisor may ask a worker.
SUPERVISOR_MAY: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: _ALWAYS | {m.LoadState, m.Boot, m.Succeed},
    Phase.BOOTING: _ALWAYS,
    Phase.SERVING: _ALWAYS
    | {m.Execute, m.QueryStatus, m.QueryStatistics, m.Configure, m.SetPin, m.SetTokenPresent}
    | {m.Freeze, m.Thaw, m.HandOver},
    Phase.LEAVING: _ALWAYS,
    Phase.CLOSING: _ALWAYS,
}

#: What a worker may ask or tell the supervisor: StoreState as a request, Event as a notification.  One that is told to shut down
#: may have sent a change before it heard of that.
WORKER_MAY: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: frozenset(),
    Phase.BOOTING: frozenset({m.StoreState, m.Event}),
    Phase.SERVING: frozenset({m.StoreState, m.Event}),
    Phase.LEAVING: frozenset({m.Event}),
    Phase.CLOSING: frozenset({m.StoreState, m.Event}),
}

#: Requests that come with a descriptor.
WITH_DESCRIPTOR: frozenset[type[Record]] = frozenset({m.Succeed, m.HandOver})

LAUNCHER_MAY_BE_ASKED: frozenset[type[Record]] = frozenset({m.Spawn, m.LauncherStatus})
PROVIDER_MAY_BE_ASKED: frozenset[type[Record]] = frozenset({m.DeriveKey, m.ProviderStatus})


def by_type(classes: frozenset[type[Record]]) -> dict[str, type[Record]]:
    """Returns the classes by their TYPE."""
    return {c.TYPE: c for c in classes}
