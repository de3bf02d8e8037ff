"""Attacks on a fleet that worked once: hosts that lie, owners that reach for others' things, strangers, who writes the database.

Each test is the attack, with the real engine, store, policies and issuer; what it took, and from whom, is in its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.bundle import Bundle
from hsmvisor.client.importing import seal_import
from hsmvisor.manager import limits
from hsmvisor.manager.access.tokens import PREFIX
from hsmvisor.manager.ca import requests
from hsmvisor.manager.engine.results import Result
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.inventory.identities import Identities
from hsmvisor.manager.inventory.joining import Joining
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.link import pace
from hsmvisor.manager.link.exchange import Exchange
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Owner, Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import inventory, lines, tables
from hsmvisor.manager.store.rows import HostRow, RequestRow
from hsmvisor.manager.wanted.asking import Denied
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid
from hsmvisor_rpc.sealed.commands import Action, Command, fingerprint, sign
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, RecipientKey, recipient_fingerprint
from hsmvisor_rpc.sealed.fleet import JoinStatement
from hsmvisor_rpc.sealed.identity import ModuleIdentity
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisor_rpc.v1 import manager_pb2 as pb
from sqlalchemy import select, update
from support.certificates import Authority, chain_pem, new_key, pkcs8
from support.fleet import Clock, Fleet
from support.host_process import new_id, refused, wait_for
from support.importing import importing_of
from support.light_host import Generation, LightGuest, LightHost
from support.manager_process import JoiningHost, ManagerProcess, guest
from support.manager_process import exchange as tell
from support.scenarios import SHARED, WEB, Play, held, leaf, played

C = grpc.StatusCode
EVERYBODY = '@id("all") permit (principal, action, resource);'


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """On SQLite alone."""
    return lambda scenario, **options: played(tmp_path, "", scenario, **options)


@pytest.fixture
def play_on_both(tmp_path: Path, url: str) -> Play:
    """Where the widths of columns matter."""
    return lambda scenario, **options: played(tmp_path, url, scenario, **options)


@pytest.fixture(scope="module")
def manager() -> Iterator[ManagerProcess]:
    """A real one."""
    with ManagerProcess() as manager:
        yield manager


def rows_of(manager: ManagerProcess, table: str) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{manager.state}/manager.db?mode=ro", uri=True)) as database:
        return int(database.execute(f"select count(*) from {table}").fetchone()[0])


def common_name(guest: LightGuest) -> str:
    return leaf(guest).subject.rfc4514_string()


async def cancel(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.cancel(connection, request, False, "", request.owner)
    fleet.hub.lines()
    await fleet.settle()


async def rotate(fleet: Fleet, request: RequestRow) -> None:
    fleet.clock.pass_(1)
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", False, False, "", "a test", "")
    fleet.hub.lines()
    await fleet.settle()


# ---- owners, and what is others' ---------------------------------------------------------------------------------------


def test_cancelling_what_was_denied_destroys_nobodys_keys(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        victim, mine = host.add("victim"), host.add("mine", owner="mallory")
        await fleet.ask(**WEB, resources=("h1/victim",))
        await fleet.settle()
        request = await fleet.ask("mallory", **WEB, selector={"kind": "VM"})
        await fleet.settle()
        host.restart()  # it tells all, and with it what the victim's module holds under this name
        await fleet.settle()
        assert (held(victim), held(mine)) == (1, 1)
        await cancel(fleet, request)
        assert (held(victim), held(mine)) == (1, 0)
        assert set(victim.module.told("tls")) == {1} and common_name(victim) == "CN=victim.example.net"

    play(scenario)


def test_a_material_of_the_same_name_takes_nobodys_place(play: Play) -> None:
    """Although policy allows both: a module knows materials by their names, and two under one never came to rest."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web")
        first = await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        names = ("dns:other.example.net",)
        second = await fleet.ask("mallory", **WEB | {"names": names}, resources=("h1/web",))
        shared = await fleet.ask("eve", **SHARED, selector={"kind": "VM"})
        await fleet.settle()
        assert common_name(guest) == "CN=web.example.net" and set(guest.module.told("tls")) == {1}
        for request in (second, shared):
            line = await fleet.line(request)
            assert line.stage == "denied" and "another request" in line.why
        await cancel(fleet, shared)
        assert held(guest) == 1
        await cancel(fleet, first)  # now the name is free
        assert common_name(guest) == "CN=other.example.net"

    play(scenario, policy=EVERYBODY)


def test_what_was_decided_for_one_owner_is_not_another_ones(play: Play) -> None:
    """Decisions are remembered: one about the same words of somebody else, or about the resource a moment ago, is none of these."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web", where="secret-site")
        await fleet.settle()
        spec = Spec("x", names=("dns:{where}.example.net",), selector={"kind": "VM"})
        async with fleet.database.transaction() as connection:
            assert (await fleet.asking.explain(connection, Owner("alice"), spec)).expected[0].decision.allowed
            others = await fleet.asking.explain(connection, Owner("mallory"), spec)
        assert not any(one.decision.allowed for one in others.expected)
        request = await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        guest.owner = "bob"  # within the same second
        await fleet.settle()
        assert [denial.action for denial in await fleet.denials(request)] == ["distribute"]

    play(scenario)


def test_an_owner_is_told_nothing_of_what_others_have(manager: ManagerProcess) -> None:
    """Selectors listed it: by Explain, in what Apply answers and Get shows, in events; templates told its attributes."""
    host, link = JoiningHost("beta"), None
    host.join(manager)
    link = host.stubs(manager)
    tell(link, guests=[guest("mine", "ann", where="here"), guest("other", "bob", where="secret-site")])
    ann = manager.certified("ann.test")
    spec = pb.RequestSpec(material="spy", names=["dns:{where}.example.net"], selector={"host": "beta"})
    explained = ann.requests.Explain(pb.ExplainRequest(spec=spec), timeout=10)
    applied = ann.requests.Apply(pb.ApplyRequest(request_id=new_id(), spec=spec), timeout=10)
    wait_for(lambda: ann.requests.Get(pb.GetRequest(id=applied.id), timeout=10).lines[0].stage == "keying", 10, "a look")
    shown = ann.requests.Get(pb.GetRequest(id=applied.id), timeout=10)
    events = ann.history.ListEvents(pb.ListFleetEventsRequest(page_size=1000), timeout=10)
    assert [one.resource for one in explained.resources] == ["beta/mine"]
    for told in (explained, applied, shown, events):
        assert "beta/other" not in str(told) and "secret-site" not in str(told)
    seen = manager.certified("operator.test").requests.Get(pb.GetRequest(id=applied.id), timeout=10)
    assert {line.resource for line in seen.lines} == {"beta/mine", "beta/other"}  # an operator sees all
    alone = pb.RequestSpec(material="spy-2", names=["dns:x.example.net"], selector={"owner": "bob"})
    assert not ann.requests.Apply(pb.ApplyRequest(request_id=new_id(), spec=alone), timeout=10).lines
    named = pb.RequestSpec(material="spy-3", names=["dns:{where}.example.net"], resources=["beta/other"])
    (one,) = ann.requests.Explain(pb.ExplainRequest(spec=named), timeout=10).resources
    assert not one.allowed and not one.names and "secret" not in str(one)
    short = pb.RequestSpec(material="spy-4", names=["dns:x.example.net"], resources=["other"])
    assert refused(lambda: ann.requests.Explain(pb.ExplainRequest(spec=short), timeout=10)) == (C.INVALID_ARGUMENT, "RESOURCE")


def test_policy_is_asked_for_what_an_imported_certificate_says(play: Play) -> None:
    """It was asked for the names of the request, and a request for an imported key needs none."""

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web")
        await fleet.settle()
        request = await fleet.ask(material="own", source=Source.IMPORTED, resources=("h1/web",))
        importing = importing_of(fleet)
        for name, allowed in (("www.bank.example", False), ("www.example.net", True)):
            key = new_key("p256")
            bundle = Bundle.make(pkcs8(key), chain_pem(Authority().chain(key, name=name)))
            envelope = seal_import(bundle, fleet.issuer.recipient, request.id)
            if not allowed:
                with pytest.raises(Forbidden, match="bank"):
                    await importing.take(request, envelope, bundle.public_key, bundle.certificates)
                continue
            taken = await importing.take(request, envelope, bundle.public_key, bundle.certificates)
            async with fleet.database.transaction() as connection:
                await importing.store(connection, request, taken)
        await fleet.settle()
        assert held(guest, "own") == 1

    play(scenario, clock=Clock(time.time()))


@pytest.mark.parametrize("act", ["rotate", "rekey", "revoke", "cancel"])
def test_a_rule_that_forbids_what_an_owner_does_with_what_it_has_counts(play: Play, act: str) -> None:
    """The schema has these acts, and nobody asked about them."""
    asked = "rotate" if act == "rekey" else act
    allow = '@id("own") permit (principal, action, resource) when { resource.owner == principal };'
    forbid = f'@id("frozen") @reason("no changes this week") forbid (principal, action == Action::"{asked}", resource);'

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web")
        await fleet.settle()
        request = await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        acts: dict[str, Callable[..., Awaitable[object]]] = {
            "rotate": lambda c, bound: fleet.asking.rotate(c, request, "", False, False, "", "alice", "", bound),
            "rekey": lambda c, bound: fleet.asking.demand_rekey(c, "h1/web"),
            "revoke": lambda c, bound: fleet.asking.revoke(c, request, "", 1, "", "alice", "", bound),
            "cancel": lambda c, bound: fleet.asking.cancel(c, request, False, "", "alice", bound),
        }
        with pytest.raises(Denied, match="no changes this week"):
            async with fleet.database.transaction() as connection:
                await acts[act](connection, True)
        guest.owner = "bob"  # what nothing permits any more may be given back
        await fleet.settle()
        fleet.policies = Policies(allow, 2)
        async with fleet.database.transaction() as connection:
            await acts[act](connection, True)

    play(scenario, policy=allow + forbid)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(days=math.nan), "days is 0 to"),
        (Rule(days=math.inf), "days is 0 to"),
        (Rule(days=1e300), "days is 0 to"),
        (Rule(cron="1," * 5000 + "1 * * * *"), "a schedule has at most"),
    ],
)
def test_a_rule_that_never_ends_is_refused(play: Play, rule: Rule, said: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(Invalid, match=said):
            await fleet.ask(**WEB, resources=("h1/web",), renewal=rule)

    play(scenario)


def test_an_owner_has_so_many_requests_and_no_more(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_REQUESTS", 3)

    async def scenario(fleet: Fleet) -> None:
        made = [await fleet.ask(**WEB | {"material": f"m{number}"}, selector={"kind": "VM"}) for number in range(3)]
        with pytest.raises(Exhausted):
            await fleet.ask(**WEB, selector={"kind": "VM"})
        await fleet.ask("bob", **WEB, selector={"kind": "VM"})
        await cancel(fleet, made[0])
        await fleet.ask(**WEB, selector={"kind": "VM"})

    play(scenario)


# ---- hosts that lie: what they share with others goes on without them --------------------------------------------------


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
def test_what_one_host_says_keeps_a_shared_key_from_nobody(play_on_both: Play, lie: Callable[[LightGuest], None]) -> None:
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

    play_on_both(scenario)


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


def exchange(host: LightHost, number: int = 0, *, everything: bool = False, wait: float = 0, **told: Any) -> Exchange:
    """`number`: 0 = the next one."""
    host.number = number or host.number + 1
    found = {"reports": [], "gone": [], "results": [], **told}
    return Exchange(host.session, host.number, everything, wait=wait, version="light", **found)


async def row_of(fleet: Fleet, host: LightHost) -> HostRow:
    async with fleet.database.transaction() as connection:
        row = await inventory.host(connection, host.id.hex())
    assert row is not None
    return row


def test_a_host_that_is_revoked_while_it_waits_is_given_nothing(play_on_both: Play) -> None:
    """It got what was there within the half minute in which its exchange still waited: keys among it."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        host.add("web")
        await fleet.ask(**WEB, resources=("h1/web",))
        await fleet.settle()
        before = await row_of(fleet, host)
        waiting = asyncio.create_task(fleet.exchanges.exchange(before, exchange(host, wait=3)))
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

    play_on_both(scenario)


def test_what_was_told_before_does_not_undo_what_was_told_since(play_on_both: Play) -> None:
    """An exchange that comes late, or again: by another manager, or out of a trace of the connection."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web", env="test")
        await fleet.settle()
        old = exchange(host, reports=[host.report(guest)])
        guest.attributes["env"] = "prod"
        new = exchange(host, reports=[host.report(guest)])
        for told in (new, old, new):
            await fleet.exchanges.exchange(await row_of(fleet, host), told)
        async with fleet.database.transaction() as connection:
            resource = await inventory.resource(connection, "h1/web")
        assert resource is not None and resource.tags == {"env": "prod"}

    play_on_both(scenario)


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
            answer = await fleet.exchanges.exchange(await row_of(fleet, host), exchange(host))
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
                await fleet.exchanges.exchange(await row_of(fleet, host), exchange(host, reports=reports))
        assert number < 40
        await fleet.exchange(other)  # who tells little is heard

    play(scenario)


def test_lines_that_are_woken_all_the_time_keep_no_other_waiting(play_on_both: Play) -> None:
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

    play_on_both(scenario)


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


# ---- strangers ------------------------------------------------------------------------------------------------------------


def test_who_proves_no_secret_has_nothing_made_written_or_told(manager: ManagerProcess) -> None:
    """Each attempt had a certificate made and stored, an event written and a line in the audit log."""
    manager.join_token()
    before = {table: rows_of(manager, table) for table in ("ca_certificates", "events", "answers")}
    lines, began = len(manager.audit().splitlines()), time.monotonic()
    stranger = JoiningHost("stranger")
    link = manager.stranger().link
    for _ in range(300):
        request = stranger.request()
        request.proof = bytes(32)
        assert refused(lambda request=request: link.Join(request, timeout=10)) == (C.PERMISSION_DENIED, "JOIN")  # type: ignore[misc]
    assert {table: rows_of(manager, table) for table in before} == before
    noted, took = len(manager.audit().splitlines()) - lines, time.monotonic() - began
    assert noted < 210 + 20 * took  # refusals are noted, as many as a disk bears: some at once, and so many a second


def large(stranger: JoiningHost) -> tuple[JoinStatement, bytes]:
    """Returns it with its signature."""
    statement = JoinStatement("stranger", stranger.public, bytes(3_000_000), bytes(32))
    return statement, stranger.identity.sign(statement.encode())


def test_a_strangers_large_request_is_refused(manager: ManagerProcess) -> None:
    stranger = JoiningHost("stranger")
    (statement, signature), request = large(stranger), stranger.request()
    request.csr, request.nonce, request.proof, request.signature = statement.csr, statement.nonce, bytes(32), signature
    assert refused(lambda: manager.stranger().link.Join(request, timeout=10)) == (C.INVALID_ARGUMENT, "CSR")


def test_a_strangers_large_request_is_compared_with_no_secret(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was authenticated with the secret of each token there is."""

    async def scenario(fleet: Fleet) -> None:
        identities, pins = Identities(fleet.ca), fleet.parts.pins
        joining = Joining(fleet.database, fleet.history, identities, pins, bytes(32), fleet.root_public, (), fleet.clock)
        tried: list[JoinStatement] = []

        async def fitting(connection: object, statement: JoinStatement, proof: bytes) -> None:
            tried.append(statement)

        monkeypatch.setattr(joining, "_fitting", fitting)
        stranger = JoiningHost("stranger")
        with pytest.raises(Invalid, match="certificate request"):
            await joining.admit(*large(stranger), bytes(32), None)
        assert not tried
        small = JoinStatement("stranger", stranger.public, bytes(300), bytes(32))
        await joining.admit(small, stranger.identity.sign(small.encode()), bytes(32), None)
        assert tried == [small]

    play(scenario)


def test_a_used_token_has_no_certificate_made_and_a_lost_answer_is_given_again(manager: ManagerProcess) -> None:
    token, link = manager.join_token(), manager.stranger().link
    first, thief = JoiningHost("first-one"), JoiningHost("thief")
    asked = first.request(token)
    answer = link.Join(asked, timeout=10)
    before = rows_of(manager, "ca_certificates")
    for other in (thief.request(token), first.request(token)):
        assert refused(lambda other=other: link.Join(other, timeout=10)) == (C.PERMISSION_DENIED, "JOIN_TWICE")  # type: ignore[misc]
    assert link.Join(asked, timeout=10) == answer
    assert rows_of(manager, "ca_certificates") == before
    told = manager.local.history.ListEvents(pb.ListFleetEventsRequest(kind="host_refused"), timeout=10).events
    assert thief.id in {event.host for event in told}  # whoever knows a secret that was used is told of


# ---- whoever writes the database, and it alone ------------------------------------------------------------------------------


async def written(fleet: Fleet, statement: Any) -> None:
    async with fleet.database.transaction() as connection:
        await connection.execute(statement)


async def envelopes_of(fleet: Fleet) -> list[Any]:
    async with fleet.database.transaction() as connection:
        return list((await connection.execute(select(tables.envelopes))).all())


def opens(recipient: RecipientKey, row: Any, host: LightHost, generation: int) -> bool:
    module_id, fingerprint = bytes.fromhex(row.module_id), recipient_fingerprint(recipient.public)
    context = EnvelopeContext(host.id, module_id, fingerprint, "tls", generation, row.expires_at)
    try:
        return bool(recipient.open(row.envelope, context).pkcs8)
    except Refusal:
        return False


@pytest.mark.parametrize("as_well", [False, True])
def test_no_key_is_sealed_to_a_recipient_that_stands_in_the_database_alone(play: Play, as_well: bool) -> None:
    """It was read from the same database then.  `as_well`: with an identity and a host of the thief's own."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        victim, other = host.add("victim"), host.add("other")
        request = await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        thief, resources, forger = RecipientKey(), tables.resources, LightHost("h1", fleet.root_public, fleet.clock)
        told: dict[str, Any] = {"recipient": thief.public}
        if as_well:
            root = fingerprint(fleet.root_public)
            identity = ModuleIdentity(host.id, victim.module.module_id, "victim", thief.public, root, 0)
            told["identity"] = sign(identity, forger.key).encode()
            await written(fleet, update(tables.hosts).values(host_key=forger.public))
        await written(fleet, update(resources).where(resources.c.id == "h1/victim").values(told))
        if as_well:
            fleet.hosts.clear()  # its exchanges would tell the truth
        sealed: list[Any] = []
        make = fleet.issuer.make

        async def watched(key_type: str, wanted: Any, targets: Any, escrow: Any) -> Any:
            sealed.extend(targets)
            return await make(key_type, wanted, targets, escrow)

        fleet.issuer.make = watched  # type: ignore[method-assign]
        await rotate(fleet, request)
        assert thief.public not in {target.recipient for target in sealed}
        assert not any(opens(thief, row, host, 2) for row in await envelopes_of(fleet))
        if not as_well:
            assert (held(victim), held(other)) == (1, 2)
            host.restart()  # what the host itself says counts
            await fleet.settle()
            await rotate(fleet, request)
            assert held(victim) == held(other) > 2

    play(scenario)


def changed(manager: ManagerProcess, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(manager.state / "manager.db")) as database, database:
        assert database.execute(statement, values).rowcount == 1


def test_who_changes_a_tokens_rights_has_another_token(manager: ManagerProcess) -> None:
    """Or makes one up: what stands in the database of a token is its hash, and that is anybody's to make."""
    token = manager.token("ann")
    id = token.removeprefix(PREFIX).partition(".")[0]
    stubs = manager.bearing(token)
    assert set(stubs.who().roles) == {"owner"}
    for column, value in (("roles", "operator"), ("owner", "bob"), ("groups", "wheel"), ("expires_at", 2**40)):
        with contextlib.closing(sqlite3.connect(manager.state / "manager.db")) as database:
            before = database.execute(f"select {column} from tokens where id = ?", (id,)).fetchone()[0]
        changed(manager, f"update tokens set {column} = ? where id = ?", value, id)
        assert refused(stubs.who) == (C.UNAUTHENTICATED, "TOKEN")
        changed(manager, f"update tokens set {column} = ? where id = ?", before, id)
        assert stubs.who().owner == "ann"
    own = f"{PREFIX}{'ab' * 16}.{'A' * 43}"
    row = ("ab" * 16, hashlib.sha256(own.encode()).digest(), "eve", "", "operator", 1, "uid:0", 2**40, 0)
    changed(manager, "insert into tokens values (?, ?, ?, ?, ?, ?, ?, ?, ?)", *row)
    assert refused(manager.bearing(own).who) == (C.UNAUTHENTICATED, "TOKEN")


def test_who_changes_what_a_join_token_is_for_has_another_one(manager: ManagerProcess) -> None:
    manager.join("target")
    token = manager.join_token("elsewhere", owners=["ann"])
    thief = JoiningHost("target")
    changed(manager, "update join_tokens set host = 'target', owners = '', replaces = 1 where host = 'elsewhere'")
    assert refused(lambda: manager.stranger().link.Join(thief.request(token), timeout=10)) == (C.PERMISSION_DENIED, "JOIN")
