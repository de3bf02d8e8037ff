"""What the steps of a line need, put together once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsmvisor.manager.ca.interface import Ca
from hsmvisor.manager.engine.health import HealthCheck
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.signing import Commands
from hsmvisor.manager.history.events import History
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.issuer.client import Issuer
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.wanted.judging import Judge, Measurements


@dataclass(frozen=True)
class Parts:
    database: Database
    history: History
    judge: Judge
    commands: Commands
    issuer: Issuer
    pins: Pins
    authorities: Mapping[str, Ca]
    health: Mapping[str, HealthCheck]
    hub: Hub
    clock: Callable[[], float]  #: seconds since 1970
    draw: Callable[[], float]  #: 0 to 1
    measurements: Measurements = dict
