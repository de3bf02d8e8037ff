"""What workers tell of their own accord, and what front-ends do, on its way into the audit log and the event stream: throttled."""

from __future__ import annotations

from typing import Any

from hsmvisor.host import reports
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.events import Events
from hsmvisor.serving.throttle import Throttle
from hsmvisor_rpc.internal.messages import Event

_BURST = 2000.0  #: events of one module that may come at once
_RATE = 20.0  #: and a second after that
_PAUSE = 10.0  #: seconds between two notes of how many did not pass
_DEVICE_BURST, _DEVICE_RATE = 100.0, 0.2  #: as the two above, of front-ends: they connect as they like
_UNTHROTTLED = "signature"  #: an operator asked for each of them
_MAX_OPEN = 4096  #: connections whose end is told when their worker cannot tell it any more


class Happenings:
    """One module's."""

    def __init__(self, module: str, audit: Audit, events: Events) -> None:
        self._module, self._audit, self._events = module, audit, events
        self._throttle, self._notes = Throttle(_BURST, _RATE), Throttle(1, 1 / _PAUSE)
        self._open: dict[Any, dict[str, Any]] = {}  #: by number (as the worker says), what was told of them

    def told(self, event: Event) -> None:
        if event.kind == "connection-closed":
            self._open.pop(reports.plain(event.report).get("connection"), None)
        if event.kind != _UNTHROTTLED and not self._throttle.admit():
            return
        if self._throttle.suppressed and self._notes.admit():
            self._note("events-suppressed", {"count": self._throttle.take_suppressed()}, 0)
        detail = reports.plain(event.report)
        if event.kind == "connection-opened" and len(self._open) < _MAX_OPEN:
            self._open[detail.get("connection")] = detail
        self._note(event.kind, detail, min(event.at_ms, 2**53))

    def cut(self, why: str) -> None:
        """The worker is gone, and so are its connections: whose end it did not tell, we do."""
        lost, self._open = self._open, {}
        for detail in lost.values():
            self._note("connection-closed", {**detail, "why": why}, 0)

    def _note(self, kind: str, detail: dict[str, Any], at_ms: int) -> None:
        self._audit.note(f"module.{kind}", who="module", module=self._module, result="told", detail=detail)
        self._events.emit(kind, self._module, detail, at_ms)


class DeviceHappenings:
    """Of one module's device."""

    def __init__(self, module: str, audit: Audit, events: Events) -> None:
        self._module, self._audit, self._events = module, audit, events
        self._throttle = Throttle(_DEVICE_BURST, _DEVICE_RATE)

    def told(self, kind: str, detail: dict[str, object]) -> None:
        if self._throttle.admit():
            if suppressed := self._throttle.take_suppressed():
                self._note("events-suppressed", {"count": suppressed})
            self._note(kind, detail)

    def _note(self, kind: str, detail: dict[str, object]) -> None:
        self._audit.note(f"module.{kind}", who="guest", module=self._module, result="told", detail=detail)
        self._events.emit(kind, self._module, detail)
