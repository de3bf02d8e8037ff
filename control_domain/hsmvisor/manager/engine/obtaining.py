"""From a generation that was begun to one that has a certificate: the key, the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager import limits
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.interface import CaError, Later, NotYet, Order
from hsmvisor.manager.engine.outcome import Again, Failed
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.history.events import Happened, Kind
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, IssuerAway, SealTo
from hsmvisor.manager.policy.questions import permits
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import GenerationRow, ResourceRow, lines_of
from hsmvisor_rpc.sealed.commands import Action, Generate

NO_WORD = 60.0  #: seconds after which one looks at a command that nobody has answered


async def make_key(
    parts: Parts, seen: Seen, working: GenerationRow, allowed: Sequence[ResourceRow], now: float, until: float = 0.0
) -> None:
    """The module, or the issuer, makes it.  `until`: a host may be told until then; 0: whenever it comes.  Raises Failed, Again."""
    if seen.spec.shared:
        await _by_issuer(parts, seen, working, allowed, now)
        raise Again("", 0)
    target = allowed[0]
    if seen.queued.get(target.id):
        raise Again("the module makes its key", NO_WORD)
    if not target.reachable:
        raise Again(why_not_reachable(target), FAR)
    if seen.is_away(target, now):
        raise Again("its host is away", FAR)
    if (again_at := seen.rests_until(target.id)) > now:
        raise Again(seen.delivery(target.id).why, again_at - now)
    spec = seen.spec
    body = Generate(
        key_type=spec.key_type,
        names=lines_of(working.names),
        mode=spec.mode,
        profile=spec.usage,
        alias_id=b"",
        drain_seconds=spec.drain_seconds,
        after_drain=spec.after_drain,
        on_expiry=spec.on_expiry,
        self_signed=False,
    )
    async with parts.database.transaction() as connection:
        if target.id not in seen.deliveries:
            await lines.mark(connection, [seen.delivery(target.id)], seen.deliveries, now)
        await parts.commands.queue(connection, target, seen.line, [Said(Action.GENERATE, working.number, body)], until)
    parts.hub.commands([target.host_id])
    raise Again("the module makes its key", NO_WORD)


def why_not_reachable(resource: ResourceRow) -> str:
    if not resource.present:
        return "the resource is not there"
    return "it has no module" if not resource.module_id else "its module obeys another root than this fleet's"


def seal_to(resource: ResourceRow, material: str, generation: int, expires_at: int) -> SealTo:
    return SealTo(
        host_id=bytes.fromhex(resource.host_id),
        module_id=bytes.fromhex(resource.module_id),
        recipient=resource.recipient,
        material=material,
        generation=generation,
        expires_at=expires_at,
    )


async def _by_issuer(parts: Parts, seen: Seen, working: GenerationRow, allowed: Sequence[ResourceRow], now: float) -> None:
    able = [resource for resource in allowed if resource.reachable]
    if not able:
        raise Again("no module can be reached", FAR)
    expires = int(now) + limits.ENVELOPE_LIFETIME
    wanted = names.parse_all(lines_of(working.names)) if working.names else ()
    escrow = EscrowAs(seen.line.id, working.number) if seen.spec.escrow else None
    targets = [seal_to(resource, seen.line.material, working.number, expires) for resource in able]
    try:
        made = await parts.issuer.make(seen.spec.key_type, wanted, targets, escrow)
    except IssuerAway as error:
        raise Again(str(error), 5) from None
    except BadKey as error:
        raise Failed(str(error)) from None
    async with parts.database.transaction() as connection:
        state = "issued" if seen.spec.bare else "ordered"
        told = {"public_key": made.public_key, "csr": made.csr, "state": state}
        if not await lines.change_generation(connection, seen.line.id, working.number, was="keying", **told):
            return
        await lines.add_envelopes(connection, envelope_rows(seen, working.number, able, made.envelopes, expires))
        if escrow is not None:
            await lines.put_escrow(connection, seen.line.id, working.number, made.wrapped, int(now))


def envelope_rows(
    seen: Seen, generation: int, targets: Sequence[ResourceRow], envelopes: Sequence[bytes], expires_at: int
) -> list[dict[str, object]]:
    return [
        {
            "line_id": seen.line.id,
            "generation": generation,
            "resource_id": resource.id,
            "module_id": resource.module_id,
            "envelope": envelope,
            "expires_at": expires_at,
        }
        for resource, envelope in zip(targets, envelopes, strict=True)
    ]


async def order(parts: Parts, seen: Seen, working: GenerationRow) -> GenerationRow | None:
    """Has the authority certify it; returns what it is now, None where it was not in this state any more.  Raises Failed, Again."""
    ca = parts.authorities.get(working.authority)
    if ca is None:
        raise Failed(f"there is no authority {working.authority!r}: see the manager's configuration")
    serving = seen.serving
    replaces = leaf_der(serving) if serving and serving.chain else b""

    async def keep(text: str) -> None:
        async with parts.database.transaction() as connection:
            await lines.change_generation(connection, seen.line.id, working.number, kept=text)

    asked = Order(
        id=f"{seen.line.id}.{working.number}",
        csr=working.csr,
        profile=seen.spec.profile,
        names=names.parse_all(lines_of(working.names)),
        lifetime=seen.spec.lifetime,
        replaces=replaces,
        kept=working.kept,
    )
    try:
        issued = await ca.issue(asked, keep)
    except NotYet as error:
        raise Again(f"{working.authority}: {error}", error.seconds) from None
    except Later as error:
        raise Failed(f"{working.authority}: {error}", error.seconds) from None
    except CaError as error:
        raise Failed(f"{working.authority}: {error}") from None
    chain = [x509.load_der_x509_certificate(der) for der in issued.chain]
    leaf = chain[0]
    made = replace(
        working,
        state="issued",
        chain=b"".join(one.public_bytes(Encoding.PEM) for one in chain).decode(),
        serial=f"{leaf.serial_number:x}",
        not_before=int(leaf.not_valid_before_utc.timestamp()),
        not_after=int(leaf.not_valid_after_utc.timestamp()),
    )
    told = {name: getattr(made, name) for name in ("state", "chain", "serial", "not_before", "not_after")}
    async with parts.database.transaction() as connection:
        if not await lines.change_generation(connection, seen.line.id, working.number, was="ordered", **told):
            return None
        detail: dict[str, object] = {
            "generation": working.number,
            "authority": working.authority,
            "serial": made.serial,
            "names": working.names,
            **permits(seen.permits.values()),
        }
        if issued.shown or issued.known:
            detail |= {"control_shown": list(issued.shown), "control_known": list(issued.known)}
        await parts.history.add(connection, happened(seen, Kind.ISSUED, detail))
    return made


def leaf_der(generation: GenerationRow) -> bytes:
    return x509.load_pem_x509_certificate(generation.chain.encode()).public_bytes(Encoding.DER)


def happened(seen: Seen, kind: Kind, detail: dict[str, object], resource_id: str = "") -> Happened:
    return Happened(
        kind,
        owner=seen.request.owner,
        request_id=seen.request.id,
        material=seen.line.material,
        resource_id=resource_id or seen.line.resource_id,
        detail=detail,
    )
