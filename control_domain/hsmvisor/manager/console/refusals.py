"""Refusals in the audit log, as the control API's gate writes them; not so many that they fill the disk."""

from __future__ import annotations

from hsmvisor.manager.console import limits
from hsmvisor.manager.roles import TABLE
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.text import clean
from hsmvisor.serving.throttle import Throttle


class Refusals:
    def __init__(self, audit: Audit) -> None:
        self._audit, self._throttle = audit, Throttle(limits.LOGGED_BURST, limits.LOGGED_RATE)

    def note(self, who: str, method: str, error: ServiceError) -> None:
        """`error` stands in the log once."""
        if error.noted:
            return
        error.noted = True
        if not self._throttle.admit():
            return
        if suppressed := self._throttle.take_suppressed():
            self._audit.note("call.refused", who=TABLE.service, via="console", result="suppressed", count=suppressed)
        told = {"method": method, "via": "console", "reason": error.reason, "detail": clean(error.detail)}
        self._audit.note("call.refused", who=clean(who), result="refused", **told)
