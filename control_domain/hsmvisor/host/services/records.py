"""EventService and AuditService: what happens, and what happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hsmvisor.host import convert, limits
from hsmvisor.serving import audit_lines
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.events import Events
from hsmvisor.serving.gate import origin
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


class EventService(rpc.EventServiceServicer):
    def __init__(self, events: Events) -> None:
        self._events = events

    async def StreamEvents(self, untrusted: pb.StreamEventsRequest, context: Any) -> AsyncIterator[pb.Event]:
        module = limits.module_name(untrusted.module) if untrusted.module else ""
        async for row in self._events.follow(untrusted.after_id, module):
            yield convert.event(row)


class AuditService(rpc.AuditServiceServicer):
    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def ExportAudit(self, untrusted: pb.ExportAuditRequest, context: Any) -> AsyncIterator[pb.AuditLine]:
        """The lines that there are when it is called."""
        module = limits.module_name(untrusted.module) if untrusted.module else ""
        await self._audit.record("audit.export", who=origin().who, why=origin().why, result="ok", after=untrusted.after_sequence)
        found = audit_lines.lines(
            self._audit.path, untrusted.after_sequence, untrusted.limit, lambda values: module in ("", values.get("module"))
        )
        async for sequence, line in found:
            yield pb.AuditLine(sequence=sequence, line=line)
