"""The engine on both databases: from what an owner asks to what modules hold, with the time in the test's hand."""

from __future__ import annotations

from hsmvisor.manager.renewal.decisions import Rule
from support.fleet import Fleet
from support.scenarios import SHARED, WEB, Client, Play, held, leaf, names_of

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


def test_thirty_renewals_while_clients_connect_and_nobody_acts(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        hosts = [await fleet.host("h1"), await fleet.host("h2")]
        guests = [host.add(f"web-{host.name}-{n}", env="prod") for host in hosts for n in range(2)]
        await fleet.settle()
        await fleet.ask(**WEB | {"lifetime": 120}, selector={"env": "prod"})
        await fleet.settle()
        client = Client(fleet)
        while min(held(guest) for guest in guests) <= 30:
            fleet.clock.pass_(5)
            for guest in guests:  # before anybody has done anything at this time, and after
                client.connect(guest)
            await fleet.settle()
            for guest in guests:
                client.connect(guest)
        assert len(client.seen) >= 4 * 30 and client.connections > 1000
        assert not {e.kind for e in await fleet.events()} & {"failed", "expired", "expiring", "denied"}

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
            "invisible": host.add("invisible", env="prod", fqdn="a.example.net\u200b"),
            "escape": host.add("escape", env="prod", fqdn="a.example.net\x1b"),
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
