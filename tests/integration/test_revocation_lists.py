"""Certificates that are revoked with what an owner or an operator does: the authority's list says so, and says no other."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest
from cryptography import x509
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.store import inventory
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.command import Command
from support.fleet import Fleet
from support.fleet_processes import Manager
from support.guest import free_port
from support.host_process import wait_for
from support.light_fleet import LightFleet
from support.light_host import shared_recipient
from support.scenarios import SHARED, WEB, Play, held, leaf

REASON = x509.ReasonFlags


def listed(revocations: bytes) -> dict[int, x509.ReasonFlags]:
    found = x509.load_der_x509_crl(revocations)
    return {one.serial_number: one.extensions.get_extension_for_class(x509.CRLReason).value.reason for one in found}


async def revoked(fleet: Fleet) -> dict[int, x509.ReasonFlags]:
    return listed(await fleet.ca.revocation_list())


async def leave(fleet: Fleet, name: str) -> int:
    """As RemoveHost with revoke_certificates; returns how many these were."""
    leaving = Leaving(fleet.database, fleet.history, fleet.authorities, fleet.clock)
    async with fleet.database.transaction() as connection:
        host = await inventory.host_named(connection, name)
    assert host is not None
    count = await leaving.revoke_certificates(host)
    async with fleet.database.transaction() as connection:
        await leaving.remove_host(connection, host, True, "otto")
    fleet.hub.lines()
    return count


def test_a_rotation_that_revokes_waits_until_the_new_certificate_serves(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("web-1",))
        await fleet.settle()
        old = leaf(guest).serial_number
        fleet.clock.pass_(5)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", False, True, "", "alice", "")
        await fleet.pass_(300, away=("h1",))
        assert held(guest) == 1 and not await revoked(fleet), "it serves still"
        await fleet.settle()
        assert held(guest) == 2 and leaf(guest).serial_number != old
        assert await revoked(fleet) == {old: REASON.superseded}
        assert guest.module.materials["tls"][1].state == "retiring", "who is connected stays so"
        # the next one revokes nothing that nobody asked for
        fleet.clock.pass_(5)
        async with fleet.database.transaction() as connection:
            await fleet.asking.rotate(connection, request, "", False, False, "", "alice", "")
        await fleet.settle()
        assert held(guest) == 3 and set(await revoked(fleet)) == {old}

    play(scenario)


def test_a_host_leaves_with_its_certificates(play: Play) -> None:
    """What its modules had for themselves is revoked; a key that they shared is another one at the others."""

    async def scenario(fleet: Fleet) -> None:
        hosts = [await fleet.host("h1"), await fleet.host("h2")]
        first, second = (host.add(f"web-{host.name}", env="prod") for host in hosts)
        await fleet.settle()
        await fleet.ask(**WEB | {"material": "own"}, selector={"env": "prod"})
        await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        own, shared = leaf(first, "own").serial_number, leaf(first).serial_number
        assert held(second, "own") == 1 and leaf(second).serial_number == shared
        fleet.clock.pass_(5)
        assert await leave(fleet, "h1") == 1
        assert await revoked(fleet) == {own: REASON.cessation_of_operation}
        del fleet.hosts["h1"]
        await fleet.settle()
        assert await revoked(fleet) == {own: REASON.cessation_of_operation, shared: REASON.key_compromise}
        assert (held(second), held(second, "own")) == (2, 1)

    play(scenario)


def test_every_key_of_a_resource_anew(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1", env="prod")
        await fleet.settle()
        await fleet.ask(**WEB | {"material": "own"}, selector={"env": "prod"})
        await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        old = {leaf(guest, "own").serial_number, leaf(guest).serial_number}
        leaving = Leaving(fleet.database, fleet.history, fleet.authorities, fleet.clock)
        for compromised in (False, True):
            fleet.clock.pass_(5)
            before = {leaf(guest, "own").serial_number, leaf(guest).serial_number}
            async with fleet.database.transaction() as connection:
                (resource,) = await inventory.resources_named(connection, "web-1")
                assert await leaving.rekey(connection, resource, compromised, "", "otto") == 2
            fleet.hub.lines()
            await fleet.settle()
            assert await revoked(fleet) == (dict.fromkeys(before, REASON.key_compromise) if compromised else {})
        assert (held(guest), held(guest, "own")) == (3, 3) and not old & set(await revoked(fleet))

    play(scenario)


@pytest.mark.real
def test_the_command_that_removes_a_host_says_how_many_certificates_are_revoked(tmp_path: Path) -> None:
    port = free_port()
    settings = f'[pki]\naddress = "127.0.0.1:{port}"\n[[authorities]]\nname = "builtin"\nkind = "builtin"\ndefault = true\n'
    with Manager(settings) as manager:

        async def served() -> pb.MaterialRequest:
            fleet = LightFleet(manager.token, shared_recipient())
            await fleet.add("host-1", ["vm-1"], env="prod")
            await fleet.add("host-2", ["vm-2"], env="prod")
            asked = manager.apply(material="tls", names=["dns:{name}.example.net"], selector={"env": "prod"})
            await asyncio.to_thread(wait_for, lambda: fleet.holding("tls", 1) == 2, 20, "the material")
            await fleet.close()
            return manager.request(asked.id)

        shown = asyncio.run(served())
        of = {line.resource: x509.load_der_x509_certificate(line.generations[0].certificates[0]) for line in shown.lines}
        command = Command("", tmp_path)
        words = ("fleet", "host", "remove", "host-1", "--revoke-certificates", "--yes")
        told = command(*words, HSMVISOR_MANAGER=f"unix:{manager.socket}", XDG_CONFIG_HOME=str(tmp_path))
        assert "is forgotten, with 1 guests, 1 certificates are revoked" in told
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/builtin.crl", timeout=10) as answer:
            assert listed(answer.read()) == {of["host-1/vm-1"].serial_number: REASON.cessation_of_operation}
