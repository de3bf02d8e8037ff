"""HostLink: hosts join, renew their identity, and exchange what they know for what there is to do."""

from __future__ import annotations

from typing import Any

from hsmvisor.manager import limits
from hsmvisor.manager.answers import Answers, Changes
from hsmvisor.manager.auth import caller, host_of
from hsmvisor.manager.inventory.joining import Joined, Joining
from hsmvisor.manager.link.exchange import Exchanges
from hsmvisor.manager.services import convert_link
from hsmvisor.manager.store.database import DatabaseError
from hsmvisor.serving.errors import StorageUnavailable
from hsmvisor.serving.requests import request
from hsmvisor.serving.text import clean
from hsmvisor_rpc.sealed.fleet import JoinStatement
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from sqlalchemy.ext.asyncio import AsyncConnection


class HostLink(rpc.HostLinkServicer):
    def __init__(self, joining: Joining, exchanges: Exchanges, changes: Changes, answers: Answers, roots: Any) -> None:
        """`roots`: returns the authorities that hosts believe, DER."""
        self._joining, self._exchanges, self._changes, self._answers = joining, exchanges, changes, answers
        self._roots = roots

    async def Join(self, untrusted: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        statement = JoinStatement(untrusted.name, untrusted.host_key, untrusted.csr, untrusted.nonce)
        asked = request(untrusted.request_id, "Join", statement.encode(), untrusted.signature, untrusted.proof)
        fields: dict[str, Any] = {"host": clean(untrusted.name)}
        signature, proof, certified = untrusted.signature, untrusted.proof, caller().may_join_as
        told = b""

        async def keep(connection: AsyncConnection, joined: Joined) -> None:
            nonlocal told
            fields["host_id"] = joined.host.id
            answer = pb.JoinResponse(
                certificates=joined.chain,
                authorities=self._roots(),
                root=self._joining.root,
                proof=joined.proof,
                host=joined.host.id,
                addresses=self._joining.addresses,
            )
            told = answer.SerializeToString()
            await self._answers.store(connection, asked, told)

        async def work() -> bytes:
            version = clean(untrusted.version, limits.MAX_VERSION)
            await self._joining.join(statement, signature, proof, version, certified, keep)
            return told

        await self._joining.admit(statement, signature, proof, certified)  # a stranger fills no audit log
        return pb.JoinResponse.FromString(await self._changes.outside("host.join", asked, fields, work))

    async def RenewIdentity(self, untrusted: pb.RenewIdentityRequest, context: Any) -> pb.RenewIdentityResponse:
        host = host_of(caller())
        asked = request(untrusted.request_id, "RenewIdentity", host.id.encode(), untrusted.csr)

        async def work() -> bytes:
            chain = await self._joining.renew(host, untrusted.csr)
            return pb.RenewIdentityResponse(certificates=chain, authorities=self._roots()).SerializeToString()

        answer = await self._changes.outside("host.renew-identity", asked, {"host": host.name}, work)
        return pb.RenewIdentityResponse.FromString(answer)

    async def Exchange(self, untrusted: pb.ExchangeRequest, context: Any) -> pb.ExchangeResponse:
        try:
            return convert_link.answer(
                await self._exchanges.exchange(host_of(caller()), convert_link.exchange(untrusted, context.peer()))
            )
        except DatabaseError as error:
            raise StorageUnavailable("DATABASE", str(error), "nothing was changed: tell it again") from None
