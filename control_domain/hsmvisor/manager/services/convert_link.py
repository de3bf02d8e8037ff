"""Between protobuf and what a host tells."""

from __future__ import annotations

from hsmvisor.manager import limits
from hsmvisor.manager.engine.measuring import ATTEST
from hsmvisor.manager.engine.results import Result
from hsmvisor.manager.inventory.reports import Report, Told
from hsmvisor.manager.link.exchange import Answer, Exchange
from hsmvisor.manager.store.rows import CommandRow
from hsmvisor_rpc.v1 import manager_pb2 as pb


def exchange(untrusted: pb.ExchangeRequest, peer: str) -> Exchange:
    """The limits are the exchange's own to check.  `peer`: the connection that it came by, as gRPC calls it."""
    return Exchange(
        session=untrusted.session,
        number=untrusted.number,
        all=untrusted.all,
        reports=[_report(guest) for guest in untrusted.guests],
        gone=list(untrusted.gone),
        results=[_result(result) for result in untrusted.results if not result.again],
        undecided=[result.id for result in untrusted.results if result.again],
        wait=float(min(untrusted.wait_seconds, limits.MAX_WAIT)),
        version=untrusted.version,
        peer=peer,
    )


def _report(guest: pb.GuestReport) -> Report:
    return Report(
        name=guest.name,
        kind=guest.kind,
        owner=guest.owner,
        attributes=dict(guest.attributes),
        module=guest.module,
        signed_identity=guest.signed_identity,
        sequence=guest.sequence,
        materials={m.name: {g.number: Told(g.state, g.operations) for g in m.generations} for m in guest.materials},
    )


def _result(result: pb.CommandResult) -> Result:
    known = result.HasField("material")
    return Result(
        id=result.id,
        done=result.done,
        reason=result.reason,
        detail=result.detail,
        public_key=result.public_key,
        csr=result.csr,
        sequence=result.sequence,
        states={g.number: g.state for g in result.material.generations} if known else None,
        attestation=result.attestation,
        tpm_certificates=result.tpm_certificates,
    )


def _command(row: CommandRow) -> pb.HostCommand:
    told = {"attest" if row.action == ATTEST else "signed_command": row.signed}
    return pb.HostCommand(id=row.id, module=row.module, **told)


def answer(given: Answer) -> pb.ExchangeResponse:
    return pb.ExchangeResponse(
        tell_all=given.tell_all,
        commands=map(_command, given.commands),
        heartbeat_seconds=limits.HEARTBEAT,
        refused=[pb.RefusedGuest(name=one.name, reason=one.reason, detail=one.detail) for one in given.refused],
    )
