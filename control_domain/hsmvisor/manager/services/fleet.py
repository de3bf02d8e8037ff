"""FleetService: hosts, resources, and who may call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hsmvisor.manager import limits
from hsmvisor.manager.access.callers import caller
from hsmvisor.manager.access.owners import demand_owner, for_whom, is_bound, may_see, sees_only
from hsmvisor.manager.access.tokens import Tokens, not_found
from hsmvisor.manager.answers import Answers, Changes, asked
from hsmvisor.manager.authorities import Authorities
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.measure_now import MeasureNow
from hsmvisor.manager.inventory import listing
from hsmvisor.manager.inventory.joining import Joining, check_owners, host_name
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.metrics import Metrics
from hsmvisor.manager.policies import PolicyStore
from hsmvisor.manager.services import convert
from hsmvisor.manager.services.convert_wanted import timestamp
from hsmvisor.manager.store import fleet, inventory, tokens
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import HostRow, ResourceRow
from hsmvisor.manager.wanted.asking import Asking
from hsmvisor.manager.wanted.judging import Measurements
from hsmvisor.serving.errors import Invalid, NotFound
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import asked as page_asked
from hsmvisor.serving.pages import cut
from hsmvisor.serving.text import clean
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class FleetParts:
    """What the service is made of."""

    database: Database
    joining: Joining
    leaving: Leaving
    asking: Asking
    measure_now: MeasureNow
    measurements: Measurements
    tokens: Tokens
    authorities: Authorities
    policies: PolicyStore
    changes: Changes
    answers: Answers
    hub: Hub
    metrics: Metrics
    keys: Mapping[str, bytes]  #: public ones, as WhoAmI tells them
    version: str
    clock: Callable[[], float]


class FleetService(rpc.FleetServiceServicer):
    def __init__(self, parts: FleetParts) -> None:
        self._p = parts

    # ---- who, and how much -----------------------------------------------------------------------------------------

    async def WhoAmI(self, untrusted: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        who = caller()
        return pb.WhoAmIResponse(name=who.name, owner=who.owner, groups=sorted(who.groups), roles=sorted(who.roles), **self._p.keys)

    async def GetFleet(self, untrusted: pb.GetFleetRequest, context: Any) -> pb.Fleet:
        now = self._p.clock()
        async with self._p.database.reading() as connection:
            there = await inventory.counts(connection, now - limits.AWAY)
            wanted = await fleet.counts(connection, now)
            managers = await fleet.manager_names(connection, now - limits.MANAGER_AWAY)
        return pb.Fleet(
            **there,
            **wanted,
            managers=managers,
            version=self._p.version,
            policy_version=self._p.policies.current().version,
            authorities=sorted(self._p.authorities),
        )

    async def GetMetrics(self, untrusted: pb.GetFleetMetricsRequest, context: Any) -> pb.FleetMetrics:
        now = self._p.clock()
        async with self._p.database.reading() as connection:
            there = await inventory.counts(connection, now - limits.AWAY)
            wanted = await fleet.counts(connection, now)
            stages = await fleet.stages(connection)
        return pb.FleetMetrics(text=self._p.metrics.text(there | wanted, stages))

    # ---- hosts -----------------------------------------------------------------------------------------------------

    async def CreateJoinToken(self, untrusted: pb.CreateJoinTokenRequest, context: Any) -> pb.CreateJoinTokenResponse:
        host, owners = host_name(untrusted.host) if untrusted.host else "", tuple(untrusted.owners)
        check_owners(owners)
        lifetime, replaces = untrusted.lifetime_seconds, untrusted.replace
        call = asked(untrusted.request_id, "CreateJoinToken", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"host": host, "owners": list(owners), "lifetime": lifetime, "replace": replaces}

        async def work(connection: AsyncConnection) -> bytes:
            id, ends = await self._p.joining.create(connection, host, owners, lifetime, replaces, origin().who[: limits.MAX_BY])
            fields["id"] = id
            return _made(id, ends)

        id, ends = _told(await self._p.changes.once("fleet.create-join-token", call, fields, work))
        return pb.CreateJoinTokenResponse(token=await self._p.joining.token(id), expires_at=timestamp(ends))

    async def ListHosts(self, untrusted: pb.ListHostsRequest, context: Any) -> pb.ListHostsResponse:
        size, after = page_asked(untrusted.page_size, untrusted.page_token)
        async with self._p.database.reading() as connection:
            rows, token = cut(await inventory.hosts_after(connection, after, size + 1), size, lambda row: row.name)
            shown = await listing.hosts_shown(connection, rows)
        now = self._p.clock()
        return pb.ListHostsResponse(hosts=[convert.host(one, now) for one in shown], next_page_token=token)

    async def GetHost(self, untrusted: pb.GetFleetHostRequest, context: Any) -> pb.FleetHost:
        return await self._host(host_name(untrusted.name))

    async def _host(self, name: str) -> pb.FleetHost:
        async with self._p.database.reading() as connection:
            (shown,) = await listing.hosts_shown(connection, [await _named(connection, name)])
        return convert.host(shown, self._p.clock())

    async def UpdateHost(self, untrusted: pb.UpdateHostRequest, context: Any) -> pb.FleetHost:
        name, trusted, owners = host_name(untrusted.name), untrusted.trusted, tuple(untrusted.owners)
        check_owners(owners)
        call = asked(untrusted.request_id, "UpdateHost", untrusted.SerializeToString(deterministic=True))

        async def work(connection: AsyncConnection) -> bytes:
            host = await _named(connection, name)
            await self._p.leaving.change_host(connection, host, trusted, owners)
            return b""

        await self._p.changes.once("fleet.update-host", call, {"host": name, "trusted": trusted, "owners": list(owners)}, work)
        self._p.hub.lines()
        return await self._host(name)

    async def RevokeHost(self, untrusted: pb.RevokeHostRequest, context: Any) -> pb.FleetHost:
        name, why = host_name(untrusted.name), clean(untrusted.why, limits.MAX_WHY)
        call = asked(untrusted.request_id, "RevokeHost", untrusted.SerializeToString(deterministic=True))

        async def work(connection: AsyncConnection) -> bytes:
            await self._p.leaving.revoke_host(connection, await _named(connection, name), why, origin().who)
            return b""

        await self._p.changes.once("fleet.revoke-host", call, {"host": name, "because": why}, work)
        self._p.hub.lines()
        return await self._host(name)

    async def RemoveHost(self, untrusted: pb.RemoveHostRequest, context: Any) -> pb.RemoveHostResponse:
        name, revoke = host_name(untrusted.name), untrusted.revoke_certificates
        call = asked(untrusted.request_id, "RemoveHost", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"host": name, "revoke_certificates": revoke}

        async def work() -> bytes:
            async with self._p.database.reading() as connection:
                host = await _named(connection, name)
            revoked = await self._p.leaving.revoke_certificates(host) if revoke else 0
            async with self._p.database.transaction() as connection:
                host = await _named(connection, name)
                count = await self._p.leaving.remove_host(connection, host, revoke, origin().who)
                answer = pb.RemoveHostResponse(resources=count, revoked=revoked).SerializeToString()
                await self._p.answers.store(connection, call, answer)
            fields.update(resources=count, revoked=revoked)
            return answer

        answer = await self._p.changes.outside("fleet.remove-host", call, fields, work)
        self._p.hub.lines()
        return pb.RemoveHostResponse.FromString(answer)

    # ---- resources ---------------------------------------------------------------------------------------------------

    async def ListResources(self, untrusted: pb.ListResourcesRequest, context: Any) -> pb.ListResourcesResponse:
        size, after = page_asked(untrusted.page_size, untrusted.page_token)
        owner, selector = sees_only(caller(), untrusted.owner), dict(untrusted.selector)
        if len(selector) > limits.MAX_SELECTOR:
            raise Invalid("SELECTOR", f"a selector has at most {limits.MAX_SELECTOR} attributes")
        name = host_name(untrusted.host) if untrusted.host else ""
        async with self._p.database.reading() as connection:
            host_id = (await _named(connection, name)).id if name else ""
            found = await inventory.resources_after(connection, after, size + 1, selector, host_id, owner)
            rows, token = cut(found, size, lambda row: row.id)
            shown = await listing.resources_shown(connection, rows, self._p.clock())
        return pb.ListResourcesResponse(resources=map(convert.resource, shown), next_page_token=token)

    async def GetResource(self, untrusted: pb.GetResourceRequest, context: Any) -> pb.Resource:
        async with self._p.database.reading() as connection:
            return await self._shown(connection, await self._resource(connection, untrusted.id))

    async def _shown(self, connection: AsyncConnection, row: ResourceRow) -> pb.Resource:
        (shown,) = await listing.resources_shown(connection, [row], self._p.clock())
        return convert.resource(shown)

    async def _resource(self, connection: AsyncConnection, untrusted_id: str) -> ResourceRow:
        """Returns one that the caller may see, by HOST/NAME, or by NAME where there is only one.  Raises NotFound, Invalid."""
        who = caller()
        if "/" in untrusted_id:
            row = await inventory.resource(connection, untrusted_id)
            found = [row] if row is not None else []
        else:
            found = await inventory.resources_named(connection, untrusted_id, sees_only(who))
        found = [row for row in found if may_see(who, row.owner)]
        if not found:
            raise NotFound(
                "RESOURCE", f"there is no resource {clean(untrusted_id, 130)}", "hsmvisor fleet resources shows those there are"
            )
        if len(found) > 1:
            told = ", ".join(row.id for row in found)
            raise Invalid("RESOURCE", f"several resources are called {clean(untrusted_id, 130)}: {told}", "write HOST/NAME")
        return found[0]

    async def RekeyResource(self, untrusted: pb.RekeyResourceRequest, context: Any) -> pb.Resource:
        why, compromised = clean(untrusted.why, limits.MAX_WHY), untrusted.compromised
        call = asked(untrusted.request_id, "RekeyResource", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"resource": clean(untrusted.id, 130), "compromised": compromised, "because": why}

        async def work(connection: AsyncConnection) -> bytes:
            row = await self._resource(connection, untrusted.id)
            demand_owner(caller(), row.owner)
            fields["resource"] = row.id
            if is_bound(caller()):
                await self._p.asking.demand_rekey(connection, row.id)
            fields["keys"] = await self._p.leaving.rekey(connection, row, compromised, why, origin().who)
            return row.id.encode()

        id = (await self._p.changes.once("fleet.rekey-resource", call, fields, work)).decode()
        self._p.hub.lines()
        async with self._p.database.reading() as connection:
            return await self._shown(connection, await self._resource(connection, id))

    async def MeasureResource(self, untrusted: pb.MeasureResourceRequest, context: Any) -> pb.Measurement:
        async with self._p.database.reading() as connection:
            row = await self._resource(connection, untrusted.id)
        demand_owner(caller(), row.owner)
        found = await self._p.measure_now.measure(row, untrusted.pcrs)
        known = [one for one in self._p.measurements().values() if one.pcrs.keys() <= found.asked]
        return convert.measurement(found, sorted(one.name for one in known if one.fits(found.values)))

    # ---- access tokens -----------------------------------------------------------------------------------------------

    async def CreateToken(self, untrusted: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        who = caller()
        owner, groups, roles = for_whom(who, untrusted.owner), tuple(untrusted.groups), tuple(untrusted.roles)
        call = asked(untrusted.request_id, "CreateToken", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"owner": owner, "roles": [clean(role, 40) for role in roles[:8]]}

        async def work(connection: AsyncConnection) -> bytes:
            id, ends = await self._p.tokens.create(connection, who, owner, groups, roles, untrusted.lifetime_seconds)
            fields["id"] = id
            return _made(id, ends)

        id, ends = _told(await self._p.changes.once("fleet.create-token", call, fields, work))
        return pb.CreateTokenResponse(id=id, token=await self._p.tokens.text(id), expires_at=timestamp(ends))

    async def ListTokens(self, untrusted: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        size, after = page_asked(untrusted.page_size, untrusted.page_token)
        async with self._p.database.reading() as connection:
            found = await tokens.tokens_after(connection, after, size + 1, sees_only(caller()))
        rows, token = cut(found, size, lambda row: row.id)
        return pb.ListTokensResponse(tokens=map(convert.token, rows), next_page_token=token)

    async def RevokeToken(self, untrusted: pb.RevokeTokenRequest, context: Any) -> pb.RevokeTokenResponse:
        id = clean(untrusted.id, 40)
        call = asked(untrusted.request_id, "RevokeToken", untrusted.SerializeToString(deterministic=True))
        fields: dict[str, Any] = {"token": id}

        async def work(connection: AsyncConnection) -> bytes:
            row = await tokens.token(connection, untrusted.id)
            if row is None or not may_see(caller(), row.owner):
                raise not_found(id)
            demand_owner(caller(), row.owner)
            fields["with"] = len(await self._p.tokens.revoke(connection, row, origin().who)) - 1
            return b""

        await self._p.changes.once("fleet.revoke-token", call, fields, work)
        return pb.RevokeTokenResponse()


async def _named(connection: AsyncConnection, name: str) -> HostRow:
    host = await inventory.host_named(connection, name)
    if host is None:
        raise NotFound("HOST", f"there is no host {name}", "hsmvisor fleet hosts shows those there are")
    return host


def _made(id: str, ends: int) -> bytes:
    """What is stored of a secret that was made: its id, of which it is made again."""
    return f"{id} {ends}".encode()


def _told(answer: bytes) -> tuple[str, int]:
    id, _, ends = answer.decode().partition(" ")
    return id, int(ends)
