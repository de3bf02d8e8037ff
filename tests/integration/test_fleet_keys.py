"""Which key a generation has: a new one, the one before's, its owner's; on both databases."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import inventory
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.serving.errors import Invalid, WrongState
from support.fleet import Clock, Fleet
from support.importing import import_key
from support.light_host import LightGuest
from support.scenarios import SHARED, WEB, Play, held, leaf

DAY = 86400.0


def key_of(guest: LightGuest) -> bytes:
    current = guest.module.current("tls")
    assert current is not None
    return current.public_key


async def rotate(fleet: Fleet, request: RequestRow, urgent: bool = False, reason: str = "") -> None:
    fleet.clock.pass_(60)
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", urgent, False, reason, "alice", "a test")
    await fleet.settle()


def test_a_key_that_many_generations_share_reaches_who_comes_last(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        first = host.add("a", env="prod")
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"}, escrow=True, renewal=Rule(rekey=False))
        await fleet.settle()
        key = key_of(first)
        await fleet.pass_(15 * 2400, 600)
        assert held(first) > 14 and key_of(first) == key
        late = host.add("b", env="prod")
        await fleet.settle()
        assert (held(late), key_of(late)) == (held(first), key)
        assert len(await fleet.generations(await fleet.line(request))) <= 14  # the old ones are forgotten all the same

    play(scenario)


def test_a_compromised_key_is_not_certified_again(play: Play) -> None:
    """Also where the rule keeps keys."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",), renewal=Rule(rekey=False))
        await fleet.settle()
        keys = [key_of(guest)]
        for urgent, reason in ((False, ""), (True, ""), (False, "superseded"), (False, "key_compromise")):
            await rotate(fleet, request, urgent, reason)
            keys.append(key_of(guest))
        assert held(guest) == 5
        same = [after == before for before, after in itertools.pairwise(keys)]
        assert same == [True, False, True, False]

    play(scenario)


def test_an_imported_certificate_comes_to_its_end(play: Play) -> None:
    """Nobody here can make the next one: its owner is told in time, once, and nothing is tried again and again."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        request = await fleet.ask(material="tls", source=Source.IMPORTED, resources=("h1/web-1",))
        await import_key(fleet, request)
        await fleet.settle()
        assert held(guest) == 1 and leaf(guest).not_valid_after_utc.timestamp() > fleet.clock()
        looks = fleet.engine.looks
        await fleet.pass_(40 * DAY, DAY / 4)
        line = await fleet.line(request)
        assert (line.stage, line.serving) == ("serving", 1) and "its owner is to import the next key" in line.why
        assert [e.kind for e in await fleet.events() if e.kind in ("expiring", "expired")] == ["expiring", "expired"]
        assert fleet.engine.looks - looks < 1000
        for urgent in (False, True):
            with pytest.raises(WrongState, match="its owner's"):
                await rotate(fleet, request, urgent)
        with pytest.raises(Invalid, match="the certificate has ended"):
            await import_key(fleet, request)

    play(scenario, clock=Clock(time.time()))


def test_an_imported_key_is_certified_again_until_it_is_compromised(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        spec = WEB | {"source": Source.IMPORTED, "names": ("dns:www.example.net",), "authority": "builtin"}
        request = await fleet.ask(**spec, resources=("h1/web-1",))
        await import_key(fleet, request)
        await fleet.settle()
        key = key_of(guest)
        await rotate(fleet, request)
        assert (held(guest), key_of(guest)) == (2, key)
        with pytest.raises(WrongState, match="its owner's"):
            await rotate(fleet, request, reason="key_compromise")
        leaving = Leaving(fleet.database, fleet.history, fleet.authorities, fleet.clock)
        async with fleet.database.transaction() as connection:
            row = await inventory.resource(connection, "h1/web-1")
            assert row is not None
            await leaving.rekey(connection, row, True, "it was seen elsewhere", "alice")
        await fleet.settle()
        assert held(guest) == 2 and "its owner is to import the next key" in (await fleet.line(request)).why
        fleet.clock.pass_(60)
        await import_key(fleet, request)
        await fleet.settle()
        assert held(guest) == 3 and key_of(guest) != key
        before = {g.number: g for g in await fleet.generations(await fleet.line(request))}[2]
        assert before.revoked_at and before.revoke == "key_compromise"

    play(scenario, clock=Clock(time.time()))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"two_step": True}, "two steps are for a key that several share"),
        ({"profile": ""}, "a profile's name"),
        ({"profile": "x" * 65}, "a profile's name"),
        ({"profile": "a b"}, "a profile's name"),
    ],
)
def test_what_has_no_effect_or_no_end_is_refused(play: Play, spec: dict[str, Any], why: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(Invalid, match=why):
            await fleet.ask(**WEB | spec, resources=("h1/web-1",))
        await fleet.ask(**WEB | {"profile": "x" * 64}, resources=("h1/web-1",))

    play(scenario)
