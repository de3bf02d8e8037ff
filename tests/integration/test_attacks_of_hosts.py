"""Hosts that lie: what they share with others goes on without them.

Each test is the attack, with the real engine, store, policies and issuer; what it took, and from whom, is in its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager import limits
from hsmvisor.manager.ca import requests
from hsmvisor.manager.engine.results import Result
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.link import pace
from hsmvisor.manager.store import inventory, lines
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.serving.errors import Exhausted
from hsmvisor_rpc.sealed.commands import Action, Command
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from support.attacks import rotate
from support.fleet import Fleet, told_by
from support.light_host import Generation, LightGuest
from support.scenarios import SHARED, WEB, Play, held


def _no_state(guest: LightGuest) -> None:
    guest.module.materials["tls"][7] = Generation(7, "current evil 8:staged", b"")


def _highest_generation(guest: LightGuest) -> None:
    guest.module.materials["tls"][2**31 - 1] = Generation(2**31 - 1, "staged", b"")


def _no_generation(guest: LightGuest) -> None:
    guest.module.materials["tls"][2**32 - 1] = Generation(2**32 - 1, "staged", b"")


def _highest_sequence(guest: LightGuest) -> None:
    guest.module.sequence = 2**63 - 1


def _no_number(guest: LightGuest) -> None:
    guest.module.sequence = 2**64 - 1


def _more_operations_than_fit(guest: LightGuest) -> None:
    guest.module.materials["tls"][1].operations = 2**64 - 1


def _a_recipient_of_nobody(guest: LightGuest) -> None:
    guest.module.recipient.public = guest.module.recipient.public[:1184] + bytes(32)  # a point of low order


def _a_short_module_id(guest: LightGuest) -> None:
    guest.module.module_id = b"x"


@pytest.mark.parametrize(
    "lie",
    [
        _no_state,
        _highest_generation,
        _no_generation,
        _highest_sequence,
        _no_number,
        _more_operations_than_fit,
        _a_recipient_of_nobody,
        _a_short_module_id,
    ],
)
def test_what_one_host_says_keeps_a_shared_key_from_nobody(play: Play, lie: Callable[[LightGuest], None]) -> None:
    async def scenario(fleet: Fleet) -> None:
        good, evil = await fleet.host("h1"), await fleet.host("h2")
        guest, liar = good.add("web"), evil.add("web")
        request = await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        assert held(guest) == 1
        lie(liar)
        for number in (2, 3):
            evil.restart()
            await fleet.settle()
            await rotate(fleet, request)
            assert held(guest) == number
        assert "h2/web" in await fleet.refusals() or lie is _highest_generation

    play(scenario)


@pytest.mark.parametrize("lie", ["another kind", "other names", "another key", "the key before", "nobody's", "too large"])
def test_a_certificate_is_made_of_what_was_asked_for_alone(play: Play, lie: str) -> None:
    """What policy permitted is this kind of key under these names; what the host gives in its place is not certified."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web")
        asked = await fleet.ask(**WEB, resources=("h1/web",))
        honest: list[Result] = []
        if lie == "the key before":
            carried = host.carry_out
            host.carry_out = lambda *told: _kept(honest, carried(*told))  # type: ignore[method-assign]
            await fleet.settle()
        before = len(await fleet.events("issued"))
        carry_out = host.carry_out

        def lying(id: str, module: str, signed: bytes) -> Result:
            result = carry_out(id, module, signed)
            return _with_lie(lie, result, honest) if result.csr else result

        host.carry_out = lying  # type: ignore[method-assign]
        if lie == "the key before":
            await rotate(fleet, asked)
        await fleet.settle()
        assert len(await fleet.events("issued")) == before
        (failed,) = await fleet.events("failed")
        assert failed.resource_id == "h1/web"
        host.carry_out = carry_out  # type: ignore[method-assign]
        await fleet.pass_(2 * 3600, 300)
        assert held(guest) > 1 and len(await fleet.events("issued")) > before  # from then on all is well

    play(scenario)


def _kept(kept: list[Result], result: Result) -> Result:
    if result.csr:
        kept.append(result)
    return result


def _with_lie(lie: str, result: Result, honest: list[Result]) -> Result:
    key: Any = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    ours = x509.SubjectAlternativeName([x509.DNSName("web.example.net")])
    match lie:
        case "another kind":
            key = rsa.generate_private_key(65537, 2048)
            builder = builder.add_extension(ours, False)
        case "other names":
            pass
        case "another key":
            return replace(result, csr=builder.add_extension(ours, False).sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
        case "the key before":
            return replace(result, csr=honest[0].csr, public_key=honest[0].public_key)
        case "nobody's":
            return replace(result, csr=result.csr[:-1] + bytes([result.csr[-1] ^ 1]))
        case "too large":
            return replace(result, csr=bytes(1_000_000))
    csr = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    return replace(result, csr=csr, public_key=requests.spki(key.public_key()))


def test_what_is_not_so_is_not_done_again_and_again(play: Play) -> None:
    """A host that says that it has done all, and has done nothing, is asked less and less often."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web")
        carried = 0

        def lying(id: str, module: str, signed: bytes) -> Result:
            nonlocal carried
            carried += 1
            return Result(id, True, sequence=carried, states={})

        host.carry_out = lying  # type: ignore[method-assign]
        await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        await fleet.pass_(3600)
        assert carried < 40

    play(scenario)


def test_a_host_that_refuses_keeps_nobody_from_a_shared_key_and_floods_nobody(play: Play) -> None:
    """Its refusals kept the line from being renewed, and each of them was told."""

    async def scenario(fleet: Fleet) -> None:
        good, evil = await fleet.host("h1"), await fleet.host("h2")
        guest = good.add("web")
        evil.add("web")
        evil.refuse = lambda module, command: Refusal(Reason.MALFORMED, "no")
        await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        assert held(guest) == 1
        await fleet.pass_(3 * 3600)
        assert held(guest) >= 5
        assert len(await fleet.events("failed")) < 60
        late = evil.add("late")  # one that comes later makes a new key, whatever its neighbour does
        evil.refuse = lambda module, command: Refusal(Reason.MALFORMED, "no") if module == "web" else None
        await fleet.pass_(1200)
        assert held(late) and held(late) == held(guest)

    play(scenario)


@pytest.mark.parametrize("why", [Reason.WRONG_STATE, Reason.STALE_SEQUENCE, Reason.UNKNOWN_GENERATION, Reason.WRONG_MODULE])
def test_no_refusal_is_answered_at_once_for_ever(play: Play, why: Reason) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web")
        said: list[str] = []

        def refuse(module: str, command: Command) -> Refusal | None:
            said.append(command.action)
            return None if command.action in (Action.GENERATE, Action.CERTIFY) else Refusal(why, "no")

        host.refuse = refuse
        await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        await fleet.pass_(1200, 5)
        assert 2 < len(said) < 40

    play(scenario)


async def _lost(fleet: Fleet, guest: LightGuest, asked: RequestRow) -> None:
    guest.module.materials.clear()


async def _stale(fleet: Fleet, guest: LightGuest, asked: RequestRow) -> None:
    newest = max(guest.module.materials["tls"])
    guest.module.materials["tls"] = {newest + 7: Generation(newest + 7, "retiring", b"")}


async def _changed(fleet: Fleet, guest: LightGuest, asked: RequestRow) -> None:
    guest.attributes["n"] = str(int(guest.attributes.get("n", "0")) + 1)
    await fleet.ask(**WEB | {"names": (f"dns:n{guest.attributes['n']}.example.net",)}, selector={"kind": "VM"})


async def _rotated(fleet: Fleet, guest: LightGuest, asked: RequestRow) -> None:
    await rotate(fleet, asked)


@pytest.mark.parametrize("again", [_lost, _stale, _changed, _rotated])
def test_nobody_has_certificates_made_as_fast_as_messages_travel(
    play: Play, again: Callable[[Fleet, LightGuest, RequestRow], Awaitable[None]]
) -> None:
    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web")
        asked = await fleet.ask(**WEB, selector={"kind": "VM"})
        await fleet.settle()
        for _ in range(30):
            await again(fleet, guest, asked)
            fleet.clock.pass_(1)
            await fleet.settle()
        assert 5 < len(await fleet.events("issued")) <= 12
        await fleet.pass_(3600, 300)
        assert held(guest)  # and all is well when it stops

    play(scenario)


# ---- exchanges ------------------------------------------------------------------------------------------------------------


def test_a_host_that_is_revoked_while_it_waits_is_given_nothing(play: Play) -> None:
    """It got what was there within the half minute in which its exchange still waited: keys among it."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web")
        await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        before = await fleet.row_of(host)
        waiting = asyncio.create_task(fleet.exchanges.exchange(before, told_by(host, wait=3)))
        await asyncio.sleep(0.3)
        leaving = Leaving(fleet.database, fleet.history, fleet.authorities, fleet.clock)
        async with fleet.database.transaction() as connection:
            await leaving.revoke_host(connection, before, "stolen", "a test")
            resource = await inventory.resource(connection, "h1/web")
            line = (await lines.lines_on(connection, "h1/web"))[0]
            assert resource is not None
            await fleet.parts.commands.queue(connection, resource, line, [Said(Action.ACTIVATE, 1)])
        fleet.hub.commands([before.id])
        assert not (await waiting).commands

    play(scenario)


def test_what_was_told_before_does_not_undo_what_was_told_since(play: Play) -> None:
    """An exchange that comes late, or again: by another manager, or out of a trace of the connection."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web", env="test")
        await fleet.settle()
        old = told_by(host, reports=[host.report(guest)])
        guest.attributes["env"] = "prod"
        new = told_by(host, reports=[host.report(guest)])
        for told in (new, old, new):
            await fleet.exchanges.exchange(await fleet.row_of(host), told)
        async with fleet.database.transaction() as connection:
            resource = await inventory.resource(connection, "h1/web")
        assert resource is not None and resource.tags == {"env": "prod"}

    play(scenario)


def test_a_guest_that_answers_nothing_keeps_no_other_from_its_commands(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_COMMANDS", 3)

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("hung")
        host.add("web")
        await fleet.settle()
        for number in range(5):
            await fleet.ask(**WEB | {"material": f"m{number}"}, resources=("h1/hung",))
        await fleet.engine.turn()
        fleet.clock.pass_(1)
        await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.engine.turn()
        given: list[str] = []
        for _ in range(3):
            answer = await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host))
            given += [command.module for command in answer.commands]
        assert sorted(given) == ["hung"] * 5 + ["web"]

    play(scenario)


def test_a_guest_that_changes_all_the_time_costs_so_much_and_no_more(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "BURST", 100.0)
    monkeypatch.setattr(pace, "RATE", 1.0)
    monkeypatch.setattr("hsmvisor.manager.link.exchange.MOST_DELAY", 1.0)

    async def scenario(fleet: Fleet) -> None:
        host, other = await fleet.host("h1"), await fleet.host("h2")
        guest = host.add("web")
        other.add("web")
        await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        with pytest.raises(Exhausted):
            for number in range(2000):
                guest.attributes["n"] = str(number)
                reports = [host.report(guest)] * 100
                await fleet.exchanges.exchange(await fleet.row_of(host), told_by(host, reports=reports))
        assert number < 40
        await fleet.exchange(other)  # who tells little is heard

    play(scenario)


def test_lines_that_are_woken_all_the_time_keep_no_other_waiting(play: Play) -> None:
    """Whoever was woken came before whoever was due: one host with a few guests kept all renewals from being looked at."""

    async def scenario(fleet: Fleet) -> None:
        good, evil = await fleet.host("h1"), await fleet.host("h2")
        guest = good.add("web")
        noisy = [evil.add(f"n{number}", owner="mallory") for number in range(40)]
        await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        await fleet.ask("mallory", **WEB, selector={"host": "h2"})
        await fleet.settle()
        fleet.clock.pass_(1900)
        await fleet.exchange(good)
        for _ in range(12):
            fleet.clock.pass_(0.1)
            for one in noisy:
                there = one.module.materials["tls"]
                if there.pop(9, None) is None:
                    there[9] = Generation(9, "staged", b"")
            await fleet.exchange(evil, carry_out=False)
            await fleet.engine.turn()
            await fleet.exchange(good)
            if held(guest) == 2:
                break
        assert held(guest) == 2

    play(scenario)


def test_what_was_denied_on_a_resource_goes_with_it(play: Play) -> None:
    """Else each guest that comes and goes leaves a row behind for each request that meant it."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("mine", owner="mallory")
        request = await fleet.ask("mallory", **WEB, selector={"kind": "VM"})
        for number in range(5):
            host.add(f"g{number}")
            await fleet.settle()
            assert [row.resource_id for row in await fleet.denials(request)] == [f"h1/g{number}"]
            del host.guests[f"g{number}"]
            await fleet.settle()
        assert not await fleet.denials(request)

    play(scenario)
