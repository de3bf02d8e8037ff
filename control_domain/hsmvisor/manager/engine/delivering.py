"""One generation, to all modules that are to have it: staged, then activated; what cannot be done now is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager import limits
from hsmvisor.manager.engine import measuring
from hsmvisor.manager.engine.measuring import Standing
from hsmvisor.manager.engine.obtaining import envelope_rows, seal_to, why_not_reachable
from hsmvisor.manager.engine.outcome import Again
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, IssuerAway
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import UNMEASURED, DeliveryRow, GenerationRow, ResourceRow
from hsmvisor_rpc.sealed.commands import Action, Certify, Destroy, Stage


@dataclass(frozen=True)
class Delivered:
    """`waiting`: for a module that is at work; `stragglers`: that cannot be reached; `lost`: that need a key that nobody has."""

    done: int
    waiting: tuple[str, ...] = ()
    stragglers: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()  #: staged, until all have staged it
    refusing: tuple[str, ...] = ()  #: asked again later,
    again_at: float = FAR  #: and the first of them then
    unmeasured: Mapping[str, str] = field(default_factory=dict)  #: whose boot is not what it has to be: why


#: By resource: the commands by which its module comes to have a generation staged; None: its key is nowhere to be had.
_Keys = dict[str, tuple[Said, ...] | None]


@dataclass(frozen=True)
class _Next:
    """What one module is told, or why nothing is."""

    resource: ResourceRow
    said: tuple[Said, ...] = ()
    state: str = "pending"
    why: str = ""
    lost: bool = False
    again_at: float = 0.0
    asked: bool = False  #: its host is at measuring its boot


async def deliver(parts: Parts, seen: Seen, generation: GenerationRow, allowed: Sequence[ResourceRow], now: float) -> Delivered:
    """Queues what each module needs to come to `generation`, and stores where each is."""
    undone = [r for r in allowed if seen.delivery(r.id).active != generation.number]
    all_staged = all(_is_staged(seen, r, generation) for r in undone)
    release = not seen.spec.two_step or bool(generation.released) or all_staged or generation.state == "serving"
    told_now = [r for r in undone if measuring.can_be_told(seen, r, now) and (release or not _is_staged(seen, r, generation))]
    renews = seen.serving is not None and seen.serving.number != generation.number
    standings = await measuring.gate(parts, seen, told_now, now, renews) if told_now else {}
    barred = {id: standing for id, standing in standings.items() if not standing.until}
    keys = await _keys(parts, seen, generation, [r for r in allowed if r.id not in barred], now)
    steps = [_barred(seen, r, barred[r.id]) if r.id in barred else _step(seen, generation, r, keys, release, now) for r in undone]
    told = {step.resource.host_id for step in steps if step.said}
    changed = [row for step in steps if (row := _row(seen, step)) is not None]
    if told or changed:
        async with parts.database.transaction() as connection:
            for step in steps:
                if step.said:
                    standing = standings.get(step.resource.id)
                    until = standing.until if standing is not None else 0.0
                    await parts.commands.queue(connection, step.resource, seen.line, step.said, until)
            await lines.mark(connection, changed, seen.deliveries, now)
        parts.hub.commands(told)
    return Delivered(
        done=len(allowed) - len(undone),
        waiting=_ids(s for s in steps if s.said or s.asked or seen.queued.get(s.resource.id)),
        stragglers=_ids(
            s
            for s in steps
            if s.state == "pending" and not s.said and not s.lost and not s.again_at and not seen.queued.get(s.resource.id)
        ),
        lost=_ids(s for s in steps if s.lost),
        held_back=_ids(s for s in steps if s.state == "staged" and not s.again_at),
        refusing=_ids(s for s in steps if s.again_at and s.resource.id not in barred),
        unmeasured={s.resource.id: s.why for s in steps if s.state == UNMEASURED},
        again_at=min((s.again_at for s in steps if s.again_at), default=FAR),
    )


def _ids(steps: Iterable[_Next]) -> tuple[str, ...]:
    return tuple(step.resource.id for step in steps)


def _row(seen: Seen, step: _Next) -> DeliveryRow | None:
    known = seen.delivery(step.resource.id)
    row = replace(known, state=step.state, why=step.why, permitted=seen.permitted(step.resource.id))
    return None if row == known and step.resource.id in seen.deliveries else row


def _is_staged(seen: Seen, resource: ResourceRow, generation: GenerationRow) -> bool:
    delivery = seen.delivery(resource.id)
    return delivery.staged == generation.number and generation.number in delivery.generations


def _barred(seen: Seen, resource: ResourceRow, standing: Standing) -> _Next:
    """Its boot is not what it has to be, or not known yet."""
    state = UNMEASURED if seen.delivery(resource.id).state == UNMEASURED else "pending"
    return _Next(resource, state=state, why=standing.why, again_at=standing.again_at, asked=standing.asked)


def _step(
    seen: Seen,
    generation: GenerationRow,
    resource: ResourceRow,
    keys: _Keys,
    release: bool,
    now: float,
) -> _Next:
    delivery, number = seen.delivery(resource.id), generation.number
    if seen.queued.get(resource.id):
        return _Next(resource, state=delivery.state if delivery.state in ("pending", "staged") else "pending")
    waits = UNMEASURED if delivery.state == UNMEASURED else "pending"
    if not resource.reachable:
        return _Next(resource, state=waits, why=why_not_reachable(resource))
    if seen.is_away(resource, now):
        return _Next(resource, state=waits, why="its host is away")
    if (again_at := seen.rests_until(resource.id)) > now:
        return _Next(resource, state=delivery.state, why=delivery.why, again_at=again_at)
    if delivery.generations.get(number) == "retiring":
        return _Next(resource, (Said(Action.ROLL_BACK, number),))
    activate = (Said(Action.ACTIVATE, number),)
    if _is_staged(seen, resource, generation):
        return _Next(resource, activate) if release else _Next(resource, state="staged", why="until all have staged it")
    staging = keys.get(resource.id)
    if staging is None:
        return _Next(resource, why="its key is not at hand: a new one is made", lost=True)
    # commands are carried out in order, and one that fails keeps the next from doing anything: both at once save a round
    both = not seen.spec.two_step or bool(generation.released) or generation.state == "serving"
    return _Next(resource, (*staging, *activate) if both or not staging else staging)


async def _keys(parts: Parts, seen: Seen, generation: GenerationRow, allowed: Sequence[ResourceRow], now: float) -> _Keys:
    """Returns the commands by which each module comes to have the generation staged; None: its key is nowhere to be had."""
    undone = [
        r
        for r in allowed
        if seen.delivery(r.id).active != generation.number
        and not _is_staged(seen, r, generation)
        and not seen.queued.get(r.id)
        and r.reachable
        and not seen.is_away(r, now)
        and seen.rests_until(r.id) <= now
    ]
    chain = _ders(generation)
    found: _Keys = {}
    missing: list[ResourceRow] = []
    for resource in undone:
        held = seen.delivery(resource.id).generations
        if not seen.spec.shared and generation.key_of == generation.number:
            there = held.get(generation.number) == "staged"
            certify = (Said(Action.CERTIFY, generation.number, Certify(chain)),) if chain else ()
            found[resource.id] = certify if there else None
        elif generation.key_of != generation.number and seen.key_is_held(resource.id, generation.key_of):
            found[resource.id] = (_stage(seen, generation, chain, b"", 0),)
        elif seen.spec.shared:
            missing.append(resource)
        else:
            found[resource.id] = None
    if missing:
        found |= await _from_envelopes(parts, seen, generation, chain, missing, now)
    return found


async def _from_envelopes(
    parts: Parts, seen: Seen, generation: GenerationRow, chain: tuple[bytes, ...], missing: Sequence[ResourceRow], now: float
) -> _Keys:
    async with parts.database.reading() as connection:
        there = await lines.envelopes_of(connection, seen.line.id, generation.number, now + 60)
        escrow = await lines.escrow(connection, seen.line.id, generation.key_of)
    found: _Keys = {}
    unsealed = []
    for resource in missing:
        row = there.get(resource.id)
        if row is not None and row.module_id == resource.module_id:
            found[resource.id] = (_stage(seen, generation, chain, bytes(row.envelope), int(row.expires_at)),)
        else:
            unsealed.append(resource)
    if escrow and unsealed:
        expires = int(now) + limits.ENVELOPE_LIFETIME
        targets = [seal_to(r, seen.line.material, generation.number, expires) for r in unsealed]
        try:
            made = await parts.issuer.reseal(escrow, EscrowAs(seen.line.id, generation.key_of), targets)
        except IssuerAway as error:
            raise Again(str(error), 5) from None
        except BadKey:
            made = ()
        if made:
            async with parts.database.transaction() as connection:
                await lines.add_envelopes(connection, envelope_rows(seen, generation.number, unsealed, made, expires))
            for resource, envelope in zip(unsealed, made, strict=True):
                found[resource.id] = (_stage(seen, generation, chain, envelope, expires),)
    return {resource.id: found.get(resource.id) for resource in missing}


def _stage(seen: Seen, generation: GenerationRow, chain: tuple[bytes, ...], envelope: bytes, expires_at: int) -> Said:
    spec = seen.spec
    body = Stage(
        public_key=generation.public_key,
        certificates=chain,
        envelope=envelope,
        mode=spec.mode,
        profile=spec.usage,
        alias_id=b"",
        drain_seconds=spec.drain_seconds,
        after_drain=spec.after_drain,
        on_expiry=spec.on_expiry,
        self_signed=False,
    )
    return Said(Action.STAGE, generation.number, body, expires_at)


def _ders(generation: GenerationRow) -> tuple[bytes, ...]:
    if not generation.chain:
        return ()
    found = x509.load_pem_x509_certificates(generation.chain.encode())
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)


def superfluous(seen: Seen, resource: ResourceRow, serving: GenerationRow) -> list[Said]:
    """Returns the commands that destroy what nobody needs: what was staged and never served, too many old ones, and after a
    compromise all of them."""
    delivery = seen.delivery(resource.id)
    if delivery.active != serving.number:
        return []
    old = sorted(n for n, state in delivery.generations.items() if state == "retiring")
    gone = [n for n, state in delivery.generations.items() if state == "staged" and n < serving.number]
    if serving.urgent:
        return [Said(Action.DESTROY, n, Destroy(True)) for n in old] + [Said(Action.DESTROY, n, Destroy(False)) for n in gone]
    gone += old[: max(0, len(old) - limits.KEPT_GENERATIONS)]
    return [Said(Action.DESTROY, n, Destroy(False)) for n in sorted(gone)]
