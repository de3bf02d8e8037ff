"""Between protobuf and the inventory, tokens, policies and what happened."""

from __future__ import annotations

from collections.abc import Sequence

from hsmvisor.manager.history.events import Event
from hsmvisor.manager.inventory.listing import HostShown, ResourceShown
from hsmvisor.manager.services.convert_wanted import timestamp
from hsmvisor.manager.store.rows import DeliveryRow, LineRow, MeasurementRow, PolicyRow, TokenRow, lines_of
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from hsmvisor_rpc.v1 import manager_pb2 as pb


def host(shown: HostShown, now: float) -> pb.FleetHost:
    row = shown.row
    return pb.FleetHost(
        id=row.id,
        name=row.name,
        state=row.state,
        trusted=bool(row.trusted),
        owners=lines_of(row.owners),
        host_key=row.host_key,
        joined_at=timestamp(row.joined_at),
        seen_at=timestamp(row.seen_at),
        certificate_ends_at=timestamp(row.certificate_ends_at),
        version=row.version,
        resources=shown.resources,
        pending=shown.pending,
        away=row.state == "joined" and row.is_silent(now),
    )


def resource(shown: ResourceShown) -> pb.Resource:
    row = shown.row
    return pb.Resource(
        id=row.id,
        host=row.host,
        name=row.name,
        kind=row.kind,
        owner=row.owner,
        attributes=row.tags,
        module=row.module,
        module_id=bytes.fromhex(row.module_id),
        present=bool(row.present),
        first_seen_at=timestamp(row.first_seen_at),
        changed_at=timestamp(row.changed_at),
        holdings=[holding(delivery, line, shown.away) for delivery, line in shown.holdings],
        obeys=bool(row.obeys),
    )


def holding(row: DeliveryRow, line: LineRow, away: bool) -> pb.Holding:
    """`away`: the resource's host is not heard of, so what is pending waits for that."""
    return pb.Holding(
        request=line.request_id,
        material=line.material,
        resource=row.resource_id,
        staged=row.staged,
        active=row.active,
        wanted=line.serving,
        state="away" if away and row.state == "pending" else row.state,
        why=row.why,
        changed_at=timestamp(row.changed_at),
    )


def measurement(row: MeasurementRow, fits: Sequence[str]) -> pb.Measurement:
    found = pb.Measurement(
        resource=row.resource_id,
        pcrs=[pb.Pcr(number=number, value=value) for number, value in sorted(row.values.items())],
        fits=fits,
        asked_at=timestamp(row.asked_at),
        nonce=row.nonce,
        attestation=row.attestation,
    )
    if row.certificates:
        certificates = TpmCertificates.decode(row.certificates)
        found.endorsement_certificates.extend((certificates.rsa, certificates.p256))
        found.platform_certificate, found.ca_certificate = certificates.platform, certificates.ca
    return found


def token(row: TokenRow) -> pb.AccessToken:
    return pb.AccessToken(
        id=row.id,
        owner=row.owner,
        groups=lines_of(row.groups),
        roles=lines_of(row.roles),
        created_at=timestamp(row.created_at),
        expires_at=timestamp(row.expires_at),
        revoked=bool(row.revoked_at),
    )


def policies(row: PolicyRow) -> pb.Policies:
    return pb.Policies(
        version=row.version,
        text=row.text,
        uploaded_at=timestamp(row.uploaded_at),
        uploaded_by=row.uploaded_by,
        comment=row.comment,
    )


def event(row: Event) -> pb.FleetEvent:
    return pb.FleetEvent(
        id=row.id,
        at=timestamp(row.at),
        kind=row.kind,
        owner=row.owner,
        request=row.request_id,
        material=row.material,
        resource=row.resource_id,
        host=row.host_id,
        detail=row.detail_text,
    )
