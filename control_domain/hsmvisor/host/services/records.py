"""EventService and AuditService: what happens, and what happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from hsmvisor.host import convert, limits
from hsmvisor.serving.audit import Audit, rotated
from hsmvisor.serving.events import Events
from hsmvisor.serving.gate import origin
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

_BATCH = 500


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
        """The lines that there are when it is called; read in another thread, a batch at a time."""
        module = limits.module_name(untrusted.module) if untrusted.module else ""
        await self._audit.record("audit.export", who=origin().who, why=origin().why, result="ok", after=untrusted.after_sequence)
        lines = _lines(self._audit.path, untrusted.after_sequence, module)
        left = untrusted.limit or 2**63
        while left and (batch := await asyncio.to_thread(_take, lines, min(left, _BATCH))):
            for line in batch:
                yield line
            left -= len(batch)


def _take(lines: Iterator[pb.AuditLine], count: int) -> list[pb.AuditLine]:
    return [line for _, line in zip(range(count), lines, strict=False)]


def _lines(path: Path, after: int, module: str) -> Iterator[pb.AuditLine]:
    files = [*rotated(path), path]
    # a rotated file is named by its first line: those that end before `after` are not read
    firsts = [int(file.suffix[1:]) for file in files[:-1]]
    skip = sum(1 for first in firsts[1:] if first <= after + 1)
    for file in files[skip:]:
        with open(file, encoding="ascii") as stream:
            for raw in stream:
                if not raw.endswith("\n"):
                    return  # being written
                line = raw[:-1]
                values = json.loads(line)
                if values["seq"] > after and module in ("", values.get("module")):
                    yield pb.AuditLine(sequence=values["seq"], line=line)
