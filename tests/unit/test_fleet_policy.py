"""Policy: tables, uploads that are refused, files of cases, and decisions beside a small model that knows nothing of Cedar."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hsmvisor.manager.ca import names
from hsmvisor.manager.policy import cases
from hsmvisor.manager.policy.cases import BadCases
from hsmvisor.manager.policy.engine import MAX_ID, MAX_POLICIES, MAX_REASON, MAX_RULES, BadPolicies, Policies
from hsmvisor.manager.policy.questions import Act, Asked, Kind, Owner, Question, Resource, Source, touches, wildcards, within
from hypothesis import given
from hypothesis import strategies as st

TEXT = """
@id("web-team")
permit(principal in Group::"web", action in [Action::"request", Action::"distribute", Action::"renew"], resource)
when {
    resource.kind == "VM" && resource.hasTag("env") && resource.getTag("env") == "prod" &&
    context.source == "module" && context.within.contains("example.net")
};

@id("owners-rotate")
permit(principal, action in [Action::"rotate", Action::"revoke", Action::"cancel"], resource)
when { resource.owner == principal };

@id("no-bank")
@reason("names of the bank are its own team's")
forbid(principal, action, resource)
when { context.touches.contains("bank.example.net") }
unless { principal in Group::"bank" };

@id("old-host")
@reason("host h-13 is being retired")
forbid(principal, action in [Action::"request", Action::"distribute"], resource in Host::"h-13");
"""
POLICIES = Policies(TEXT, 7)


def question(act: Act = Act.REQUEST, *told: str, **changes: Any) -> Question:
    asked = Asked("web", Source.MODULE, "P-256", names=names.parse_all(told or ("web.example.net",)))
    made = Question(act, Owner("ann", frozenset({"web"})), Resource("r1", "web-1", Kind.VM, "ann", "h-1", {"env": "prod"}), asked)
    who = replace(made.who, **{k: v for k, v in changes.items() if k in ("groups",)})
    resource = replace(made.resource, **{k: v for k, v in changes.items() if k in ("kind", "attributes", "host", "owner")})
    return replace(made, who=who, resource=resource, asked=replace(asked, **{k: v for k, v in changes.items() if k in ("source",)}))


@pytest.mark.parametrize(
    ("asked", "allowed", "why"),
    [
        (question(), True, "permitted by web-team"),
        (question(Act.RENEW), True, "permitted by web-team"),
        (question(Act.REQUEST, "*.example.net"), True, "permitted by web-team"),
        (question(Act.REQUEST, "web.example.net", "web.example.com"), False, "no rule permits it"),
        (question(Act.REQUEST, "notexample.net"), False, "no rule permits it"),
        (question(Act.REQUEST, "example.net.evil.com"), False, "no rule permits it"),
        (question(groups=frozenset()), False, "no rule permits it"),
        (question(attributes={}), False, "no rule permits it"),
        (question(attributes={"env": "test"}), False, "no rule permits it"),
        (question(kind=Kind.VOLUME), False, "no rule permits it"),
        (question(source=Source.ISSUER), False, "no rule permits it"),
        (question(Act.IMPORT), False, "no rule permits it"),
        (question(Act.ROTATE), True, "permitted by owners-rotate"),
        (question(Act.ROTATE, owner="bob"), False, "no rule permits it"),
        (question(Act.REQUEST, "a.bank.example.net"), False, "forbidden by no-bank: names of the bank are its own team's"),
        (question(Act.REQUEST, "a.bank.example.net", groups=frozenset({"web", "bank"})), True, "permitted by web-team"),
        (question(host="h-13"), False, "forbidden by old-host: host h-13 is being retired"),
        (question(Act.RENEW, host="h-13"), True, "permitted by web-team"),
        (
            question(Act.REQUEST, "a.bank.example.net", host="h-13"),
            False,
            "forbidden by no-bank: names of the bank are its own team's; old-host: host h-13 is being retired",
        ),
    ],
)
def test_decisions(asked: Question, allowed: bool, why: str) -> None:
    decision = POLICIES.decide(asked)
    assert (decision.allowed, decision.why, decision.version) == (allowed, why, 7)


def test_a_wildcard_stands_for_names_that_it_is_not_in() -> None:
    text = '@id("all") permit(principal, action, resource);\n@id("star") @reason("it stands for the bank too")'
    policies = Policies(text + ' forbid(principal, action, resource) when { context.wildcards.contains("example.net") };')
    assert not policies.decide(question(Act.REQUEST, "*.example.net")).allowed
    assert policies.decide(question(Act.REQUEST, "*.web.example.net")).allowed
    assert wildcards(names.parse_all(["*.a.net", "b.net", "ip:::1"])) == {"a.net"}


def test_nothing_is_allowed_by_nothing() -> None:
    assert not Policies("").decide(question()).allowed


def test_a_forbid_that_cannot_be_evaluated_denies() -> None:
    """Cedar itself would pass over it."""
    text = '@id("all") permit(principal, action, resource);\n@id("big") @reason("x") forbid(principal, action, resource) when {'
    text += " context.lifetime * 9223372036854775807 == 1 };"
    policies = Policies(text)
    huge = replace(question(), asked=replace(question().asked, lifetime=3))
    decision = policies.decide(huge)
    assert not decision.allowed and decision.why.startswith("forbidden by not-evaluated:")
    assert policies.decide(question()).allowed


@pytest.mark.parametrize(
    "hostile",
    ['"', '\\"', '" || true', "\n", "\0", 'Owner::"root"', "}", "🦆", "a" * 5000, "__entity", "${x}"],
)
def test_names_and_attributes_are_data(hostile: str) -> None:
    """Whoever reports a guest chooses its name and attributes, whoever asks chooses the material's."""
    asked = question()
    spoilt = replace(
        asked,
        who=Owner(hostile, frozenset({hostile})),
        resource=replace(asked.resource, id=hostile, name=hostile, owner="root", host=hostile, attributes={hostile: hostile}),
        asked=replace(asked.asked, material=hostile, key_type=hostile, profile=hostile),
    )
    decision = POLICIES.decide(spoilt)
    assert not decision.allowed and decision.why == "no rule permits it"
    mine = replace(asked.resource, name=hostile, attributes={"env": "prod", hostile: hostile})
    permitted = POLICIES.decide(replace(asked, resource=mine))
    assert permitted.why == "permitted by web-team"


# ---- uploads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("permit(principal", "not Cedar policies"),
        ("permit(principal, action, resource);", r'each rule has an @id\("..."\)'),
        ('@id("") permit(principal, action, resource);', "each rule has an @id"),
        (f'@id("{"x" * (MAX_ID + 1)}") permit(principal, action, resource);', "each rule has an @id"),
        ('@id("a") permit(principal, action, resource);' * 2, "two rules have the id 'a'"),
        ('@id("a") forbid(principal, action, resource);', "a forbid has a @reason"),
        (f'@id("a") @reason("{"x" * (MAX_REASON + 1)}") forbid(principal, action, resource);', "at most 300 printable"),
        ('@id("a") permit(principal == ?principal, action, resource);', "templates are not supported"),
        ('@id("a") permit(principal, action == Action::"fly", resource);', "fly"),
        ('@id("a") permit(principal, action, resource) when { resource.nme == "x" };', "nme"),
        ('@id("a") permit(principal, action, resource) when { context.names == "x" };', "not allowed|types|expected|unexpected"),
        ('@id("a") permit(principal, action, resource) when { resource.getTag("env") == "x" };', "tag"),
        ("x" * (MAX_POLICIES + 1), "at most 262144 characters"),
    ],
)
def test_policies_that_are_not_taken(text: str, said: str) -> None:
    with pytest.raises(BadPolicies, match=said):
        Policies(text)


def test_as_many_rules_as_there_may_be() -> None:
    rules = [f'@id("{n}") permit(principal == Owner::"{n}", action, resource);\n' for n in range(MAX_RULES + 1)]
    assert len(Policies("".join(rules[:-1])).rules) == MAX_RULES
    with pytest.raises(BadPolicies, match="1001 rules"):
        Policies("".join(rules))
    longest = f'@id("{"x" * MAX_ID}") @reason("{"y" * MAX_REASON}") forbid(principal, action, resource);'
    assert Policies(longest).rules[0].reason == "y" * MAX_REASON


# ---- files of cases -----------------------------------------------------------------------------------------------------

CASES = """
[[case]]
name = "the web team has its names"
act = "request"
owner = { name = "ann", groups = ["web"] }
resource = { name = "web-1", attributes = { env = "prod" } }
material = { name = "web", names = ["web.example.net"] }
expect = "allow"
rule = "web-team"

[[case]]
act = "request"
owner = { name = "ann", groups = ["web"] }
resource = { name = "web-1", attributes = { env = "prod" } }
material = { name = "web", names = ["a.bank.example.net"] }
expect = "deny"
rule = "no-bank"
"""


def test_cases_that_hold_and_rules_that_none_meets() -> None:
    results = cases.run(POLICIES, cases.parse(CASES))
    assert [result.failure for result in results] == ["", ""]
    assert [result.case.name for result in results] == ["the web team has its names", "case 2"]
    assert cases.unused(POLICIES, results) == ("owners-rotate", "old-host")


def test_cases_that_do_not_hold() -> None:
    wrong = CASES.replace('expect = "allow"', 'expect = "deny"').replace('rule = "no-bank"', 'rule = "old-host"')
    first, second = cases.run(POLICIES, cases.parse(wrong))
    assert first.failure == "expected deny: permitted by web-team"
    assert second.failure.startswith("expected rule old-host: forbidden by no-bank")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "stands 1 to"),
        ("[[case", "Expected|Invalid|expected"),
        (CASES.replace('act = "request"', 'act = "fly"', 1), r"case 1 \(the web team has its names\): 'fly'"),
        (CASES.replace('expect = "deny"', 'expect = "maybe"'), "case 2: expect is allow or deny, not 'maybe'"),
        (CASES.replace("groups", "teams", 1), "unknown key 'teams'; known are name, groups"),
        (CASES.replace('act = "request"\n', "", 1), r"case 1 \(.*\): 'act' is missing"),
        (CASES.replace("a.bank.example.net", "-x"), "case 2: '-x' is no host name"),
        ("case = 3", "stands 1 to"),
        ("[[case]]\nowner = 3", "is missing or of another kind|unknown"),
    ],
)
def test_cases_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(BadCases, match=said):
        cases.parse(text)


# ---- beside a model -----------------------------------------------------------------------------------------------------

labels = st.sampled_from(["example.net", "bank.example.net", "example.com", "net"])
heads = st.sampled_from(["web", "*", "a.b", "bank"])
hosts = st.builds(lambda head, tail: f"{head}.{tail}", heads, labels).filter(lambda name: name != "*.net")
questions = st.builds(
    Question,
    st.sampled_from(Act),
    st.builds(Owner, st.sampled_from(["ann", "bob"]), st.frozensets(st.sampled_from(["web", "bank", "ops"]))),
    st.builds(
        Resource,
        st.just("r1"),
        st.just("web-1"),
        st.sampled_from(Kind),
        st.sampled_from(["ann", "bob"]),
        st.sampled_from(["h-1", "h-13"]),
        st.dictionaries(st.sampled_from(["env", "tier"]), st.sampled_from(["prod", "test"])),
    ),
    st.builds(
        Asked,
        st.just("web"),
        st.sampled_from(Source),
        st.just("P-256"),
        names=st.lists(hosts, min_size=1, max_size=3).map(names.parse_all),
    ),
)


def in_domain(name: str, domain: str) -> bool:
    host = name.removeprefix("dns:").removeprefix("*.")
    return host == domain or host.endswith("." + domain)


def model(asked: Question) -> tuple[bool, set[str]]:
    """What TEXT says, in Python."""
    told, act = list(map(str, asked.asked.names)), asked.act
    forbids, permits = set(), set()
    if any(in_domain(n, "bank.example.net") for n in told) and "bank" not in asked.who.groups:
        forbids.add("no-bank")
    if asked.resource.host == "h-13" and act in (Act.REQUEST, Act.DISTRIBUTE):
        forbids.add("old-host")
    web = "web" in asked.who.groups and act in (Act.REQUEST, Act.DISTRIBUTE, Act.RENEW) and asked.resource.kind is Kind.VM
    prod = asked.resource.attributes.get("env") == "prod" and asked.asked.source is Source.MODULE
    if web and prod and all(in_domain(n, "example.net") for n in told):
        permits.add("web-team")
    if act in (Act.ROTATE, Act.REVOKE, Act.CANCEL) and asked.resource.owner == asked.who.name:
        permits.add("owners-rotate")
    return (False, forbids) if forbids else (bool(permits), permits)


@given(questions)
def test_beside_the_model(asked: Question) -> None:
    decision = POLICIES.decide(asked)
    assert (decision.allowed, {rule.id for rule in decision.rules}) == model(asked)


@given(st.lists(hosts, min_size=1, max_size=4).map(names.parse_all), labels)
def test_domains_of_names(told: tuple[names.Name, ...], domain: str) -> None:
    assert (domain in within(told)) == all(in_domain(str(n), domain) for n in told)
    assert (domain in touches(told)) == any(in_domain(str(n), domain) for n in told)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ip:192.0.2.1", {"192.0.2.1"}),
        ("uri:https://web.example.net:8443/x", {"web.example.net", "example.net", "net"}),
        ("uri:https://192.0.2.1/x", set()),
        ("uri:urn:uuid:1", set()),
        ("email:a@example.net", {"example.net", "net"}),
    ],
)
def test_domains_of_other_names(text: str, found: set[str]) -> None:
    assert within([names.parse(text)]) == touches([names.parse(text)]) == found
