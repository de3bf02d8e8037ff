"""Owners that reach for what is others'.

Each test is the attack, with the real engine, store, policies and issuer; what it took, and from whom, is in its name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator

import grpc
import pytest
from hsmvisor.bundle import Bundle
from hsmvisor.client.importing import seal_import
from hsmvisor.manager import limits
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Owner, Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.wanted.asking import Denied
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.attacks import cancel, common_name
from support.certificates import Authority, chain_pem, new_key, pkcs8
from support.fleet import Clock, Fleet
from support.host_process import new_id, refused, wait_for
from support.importing import importing_of
from support.manager_process import JoiningHost, ManagerProcess, guest
from support.manager_process import exchange as tell
from support.scenarios import SHARED, WEB, Play, held

C = grpc.StatusCode
EVERYBODY = '@id("all") permit (principal, action, resource);'


@pytest.fixture(scope="module")
def manager() -> Iterator[ManagerProcess]:
    """A real one."""
    with ManagerProcess() as manager:
        yield manager


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
