"""A manager that dies at any step of a delivery or a renewal: another one goes on, and there is exactly one outcome.

The steps are found by counting: each transaction is one, before and after its commit, and so is each word to an authority and to
the issuer.  The walk goes on until nobody dies any more (support/counts.py), so a step that is added is walked too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hsmvisor.manager.ca.interface import Issued, Keep, Order, Reason, Window
from hsmvisor.manager.engine.engine import LEASE
from hsmvisor.manager.policy.measured import Measured
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.manager.store.tables import certificates
from sqlalchemy import select
from support import counts
from support.fleet import Fleet
from support.light_host import LightGuest
from support.postgres import Postgres
from support.scenarios import SHARED, WEB
from support.soft_tpm import SoftTpm

KINDS: dict[str, dict[str, Any]] = {
    "own": WEB | {"resources": ("a",)},
    "measured": WEB | {"resources": ("a",), "measured": ("golden",)},
    "same-key": WEB | {"resources": ("a",), "renewal": Rule(rekey=False)},
    "shared": SHARED | {"selector": {"env": "prod"}},
    "kept": SHARED | {"selector": {"env": "prod"}, "escrow": True, "two_step": True},
}


class Dies(BaseException):
    """Not an error that anybody handles."""


class Steps:
    """Dies at the step of this number."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count, self.walking = at, 0, True

    @property
    def died(self) -> bool:
        return self.count >= self.at

    def step(self) -> None:
        if not self.walking:
            return
        self.count += 1
        if self.count == self.at:
            self.walking = False
            raise Dies

    def walk(self, fleet: Fleet) -> None:
        """Has the fleet's manager walk our steps."""
        real = fleet.database.transaction

        @contextlib.asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            async with real() as connection:
                yield connection
                self.step()  # before the commit: nothing of it is there
            self.step()  # after it

        fleet.database.transaction = transaction  # type: ignore[method-assign]
        fleet.authorities["builtin"] = Stepping(fleet.ca, self)
        issuer = fleet.issuer
        for name in ("make", "reseal"):
            self._wrap(issuer, name)

    def _wrap(self, thing: Any, name: str) -> None:
        real = getattr(type(thing), name)

        async def call(*args: Any) -> Any:
            self.step()
            done = await real(thing, *args)
            self.step()
            return done

        setattr(thing, name, call)


class Stepping:
    kind = "builtin"

    def __init__(self, inner: Any, steps: Steps) -> None:
        self._inner, self._steps = inner, steps

    async def issue(self, order: Order, keep: Keep) -> Issued:
        self._steps.step()
        issued: Issued = await self._inner.issue(order, keep)
        self._steps.step()
        return issued

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        self._steps.step()
        await self._inner.revoke(certificate, reason)
        self._steps.step()

    async def window(self, certificate: bytes) -> Window | None:
        return None

    async def close(self) -> None:
        return


Act = Callable[[Fleet, RequestRow], Awaitable[None]]


async def nothing(fleet: Fleet, request: RequestRow) -> None:
    return


async def rotate(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", True, True, "key_compromise", "alice", "")


async def cancel(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.cancel(connection, request, False, "", "alice")


async def _until_it_dies(fleet: Fleet, steps: Steps, restarts: bool) -> None:
    """Lives until it dies or has nothing more to do; then another one takes over.  `restarts`: the hosts do so too."""
    with contextlib.suppress(Dies):
        await fleet.settle()
    steps.walking = False
    if not steps.died:
        return
    await fleet.reopen()
    if restarts:
        for host in fleet.hosts.values():  # what hosts were told and had not answered they tell to the next one
            host.restart()
    fleet.clock.pass_(LEASE + 1)
    async with fleet.database.transaction() as connection:
        await lines.rescue(connection, fleet.clock())
    await fleet.settle()


async def _walk(directory: Path, url: str, kind: str, act: Act, at: int, before: bool, restarts: bool) -> bool:
    """`before`: the material serves already when the steps begin.  Returns whether somebody died."""
    fleet = await Fleet.begin(directory, url)
    try:
        host = await fleet.host("h1")
        guests = [host.add("a", env="prod"), host.add("b", env="prod")]
        host.tpms["a"] = SoftTpm().boot(b"kernel")
        fleet.measured = {"golden": Measured("golden", {4: (host.tpms["a"].pcrs[4],)})}
        await fleet.settle()
        request = await fleet.ask(**KINDS[kind])
        if before:
            await fleet.settle()
            fleet.clock.pass_(5 if act is not nothing else 1801)  # or its renewal is due
            if act is not nothing:
                await act(fleet, request)
        steps = Steps(at)
        steps.walk(fleet)
        await _until_it_dies(fleet, steps, restarts)
        await _is_one_outcome(fleet, request, guests if kind in ("shared", "kept") else guests[:1], act, before)
        return steps.died
    finally:
        await fleet.end()


async def _is_one_outcome(fleet: Fleet, request: RequestRow, guests: list[LightGuest], act: Act, before: bool) -> None:
    if act is cancel:
        for guest in guests:
            assert {g.state for g in guest.module.materials["tls"].values()} == {"destroyed"}
        assert await fleet.lines(request) == []
        return
    line = await fleet.line(request)
    generations = {g.number: g for g in await fleet.generations(line)}
    serving = [g for g in generations.values() if g.state == "serving"]
    assert [g.number for g in serving] == [line.serving] and line.stage == "serving" and not line.failures, line
    current = {guest.module.current("tls").number for guest in guests}  # type: ignore[union-attr]
    assert current == {line.serving}
    for guest in guests:
        there = guest.module.current("tls")
        assert there is not None
        leaf = x509.load_der_x509_certificate(there.certificates[0])
        assert f"{leaf.serial_number:x}" == serving[0].serial
        states = [g.state for g in guest.module.materials["tls"].values()]
        assert "staged" not in states
        assert guest.module.activations == (2 if before else 1)  # nobody has seen two of them come
        if act is rotate:
            assert states.count("retiring") == 0
    async with fleet.database.transaction() as connection:
        rows = (await connection.execute(select(certificates.c.serial, certificates.c.revoked_at))).all()
    assert len({row.serial for row in rows}) == len(rows) <= (2 if before else 1) + 1  # a lost key costs one, at most
    if act is rotate:
        assert sum(bool(row.revoked_at) for row in rows) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "act", "before"),
    [
        ("own", nothing, False),
        ("own", nothing, True),
        ("own", rotate, True),
        ("own", cancel, True),
        ("measured", nothing, False),
        ("measured", nothing, True),
        ("same-key", nothing, True),
        ("shared", nothing, False),
        ("shared", nothing, True),
        ("kept", rotate, True),
        ("kept", cancel, True),
    ],
)
@pytest.mark.parametrize("restarts", [True, False], ids=["hosts-restart", "hosts-go-on"])
@pytest.mark.timeout(600)
def test_a_manager_may_die_at_every_step(tmp_path: Path, kind: str, act: Act, before: bool, restarts: bool) -> None:
    for at in counts.steps(16):
        directory = tmp_path / str(at)
        directory.mkdir()
        if not asyncio.run(_walk(directory, "", kind, act, at, before, restarts)):
            break
    assert at > 10, "so few steps are none"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_manager_may_die_at_every_step_with_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    """The simplest walk alone: a step costs a database of its own, which is most of a second."""
    for at in counts.steps(16):
        directory = tmp_path / str(at)
        directory.mkdir()
        if not asyncio.run(_walk(directory, postgres.database(), "own", nothing, at, True, restarts=False)):
            break
    assert at > 10, "so few steps are none"
