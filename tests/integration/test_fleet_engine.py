"""The engine on both databases: from what an owner asks to what modules hold, with the time in the test's hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hsmvisor.manager.ca.interface import Issued, Keep, Later, Order, Reason, Refused, Window
from hsmvisor.manager.engine.health import HealthCheck
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import inventory, wanted
from hsmvisor.manager.wanted import membership
from hsmvisor.manager.wanted.asking import Denied
from hsmvisor.serving.errors import Invalid, WrongState
from hsmvisor_rpc.sealed.commands import Command
from hsmvisor_rpc.sealed.refusal import Reason as Refusing
from hsmvisor_rpc.sealed.refusal import Refusal
from support.fleet import POLICY, Fleet
from support.light_host import LightGuest, LightHost
from support.postgres import Postgres

Scenario = Callable[[Fleet], Awaitable[None]]
Play = Callable[..., None]

WEB = {"material": "tls", "names": ("dns:{name}.example.net",), "lifetime": 3600}
SHARED = {"material": "tls", "names": ("dns:www.example.net",), "lifetime": 3600, "source": Source.ISSUER}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with contextlib.closing(Postgres()) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    url = request.getfixturevalue("postgres").database() if request.param == "postgresql" else ""

    def run(scenario: Scenario, **options: Any) -> None:
        async def whole() -> None:
            fleet = await Fleet.begin(tmp_path, url, **options)
            try:
                await scenario(fleet)
            finally:
                await fleet.end()

        asyncio.run(whole())

    return run


def held(guest: LightGuest, material: str = "tls") -> int:
    current = guest.module.current(material)
    return current.number if current else 0


def leaf(guest: LightGuest, material: str = "tls") -> x509.Certificate:
    current = guest.module.current(material)
    assert current is not None
    return x509.load_der_x509_certificate(current.certificates[0])


def names_of(certificate: x509.Certificate) -> list[str]:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


# ---- a key of the module's own ---


def test_what_is_asked_for_serves_and_is_renewed_with_new_keys(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        assert held(guest) == 1 and names_of(leaf(guest)) == ["web-1.example.net"]
        keys = {guest.module.current("tls").public_key}
        for round in range(2, 8):
            await fleet.pass_(1800, 60)
            assert round <= held(guest) <= round + 1
            assert leaf(guest).not_valid_after_utc.timestamp() > fleet.clock()
            keys.add(guest.module.current("tls").public_key)
        assert len(keys) == 7 and len(guest.module.keys) == held(guest)  # rekey is the default
        line = await fleet.line(request)
        assert (line.stage, line.failures) == ("serving", 0)

    play(scenario)


def test_the_same_key_gets_a_new_certificate_where_the_rule_says_so(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",), renewal=Rule(rekey=False))
        await fleet.settle()
        key, serial = guest.module.current("tls").public_key, leaf(guest).serial_number
        await fleet.pass_(3600, 60)
        assert held(guest) >= 2 and guest.module.current("tls").public_key == key and leaf(guest).serial_number != serial
        assert len(guest.module.keys) == 1

    play(scenario)


def test_old_generations_do_not_pile_up(play: Play) -> None:
    """A module has a limit of its own, which would stop the renewal."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB | {"lifetime": 120}, resources=("web-1",))
        await fleet.settle()
        await fleet.pass_(3600, 10)
        states = [g.state for g in guest.module.materials["tls"].values()]
        assert held(guest) >= 50
        assert states.count("retiring") <= 7 and states.count("current") == 1

    play(scenario)


def test_a_bare_key_has_no_certificate_and_follows(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        rule = Rule(period=600)
        await fleet.ask(material="sign", bare=True, mode="follow", usage="request-signing", resources=("web-1",), renewal=rule)
        await fleet.settle()
        assert held(guest, "sign") == 1 and guest.module.current("sign").certificates == ()
        await fleet.pass_(1300, 60)
        assert held(guest, "sign") == 3

    play(scenario)


def test_a_generation_makes_so_many_signatures(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",), renewal=Rule(signatures=1000))
        await fleet.settle()
        guest.module.current("tls").operations = 999
        await fleet.settle()
        assert held(guest) == 1
        guest.module.current("tls").operations = 1000
        await fleet.pass_(70)
        assert held(guest) == 2

    play(scenario)


# ---- attributes ---


def test_a_resource_that_appears_is_served_and_one_that_loses_its_attributes_is_not(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        one = host.add("web-1", env="prod", tier="web")
        other = host.add("db-1", env="prod", tier="db")
        await fleet.settle()
        request = await fleet.ask(**WEB, selector={"env": "prod", "tier": "web"})
        await fleet.settle()
        assert held(one) == 1 and held(other) == 0
        new = host.add("web-2", env="prod", tier="web")
        await fleet.settle()
        assert held(new) == 1 and names_of(leaf(new)) == ["web-2.example.net"]
        one.attributes["env"] = "test"
        await fleet.settle()
        assert held(one) == 0 and {g.state for g in one.module.materials["tls"].values()} == {"destroyed"}
        assert [line.resource_id for line in await fleet.lines(request)] == ["h1/web-2"]
        del host.guests["web-2"]
        await fleet.settle()
        assert await fleet.lines(request) == []
        assert [e.resource_id for e in await fleet.events("taken_away")] == ["h1/web-1", "h1/web-2"]
        one.attributes["env"] = "prod"
        await fleet.settle()
        assert held(one) > 1  # a number is never used twice

    play(scenario)


def test_a_selector_may_name_kind_owner_and_host(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        first, second = await fleet.host("h1"), await fleet.host("h2")
        there, elsewhere, db = first.add("a"), second.add("a"), first.add("d", kind="database")
        await fleet.settle()
        await fleet.ask(**WEB, selector={"host": "h1", "kind": "VM", "owner": "alice"})
        await fleet.settle()
        assert (held(there), held(elsewhere), held(db)) == (1, 0, 0)

    play(scenario)


def test_a_name_that_a_resource_cannot_fill_is_not_made(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        good = host.add("a", env="prod", fqdn="a.example.net")
        bad = {
            "star": host.add("star", env="prod", fqdn="*.example.net"),
            "brace": host.add("brace", env="prod", fqdn="{name}"),
            "none": host.add("none", env="prod"),
            "list": host.add("list", env="prod", fqdn="a.example.net,b.example.net"),
            "null": host.add("null", env="prod", fqdn="a.example.net\x1b"[:-1] + "​"),
            "bank": host.add("bank", env="prod", fqdn="www.bank.example"),
        }
        await fleet.settle()
        request = await fleet.ask(material="tls", names=("dns:{fqdn}",), selector={"env": "prod"}, lifetime=3600)
        await fleet.settle()
        assert held(good) == 1
        for name, guest in bad.items():
            assert held(guest) == 0, name
        denied = {row.resource_id: row.why for row in await fleet.denials(request)}
        assert "names of the bank are not given out here" in denied["h1/bank"]

    play(scenario)


# ---- a key for several ---


def test_a_shared_key_comes_sealed_to_all_and_a_newcomer_makes_it_anew(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guests = [host.add(f"web-{n}", env="prod") for n in range(3)]
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        assert [held(guest) for guest in guests] == [1, 1, 1]
        assert len({guest.module.current("tls").public_key for guest in guests}) == 1
        late = host.add("web-9", env="prod")
        await fleet.settle()
        assert [held(guest) for guest in (*guests, late)] == [2, 2, 2, 2]
        assert len({guest.module.current("tls").public_key for guest in (*guests, late)}) == 1
        assert (await fleet.line(request)).stage == "serving"

    play(scenario)


def test_a_kept_key_comes_to_a_newcomer(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guests = [host.add(f"web-{n}", env="prod") for n in range(2)]
        await fleet.settle()
        await fleet.ask(**SHARED, selector={"env": "prod"}, escrow=True)
        await fleet.settle()
        guests.append(host.add("web-9", env="prod"))
        await fleet.settle()
        assert [held(guest) for guest in guests] == [1, 1, 1]
        assert len({guest.module.current("tls").public_key for guest in guests}) == 1

    play(scenario)


def test_a_shared_key_that_is_kept_gets_a_new_certificate_for_newcomers_too(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guests = [host.add("web-1", env="prod")]
        await fleet.settle()
        await fleet.ask(**SHARED, selector={"env": "prod"}, escrow=True, renewal=Rule(rekey=False))
        await fleet.settle()
        await fleet.pass_(2400, 60)
        assert held(guests[0]) == 2
        guests.append(host.add("web-2", env="prod"))
        await fleet.settle()
        assert [held(guest) for guest in guests] == [2, 2]
        assert len({guest.module.current("tls").public_key for guest in guests}) == 1

    play(scenario)


def test_two_steps_wait_for_everybody_or_for_the_owner(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        first, second = await fleet.host("h1"), await fleet.host("h2")
        one, other = first.add("a", env="prod"), second.add("b", env="prod")
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"}, two_step=True)
        await fleet.settle(away=("h2",))
        assert (held(one), held(other)) == (0, 0)
        assert one.module.materials["tls"][1].state == "staged"
        await fleet.settle()
        assert (held(one), held(other)) == (1, 1)
        fleet.clock.pass_(1)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", False, False, "", "alice", "")
        await fleet.settle(away=("h2",))
        assert (held(one), held(other)) == (1, 1)
        async with fleet.database.transaction() as connection:
            await fleet.asking.activate(connection, request, "")
        await fleet.settle(away=("h2",))
        assert (held(one), held(other)) == (2, 1)
        await fleet.settle()
        assert (held(one), held(other)) == (2, 2)

    play(scenario)


# ---- what goes wrong ---


def test_a_host_that_was_away_for_three_renewals_comes_to_the_newest(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        near, far = await fleet.host("h1"), await fleet.host("h2")
        one, own, shared = near.add("a", env="prod"), far.add("own"), far.add("b", env="prod")
        await fleet.settle()
        await fleet.ask(**SHARED, selector={"env": "prod"})
        mine = await fleet.ask(**WEB | {"material": "own"}, resources=("h2/own",))
        await fleet.settle()
        assert (held(one), held(shared), held(own, "own")) == (1, 1, 1)
        await fleet.pass_(3 * 2400, 60, away=("h2",))
        assert held(one) >= 4 and (held(shared), held(own, "own")) == (1, 1)
        assert [d.state for d in await fleet.deliveries(await fleet.line(mine))] != []
        await fleet.settle()
        assert held(shared) == held(one) and shared.module.current("tls").public_key == one.module.current("tls").public_key
        assert leaf(own, "own").not_valid_after_utc.timestamp() > fleet.clock()
        assert {e.kind for e in await fleet.events()} >= {"host_back"}

    play(scenario)


def test_a_host_that_restarts_in_the_middle_is_given_the_same_again(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        for _ in range(6):  # carried out, but it dies before it tells
            await fleet.engine.turn()
            await fleet.engine.turn()
            await fleet.exchange(host)
            host.restart()
        await fleet.settle()
        assert held(guest) == 1 and guest.module.activations == 1 and len(guest.module.keys) == 1

    play(scenario)


def test_a_module_that_was_made_anew_gets_its_material_again(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1", env="prod")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.ask(**SHARED | {"material": "all"}, selector={"env": "prod"})
        await fleet.settle()
        assert (held(guest), held(guest, "all")) == (1, 1)
        again = host.add("web-1", env="prod")
        await fleet.settle()
        assert held(again) == 2 and held(again, "all") == 2

    play(scenario)


def test_a_module_that_was_set_back_is_brought_up_to_date(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        import copy

        host = await fleet.host("h1")
        guest = host.add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        backup = copy.deepcopy(guest.module.materials), guest.module.sequence
        await fleet.pass_(2400, 60)
        assert held(guest) == 2
        guest.module.materials, guest.module.sequence = backup
        host.restart()
        await fleet.settle()
        assert held(guest) == 3

    play(scenario)


def test_a_module_of_another_root_is_left_alone(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1", root=b"\1" * 32)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        assert guest.module.sequence == 0
        assert "obeys another root" in (await fleet.line(request)).why

    play(scenario)


class Moody:
    """An authority that fails when it is told to."""

    kind = "moody"

    def __init__(self) -> None:
        self.inner: Any = None
        self.wrong: Exception | None = None
        self.asked: list[float] = []
        self.revoked: list[tuple[int, Reason]] = []
        self.suggested: Window | None = None
        self.clock: Any = None

    async def issue(self, order: Order, keep: Keep) -> Issued:
        self.asked.append(self.clock())
        if self.wrong is not None:
            raise self.wrong
        return await self.inner.issue(order, keep)

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        if self.wrong is not None:
            raise self.wrong
        self.revoked.append((x509.load_der_x509_certificate(certificate).serial_number, reason))
        await self.inner.revoke(certificate, reason)

    async def window(self, certificate: bytes) -> Window | None:
        return self.suggested

    async def close(self) -> None:
        return


async def moody(fleet: Fleet) -> Moody:
    found = Moody()
    found.inner, found.clock = fleet.ca, fleet.clock
    fleet.authorities["builtin"] = found
    return found


@pytest.mark.parametrize("wrong", [Later("not now"), Refused("never")])
def test_an_authority_that_fails_is_asked_less_and_less_often_and_after_the_end_too(play: Play, wrong: Exception) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        ca.wrong = wrong
        ca.asked.clear()
        await fleet.pass_(2 * 3600, 30)
        assert 4 <= len(ca.asked) <= 40  # some before the end, and some after it
        assert max(ca.asked) > leaf(guest).not_valid_after_utc.timestamp()
        pauses = [b - a for a, b in zip(ca.asked, ca.asked[1:], strict=False)]
        assert min(pauses) >= 15
        line = await fleet.line(request)
        assert line.failures >= 4 and str(wrong) in line.why
        kinds = [e.kind for e in await fleet.events()]
        assert kinds.count("expiring") == 1 and kinds.count("expired") == 1 and "failed" in kinds
        ca.wrong = None
        await fleet.pass_(1800, 30)
        assert held(guest) >= 2 and leaf(guest).not_valid_after_utc.timestamp() > fleet.clock()
        assert (await fleet.line(request)).failures == 0
        assert "recovered" in [e.kind for e in await fleet.events()]

    play(scenario)


def test_an_authority_that_says_when_is_not_asked_before(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        ca.wrong = Later("busy", 5000)
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        await fleet.pass_(4900, 60)
        assert len(ca.asked) == 1
        await fleet.pass_(300, 60)
        assert len(ca.asked) == 2

    play(scenario)


def test_a_window_that_the_authority_suggests_wins(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        await fleet.settle()
        now = fleet.clock()
        ca.suggested = Window(now + 3000, now + 3100, 300, "https://example.net/why")
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        await fleet.pass_(2700, 60)  # by its lifetime it would have been renewed long ago
        assert held(guest) == 1 and "https://example.net/why" in (await fleet.line(request)).why
        ca.suggested = Window(now, now + 1, 300, "https://example.net/now")
        await fleet.pass_(300, 60)
        assert held(guest) == 2

    play(scenario)


def test_a_module_that_refuses_is_told_again_later(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1")
        said: list[str] = []

        def refuse(module: str, command: Command) -> Refusal | None:
            said.append(command.action)
            return Refusal(Refusing.LIMIT, "a module has at most 256 materials") if len(said) < 3 else None

        host.refuse = refuse
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        assert "at most 256 materials" in (await fleet.line(request)).why
        await fleet.pass_(4 * 3600, 300)
        assert held(guest) >= 1 and (await fleet.line(request)).failures == 0

    play(scenario)


# ---- what owners and operators do ---


def test_asking_again_changes_nothing_and_asking_otherwise_does(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        first = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        fleet.clock.pass_(30)
        again = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        assert again == first and held(guest) == 1
        await fleet.ask(**WEB | {"names": ("dns:{name}.example.net", "dns:www.example.net")}, resources=("web-1",))
        await fleet.settle()
        assert held(guest) == 2 and names_of(leaf(guest)) == ["web-1.example.net", "www.example.net"]
        await fleet.ask(
            **WEB | {"names": ("dns:{name}.example.net", "dns:www.example.net")}, resources=("web-1",), renewal=Rule(enabled=False)
        )
        await fleet.settle()
        assert held(guest) == 2
        await fleet.pass_(3600, 300)
        assert held(guest) == 2  # the owner opted out
        with pytest.raises(WrongState):
            await fleet.ask(**SHARED, resources=("web-1",))

    play(scenario)


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_cancelled_is_taken_away_or_stays(play: Play, keep: bool) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        own, shared = host.add("a", env="prod"), host.add("b", env="prod")
        await fleet.settle()
        requests = [
            await fleet.ask(**WEB | {"material": "own"}, resources=("a",)),
            await fleet.ask(**SHARED, selector={"env": "prod"}),
        ]
        await fleet.settle()
        for request in requests:
            async with fleet.database.transaction() as connection:
                await fleet.asking.cancel(connection, request, keep, "no more", "alice")
        await fleet.settle()
        assert [held(own, "own"), held(own), held(shared)] == ([1, 1, 1] if keep else [0, 0, 0])
        await fleet.pass_(3600, 300)
        assert [held(own, "own"), held(own), held(shared)] == ([1, 1, 1] if keep else [0, 0, 0])
        again = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        assert again.id == requests[1].id and held(own) == held(shared) >= 1

    play(scenario)


def test_an_urgent_rotation_ends_the_old_key_and_revokes_its_certificate(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        old = leaf(guest).serial_number
        fleet.clock.pass_(5)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", True, False, "", "alice", "it leaked")
        await fleet.settle()
        assert held(guest) == 2 and guest.module.materials["tls"][1].state == "destroyed"
        assert ca.revoked == [(old, Reason.KEY_COMPROMISE)]

    play(scenario)


def test_a_revoked_certificate_is_replaced_at_once(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        old = leaf(guest).serial_number
        fleet.clock.pass_(5)
        async with fleet.database.transaction() as connection:
            await fleet.asking.revoke(connection, request, "", 0, "key_compromise", "alice", "")
        await fleet.settle()
        assert ca.revoked == [(old, Reason.KEY_COMPROMISE)]
        assert held(guest) == 2 and guest.module.materials["tls"][1].state == "destroyed"

    play(scenario)


def test_the_generation_before_serves_again_when_somebody_says_so(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guests = [host.add("a", env="prod"), host.add("b", env="prod")]
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        with pytest.raises(WrongState):
            async with fleet.database.transaction() as connection:
                await fleet.asking.roll_back(connection, request, "", "", "alice", fleet.clock())
        await fleet.pass_(2400, 60)
        assert [held(guest) for guest in guests] == [2, 2]
        async with fleet.database.transaction() as connection:
            assert await fleet.asking.roll_back(connection, request, "", "it is slow", "alice", fleet.clock()) == [1]
        await fleet.settle()
        assert [held(guest) for guest in guests] == [1, 1]
        await fleet.pass_(1200, 30)
        assert [held(guest) for guest in guests] == [3, 3]  # the old one ends soon

    play(scenario)


def test_a_new_generation_that_is_not_well_is_rolled_back(play: Play, tmp_path: Path) -> None:
    program = tmp_path / "check"
    program.write_text(
        "#!/usr/bin/python3\nimport json, sys\ntold = json.load(sys.stdin)\n"
        "assert told['material'] == 'tls' and told['certificate'].startswith('-----BEGIN CERT')\n"
        "print('generation 2 is ill')\nsys.exit(told['generation'] == 2)\n"
    )
    program.chmod(0o755)

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",), health="web")
        await fleet.settle()
        assert held(guest) == 1
        fleet.clock.pass_(1)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", False, False, "", "alice", "")
        await fleet.settle()
        assert held(guest) == 1 and guest.module.materials["tls"][2].state == "retiring"
        events = {e.kind: e.detail for e in await fleet.events()}
        assert "generation 2 is ill" in str(events["health_failed"])
        await fleet.pass_(3600, 60)
        assert held(guest) >= 3

    play(scenario, health={"web": HealthCheck("web", [str(program)])})


# ---- policy ---


def test_what_policy_forbids_everywhere_is_refused_with_its_rule(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        for spec, why in (
            ({"names": ("dns:www.bank.example",)}, "no-bank: names of the bank are not given out here"),
            ({"names": ("dns:www.example.net",), "owner": "mallory"}, "no rule permits it"),
        ):
            with pytest.raises(Denied) as caught:
                await fleet.ask(material="tls", resources=("h1/web-1",), **spec)
            assert why in caught.value.detail
        await fleet.settle()
        assert held(guest) == 0

    play(scenario)


def test_a_policy_that_changes_stops_what_comes_and_takes_nothing_away(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1", env="prod")
        await fleet.settle()
        request = await fleet.ask(**WEB, selector={"env": "prod"})
        await fleet.settle()
        forbids = '@id("stop") @reason("no more renewals") forbid (principal, action == Action::"renew", resource);'
        fleet.policies = Policies(POLICY + forbids, 2)
        await fleet.pass_(3000, 60)
        assert held(guest) == 1
        line = await fleet.line(request)
        assert "no more renewals" in line.why and line.stage == "denied"
        distributes = '@id("full") @reason("full") forbid (principal, action == Action::"distribute", resource);'
        fleet.policies = Policies(POLICY + distributes, 3)
        new = host.add("web-2", env="prod")
        await fleet.settle()
        assert held(new) == 0 and held(guest) == 1
        denied = {(row.resource_id, row.action) for row in await fleet.denials(request)}
        assert ("h1/web-2", "distribute") in denied
        fleet.policies = Policies(POLICY, 4)
        await fleet.pass_(7200, 120)
        assert held(guest) >= 2

    play(scenario)


def test_an_untrusted_host_is_given_nothing(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1", trusted=False)).add("web-1", env="prod")
        await fleet.settle()
        with pytest.raises(Denied):
            await fleet.ask(**WEB, selector={"env": "prod"})
        await fleet.settle()
        assert held(guest) == 0

    play(scenario)


# ---- hosts that lie ---


def test_a_host_speaks_for_itself_alone(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        honest, liar = await fleet.host("h1"), await fleet.host("h2", owners="bob")
        guest = honest.add("web-1", owner="bob", env="prod")
        await fleet.settle()
        liar.add("web-1", owner="bob", env="prod")
        liar.forged["web-1"] = honest.report(guest).signed_identity  # of the other host's module
        liar.add("web-2", owner="alice", env="prod")  # an owner that this host is not for
        await fleet.settle()
        assert liar.refused["web-1"].reason == "IDENTITY"
        assert liar.refused["web-2"].reason == "OWNER"
        request = await fleet.ask(owner="bob", **WEB, selector={"env": "prod"})
        await fleet.settle()
        assert held(guest) == 1
        assert [line.resource_id for line in await fleet.lines(request) if line.serving] == ["h1/web-1"]
        assert {e.host_id for e in await fleet.events("resource_refused")} == {liar.id.hex()}

    play(scenario)


def test_two_guests_of_a_host_have_not_one_module(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        first, second = host.add("a"), host.add("b")
        second.module = first.module
        await fleet.settle()
        assert host.refused["b"].reason == "MODULE"

    play(scenario)


def test_a_host_that_is_removed_leaves_nothing_behind(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("a", env="prod")
        other: LightHost = await fleet.host("h2")
        stays = other.add("b", env="prod")
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        async with fleet.database.transaction() as connection:
            row = await inventory.host(connection, host.id.hex())
            assert row is not None
            assert await membership.forget_host(connection, fleet.history, row, fleet.clock()) == 1
        del fleet.hosts["h1"]
        await fleet.settle()
        assert [d.resource_id for d in await fleet.deliveries(await fleet.line(request))] == ["h2/b"]
        assert held(stays) == 1

    play(scenario)


# ---- asking for what cannot be ---


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"names": ()}, "one name"),
        ({"names": ("dns:*.",)}, "host name"),
        ({"names": ("dns:{name}.x.net",), "source": Source.ISSUER}, "one certificate"),
        ({"resources": ()}, "for whom"),
        ({"resources": ("nobody",)}, "no resource"),
        ({"key_type": "RSA-1024"}, "key_type"),
        ({"authority": "other"}, "no authority"),
        ({"health": "other"}, "health check"),
        ({"escrow": True}, "never leaves"),
        ({"mode": "follow"}, "bare"),
        ({"renewal": Rule(cron="* * *")}, "schedule"),
        ({"lifetime": -1}, "lifetime"),
        ({"material": "x" * 65}, "64"),
        ({"selector": {str(n): "x" for n in range(17)}}, "16"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path, spec: dict[str, Any], word: str) -> None:
    async def whole() -> None:
        fleet = await Fleet.begin(tmp_path)
        (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        asked = {"material": "tls", "names": ("dns:a.example.net",), "resources": ("web-1",)} | spec
        with pytest.raises(Invalid) as caught:
            await fleet.ask(**asked)
        assert word in caught.value.detail
        async with fleet.database.transaction() as connection:
            assert await wanted.requests_after(connection, "", 10) == []
        await fleet.end()

    asyncio.run(whole())
