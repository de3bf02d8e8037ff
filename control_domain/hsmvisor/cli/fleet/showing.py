"""A request as people read it: what was asked, each key with its generations, who holds it, who may not."""

from __future__ import annotations

import datetime as dt
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from hsmvisor.cli.context import table, when
from hsmvisor.cli.fleet.reach import words
from hsmvisor.cli.fleet.resources import HOLDINGS, attributes, holding_rows
from hsmvisor.cli.parameters import duration
from hsmvisor_rpc.v1 import manager_pb2 as pb

_SOURCES = {
    "module": "each module makes its own key",
    "issuer": "one key for all, made by the issuer",
    "imported": "a key of the owner's own, imported",
}


def show_request(found: pb.MaterialRequest) -> None:
    spec = found.spec
    rows: list[tuple[str, Any]] = [
        ("material", spec.material),
        ("owner", found.owner),
        ("id", found.id),
        ("state", f"{found.state}, {found.summary}"),
        ("for", "\n".join(members(spec)) or "-"),
        ("key", f"{spec.key_type}: {_SOURCES.get(spec.source, spec.source)}{', kept (escrow)' if spec.escrow else ''}"),
        ("certificate", _certificate(spec)),
        ("names", "\n".join(spec.names) or "-"),
        ("use", _use(spec)),
        *([("boot", f"measured as {' or '.join(spec.measured)}")] if spec.measured else []),
        ("renewal", _renewed(spec)),
        ("asked", f"{when(found.created_at)}, changed {when(found.changed_at)}"),
    ]
    table(("", ""), rows)
    for line in found.lines:
        _show_line(line)
    if found.denials:
        print()
        denied = [(d.resource, d.action, d.why, d.policy_version, when(d.at)) for d in found.denials]
        table(("denied on", "action", "why", "policies", "at"), denied)


def members(spec: pb.RequestSpec) -> list[str]:
    found = list(spec.resources)
    if spec.selector:
        found.append(f"all with {attributes(spec.selector)}")
    return found


def _certificate(spec: pb.RequestSpec) -> str:
    if spec.bare:
        return "none: a bare key"
    lifetime = duration(spec.lifetime_seconds) if spec.lifetime_seconds else "the profile's lifetime"
    return f"{spec.authority or 'imported'}, profile {spec.profile}, {lifetime}"


def _use(spec: pb.RequestSpec) -> str:
    told = [spec.usage]
    if spec.mode != "pin":
        told.append(f"mode {spec.mode}")
    if spec.two_step:
        told.append("in two steps")
    if spec.health:
        told.append(f"health check {spec.health}")
    told.append(f"drain {duration(spec.drain_seconds)}" if spec.drain_seconds else "drain until the certificate ends")
    if spec.after_drain != "extend":
        told.append(f"{spec.after_drain} after it")
    if spec.on_expiry != "keep":
        told.append(f"{spec.on_expiry} when it expires")
    return ", ".join(told)


def _renewed(spec: pb.RequestSpec) -> str:
    if spec.source == "imported" and not spec.authority and not spec.bare:
        return "its owner imports the next one"
    return rule_told(spec.renewal)


def rule_told(rule: pb.Rule) -> str:
    if rule.off:
        return "off"
    told = ["the same key" if rule.same_key else "a new key each time"]
    if rule.lead_seconds:
        told.append(f"{duration(rule.lead_seconds)} before the end")
    if rule.cron:
        told.append(f"by the schedule {rule.cron} (UTC)")
    if rule.period_seconds:
        told.append(f"each {duration(rule.period_seconds)}")
    if rule.days:
        told.append(f"after {rule.days:g} days")
    if rule.signatures:
        told.append(f"after {rule.signatures} signatures")
    if len(told) == 1:
        told.append("by the lifetime of its certificate")
    return ", ".join(told)


def _show_line(line: pb.Line) -> None:
    print()
    rows: list[tuple[str, Any]] = [
        ("key of", line.resource or "all of them"),
        ("stage", line_told(line)),
        ("serves", f"generation {line.generation}, until {when(line.not_after)}" if line.generation else "-"),
        ("renewed at", _renewal(line)),
    ]
    if line.stage == "serving" and line.why:
        rows.append(("because", line.why))
    table(("", ""), rows)
    if line.generations:
        generations = [
            (g.number, g.state, g.serial or "-", when(g.not_before), when(g.not_after), when(g.activated_at), g.why or "-")
            for g in line.generations
        ]
        table(("generation", "state", "serial", "from", "until", "activated", "why"), generations)
    if line.holdings:
        table(HOLDINGS[1:], [row[1:] for row in holding_rows(line.holdings)])


def line_told(line: pb.Line) -> str:
    tries = f" ({line.failures} times failed)" if line.failures else ""
    why = f": {line.why}" if line.why and line.stage != "serving" else ""
    return f"{line.stage}{tries}{why}"


def _renewal(line: pb.Line) -> str:
    return f"{when(line.renew_at)}{_until(line.renew_at)}" if line.renew_at.seconds else "-"


def _until(stamp: Timestamp) -> str:
    left = stamp.ToDatetime(dt.UTC) - dt.datetime.now(dt.UTC)
    if left.total_seconds() <= 0:
        return ", which is now"
    if left.days:
        return f", in {left.days} days"
    minutes = int(left.total_seconds() // 60)
    return f", in {minutes // 60} h {minutes % 60} min" if minutes else ", in less than a minute"


REQUESTS = ("material", "owner", "for", "names", "source", "authority", "", "changed", "id")


def request_row(found: pb.MaterialRequest) -> tuple[object, ...]:
    spec = found.spec
    return (
        spec.material,
        found.owner,
        "; ".join(members(spec)),
        words(spec.names),
        spec.source,
        spec.authority or "-",
        found.summary,
        when(found.changed_at),
        found.id,
    )
