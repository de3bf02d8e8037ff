"""What a worker tells of its own accord, on its way into the audit log and the event stream: cleaned and throttled."""

from __future__ import annotations

import time

from hsmvisor.host import reports
from hsmvisor.host.audit import Audit
from hsmvisor.host.events import Events
from hsmvisor_rpc.internal.messages import Event

_BURST = 2000.0  #: events of one module that may come at once
_RATE = 200.0  #: and a second after that; a guest must not fill the host's disk
_UNTHROTTLED = "signature"  #: an operator asked for each of them


class Happenings:
    """One module's."""

    def __init__(self, module: str, audit: Audit, events: Events) -> None:
        self._module, self._audit, self._events = module, audit, events
        self._allowance, self._at = _BURST, time.monotonic()
        self._suppressed = 0

    def told(self, event: Event) -> None:
        if event.kind != _UNTHROTTLED and not self._admit():
            self._suppressed += 1
            return
        if self._suppressed:
            self._note("events-suppressed", 0, {"count": self._suppressed})
            self._suppressed = 0
        detail = reports.plain(event.report)
        self._note(event.kind, min(event.at_ms, 2**53), detail)

    def _note(self, kind: str, at_ms: int, detail: dict[str, str | int | float | bool]) -> None:
        self._audit.note(f"module.{kind}", who="module", module=self._module, worker_at_ms=at_ms, detail=detail)
        self._events.emit(kind, self._module, detail, at_ms)

    def _admit(self) -> bool:
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._at) * _RATE)
        self._at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True
