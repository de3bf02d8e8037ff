"""Certificates that are to count no more, lines that are wanted no more, and what keeps neither; on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisor.manager import limits
from hsmvisor.manager.ca.interface import CaError, Later, Reason, Refused
from hsmvisor.manager.engine import line as looking
from hsmvisor.manager.store import wanted
from hsmvisor.manager.store.rows import RequestRow
from support.fleet import Fleet
from support.scenarios import SHARED, WEB, Moody, Play, held, leaf, moody


async def rotate(fleet: Fleet, request: RequestRow, revoke: bool) -> None:
    fleet.clock.pass_(60)
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", False, revoke, "", "alice", "a test")
    await fleet.settle()


async def cancel(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.cancel(connection, request, False, "", "alice")


def does_not_revoke(authority: Moody, error: CaError) -> list[float]:
    """Returns when it is asked."""
    asked: list[float] = []

    async def revoke(certificate: bytes, reason: Reason) -> None:
        asked.append(authority.clock())
        raise error

    authority.revoke = revoke  # type: ignore[method-assign]
    return asked


def test_an_authority_that_cannot_revoke_keeps_nobody_waiting(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, authority = await fleet.host("h1"), await moody(fleet)
        guest = host.add("web-1", env="prod")
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        old = leaf(guest).serial_number
        works = authority.revoke
        asked = does_not_revoke(authority, Later("it is not there", 1))
        await rotate(fleet, request, True)
        assert held(guest) == 2 and "cannot revoke generation 1 yet" in (await fleet.line(request)).why
        late = host.add("web-2", env="prod")
        await fleet.pass_(1200, 60)
        assert held(late) == held(guest) == 3 and len(asked) == 5  # every five minutes
        authority.revoke = works  # type: ignore[method-assign]
        await fleet.pass_(400, 60)
        assert authority.revoked == [(old, Reason.SUPERSEDED)]
        assert "revoke" not in (await fleet.line(request)).why
        assert [e.detail["why"] for e in await fleet.events("failed")] == ["builtin cannot revoke it yet: it is not there"]

    play(scenario)


def test_an_authority_that_refuses_to_revoke_is_told_of_and_not_asked_again(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest, authority = (await fleet.host("h1")).add("web-1"), await moody(fleet)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        asked = does_not_revoke(authority, Refused("it knows no such certificate"))
        await rotate(fleet, request, True)
        await fleet.pass_(1200, 60)
        assert held(guest) == 2 and len(asked) == 1
        (told,) = await fleet.events("failed")
        assert "does not revoke it: it knows no such certificate" in told.detail["why"]
        line = await fleet.line(request)
        assert (line.stage, line.failures) == ("serving", 0)

    play(scenario)


def test_a_cancelled_request_waits_until_its_certificate_is_revoked(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest, authority = (await fleet.host("h1")).add("web-1"), await moody(fleet)
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        works = authority.revoke
        does_not_revoke(authority, Later("it is not there", 1))
        await rotate(fleet, request, True)
        await cancel(fleet, request)
        await fleet.settle()
        assert held(guest) == 0 and (await fleet.line(request)).stage == "leaving"
        authority.revoke = works  # type: ignore[method-assign]
        await fleet.pass_(600, 60)
        assert len(authority.revoked) == 1 and await fleet.lines(request) == []

    play(scenario)


def test_what_is_asked_for_again_while_it_ends_is_served(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        await cancel(fleet, request)
        leave = looking.leaving.leave

        async def and_asked_again(*arguments: Any) -> float | None:
            left = await leave(*arguments)
            if left is None:  # all is taken away; the next step deletes the line
                monkeypatch.undo()
                await fleet.ask(**WEB, resources=("web-1",))
            return left

        monkeypatch.setattr(looking.leaving, "leave", and_asked_again)
        await fleet.settle()
        assert held(guest) > 0 and (await fleet.line(request)).stage == "serving"

    play(scenario)


@pytest.mark.parametrize("how", ["the request names others", "the guest is another one", "the request selects others"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_denial_goes_with_what_it_was_about(play: Play, how: str, shared: bool) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web-1", env="prod")
        host.add("theirs", owner="bob", env="prod")
        await fleet.settle()
        what: dict[str, Any] = SHARED if shared else WEB
        named = how == "the request names others"
        both = {"resources": ("h1/web-1", "h1/theirs")} if named else {"selector": {"env": "prod"}}
        request = await fleet.ask(**what, **both)
        await fleet.settle()
        assert {row.resource_id for row in await fleet.denials(request)} == {"h1/theirs"}
        if named:
            await fleet.ask(**what, resources=("h1/web-1",))
        elif how == "the guest is another one":
            host.add("theirs", owner="bob", env="test")
        else:
            host.add("web-1", env="test")
            await fleet.ask(**what, selector={"env": "test"})
        await fleet.settle()
        assert await fleet.denials(request) == []

    play(scenario)


def test_a_cancelled_request_is_forgotten_when_nothing_of_it_is_left(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web-1")
        await fleet.settle()
        gone = await fleet.ask(**WEB, resources=("h1/web-1",))
        stays = await fleet.ask(**WEB | {"material": "kept"}, resources=("h1/web-1",))
        await fleet.settle()
        async with fleet.database.transaction() as connection:
            await fleet.asking.cancel(connection, gone, False, "", "alice")
            await fleet.asking.cancel(connection, stays, True, "", "alice")
        await fleet.settle()
        for seconds, known in ((limits.CANCELLED_KEPT, {gone.id, stays.id}), (1.0, {stays.id})):
            fleet.clock.pass_(seconds)
            await fleet.engine.sweep()
            async with fleet.database.reading() as connection:
                assert {row.id for row in await wanted.requests_after(connection, "", 10)} == known

    play(scenario)
