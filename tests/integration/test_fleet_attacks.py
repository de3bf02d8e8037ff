"""Attacks on a fleet that worked once: hosts that lie, owners that reach for others' things, strangers, who writes the database.

Each test is the attack, with the real engine, store, policies and issuer; what it took, and from whom, is in its name.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hsmvisor.manager.policy.questions import Owner, Source
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.manager.wanted.spec import Spec
from support.fleet import Fleet
from support.light_host import LightGuest
from support.postgres import Postgres

Scenario = Callable[[Fleet], Awaitable[None]]
Play = Callable[..., None]

WEB: dict[str, Any] = {"material": "tls", "names": ("dns:{name}.example.net",), "lifetime": 3600}
SHARED: dict[str, Any] = {"material": "tls", "names": ("dns:www.example.net",), "lifetime": 3600, "source": Source.ISSUER}
EVERYBODY = '@id("all") permit (principal, action, resource);'


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with contextlib.closing(Postgres()) as server:
        yield server


def told(tmp_path: Path, scenario: Scenario, **options: Any) -> None:
    async def whole() -> None:
        fleet = await Fleet.begin(tmp_path, **options)
        try:
            await scenario(fleet)
        finally:
            await fleet.end()

    asyncio.run(whole())


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return lambda scenario, **options: told(tmp_path, scenario, **options)


@pytest.fixture(params=["sqlite", "postgresql"])
def play_on_both(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Where the widths of columns matter."""
    url = request.getfixturevalue("postgres").database() if request.param == "postgresql" else ""
    return lambda scenario, **options: told(tmp_path, scenario, url=url, **options)


def held(guest: LightGuest, material: str = "tls") -> int:
    current = guest.module.current(material)
    return current.number if current else 0


def common_name(guest: LightGuest) -> str:
    current = guest.module.current("tls")
    assert current is not None
    return x509.load_der_x509_certificate(current.certificates[0]).subject.rfc4514_string()


async def cancel(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.cancel(connection, request, False, "", request.owner)
    fleet.hub.lines()
    await fleet.settle()


async def rotate(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", False, False, "", "a test", "")
    fleet.hub.lines()
    await fleet.settle()


# ---- owners, and what is others' ---------------------------------------------------------------------------------------


def test_cancelling_what_was_denied_destroys_nobodys_keys(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        victim, mine = host.add("victim"), host.add("mine", owner="mallory")
        await fleet.ask(**WEB, resources=("h1/victim",))
        await fleet.settle()
        request = await fleet.ask("mallory", **WEB, selector={"kind": "VM"})
        await fleet.settle()
        host.restart()  # it tells all, and with it what the victim's module holds under this name
        await fleet.settle()
        assert (held(victim), held(mine)) == (1, 1)
        await cancel(fleet, request)
        assert (held(victim), held(mine)) == (1, 0)
        assert set(victim.module.told("tls")) == {1} and common_name(victim) == "CN=victim.example.net"

    play(scenario)


def test_a_material_of_the_same_name_takes_nobodys_place(play: Play) -> None:
    """Although policy allows both: a module knows materials by their names, and two under one never came to rest."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web")
        first = await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        names = ("dns:other.example.net",)
        second = await fleet.ask("mallory", **WEB | {"names": names}, resources=("h1/web",))
        shared = await fleet.ask("eve", **SHARED, selector={"kind": "VM"})
        await fleet.settle()
        assert common_name(guest) == "CN=web.example.net" and set(guest.module.told("tls")) == {1}
        for request in (second, shared):
            line = await fleet.line(request)
            assert line.stage == "denied" and "another request" in line.why
        await cancel(fleet, shared)
        assert held(guest) == 1
        await cancel(fleet, first)  # now the name is free
        assert common_name(guest) == "CN=other.example.net"

    play(scenario, policy=EVERYBODY)


def test_what_was_decided_for_one_owner_is_not_another_ones(play: Play) -> None:
    """Decisions are remembered: one about the same words of somebody else, or about the resource a moment ago, is none of these."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web", where="secret-site")
        await fleet.settle()
        spec = Spec("x", names=("dns:{where}.example.net",), selector={"kind": "VM"})
        async with fleet.database.transaction() as connection:
            assert (await fleet.asking.explain(connection, Owner("alice"), spec)).expected[0].decision.allowed
            others = await fleet.asking.explain(connection, Owner("mallory"), spec)
        assert not any(one.decision.allowed for one in others.expected)
        request = await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        guest.owner = "bob"  # within the same second
        await fleet.settle()
        assert [denial.action for denial in await fleet.denials(request)] == ["distribute"]

    play(scenario)
