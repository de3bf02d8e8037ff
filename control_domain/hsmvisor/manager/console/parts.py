"""What the console is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hsmvisor.manager.auth import Authenticator
from hsmvisor.manager.desk import Desk
from hsmvisor.manager.history.events import History
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.wanted.asking import Asking
from hsmvisor.serving.audit import Audit


@dataclass(frozen=True)
class Parts:
    database: Database
    desk: Desk
    asking: Asking
    history: History
    authenticator: Callable[[], Authenticator]  #: the one that counts now
    audit: Audit
    policy_version: Callable[[], int]  #: of the policies that count
    manager: str  #: its name
    version: str
    clock: Callable[[], float]
