"""An authority that fails is asked more and more seldom, and a manager that is started anew asks it no sooner."""

from __future__ import annotations

import itertools

import pytest
from hsmvisor.manager.ca.interface import Later
from hsmvisor.manager.renewal import timing
from support.fleet import Fleet
from support.scenarios import WEB, Moody, Play, held, leaf, moody

pytestmark = pytest.mark.slow
STEP = 300.0  #: with which time passes


async def started_anew(fleet: Fleet, ca: Moody) -> None:
    await fleet.reopen()
    ca.inner, fleet.authorities["builtin"] = fleet.ca, ca


async def pass_(fleet: Fleet, ca: Moody, hours: float) -> None:
    """The manager is started anew all the time."""
    for _ in range(int(hours * timing.HOUR / STEP / 2)):
        await started_anew(fleet, ca)
        await fleet.pass_(2 * STEP, STEP)


def gaps(ca: Moody) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ca.asked)]


def test_pauses_grow_over_restarts(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        ca.wrong = Later("away")
        await fleet.settle()
        request = await fleet.ask(**WEB | {"lifetime": 864_000}, resources=("web-1",))
        await fleet.settle()
        await pass_(fleet, ca, 7.5)
        assert (await fleet.line(request)).failures == len(ca.asked) == 4
        for failures, gap in enumerate(gaps(ca), 1):
            pause = timing.pause(failures, None, fleet.clock())
            assert pause <= gap <= pause + STEP, gaps(ca)
        ca.wrong = None
        await pass_(fleet, ca, 8)
        assert held(guest) == 1 and (await fleet.line(request)).failures == 0

    play(scenario)


def test_a_time_that_the_authority_named_counts_over_restarts(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        ca.wrong = Later("too many orders", 3 * timing.HOUR)
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        await pass_(fleet, ca, 7)
        assert len(ca.asked) == 3 and all(3 * timing.HOUR <= gap <= 3 * timing.HOUR + STEP for gap in gaps(ca)), gaps(ca)

    play(scenario)


def test_a_certificate_that_serves_is_renewed_by_the_same_pauses(play: Play) -> None:
    """They leave room for four more attempts before it ends, and go on after that."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        ca = await moody(fleet)
        await fleet.settle()
        await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        ends, ca.wrong = leaf(guest).not_valid_after_utc.timestamp(), Later("away")
        del ca.asked[:]
        while fleet.clock() < ends + 1800:
            await started_anew(fleet, ca)
            await fleet.pass_(300, 60)
        assert len([at for at in ca.asked if at < ends]) >= 4 and [at for at in ca.asked if at > ends]
        assert min(gaps(ca)) >= timing.LEAST and len(ca.asked) < 30, gaps(ca)
        assert held(guest) == 1
        ca.wrong = None
        await started_anew(fleet, ca)
        await fleet.pass_(1800, 60)
        assert held(guest) > 1 and leaf(guest).not_valid_after_utc.timestamp() > fleet.clock()

    play(scenario)
