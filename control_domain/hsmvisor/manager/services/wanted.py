"""RequestService: what owners ask for, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hsmvisor.manager import limits
from hsmvisor.manager.access.owners import demand_owner, for_whom, is_bound, may_see
from hsmvisor.manager.answers import Answers, Changes
from hsmvisor.manager.answers import asked as request
from hsmvisor.manager.auth import caller
from hsmvisor.manager.desk import SHOWN, Desk, Work, no_request
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.importing import Importing
from hsmvisor.manager.issuer.client import IssuerAway
from hsmvisor.manager.policy.questions import Owner
from hsmvisor.manager.services import convert_wanted as convert
from hsmvisor.manager.store import wanted
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.manager.wanted.asking import Asking, Denied
from hsmvisor.serving import limits as serving_limits
from hsmvisor.serving.errors import Unavailable
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import after_token, next_token
from hsmvisor.serving.text import clean
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from sqlalchemy.ext.asyncio import AsyncConnection


class RequestService(rpc.RequestServiceServicer):
    def __init__(
        self,
        database: Database,
        desk: Desk,
        asking: Asking,
        importing: Importing,
        changes: Changes,
        answers: Answers,
        hub: Hub,
        clock: Callable[[], float],
    ) -> None:
        self._database, self._desk, self._asking, self._importing = database, desk, asking, importing
        self._changes, self._answers, self._hub, self._clock = changes, answers, hub, clock

    # ---- asking ------------------------------------------------------------------------------------------------------

    async def Apply(self, untrusted: pb.ApplyRequest, context: Any) -> pb.MaterialRequest:
        owner, spec, sees_all = self._owner(untrusted.owner), convert.spec(untrusted.spec), may_see(caller(), "")
        asked = request(untrusted.request_id, "Apply", owner.name.encode(), spec.text().encode())
        fields: dict[str, Any] = {"owner": owner.name, "material": clean(spec.material, limits.MAX_NAME)}

        async def work() -> bytes:
            denied: Denied | None = None
            id = b""
            async with self._database.transaction() as connection:
                try:
                    row = await self._asking.apply(connection, owner, spec, sees_all)
                    id = row.id.encode()
                    await self._answers.store(connection, asked, id)
                except Denied as error:
                    denied = error  # what was told of the denial is kept
            if denied is not None:
                raise denied
            self._hub.lines()
            return id

        id = await self._changes.outside("request.apply", asked, fields, work)
        return await self._shown(id.decode())

    def _owner(self, untrusted_owner: str) -> Owner:
        """Raises Invalid, Forbidden."""
        known = caller()
        name = for_whom(known, untrusted_owner)
        return Owner(name, frozenset(known.groups) if name == known.owner else frozenset())

    async def Explain(self, untrusted: pb.ExplainRequest, context: Any) -> pb.Explanation:
        owner, spec = self._owner(untrusted.owner), convert.spec(untrusted.spec)
        async with self._database.reading() as connection:
            told = convert.explanation(await self._asking.explain(connection, owner, spec, may_see(caller(), "")))
            at, why = await self._desk.next_renewal(connection, owner.name, spec.material, self._clock())
        if at:
            told.next_renewal.FromMicroseconds(int(at * 1e6))
            told.renewal_why = why
        return told

    # ---- what there is -----------------------------------------------------------------------------------------------

    async def Get(self, untrusted: pb.GetRequest, context: Any) -> pb.MaterialRequest:
        known = caller()
        async with self._database.reading() as connection:
            if untrusted.id:
                row = await wanted.request(connection, untrusted.id)
            else:
                row = await wanted.request_of(connection, untrusted.owner or known.owner, untrusted.material)
        if row is None or not may_see(known, row.owner):
            raise no_request(untrusted.id or untrusted.material)
        size = min(serving_limits.page_size(untrusted.page_size), SHOWN)
        return await self._shown(row.id, after_token(untrusted.page_token) if untrusted.page_token else "", size)

    async def List(self, untrusted: pb.ListRequestsRequest, context: Any) -> pb.ListRequestsResponse:
        known, size = caller(), serving_limits.page_size(untrusted.page_size)
        rows = await self._desk.listed(known, untrusted.owner, untrusted.state, after_token(untrusted.page_token), size + 1)
        found = []
        for listed in rows[:size]:
            told = convert.material_request(listed.row)
            told.summary, told.lines_total = listed.summary, listed.lines
            found.append(told)
        token = next_token(rows[size - 1].row.id) if len(rows) > size else ""
        return pb.ListRequestsResponse(requests=found, next_page_token=token)

    async def _shown(self, id: str, after: str = "", most: int = SHOWN) -> pb.MaterialRequest:
        told = await self._desk.shown(caller(), id, after, most)
        shown = (told.lines, told.generations, told.deliveries, told.denials, told.sums)
        made = convert.material_request(told.row, *shown, self._clock())
        made.next_page_token = next_token(told.next) if told.next else ""
        return made

    # ---- changing ----------------------------------------------------------------------------------------------------

    async def Cancel(self, untrusted: pb.CancelRequest, context: Any) -> pb.MaterialRequest:
        keep, why, by, bound = untrusted.keep, _why(untrusted.why), caller().name, is_bound(caller())

        async def work(connection: AsyncConnection, row: RequestRow) -> None:
            await self._asking.cancel(connection, row, keep, why, by, bound)

        return await self._change(untrusted, "Cancel", work, {"keep": keep})

    async def Rotate(self, untrusted: pb.RotateRequest, context: Any) -> pb.MaterialRequest:
        why, by, bound = _why(untrusted.why), caller().name, is_bound(caller())

        async def work(connection: AsyncConnection, row: RequestRow) -> None:
            urgent, revoke, reason = untrusted.urgent, untrusted.revoke, untrusted.reason
            await self._asking.rotate(connection, row, untrusted.resource, urgent, revoke, reason, by, why, bound)

        return await self._change(untrusted, "Rotate", work, {"urgent": untrusted.urgent, "revoke": untrusted.revoke})

    async def Activate(self, untrusted: pb.ActivateRequest, context: Any) -> pb.MaterialRequest:
        return await self._change(
            untrusted, "Activate", lambda connection, row: self._asking.activate(connection, row, untrusted.resource), {}
        )

    async def RollBack(self, untrusted: pb.RollBackRequest, context: Any) -> pb.MaterialRequest:
        why, by = _why(untrusted.why), caller().name

        async def work(connection: AsyncConnection, row: RequestRow) -> None:
            await self._asking.roll_back(connection, row, untrusted.resource, why, by, self._clock())

        return await self._change(untrusted, "RollBack", work, {"resource": clean(untrusted.resource)})

    async def Revoke(self, untrusted: pb.RevokeRequest, context: Any) -> pb.MaterialRequest:
        why, by, bound = _why(untrusted.why), caller().name, is_bound(caller())

        async def work(connection: AsyncConnection, row: RequestRow) -> None:
            number, reason = untrusted.generation, untrusted.reason
            await self._asking.revoke(connection, row, untrusted.resource, number, reason, by, why, bound)

        return await self._change(untrusted, "Revoke", work, {"generation": untrusted.generation})

    async def SetRenewal(self, untrusted: pb.SetRenewalRequest, context: Any) -> pb.MaterialRequest:
        rule, by = convert.rule(untrusted.renewal), caller().name
        return await self._change(
            untrusted, "SetRenewal", lambda connection, row: self._asking.set_renewal(connection, row, rule, by), {}
        )

    async def _change(self, untrusted: Any, method: str, work: Work, fields: Mapping[str, Any]) -> pb.MaterialRequest:
        """One of an owner's own requests, in one transaction with the answer to this call."""
        id = str(untrusted.id)
        call = request(untrusted.request_id, method, untrusted.SerializeToString(deterministic=True))
        told: dict[str, Any] = {"request": clean(id), **fields}
        await self._desk.change(caller(), origin(), call, id, f"request.{method.lower()}", told, work)
        return await self._shown(id)

    # ---- imported keys -----------------------------------------------------------------------------------------------

    async def GetIssuer(self, untrusted: pb.GetIssuerRequest, context: Any) -> pb.Issuer:
        try:
            recipient, signature = self._importing.recipient()
        except IssuerAway as error:
            raise Unavailable("ISSUER", str(error), "try again") from None
        return pb.Issuer(recipient=recipient, signature=signature)

    async def Import(self, untrusted: pb.ImportRequest, context: Any) -> pb.MaterialRequest:
        who, id, certificates = caller(), untrusted.id, tuple(untrusted.certificates)
        call = request(untrusted.request_id, "Import", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"request": clean(id)}

        async def work() -> bytes:
            async with self._database.reading() as connection:
                row = await self._desk.seen(connection, who, id)
            demand_owner(who, row.owner)
            fields["material"] = row.material
            taken = await self._importing.take(row, untrusted.envelope, untrusted.public_key, certificates)
            async with self._database.transaction() as connection:
                await self._importing.store(connection, await self._desk.seen(connection, who, id), taken)
                await self._answers.store(connection, call, id.encode())
            self._hub.lines()
            return id.encode()

        await self._changes.outside("request.import", call, fields, work)
        return await self._shown(id)


def _why(untrusted_why: str) -> str:
    return clean(untrusted_why, limits.MAX_WHY)
