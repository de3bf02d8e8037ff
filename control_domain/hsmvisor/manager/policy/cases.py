"""Tests of policies that people write: a TOML file of cases, each a question and what the answer must be.

[[case]]
name = "the web team has its names"
act = "request"
owner = { name = "ann", groups = ["web"] }
resource = { name = "web-1", kind = "VM", attributes = { env = "prod" } }
material = { name = "web", names = ["web.example.net"] }    # measured = ["golden"]: as what the guest's boot was measured
expect = "allow"                # or "deny"
rule = "web-team"               # which rule decides; may be left out
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Act, Asked, Decision, Kind, Owner, Question, Resource, Source

MAX_CASES = 10_000
_EXPECTED = ("allow", "deny")


class BadCases(ValueError):
    """A file of cases that cannot be read; the message says where."""


@dataclass(frozen=True)
class Case:
    name: str
    question: Question
    allowed: bool
    rule: str = ""

    def failure(self, decision: Decision) -> str:
        """Says what differs; empty: nothing."""
        if decision.allowed != self.allowed:
            return f"expected {_EXPECTED[not self.allowed]}: {decision.why}"
        if self.rule and self.rule not in {rule.id for rule in decision.rules}:
            return f"expected rule {self.rule}: {decision.why}"
        return ""


@dataclass(frozen=True)
class Result:
    case: Case
    decision: Decision
    failure: str


def run(policies: Policies, cases: tuple[Case, ...]) -> tuple[Result, ...]:
    decided = ((case, policies.decide(case.question)) for case in cases)
    return tuple(Result(case, decision, case.failure(decision)) for case, decision in decided)


def unused(policies: Policies, results: tuple[Result, ...]) -> tuple[str, ...]:
    """Returns the rules that no case met."""
    met = {rule.id for result in results for rule in result.decision.rules}
    return tuple(rule.id for rule in policies.rules if rule.id not in met)


def parse(text: str) -> tuple[Case, ...]:
    """Raises BadCases."""
    try:
        rows = tomllib.loads(text).get("case", [])
    except tomllib.TOMLDecodeError as error:
        raise BadCases(str(error)) from None
    if not isinstance(rows, list) or not rows or len(rows) > MAX_CASES:
        raise BadCases(f"[[case]] stands 1 to {MAX_CASES} times in a file of cases")
    return tuple(_cases(rows))


def _cases(rows: list[Any]) -> Iterator[Case]:
    for number, row in enumerate(rows, 1):
        where = f"case {number}"
        try:
            where += f" ({row['name']})" if "name" in row else ""
            yield _case(row, f"case {number}")
        except (KeyError, TypeError, AttributeError) as error:
            raise BadCases(f"{where}: {error} is missing or of another kind") from None
        except (ValueError, BadName) as error:
            raise BadCases(f"{where}: {error}") from None


def _case(row: dict[str, Any], usual: str) -> Case:
    _known(row, "name", "act", "owner", "resource", "material", "expect", "rule")
    if row["expect"] not in _EXPECTED:
        raise ValueError(f"expect is allow or deny, not {row['expect']!r}")
    question = Question(Act(row["act"]), _owner(row["owner"]), _resource(row["resource"]), _asked(row["material"]))
    return Case(str(row.get("name", usual)), question, row["expect"] == "allow", str(row.get("rule", "")))


def _known(row: dict[str, Any], *keys: str) -> None:
    if unknown := sorted(set(row) - set(keys)):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(keys)}")


def _owner(row: dict[str, Any]) -> Owner:
    _known(row, "name", "groups")
    return Owner(str(row["name"]), frozenset(map(str, row.get("groups", ()))))


def _resource(row: dict[str, Any]) -> Resource:
    _known(row, "name", "kind", "owner", "host", "host_trusted", "attributes")
    name = str(row["name"])
    attributes = {str(key): str(value) for key, value in row.get("attributes", {}).items()}
    owner, host = str(row.get("owner", "")), str(row.get("host", "host-1"))
    return Resource(name, name, Kind(row.get("kind", "VM")), owner, host, attributes, bool(row.get("host_trusted", True)))


def _asked(row: dict[str, Any]) -> Asked:
    _known(row, "name", "source", "key_type", "authority", "profile", "usage", "names", "lifetime", "automatic", "measured")
    told = row.get("names", [])
    return Asked(
        material=str(row["name"]),
        source=Source(row.get("source", "module")),
        key_type=str(row.get("key_type", "P-256")),
        authority=str(row.get("authority", "")),
        profile=str(row.get("profile", "server")),
        usage=str(row.get("usage", "tls")),
        names=names.parse_all(told) if told else (),
        lifetime=int(row.get("lifetime", 0)),
        automatic=bool(row.get("automatic", False)),
        measured=frozenset(_texts(row, "measured")),
    )


def _texts(row: dict[str, Any], key: str) -> list[str]:
    told = row.get(key, [])
    if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
        raise ValueError(f"{key} is a list of texts, not {told!r}")
    return told
