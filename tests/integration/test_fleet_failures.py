"""What goes wrong between a manager, its authorities and its hosts, and what becomes of it; on both databases."""

from __future__ import annotations

import pytest
from hsmvisor.manager.ca.interface import Later, Refused, Window
from hsmvisor.manager.store import inventory
from hsmvisor.manager.wanted import membership
from hsmvisor_rpc.sealed.commands import Command
from hsmvisor_rpc.sealed.refusal import Reason as Refusing
from hsmvisor_rpc.sealed.refusal import Refusal
from support.fleet import Fleet
from support.light_host import LightHost
from support.scenarios import SHARED, WEB, Play, held, leaf, moody

# ---- what goes wrong ---


def test_a_host_that_was_away_for_three_renewals_comes_to_the_newest(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        near, far = await fleet.host("h1"), await fleet.host("h2")
        one, own, shared = near.add("a", env="prod"), far.add("own"), far.add("b", env="prod")
        await fleet.settle()
        everywhere = await fleet.ask(**SHARED, selector={"env": "prod"})
        mine = await fleet.ask(**WEB | {"material": "own"}, resources=("h2/own",))
        await fleet.settle()
        assert (held(one), held(shared), held(own, "own")) == (1, 1, 1)
        await fleet.pass_(3 * 2400, 60, away=("h2",))
        assert held(one) >= 4 and (held(shared), held(own, "own")) == (1, 1)
        waiting = {row.resource_id: (row.state, row.why) for row in await fleet.deliveries(await fleet.line(everywhere))}
        assert waiting == {"h1/a": ("active", ""), "h2/b": ("pending", "its host is away")}
        line = await fleet.line(mine)
        assert (line.stage, line.why) == ("keying", "its host is away")
        await fleet.settle()
        assert held(shared) == held(one) and shared.module.current("tls").public_key == one.module.current("tls").public_key
        assert leaf(own, "own").not_valid_after_utc.timestamp() > fleet.clock()
        assert {e.kind for e in await fleet.events()} >= {"host_away", "host_back"}

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


def test_a_module_that_does_not_serve_at_the_moment_keeps_what_it_has(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        host.silent.add("web-1")
        host.restart()
        await fleet.settle()
        assert [d.active for d in await fleet.deliveries(await fleet.line(request))] == [1] and held(guest) == 1
        host.silent.clear()
        host.restart()
        await fleet.settle()
        assert held(guest) == 1 and host.refused == {}

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
