"""A request that names resources and has a selector as well: both are meant, each once, as long as either says so."""

from __future__ import annotations

from support.fleet import Fleet
from support.scenarios import SHARED, WEB, Play, held, leaf

PROD = {"env": "prod"}


async def members(fleet: Fleet, request: object) -> list[str]:
    return sorted(line.resource_id for line in await fleet.lines(request))  # type: ignore[arg-type]


def test_names_and_a_selector_in_one_request(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, other = await fleet.host("h1"), await fleet.host("h2")
        named, both, selected = host.add("named"), host.add("both", env="prod"), other.add("selected", env="prod")
        neither, foreign = other.add("neither", env="test"), other.add("foreign", owner="bob", env="prod")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("h1/named", "both"), selector=PROD)
        await fleet.settle()
        assert [held(guest) for guest in (named, both, selected, neither, foreign)] == [1, 1, 1, 0, 0]
        assert len({leaf(guest).serial_number for guest in (named, both, selected)}) == 3

        # which of the two means it changes: nobody notices
        named.attributes["env"], both.attributes["env"] = "prod", "test"
        await fleet.settle()
        assert [held(guest) for guest in (named, both, selected)] == [1, 1, 1]
        del named.attributes["env"]
        selected.attributes["env"] = "test"
        new = host.add("new", env="prod")
        await fleet.settle()
        assert [held(guest) for guest in (named, both, selected, new)] == [1, 1, 0, 1]

        # a name that is left out of the request keeps what the selector still means
        both.attributes["env"] = "prod"
        await fleet.settle()
        again = await fleet.ask(**WEB, selector=PROD)
        await fleet.settle()
        assert again.id == request.id and await members(fleet, request) == ["h1/both", "h1/new", "h2/foreign"]
        assert (held(named), held(both)) == (0, 1)

    play(scenario)


def test_a_shared_key_is_where_a_name_or_the_selector_says(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        named, selected, neither = host.add("named"), host.add("selected", env="prod"), host.add("neither")
        await fleet.settle()
        request = await fleet.ask(**SHARED, resources=("named",), selector=PROD)
        await fleet.settle()
        assert (held(named), held(selected), held(neither)) == (1, 1, 0)
        assert leaf(named).serial_number == leaf(selected).serial_number
        neither.attributes["env"] = "prod"
        del selected.attributes["env"]
        await fleet.settle()
        assert {d.resource_id for d in await fleet.deliveries(await fleet.line(request))} == {"h1/named", "h1/neither"}
        assert held(named) == held(neither) and held(selected) == 0

    play(scenario)


def test_history_says_what_policy_said_where_it_permits_too(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        for kind in ("requested", "issued", "delivered"):
            (event,) = await fleet.events(kind)
            assert event.detail.get("policy_version") == 1, (kind, event.detail)
            assert "own-resources" in str(event.detail), (kind, event.detail)

    play(scenario)
