"""The manager's API (manager.proto) on TLS, and the one place where its messages and the host's own types meet."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from hsmvisor.host import limits
from hsmvisor.host.reports import Material
from hsmvisor.host.uplink.membership import pem
from hsmvisor.host.uplink.told import Given, GuestTold, Heard, Result, Told
from hsmvisor.serving import errors
from hsmvisor.serving.limits import MAX_ANSWER
from hsmvisor.serving.text import clean
from hsmvisor.serving.timestamps import timestamp
from hsmvisor_rpc.sealed.fleet import JoinStatement
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc

_CALL_WITHIN = 30.0  #: seconds
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_ANSWER),
    ("grpc.max_send_message_length", -1),
    # a manager that is cut off is noticed within these two, also while an exchange waits; it takes a ping every 30 s
    ("grpc.keepalive_time_ms", 35_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # connecting again is uplink.py's, which goes from one manager to the next
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


class LinkFault(Exception):
    """The manager cannot be reached, or refuses; `reason` is its own word, empty where it gave none."""

    def __init__(self, code: grpc.StatusCode, reason: str, detail: str, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if reason else detail)
        self.code, self.reason, self.detail, self.hint = code, reason, detail, hint

    @property
    def away(self) -> bool:
        """It gave no answer."""
        return not self.reason and self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class ManagerChannel:
    """To one manager: `authorities` (DER) are believed, `chain` and `key` (PEM) are ours, empty for none."""

    def __init__(self, address: str, authorities: tuple[bytes, ...], chain: bytes = b"", key: bytes = b"") -> None:
        credentials = grpc.ssl_channel_credentials(pem(authorities), key or None, chain or None)
        self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._stub: Any = rpc.HostLinkStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    # ---- calls; all of them raise LinkFault -----------------------------------------------------------------------

    async def join(
        self, request_id: str, statement: JoinStatement, proof: bytes, signature: bytes, version: str
    ) -> pb.JoinResponse:
        request = pb.JoinRequest(
            request_id=request_id,
            name=statement.name,
            host_key=statement.host_key,
            csr=statement.csr,
            nonce=statement.nonce,
            proof=proof,
            signature=signature,
            version=version,
        )
        answer: pb.JoinResponse = await self._call(self._stub.Join, request, _CALL_WITHIN)
        return answer

    async def renew(self, request_id: str, csr: bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Returns the chain of the new certificate, and whom to believe from now on."""
        request = pb.RenewIdentityRequest(request_id=request_id, csr=csr)
        answer: pb.RenewIdentityResponse = await self._call(self._stub.RenewIdentity, request, _CALL_WITHIN)
        return tuple(answer.certificates), tuple(answer.authorities)

    async def exchange(self, session: str, number: int, told: Told, wait: int, version: str) -> Heard:
        """`wait`: seconds, at most, until there is something to hear."""
        request = pb.ExchangeRequest(
            session=session,
            number=number,
            all=told.all,
            guests=map(_guest, told.guests),
            gone=told.gone,
            results=map(_result, told.results),
            wait_seconds=wait,
            version=version,
        )
        answer: pb.ExchangeResponse = await self._call(self._stub.Exchange, request, _CALL_WITHIN + wait)
        return Heard(
            answer.tell_all,
            tuple(Given(row.id, row.module, row.signed_command, row.attest) for row in answer.commands[: limits.MAX_COMMANDS]),
            answer.heartbeat_seconds,
            {row.name: clean(f"{row.reason}: {row.detail}") for row in answer.refused[: limits.MAX_GUESTS]},
        )

    async def _call(self, method: Any, request: Any, within: float) -> Any:
        try:
            return await method(request, timeout=within)
        except grpc.aio.AioRpcError as error:
            raise _fault(error) from None


def _fault(error: grpc.aio.AioRpcError) -> LinkFault:
    reason, hint = map(clean, errors.told(error))
    detail = error.details() or str(error.code())
    return LinkFault(error.code(), reason, clean(detail if reason else errors.last_words(detail)), hint)


# ---- to messages ------------------------------------------------------------------------------------------------------


def _guest(row: GuestTold) -> pb.GuestReport:
    return pb.GuestReport(
        name=row.name,
        kind=row.kind,
        owner=row.owner,
        attributes=row.attributes,
        module=row.module,
        signed_identity=row.identity,
        sequence=row.sequence,
        materials=map(_material, row.materials[: limits.MAX_REPORTED_MATERIALS]),
    )


def _material(row: Material) -> pb.MaterialReport:
    # a worker says what it likes; a manager takes so many, and of those that are gone the newest ones count
    told = sorted(row.generations, key=lambda g: (g.state != "destroyed", g.number))[-limits.MAX_REPORTED_GENERATIONS :]
    generations = [
        pb.GenerationReport(
            number=g.number, state=g.state, id=g.id, operations=g.operations, last_used_at=timestamp(g.last_used_at)
        )
        for g in sorted(told, key=lambda g: g.number)
    ]
    return pb.MaterialReport(name=row.name, generations=generations)


def _result(row: Result) -> pb.CommandResult:
    return pb.CommandResult(
        id=row.id,
        done=row.done,
        reason=row.reason,
        detail=row.detail,
        public_key=row.public_key,
        csr=row.csr,
        sequence=row.sequence,
        material=_material(row.material) if row.material else None,
        again=row.again,
        attestation=row.attestation,
        tpm_certificates=row.tpm_certificates,
    )
