"""A light host speaks with its manager as a real one does, so that what the bench counts of it is not too low."""

from __future__ import annotations

import asyncio
import time

import pytest
from hsmvisor.manager.engine.results import Result
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.light_fleet import Joined, Linked, _result
from support.light_host import LightHost, shared_recipient


class Obedient(LightHost):
    def carry_out(self, id: str, module: str, signed: bytes) -> Result:
        self.guests[module].module.sequence += 1
        return Result(id, True, sequence=self.guests[module].module.sequence, states={1: "staged"})


class Conversation:
    """A manager that gives two commands to the first exchange that waits."""

    def __init__(self) -> None:
        self.heard: list[pb.ExchangeRequest] = []
        self.given = False
        self.all_heard = asyncio.Event()

    async def Exchange(self, request: pb.ExchangeRequest, **options: float) -> pb.ExchangeResponse:
        self.heard.append(request)
        if sum(len(told.results) for told in self.heard) == 2:
            self.all_heard.set()
        if not request.wait_seconds:
            return pb.ExchangeResponse()
        if self.given:
            await asyncio.sleep(60)
        self.given = True
        return pb.ExchangeResponse(commands=[pb.HostCommand(id=f"c-{n}", module="vm-1") for n in range(2)])


async def _spoken() -> list[pb.ExchangeRequest]:
    host, manager = Obedient("host-1", bytes(32), time.time, shared_recipient()), Conversation()
    for number in range(3):
        host.add(f"vm-{number}")
    link = Linked(host, Joined(b"", b"", b"", b"", "localhost:1"), lambda: None)
    link._stub = manager
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(10):
        await manager.all_heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.close()
    return manager.heard


def test_a_guest_is_told_of_again_after_its_commands_and_beside_the_exchange_that_waits() -> None:
    first, *others = asyncio.run(_spoken())
    assert first.all and [guest.name for guest in first.guests] == ["vm-0", "vm-1", "vm-2"] and not first.wait_seconds
    waiting = [request for request in others if request.wait_seconds]
    telling = [request for request in others if not request.wait_seconds]
    assert not any(request.guests or request.results for request in waiting)
    assert [result.id for request in telling for result in request.results] == ["c-0", "c-1"]
    assert all(guest.name == "vm-1" for request in telling for guest in request.guests)
    assert telling[-1].guests[0].sequence == 2
    assert not any(request.all for request in others)
    numbers = [request.number for request in (first, *others)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("states", [None, {}, {3: "current"}])
def test_what_is_not_known_of_a_material_is_not_told(states: dict[int, str] | None) -> None:
    told = _result(Result("c-1", False, states=states))
    assert told.HasField("material") == (states is not None)
    assert {g.number: g.state for g in told.material.generations} == (states or {})
