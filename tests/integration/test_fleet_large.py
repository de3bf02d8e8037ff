"""Requests with more lines than an answer has room for."""

from __future__ import annotations

import asyncio

import pytest
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.fleet_processes import Manager
from support.host_process import new_id, wait_for
from support.light_fleet import LightFleet
from support.light_host import shared_recipient

GUESTS = 130


@pytest.mark.timeout(600)
def test_an_answer_has_a_page_of_lines_and_all_can_be_had() -> None:
    async def scenario(manager: Manager) -> pb.MaterialRequest:
        fleet = LightFleet(manager.token, shared_recipient())
        await fleet.add("host-1", [f"vm-{n}" for n in range(GUESTS)], env="prod")
        asked = manager.apply(material="tls", names=["dns:{name}.example.net"], selector={"env": "prod"})
        await asyncio.to_thread(wait_for, lambda: fleet.holding("tls", 1) == GUESTS, 180, "the materials")
        await asyncio.to_thread(wait_for, lambda: manager.request(asked.id).summary == "done", 60, "the last word of it")
        await fleet.close()
        return asked

    with Manager() as manager:
        asked = asyncio.run(scenario(manager))
        first = manager.request(asked.id)
        assert len(first.lines) == 100 and first.lines_total == GUESTS and first.summary == "done"
        rest = manager.requests.Get(pb.GetRequest(id=asked.id, page_token=first.next_page_token), timeout=20)
        assert len(rest.lines) == GUESTS - 100 and not rest.next_page_token
        resources = [line.resource for line in (*first.lines, *rest.lines)]
        assert resources == sorted(set(resources)) and len(resources) == GUESTS
        few = manager.requests.Get(pb.GetRequest(id=asked.id, page_size=7), timeout=20)
        assert len(few.lines) == 7 and few.lines_total == GUESTS
        rotated = manager.requests.Rotate(pb.RotateRequest(request_id=new_id(), id=asked.id), timeout=30)
        assert len(rotated.lines) == 100
