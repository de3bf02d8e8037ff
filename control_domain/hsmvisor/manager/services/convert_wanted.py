"""Between protobuf and what owners ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.timestamp_pb2 import Timestamp
from hsmvisor.manager.engine.beginning import snapshot_of
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import Rule, decide
from hsmvisor.manager.store.lines import FAR, Sums
from hsmvisor.manager.store.rows import DeliveryRow, GenerationRow, LineRow, RequestRow
from hsmvisor.manager.wanted.asking import Explanation
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.manager.wanted.summary import summary
from hsmvisor.serving import timestamps
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.v1 import manager_pb2 as pb


def timestamp(seconds: float) -> Timestamp | None:
    """0 and what is far are not told."""
    return timestamps.timestamp(seconds) if 0 < seconds < FAR / 2 else None


def rule(untrusted: pb.Rule) -> Rule:
    return Rule(
        enabled=not untrusted.off,
        rekey=not untrusted.same_key,
        lead=float(untrusted.lead_seconds),
        cron=untrusted.cron,
        period=float(untrusted.period_seconds),
        days=untrusted.days,
        signatures=untrusted.signatures,
    )


def rule_told(known: Rule) -> pb.Rule:
    return pb.Rule(
        off=not known.enabled,
        same_key=not known.rekey,
        lead_seconds=int(known.lead),
        cron=known.cron,
        period_seconds=int(known.period),
        days=known.days,
        signatures=known.signatures,
    )


def spec(untrusted: pb.RequestSpec) -> Spec:
    """What was left open has its default; whether all of it can be is for `Spec.check` to say.  Raises Invalid."""
    try:
        source = Source(untrusted.source or "module")
    except ValueError:
        raise Invalid("SPEC", f"source is one of {', '.join(Source)}") from None
    return Spec(
        material=untrusted.material,
        source=source,
        key_type=untrusted.key_type or "P-256",
        authority=untrusted.authority,
        profile=untrusted.profile or "server",
        usage=untrusted.usage or "tls",
        names=tuple(untrusted.names),
        lifetime=untrusted.lifetime_seconds,
        resources=tuple(untrusted.resources),
        selector=dict(untrusted.selector),
        renewal=rule(untrusted.renewal),
        two_step=untrusted.two_step,
        health=untrusted.health,
        escrow=untrusted.escrow,
        mode=untrusted.mode or "pin",
        drain_seconds=untrusted.drain_seconds,
        after_drain=untrusted.after_drain or "extend",
        on_expiry=untrusted.on_expiry or "keep",
        bare=untrusted.bare,
        measured=tuple(untrusted.measured),
    )


def spec_told(known: Spec) -> pb.RequestSpec:
    return pb.RequestSpec(
        material=known.material,
        source=str(known.source),
        key_type=known.key_type,
        authority=known.authority,
        profile=known.profile,
        usage=known.usage,
        names=known.names,
        lifetime_seconds=known.lifetime,
        resources=known.resources,
        selector=dict(known.selector),
        renewal=rule_told(known.renewal),
        two_step=known.two_step,
        health=known.health,
        escrow=known.escrow,
        mode=known.mode,
        drain_seconds=known.drain_seconds,
        after_drain=known.after_drain,
        on_expiry=known.on_expiry,
        bare=known.bare,
        measured=known.measured,
    )


def explanation(known: Explanation) -> pb.Explanation:
    expected = [
        pb.Expected(
            resource=e.resource,
            allowed=e.decision.allowed,
            why=e.decision.why,
            names=e.names,
            outcome=e.outcome,
            measured=e.decision.measured,
            measured_together=e.decision.together,
        )
        for e in known.expected
    ]
    return pb.Explanation(resources=expected, remarks=known.remarks, change=known.change)


def material_request(
    row: RequestRow,
    lines: Sequence[LineRow] = (),
    generations: Iterable[GenerationRow] = (),
    deliveries: Iterable[DeliveryRow] = (),
    denials: Iterable[Any] = (),
    sums: Sums | None = None,
    now: float = 0.0,
) -> pb.MaterialRequest:
    denied = list(denials)
    by_line: dict[str, list[GenerationRow]] = {}
    for generation in generations:
        by_line.setdefault(generation.line_id, []).append(generation)
    held: dict[str, list[DeliveryRow]] = {}
    for delivery in deliveries:
        held.setdefault(delivery.line_id, []).append(delivery)
    return pb.MaterialRequest(
        id=row.id,
        owner=row.owner,
        spec=spec_told(Spec.of_text(row.spec)),
        state=row.state,
        created_at=timestamp(row.created_at),
        changed_at=timestamp(row.changed_at),
        lines=[_line(row, line, by_line.get(line.id, []), held.get(line.id, []), now) for line in lines],
        denials=[_denial(one) for one in denied],
        summary=summary(row, sums, bool(denied)) if sums is not None else "",
        lines_total=sums.total if sums is not None else 0,
    )


def _denial(row: Any) -> pb.Denial:
    return pb.Denial(resource=row.resource_id, action=row.action, why=row.why, policy_version=row.version, at=timestamp(row.at))


def _line(row: RequestRow, line: LineRow, generations: Sequence[GenerationRow], held: Sequence[DeliveryRow], now: float) -> pb.Line:
    serving = next((g for g in generations if g.number == line.serving), None)
    active = row.state == "active" and serving is not None
    due = decide(snapshot_of(Spec.of_text(row.spec), line, serving), now).due if active else 0.0
    return pb.Line(
        id=line.id,
        resource=line.resource_id,
        generation=line.serving,
        stage=line.stage,
        why=line.why,
        failures=line.failures,
        look_at=timestamp(line.look_at),
        not_after=timestamp(serving.not_after) if serving is not None else None,
        renew_at=timestamp(due),
        generations=[_generation(g) for g in generations],
        holdings=[holding(row, line, d) for d in held],
    )


def _generation(row: GenerationRow) -> pb.LineGeneration:
    chain = x509.load_pem_x509_certificates(row.chain.encode()) if row.chain else []
    return pb.LineGeneration(
        number=row.number,
        state="revoked" if row.revoked_at else row.state,
        certificates=[one.public_bytes(Encoding.DER) for one in chain],
        not_before=timestamp(row.not_before),
        not_after=timestamp(row.not_after),
        activated_at=timestamp(row.activated_at),
        why=row.why,
        serial=row.serial,
        revoked_at=timestamp(row.revoked_at),
    )


def holding(request: RequestRow, line: LineRow, row: DeliveryRow) -> pb.Holding:
    return pb.Holding(
        request=request.id,
        material=line.material,
        resource=row.resource_id,
        staged=row.staged,
        active=row.active,
        wanted=line.serving,
        state=row.state,
        why=row.why,
        changed_at=timestamp(row.changed_at),
    )
