"""Keys that owners bring themselves: opened by the issuer, sealed to the modules that are to have them, forgotten.

A key that comes is a new generation of its request's line, with the certificates that came along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager import limits
from hsmvisor.manager.ca import names, requests
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.engine.beginning import revoke_if_asked
from hsmvisor.manager.engine.obtaining import seal_to
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, Issuer, IssuerAway, Made
from hsmvisor.manager.policy.questions import Act, Source, permits
from hsmvisor.manager.store import inventory, lines
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import GenerationRow, RequestRow, ResourceRow, text_of
from hsmvisor.manager.wanted import membership
from hsmvisor.manager.wanted.judging import Judge
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.serving.errors import Forbidden, Invalid, Unavailable, WrongState
from hsmvisor_rpc.sealed.fleet import IssuerStatement
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class Taken:
    """An imported key as it is now: sealed."""

    line_id: str
    number: int
    made: Made
    targets: Sequence[ResourceRow]
    expires_at: int
    names: tuple[str, ...]
    policy: Mapping[str, object]  #: as the history tells it


class Importing:
    def __init__(
        self,
        database: Database,
        history: History,
        judge: Judge,
        issuer: Issuer,
        pins: Pins,
        sign: Callable[[bytes], bytes],
        draw: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        """`sign`: with the fleet's root or a signer that it certified."""
        self._database, self._history, self._judge, self._issuer, self._pins = database, history, judge, issuer, pins
        self._sign, self._draw, self._clock = sign, draw, clock

    def recipient(self) -> tuple[bytes, bytes]:
        """Returns to whom owners seal their keys, and the word for it."""
        statement = IssuerStatement(self._issuer.recipient)
        return statement.recipient, self._sign(statement.encode())

    async def take(self, row: RequestRow, envelope: bytes, public_key: bytes, certificates: Sequence[bytes]) -> Taken:
        """Raises Invalid, Forbidden, WrongState, Unavailable."""
        spec = Spec.of_text(row.spec)
        if spec.source is not Source.IMPORTED or row.state != "active":
            raise WrongState("SOURCE", f"the request for {row.material} is not for a key that is imported")
        async with self._database.reading() as connection:
            line = next(iter(await lines.lines_of_request(connection, row.id)), None)
            members = await membership.members(connection, spec)
            hosts = await inventory.hosts_of(connection, [r.host_id for r in members])
            held = await lines.deliveries_of(connection, [line.id]) if line else []
        told = replace(spec, names=_names_told(certificates, public_key) or spec.names)  # policy is asked for what comes
        asked = replace(row, spec=told.text())
        decided = [(r, self._judge.decide(Act.IMPORT, asked, told, r, hosts.get(r.host_id), False)) for r in members]
        reachable = [resource for resource, decision in decided if decision.allowed and resource.reachable]
        targets = [resource for resource in reachable if self._pins.vouch(resource, hosts.get(resource.host_id))]
        if decided and not any(decision.allowed for _, decision in decided):
            raise Forbidden("POLICY", f"policy does not allow it: {decided[0][1].why}")
        if line is None or (not targets and not spec.escrow):
            raise WrongState("RESOURCES", "no module that is to have the key can be reached: it would be lost", "ask for escrow")
        if ended := _ended(certificates, public_key, self._clock()):
            raise Invalid("CERTIFICATES", f"the certificate has ended: {ended}", "have the key certified again first")
        number = max([line.newest, *(n for d in held for n in d.generations)]) + 1
        expires = int(self._clock()) + limits.ENVELOPE_LIFETIME
        sealed_to = [seal_to(r, row.material, number, expires) for r in targets]
        escrow = EscrowAs(line.id, number) if spec.escrow else None
        try:
            made = await self._issuer.take(row.id, envelope, public_key, certificates, sealed_to, escrow)
        except BadKey as error:
            raise Invalid("KEY", str(error)) from None
        except IssuerAway as error:
            raise Unavailable("ISSUER", str(error), "try again") from None
        policy = permits(decision for _, decision in decided)
        return Taken(line.id, number, made, targets, expires, _names(made.certificates), policy)

    async def store(self, connection: AsyncConnection, row: RequestRow, taken: Taken) -> None:
        """Raises WrongState where another one came in between, or the request was cancelled."""
        if row.state != "active":
            raise WrongState("CANCELLED", f"the request for {row.material} was cancelled", "ask for it again")
        line = await lines.line(connection, taken.line_id)
        if line is None or line.newest >= taken.number:
            raise WrongState("GENERATION", "another key came in between", "import it again")
        now, chain = self._clock(), [x509.load_der_x509_certificate(der) for der in taken.made.certificates]
        leaf = chain[0] if chain else None
        generation = GenerationRow(
            line_id=line.id,
            number=taken.number,
            state="issued",
            key_of=taken.number,
            public_key=taken.made.public_key,
            csr=taken.made.csr,
            names=text_of(taken.names),
            authority=Spec.of_text(row.spec).authority,
            chain=b"".join(one.public_bytes(Encoding.PEM) for one in chain).decode(),
            serial=f"{leaf.serial_number:x}" if leaf else "",
            not_before=int(leaf.not_valid_before_utc.timestamp()) if leaf else 0,
            not_after=int(leaf.not_valid_after_utc.timestamp()) if leaf else 0,
            drawn=self._draw(),
            created_at=now,
            why="it was imported",
        )
        known = {one.number: one for one in await lines.generations_of(connection, [line.id])}
        await lines.add_generation(connection, generation)
        await revoke_if_asked(connection, line, known.get(line.serving))
        rows = [
            {
                "line_id": line.id,
                "generation": taken.number,
                "resource_id": resource.id,
                "module_id": resource.module_id,
                "envelope": sealed,
                "expires_at": taken.expires_at,
            }
            for resource, sealed in zip(taken.targets, taken.made.envelopes, strict=True)
        ]
        await lines.add_envelopes(connection, rows)
        if taken.made.wrapped:
            await lines.put_escrow(connection, line.id, taken.number, taken.made.wrapped, int(now))
        await lines.change_line(connection, line.id, newest=taken.number, look_at=now)
        detail = {"generation": taken.number, "serial": generation.serial, "names": generation.names, **taken.policy}
        happened = Happened(Kind.IMPORTED, owner=row.owner, request_id=row.id, material=row.material, detail=detail)
        await self._history.add(connection, happened)


def _names_told(untrusted_certificates: Sequence[bytes], public_key: bytes) -> tuple[str, ...]:
    """Returns the names of the certificate that is for the key.  Raises Invalid."""
    try:
        found = [x509.load_der_x509_certificate(der) for der in untrusted_certificates]
        leaves = [one for one in found if requests.spki(one.public_key()) == public_key]
        return tuple(dict.fromkeys(str(name) for one in leaves for name in names.told_by(one)))
    except BadName as error:
        raise Invalid("CERTIFICATES", f"the certificate has a name of which policy cannot be asked: {error}") from None
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise Invalid("CERTIFICATES", "a certificate that came with the key cannot be read") from None


def _ended(certificates: Sequence[bytes], public_key: bytes, now: float) -> str:
    """Says when the key's certificate ended; empty: it has not, or there is none."""
    found = [x509.load_der_x509_certificate(der) for der in certificates]
    ends = [one.not_valid_after_utc for one in found if requests.spki(one.public_key()) == public_key]
    return next((f"{end:%Y-%m-%d %H:%M:%S} UTC" for end in ends if end.timestamp() <= now), "")


def _names(certificates: Sequence[bytes]) -> tuple[str, ...]:
    if not certificates:
        return ()
    try:
        return tuple(map(str, names.told_by(x509.load_der_x509_certificate(certificates[0]))))
    except ValueError:
        return ()
