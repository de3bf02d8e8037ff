"""hsmvisor request apply, request explain: what an owner asks for, and what would come of it."""

from __future__ import annotations

import sys
from typing import Any

import click
import grpc
from hsmvisor.cli.context import MANAGER, REFUSED, CommandError, Context, of_call, pass_context, plain, table, when
from hsmvisor.cli.fleet.finding import get
from hsmvisor.cli.fleet.parameters import ident_option
from hsmvisor.cli.fleet.reach import Manager, ManagerCommand, manager_of, words
from hsmvisor.cli.fleet.showing import REQUESTS, request_row
from hsmvisor.cli.fleet.specs import Asked, asked_of, spec_options
from hsmvisor.cli.fleet.waiting import Waiting, demand_allowed
from hsmvisor.cli.parameters import Duration
from hsmvisor_rpc.v1 import manager_pb2 as pb

FILE = """
    \b
    A file:
      [[request]]
      material = "web"
      names = ["dns:{name}.example.net"]
      select = { env = "prod", role = "web" }     # and / or: resources = ["rack1-host7/web-1"]
      lifetime = "30d"
      renewal = { lead = "10d" }                  # off, same_key, lead, cron, period, days, signatures
      # source, key_type, authority, profile, usage, two_step, health, escrow, bare, mode, drain, after_drain, on_expiry,
      # measured, owner
"""


@click.command(cls=ManagerCommand)
@spec_options
@click.option("--wait/--no-wait", default=None, help="Wait until it is done or fails; on a terminal that is the default.")
@click.option("--timeout", "within", type=Duration(), default=300, show_default="5m", help="How long to wait at most.")
@ident_option
@pass_context
def apply(
    ctx: Context, /, material: str, file: Any, owner: str, wait: bool | None, within: int, ident: str, **options: Any
) -> None:
    """Ask for MATERIAL on resources, or change what was asked; the same again changes nothing.

    The manager asks its policies, has the key made and certified, delivers it, and renews it from then on: each resource that is
    meant gets it, those too that come later. MATERIAL is the key's name in the guests' modules (CKA_LABEL).

    \b
    Example: hsmvisor request apply web --name 'dns:{name}.example.net' --select env=prod --lifetime 30d
    Example: hsmvisor request apply api --source issuer --name dns:api.example.net --resource web-1 --resource web-2 --two-step
    Example: hsmvisor request apply --file requests.toml
    """
    asked = asked_of(material, file, owner, options)
    manager, wanted = manager_of(ctx), sys.stderr.isatty() if wait is None else wait
    waiting = Waiting(ctx, within)
    done: list[pb.MaterialRequest] = []
    failures: list[CommandError] = []
    for number, one in enumerate(asked):
        try:
            before = _before(manager, one)
            own = ident if len(asked) == 1 else f"{ident}-{number}"
            found = manager.requests.Apply(pb.ApplyRequest(request_id=own, spec=one.spec, owner=one.owner), timeout=manager.timeout)
        except grpc.RpcError as error:
            failures.append(_named(of_call(error, MANAGER), one, asked))
            continue
        done.append(found)
        ctx.say(_said(found, before))
    for index, found in enumerate(done if wanted else ()):
        try:
            done[index] = waiting.until_done(found, stays=_needs_its_key)
            demand_allowed(done[index])
        except CommandError as error:
            failures.append(error)
            done[index] = get(manager, pb.GetRequest(id=found.id))
    for found in done:
        _hint(ctx, found, wanted)
    _tell(ctx, done, one_alone=len(asked) == 1, wanted=wanted)
    if failures:
        for failure in failures[:-1]:
            failure.json = ctx.json
            failure.show()
        raise failures[-1]


apply.help = (apply.help or "") + FILE


def _before(manager: Manager, asked: Asked) -> pb.MaterialRequest | None:
    try:
        request = pb.GetRequest(material=asked.spec.material, owner=asked.owner)
        return get(manager, request)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    return None


def _named(error: CommandError, one: Asked, asked: list[Asked]) -> CommandError:
    """Says of which of several requests it is."""
    if len(asked) == 1:
        return error
    return CommandError(f"{one.where}: {error.message}", error.exit_code, error.hint, error.reason)


def _said(found: pb.MaterialRequest, before: pb.MaterialRequest | None) -> str:
    what = f"{found.spec.material} of {found.owner}"
    if before is None or before.state != "active":
        return f"{what} is asked for"
    if before.spec == found.spec and before.changed_at == found.changed_at:
        return f"{what} is asked for already"
    return f"{what} is changed"


def _needs_its_key(found: pb.MaterialRequest) -> bool:
    return found.spec.source == "imported" and not any(line.generations for line in found.lines)


def _hint(ctx: Context, found: pb.MaterialRequest, waited: bool) -> None:
    material = found.spec.material
    if _needs_its_key(found):
        ctx.say(f"  it waits for its key: hsmvisor request import {material} --key-file FILE --cert-file FILE")
    elif not found.lines and not found.denials:
        ctx.say("  no resource is meant by it at this moment; those that come later get it when they come")
    elif not waited:
        ctx.say(f"  hsmvisor request show {material} tells how far it is")


_LINES = ("material", "resource", "stage", "generation", "until", "renewed at")


def _line_row(found: pb.MaterialRequest, line: pb.Line) -> tuple[object, ...]:
    where = line.resource or "all of them"
    return found.spec.material, where, line.stage, line.generation or "-", when(line.not_after), when(line.renew_at)


def _tell(ctx: Context, done: list[pb.MaterialRequest], one_alone: bool, wanted: bool) -> None:
    def text() -> None:
        if wanted:
            table(_LINES, [_line_row(one, line) for one in done for line in one.lines])
        elif len(done) > 1:
            table(REQUESTS, map(request_row, done))

    if one_alone and done:
        ctx.result(done[0], text)
    elif done:
        ctx.result({"requests": [plain(one) for one in done]}, text)


@click.command(cls=ManagerCommand)
@spec_options
@pass_context
def explain(ctx: Context, /, material: str, file: Any, owner: str, **options: Any) -> None:
    """What `request apply` with the same options would do, on which resource, and why; changes nothing.

    Ends with 4 when policies deny it on a resource, or something else stands against it.

    Example: hsmvisor request explain web --name 'dns:{name}.example.net' --select env=prod
    """
    asked = asked_of(material, file, owner, options)
    manager = manager_of(ctx)
    found = []
    for one in asked:
        try:
            request = pb.ExplainRequest(spec=one.spec, owner=one.owner)
            found.append(manager.requests.Explain(request, timeout=manager.timeout))
        except grpc.RpcError as error:
            raise _named(of_call(error, MANAGER), one, asked) from None
    told = [{"material": one.spec.material, "owner": one.owner, **plain(answer)} for one, answer in zip(asked, found, strict=True)]

    def text() -> None:
        for one, answer in zip(asked, found, strict=True):
            _show(one, answer)

    ctx.result(told[0] if len(told) == 1 else {"requests": told}, text)
    if any(not expected.allowed for answer in found for expected in answer.resources):
        raise click.exceptions.Exit(REFUSED)


_CHANGES = {"nothing": "it is asked for already, and nothing changes", "create": "it is new", "change": "it is changed"}


def _show(one: Asked, answer: pb.Explanation) -> None:
    click.echo(f"{one.spec.material}: {_CHANGES.get(answer.change, answer.change)}")
    rows = [(e.resource, "yes" if e.allowed else "NO", e.why, words(e.names), e.outcome) for e in answer.resources]
    if rows:
        table(("resource", "allowed", "why", "names", "outcome"), rows)
    for remark in answer.remarks:
        click.echo(f"  {remark}")
    if answer.next_renewal.seconds:
        click.echo(f"  renewed next at {when(answer.next_renewal)}: {answer.renewal_why or 'by its lifetime'}")


COMMANDS = (apply, explain)
