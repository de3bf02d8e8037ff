"""Refusals in the audit log; not so many that they fill the disk."""

from __future__ import annotations

from typing import Any, Protocol

from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.text import clean
from hsmvisor.serving.throttle import Throttle


class Log(Protocol):
    """The audit log, as far as it is needed here."""

    def note(self, kind: str, **fields: Any) -> object:
        """Queues a line; nobody waits for it."""


class Refusals:
    def __init__(self, audit: Log, service: str, throttle: Throttle, **told: str) -> None:
        """`service`: is named in the line that counts those left out; `told`: stands in each line."""
        self._audit, self._service, self._throttle, self._told = audit, service, throttle, told

    def note(self, who: str, method: str, error: ServiceError) -> None:
        """`error` stands in the log once."""
        if error.noted:
            return
        error.noted = True
        if not self._throttle.admit():
            return
        if suppressed := self._throttle.take_suppressed():
            self._audit.note("call.refused", who=self._service, **self._told, result="suppressed", count=suppressed)
        why = {"reason": error.reason, "detail": clean(error.detail)}
        self._audit.note("call.refused", who=clean(who), method=method, **self._told, result="refused", **why)
