"""PolicyService, AuthorityService and HistoryService: what is allowed, by whom certificates are issued, and what happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hsmvisor.manager.access.callers import caller
from hsmvisor.manager.access.owners import sees_only
from hsmvisor.manager.answers import Changes, asked
from hsmvisor.manager.authorities import Authorities
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.history.events import History
from hsmvisor.manager.policies import PolicyStore
from hsmvisor.manager.services import convert
from hsmvisor.manager.store import fleet, policies
from hsmvisor.manager.store.database import Database
from hsmvisor.serving import audit_lines
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.errors import Invalid, NotFound
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import asked as page_asked
from hsmvisor.serving.pages import cut
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from sqlalchemy.ext.asyncio import AsyncConnection


class PolicyService(rpc.PolicyServiceServicer):
    def __init__(self, database: Database, store: PolicyStore, changes: Changes, hub: Hub) -> None:
        self._database, self._store, self._changes, self._hub = database, store, changes, hub

    async def Upload(self, untrusted: pb.UploadPolicyRequest, context: Any) -> pb.Policies:
        call = asked(untrusted.request_id, "UploadPolicy", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"instead_of": untrusted.instead_of, "comment": untrusted.comment[:300]}

        async def work(connection: AsyncConnection) -> bytes:
            text, comment, instead_of = untrusted.text, untrusted.comment, untrusted.instead_of
            row = await self._store.upload(connection, text, comment, instead_of, origin().who)
            fields["version"] = row.version
            return str(row.version).encode()

        await self._store.check(untrusted.text, untrusted.comment)
        version = int(await self._changes.once("policy.upload", call, fields, work))
        await self._store.refresh()
        self._hub.lines()
        return await self._version(version)

    async def Get(self, untrusted: pb.GetPolicyRequest, context: Any) -> pb.Policies:
        return await self._version(untrusted.version)

    async def _version(self, untrusted_version: int) -> pb.Policies:
        async with self._database.reading() as connection:
            number = min(untrusted_version, 2**31 - 1) or await policies.newest(connection)
            row = await policies.version(connection, number)
        if row is None:
            raise NotFound("POLICY_VERSION", f"there are no policies of version {untrusted_version}")
        return convert.policies(row)

    async def List(self, untrusted: pb.ListPoliciesRequest, context: Any) -> pb.ListPoliciesResponse:
        size, before = page_asked(untrusted.page_size, untrusted.page_token)
        if before and not (before.isascii() and before.isdigit() and len(before) < 10):
            raise Invalid("PAGE_TOKEN", "page_token is not one that was given here")
        async with self._database.reading() as connection:
            found = await policies.before(connection, int(before or 0), size + 1)
        rows, token = cut(found, size, lambda row: str(row.version))
        return pb.ListPoliciesResponse(policies=map(convert.policies, rows), next_page_token=token)


class AuthorityService(rpc.AuthorityServiceServicer):
    def __init__(self, database: Database, authorities: Authorities) -> None:
        self._database, self._authorities = database, authorities

    async def ListAuthorities(self, untrusted: pb.ListAuthoritiesRequest, context: Any) -> pb.ListAuthoritiesResponse:
        async with self._database.reading() as connection:
            issued = await fleet.issued(connection)
        found = []
        for name, ca in sorted(self._authorities.items()):
            count, revoked = issued.get(name, (0, 0))
            root = self._authorities.root(name)
            found.append(
                pb.CertificateAuthority(
                    name=name,
                    kind=ca.kind,
                    default=name == self._authorities.default,
                    roots=[root] if root else [],
                    issued=count,
                    revoked=revoked,
                )
            )
        return pb.ListAuthoritiesResponse(authorities=found)


class HistoryService(rpc.HistoryServiceServicer):
    def __init__(self, history: History, audit: Audit) -> None:
        self._history, self._audit = history, audit

    async def StreamEvents(self, untrusted: pb.StreamFleetEventsRequest, context: Any) -> AsyncIterator[pb.FleetEvent]:
        owner = sees_only(caller())
        async for event in self._history.follow(min(untrusted.after_id, 2**63 - 1), untrusted.kind, owner):
            yield convert.event(event)

    async def ListEvents(self, untrusted: pb.ListFleetEventsRequest, context: Any) -> pb.ListFleetEventsResponse:
        owner = sees_only(caller())
        events, token = await self._history.page(
            untrusted.page_size, untrusted.page_token, untrusted.kind, owner, untrusted.request, untrusted.resource
        )
        return pb.ListFleetEventsResponse(events=map(convert.event, events), next_page_token=token)

    async def ExportAudit(self, untrusted: pb.ExportFleetAuditRequest, context: Any) -> AsyncIterator[pb.FleetAuditLine]:
        """The lines that there are when it is called."""
        await self._audit.record("audit.export", who=origin().who, why=origin().why, result="ok", after=untrusted.after_sequence)
        async for sequence, line in audit_lines.lines(self._audit.path, untrusted.after_sequence, untrusted.limit, lambda _: True):
            yield pb.FleetAuditLine(sequence=sequence, line=line)
