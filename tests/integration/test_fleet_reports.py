"""What a host tells of some of its guests is compared with what there is of the others; on both databases."""

from __future__ import annotations

import pytest
from hsmvisor.manager import limits
from hsmvisor.manager.store import inventory
from support.fleet import Fleet
from support.scenarios import WEB, Play, held


async def there(fleet: Fleet) -> dict[str, str]:
    """The modules' names by resource."""
    async with fleet.database.reading() as connection:
        (host,) = fleet.hosts.values()
        return {row.id: row.module for row in await inventory.resources_on(connection, host.id.hex())}


def test_a_module_is_one_guests(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        one = host.add("one")
        await fleet.settle()
        other = host.add("other")
        other.module = one.module
        await fleet.settle()
        assert await there(fleet) == {"h1/one": "one"} and "is that of h1/one" in host.refused["other"].detail
        host.add("one")  # its guest has another one now
        await fleet.settle()
        host.restart()
        await fleet.settle()
        assert set(await there(fleet)) == {"h1/one", "h1/other"}

    play(scenario)


def test_a_host_has_so_many_guests_and_no_more(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_GUESTS", 3)

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        for name in ("a", "b", "c", "d"):  # one report after the other
            guest = host.add(name, env="prod")
            await fleet.settle()
        assert set(await there(fleet)) == {"h1/a", "h1/b", "h1/c"} and "at most 3 guests" in host.refused["d"].detail
        await fleet.ask(**WEB, selector={"env": "prod"})
        await fleet.settle()
        assert (held(host.guests["c"]), held(guest)) == (1, 0)  # those that there are may change
        del host.guests["a"]
        await fleet.settle()
        guest.attributes["env"] = "test"
        await fleet.settle()
        assert set(await there(fleet)) == {"h1/b", "h1/c", "h1/d"}

    play(scenario)
