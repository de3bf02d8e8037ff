"""Cedar behind `decide`: default deny, a forbid is stronger than any permit, and what cannot be evaluated denies.

Cedar itself passes over a policy whose evaluation fails; a forbid that fails would then forbid nothing.  So any failure denies.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import cedarpy
from hsmvisor.manager.policy.questions import Decision, Question, Rule, touches, wildcards, within

MAX_POLICIES = 256 * 1024  #: characters of one version
MAX_RULES = 1000
MAX_ID = 64  #: characters of a rule's @id
MAX_REASON = 300

SCHEMA = resources.files("hsmvisor.manager.policy").joinpath("fleet.cedarschema").read_text(encoding="utf-8")


class BadPolicies(ValueError):
    """Policies that are not taken; each line says where and what is wrong."""


class Policies:
    """One version, parsed and validated.  For any thread."""

    def __init__(self, text: str, version: int = 0) -> None:
        """Raises BadPolicies."""
        if len(text) > MAX_POLICIES:
            raise BadPolicies(f"policies have at most {MAX_POLICIES} characters, these have {len(text)}")
        self.text, self.version = text, version
        self._rules = _rules(text)
        _validate(text)
        self._schema = cedarpy.Schema.from_str(SCHEMA)
        self._policies = cedarpy.PolicySet.from_str(text)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(self._rules.values())

    def decide(self, question: Question) -> Decision:
        request = {
            "principal": _uid("Owner", question.who.name),
            "action": _uid("Action", str(question.act)),
            "resource": _uid("Resource", question.resource.id),
            "context": _context(question),
        }
        entities = json.dumps(_entities(question))
        try:
            result = cedarpy.is_authorized(request, self._policies, entities, self._schema)
        except ValueError as error:
            return Decision(False, (Rule("not-evaluated", _short(str(error))),), self.version)
        if result.diagnostics.errors:
            return Decision(False, (Rule("not-evaluated", _short("; ".join(map(str, result.diagnostics.errors)))),), self.version)
        rules = tuple(sorted((self._rules[name] for name in result.diagnostics.reasons), key=lambda rule: rule.id))
        return Decision(result.allowed, rules, self.version)


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_REASON]


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, "id": name}


def _reference(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": _uid(kind, name)}


def _context(question: Question) -> dict[str, Any]:
    asked = question.asked
    return {
        "material": asked.material,
        "source": str(asked.source),
        "key_type": asked.key_type,
        "authority": asked.authority,
        "profile": asked.profile,
        "usage": asked.usage,
        "names": sorted(map(str, asked.names)),
        "within": sorted(within(asked.names)),
        "touches": sorted(touches(asked.names)),
        "wildcards": sorted(wildcards(asked.names)),
        "lifetime": asked.lifetime,
        "automatic": asked.automatic,
        "measured": sorted(asked.measured),
    }


def _entities(question: Question) -> list[dict[str, Any]]:
    who, resource = question.who, question.resource
    found: list[dict[str, Any]] = [
        {"uid": _uid("Owner", who.name), "attrs": {}, "parents": [_uid("Group", group) for group in sorted(who.groups)]},
        {"uid": _uid("Host", resource.host), "attrs": {"trusted": resource.host_trusted}, "parents": []},
        {
            "uid": _uid("Resource", resource.id),
            "attrs": {
                "name": resource.name,
                "kind": str(resource.kind),
                "owner": _reference("Owner", resource.owner),
                "host": _reference("Host", resource.host),
            },
            "parents": [_uid("Host", resource.host)],
            "tags": dict(resource.attributes),
        },
    ]
    return found + [{"uid": _uid("Group", group), "attrs": {}, "parents": []} for group in sorted(who.groups)]


# ---- what an upload has to be -------------------------------------------------------------------------------------------


def _rules(text: str) -> dict[str, Rule]:
    """Returns the rules by the parser's names for them.  Raises BadPolicies."""
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as error:
        raise BadPolicies(f"not Cedar policies: {_short(str(error))}") from None
    if parsed.get("templates") or parsed.get("templateLinks"):
        raise BadPolicies("templates are not supported: write the policy out")
    policies: dict[str, Any] = parsed.get("staticPolicies", {})
    if len(policies) > MAX_RULES:
        raise BadPolicies(f"{len(policies)} rules, at most {MAX_RULES}")
    found: dict[str, Rule] = {}
    for name, policy in policies.items():
        annotations = policy.get("annotations", {})
        identity, reason = annotations.get("id") or "", annotations.get("reason") or ""
        if not identity or len(identity) > MAX_ID or not identity.isprintable():
            raise BadPolicies(f'{name}: each rule has an @id("...") of 1 to {MAX_ID} characters, by which a denial names it')
        if identity in (rule.id for rule in found.values()):
            raise BadPolicies(f"two rules have the id {identity!r}")
        if len(reason) > MAX_REASON or not reason.isprintable():
            raise BadPolicies(f"{identity}: a @reason has at most {MAX_REASON} printable characters")
        if policy.get("effect") == "forbid" and not reason:
            raise BadPolicies(f'{identity}: a forbid has a @reason("..."): whoever is denied is told')
        found[name] = Rule(identity, reason)
    return found


def _validate(text: str) -> None:
    result = cedarpy.validate_policies(text, SCHEMA)
    if not result.validation_passed:
        raise BadPolicies("\n".join(_short(str(error)) for error in result.errors[:20]))
