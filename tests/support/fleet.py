"""A manager without a process, and its hosts: the real engine, store, policies and authority; time is the test's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.manager.ca.builtin.authority import BuiltinCa, open_authority
from hsmvisor.manager.ca.builtin.keys import FileKeys
from hsmvisor.manager.ca.interface import Ca
from hsmvisor.manager.engine.engine import Engine
from hsmvisor.manager.engine.health import HealthCheck
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.measuring import ATTEST
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.results import Results
from hsmvisor.manager.engine.signing import Commands
from hsmvisor.manager.history.events import Event, History
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.inventory.reports import Reports
from hsmvisor.manager.issuer.client import Issuer
from hsmvisor.manager.issuer.settings import FileEscrow, Settings
from hsmvisor.manager.link.exchange import Exchange, Exchanges
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.measured import Measured
from hsmvisor.manager.policy.questions import Owner, Source
from hsmvisor.manager.store import inventory, lines, wanted
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import DeliveryRow, GenerationRow, HostRow, LineRow, RequestRow
from hsmvisor.manager.wanted.asking import Asking
from hsmvisor.manager.wanted.judging import Judge
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor_rpc.sealed.commands import Signer, raw_public
from support.light_host import LightHost

START = 1_800_000_000.0

POLICY = """
@id("own-resources")
permit (principal, action, resource) when { resource.owner == principal && resource.host.trusted };
@id("no-bank") @reason("names of the bank are not given out here")
forbid (principal, action, resource) when { context.touches.contains("bank.example") };
"""


class Clock:
    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Fleet:
    """Opened by `await Fleet.begin(...)`."""

    hosts: dict[str, LightHost]
    database: Database

    @classmethod
    async def begin(
        cls,
        directory: Path,
        url: str = "",
        policy: str = POLICY,
        authorities: Mapping[str, Ca] | None = None,
        health: Mapping[str, HealthCheck] | None = None,
        clock: Clock | None = None,
        issuer: Issuer | None = None,
    ) -> Fleet:
        self = cls()
        self.directory, self.clock, self.hosts = directory, clock or Clock(), {}
        self.url = url or f"sqlite:///{directory / 'manager.db'}"
        self.root = Ed25519PrivateKey.generate()
        self.root_public = raw_public(self.root.public_key())
        self.pins = Pins(bytes(32), self.root_public)
        self.policies = Policies(policy, 1)
        self.measured: dict[str, Measured] = {}  #: what guests' boots may have to be
        self.given, self.health = authorities, dict(health or {})
        self.issuer = issuer or Issuer(Settings(directory / "issuer.key", FileEscrow(directory / "escrow.key")))
        self.draw = random.Random(1).random
        self._issues = False
        await self.open()
        return self

    async def open(self) -> None:
        """As a manager that starts; the database and the hosts are as they were."""
        self.database = Database(self.url)
        await self.database.migrate()
        self.history = History(self.database, (), self.clock)
        if self.given is None:
            keys = FileKeys(self.directory / "ca")
            self.ca: BuiltinCa = await open_authority("builtin", keys, self.database, clock=self.clock)
            self.authorities: dict[str, Ca] = {"builtin": self.ca}
        else:
            self.authorities = dict(self.given)
        self.hub = Hub()
        self.judge = Judge(lambda: self.policies, self.history, self.clock, lambda: self.measured)
        usual, measured = next(iter(self.authorities)), lambda: self.measured
        self.asking = Asking(self.history, self.judge, self.authorities, usual, self.health, self.clock, measured)
        self.parts = Parts(
            database=self.database,
            history=self.history,
            judge=self.judge,
            commands=Commands(lambda: Signer(self.root), self.clock),
            issuer=self.issuer,
            pins=self.pins,
            authorities=self.authorities,
            health=self.health,
            hub=self.hub,
            clock=self.clock,
            draw=self.draw,
            measurements=measured,
        )
        self.engine = Engine(self.parts)
        reports = Reports(self.history, self.root_public, self.clock)
        results = Results(self.history, self.clock)
        self.exchanges = Exchanges(self.database, self.history, reports, results, self.hub, self.clock)

    async def close(self) -> None:
        await self.history.close()
        await self.database.close()

    async def end(self) -> None:
        await self.close()
        await self.issuer.close()

    async def reopen(self) -> None:
        await self.close()
        await self.open()

    # ---- hosts -------------------------------------------------------------------------------------------------------

    async def host(self, name: str, owners: str = "", trusted: bool = True) -> LightHost:
        made = self.hosts[name] = LightHost(name, self.root_public, self.clock)
        row = HostRow(
            id=made.id.hex(),
            name=name,
            host_key=made.public,
            pin=self.pins.pin(made.id.hex(), name),
            state="joined",
            trusted=int(trusted),
            owners=owners,
            certificate=b"",
            certificate_before=b"",
            certificate_ends_at=0,
            joined_at=int(self.clock()),
            seen_at=0,
            version="",
            session="",
            number=0,
            away=0,
        )
        async with self.database.transaction() as connection:
            await inventory.put_host(connection, row)
        return made

    async def row_of(self, host: LightHost) -> HostRow:
        async with self.database.transaction() as connection:
            row = await inventory.host(connection, host.id.hex())
        assert row is not None
        return row

    async def exchange(self, host: LightHost, carry_out: bool = True) -> int:
        """One exchange, and what came of it is carried out.  Returns how much there was of it."""
        row = await self.row_of(host)
        everything = host.number == 0
        now = {guest.name: host.report(guest) for guest in host.guests.values()}
        changed = [report for name, report in now.items() if everything or _differs(host.told.get(name), report)]
        gone = [name for name in host.told if name not in now]
        results = list(host.results)  # told again if no answer comes
        host.number += 1
        told = Exchange(host.session, host.number, everything, changed, gone, results, 0, "light")
        answer = await self.exchanges.exchange(row, told)
        if answer.tell_all:
            host.number = 0
            return 1 + await self.exchange(host, carry_out)
        host.results = host.results[len(results) :]
        host.refused |= {one.name: one for one in answer.refused}
        host.told = now
        if carry_out:
            for command in answer.commands:
                answer_to = host.attest if command.action == ATTEST else host.carry_out
                host.results.append(answer_to(command.id, command.module, command.signed))
        return len(answer.commands) + len(results) + len(changed) + len(gone)

    async def settle(self, away: tuple[str, ...] = (), turns: int = 200) -> None:
        """Until nobody has anything to do at this moment."""
        quiet = 0
        for _ in range(turns):
            done = await self.engine.turn()
            for host in self.hosts.values():
                if host.name not in away:
                    done += await self.exchange(host)
            quiet = 0 if done else quiet + 1
            if quiet == 2:  # an exchange may have woken somebody without having anything to tell
                return
        raise AssertionError("it never settles")

    async def pass_(self, seconds: float, step: float = 15.0, away: tuple[str, ...] = ()) -> None:
        """Lets time pass, hosts telling that they live."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(self.clock.now + step, end)
            await self.engine.sweep()
            await self.settle(away)

    # ---- owners ------------------------------------------------------------------------------------------------------

    async def ask(self, owner: str = "alice", groups: tuple[str, ...] = (), **spec: Any) -> RequestRow:
        if spec.get("source") not in (None, Source.MODULE) and not self._issues:
            self._issues = True
            await self.issuer.start()
        async with self.database.transaction() as connection:
            row = await self.asking.apply(connection, Owner(owner, frozenset(groups)), Spec(**spec))
        self.hub.lines()
        return row

    async def lines(self, request: RequestRow) -> list[LineRow]:
        async with self.database.transaction() as connection:
            return await lines.lines_of_request(connection, request.id)

    async def line(self, request: RequestRow, resource: str = "") -> LineRow:
        found = [line for line in await self.lines(request) if resource in ("", line.resource_id)]
        assert len(found) == 1, found
        return found[0]

    async def generations(self, line: LineRow) -> list[GenerationRow]:
        async with self.database.transaction() as connection:
            return await lines.generations_of(connection, [line.id])

    async def deliveries(self, line: LineRow) -> list[DeliveryRow]:
        async with self.database.transaction() as connection:
            return await lines.deliveries_of(connection, [line.id])

    async def denials(self, request: RequestRow) -> list[Any]:
        async with self.database.transaction() as connection:
            return await wanted.denied(connection, request.id)

    async def events(self, kind: str = "") -> list[Event]:
        found, _ = await self.history.page(size=1000, kind=kind)
        return found[::-1]

    async def refusals(self) -> set[str]:
        """The guests that were not taken."""
        names = {host.id.hex(): host.name for host in self.hosts.values()}
        return {f"{names[event.host_id]}/{event.detail['name']}" for event in await self.events("resource_refused")}


def told_by(host: LightHost, number: int = 0, *, everything: bool = False, wait: float = 0, **told: Any) -> Exchange:
    """An exchange of it; `number`: 0 = the next one."""
    host.number = number or host.number + 1
    found = {"reports": [], "gone": [], "results": [], **told}
    return Exchange(host.session, host.number, everything, wait=wait, version="light", **found)


def _differs(before: Any, now: Any) -> bool:
    if before is None:
        return True
    fields = ("kind", "owner", "attributes", "module", "sequence", "materials")
    return any(getattr(before, name) != getattr(now, name) for name in fields)
