"""What owners and operators do, and what policy says to it; on both databases."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.manager.ca.interface import Reason
from hsmvisor.manager.engine.health import HealthCheck
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import wanted
from hsmvisor.manager.wanted.asking import Denied
from hsmvisor.serving.errors import Invalid, WrongState
from support.fleet import POLICY, Fleet
from support.scenarios import SHARED, WEB, Play, held, leaf, moody, names_of

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
