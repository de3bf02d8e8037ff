"""hsmvisor request ...: what owners asked for, how far it is, and what is to become of it."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.core import ParameterSource
from hsmvisor.cli.context import Context, pass_context, plain, table
from hsmvisor.cli.fleet import asking, importing
from hsmvisor.cli.fleet.finding import find, resource_id
from hsmvisor.cli.fleet.parameters import (
    MATERIAL_NAME,
    REASONS,
    RESOURCE_NAME,
    because_of,
    ident_option,
    owner_option,
    why_option,
    yes_option,
)
from hsmvisor.cli.fleet.reach import ManagerGroup, manager_of
from hsmvisor.cli.fleet.showing import REQUESTS, request_row, rule_told, show_request
from hsmvisor.cli.fleet.specs import rule_of, rule_options
from hsmvisor.cli.fleet.waiting import Waiting, generations, serving
from hsmvisor.cli.parameters import Duration
from hsmvisor_rpc.v1 import manager_pb2 as pb


@click.group(cls=ManagerGroup)
def request() -> None:
    """Keys and certificates that owners ask their fleet's manager for: delivered to guests, and renewed until they are cancelled.

    A request is named by its material, or by its id. How the manager is reached: hsmvisor fleet --help.

    \b
      hsmvisor request explain web --name 'dns:{name}.example.net' --select env=prod    what would happen?
      hsmvisor request apply web --name 'dns:{name}.example.net' --select env=prod
      hsmvisor request show web                                                         how far is it?
      hsmvisor request rotate web                                                       a new key now
    """


for command in (*asking.COMMANDS, importing.import_):
    request.add_command(command)

_material = click.argument("material", type=MATERIAL_NAME)
_resource = click.option(
    "--resource",
    "resource",
    default="",
    type=RESOURCE_NAME,
    help="HOST/NAME of one resource alone, where each has a key of its own.",
)


@request.command("list")
@click.option("--owner", default="", help="Of one owner alone.")
@click.option("--state", type=click.Choice(["active", "cancelled", "all"]), default="active", show_default=True, help="Which ones.")
@pass_context
def list_(ctx: Context, owner: str, state: str) -> None:
    """What was asked for, and how far it is: done, working, failing, denied, waiting, cancelled. An owner sees its own.

    Example: hsmvisor request list --state all
    """
    manager = manager_of(ctx)
    asked = pb.ListRequestsRequest(owner=owner, state="" if state == "all" else state)
    found = manager.pages(manager.requests.List, asked, "requests")
    ctx.result({"requests": [plain(one) for one in found]}, lambda: table(REQUESTS, map(request_row, found)))


@request.command()
@_material
@owner_option
@pass_context
def show(ctx: Context, material: str, owner: str) -> None:
    """One request: each key with its generations, who holds it, when it is renewed, where it is denied and by which rule.

    Example: hsmvisor request show web
    """
    found = find(manager_of(ctx), material, owner)
    ctx.result(found, lambda: show_request(found))


@request.command()
@_material
@owner_option
@click.option("--keep", is_flag=True, help="What was delivered stays; it is only not renewed any more.")
@why_option
@yes_option
@ident_option
@pass_context
def cancel(ctx: Context, material: str, owner: str, keep: bool, because: str, yes: bool, ident: str) -> None:
    """End a request: nothing is renewed, and its keys are taken away from all guests; one that is cancelled is no error.

    Example: hsmvisor request cancel web --keep --why 'web moves to the new cluster'
    """
    manager = manager_of(ctx)
    found = find(manager, material, owner)
    if not keep and not yes and found.state == "active":
        click.confirm(f"Take {found.spec.material} of {found.owner} away from all guests that have it?", abort=True, err=True)
    asked = pb.CancelRequest(request_id=ident, id=found.id, keep=keep, why=because_of(ctx, because))
    found = manager.requests.Cancel(asked, timeout=manager.timeout)
    stays = "what was delivered stays, and is not renewed" if keep else "what was delivered is taken away"
    ctx.result(found, lambda: click.echo(f"{found.spec.material} of {found.owner} is cancelled: {stays}"))


@request.command()
@_material
@owner_option
@_resource
@click.option(
    "--urgent",
    is_flag=True,
    help="The old key is known to others: whatever the rule says there is a new one, the old one ends at once everywhere, and its "
    "certificate is revoked.",
)
@click.option("--revoke", is_flag=True, help="Revoke the old certificate once the new one serves.")
@click.option("--reason", type=click.Choice(REASONS), help="Of the revocation; default: superseded, or key_compromise if urgent.")
@click.option("--wait/--no-wait", default=None, help="Wait until the new one serves or fails; on a terminal that is the default.")
@click.option("--timeout", "within", type=Duration(), default=300, show_default="5m", help="How long to wait at most.")
@why_option
@ident_option
@pass_context
def rotate(
    ctx: Context, material: str, owner: str, resource: str, urgent: bool, revoke: bool, reason: str | None, wait: bool | None,
    within: int, because: str, ident: str,
) -> None:  # fmt: skip
    """Make a new generation now, whenever it would be renewed.

    Example: hsmvisor request rotate web --urgent --why 'found in a core dump'
    """
    manager = manager_of(ctx)
    before = find(manager, material, owner)
    asked = pb.RotateRequest(
        request_id=ident,
        id=before.id,
        urgent=urgent,
        revoke=revoke,
        reason=reason or "",
        resource=resource_id(manager, resource),
        why=because_of(ctx, because),
    )
    found = manager.requests.Rotate(asked, timeout=manager.timeout)
    if sys.stderr.isatty() if wait is None else wait:
        found = Waiting(ctx, within).until_done(found, generations(before, asked.resource))
        text = f"{found.spec.material} of {found.owner} is rotated: generation {serving(found, asked.resource)} serves"
    else:
        text = f"{found.spec.material} of {found.owner} gets a new generation; hsmvisor request show {material} tells how far it is"
    ctx.result(found, lambda: click.echo(text))


@request.command()
@_material
@owner_option
@_resource
@ident_option
@pass_context
def activate(ctx: Context, material: str, owner: str, resource: str, ident: str) -> None:
    """Activate what is staged (--two-step), although some guests have not staged it; those get it when they can.

    Example: hsmvisor request activate web
    """
    manager = manager_of(ctx)
    asked = pb.ActivateRequest(request_id=ident, id=find(manager, material, owner).id, resource=resource_id(manager, resource))
    found = manager.requests.Activate(asked, timeout=manager.timeout)
    ctx.result(found, lambda: click.echo(f"{found.spec.material} of {found.owner} is activated where it is staged"))


@request.command("roll-back")
@_material
@owner_option
@_resource
@why_option
@ident_option
@pass_context
def roll_back(ctx: Context, material: str, owner: str, resource: str, because: str, ident: str) -> None:
    """Let the generation before serve again, everywhere.

    Example: hsmvisor request roll-back web --why 'clients do not know the new chain'
    """
    manager = manager_of(ctx)
    asked = pb.RollBackRequest(
        request_id=ident,
        id=find(manager, material, owner).id,
        resource=resource_id(manager, resource),
        why=because_of(ctx, because),
    )
    found = manager.requests.RollBack(asked, timeout=manager.timeout)
    serves = serving(found, asked.resource)
    ctx.result(found, lambda: click.echo(f"{found.spec.material} of {found.owner} is rolled back: generation {serves} serves"))


@request.command()
@_material
@owner_option
@_resource
@click.option("--generation", type=click.IntRange(0, 2**32 - 1), default=0, help="Which one; default: that which serves.")
@click.option("--reason", default="unspecified", show_default=True, type=click.Choice(REASONS), help="As it stands in the list.")
@why_option
@yes_option
@ident_option
@pass_context
def revoke(
    ctx: Context, material: str, owner: str, resource: str, generation: int, reason: str, because: str, yes: bool, ident: str
) -> None:
    """Revoke a generation's certificate. Where it serves, another one takes its place.

    Example: hsmvisor request revoke web --generation 3 --reason key_compromise --yes
    """
    manager = manager_of(ctx)
    before = find(manager, material, owner)
    if not yes:
        which = f"generation {generation}" if generation else "the generation that serves"
        click.confirm(f"Revoke the certificate of {which} of {before.spec.material}?", abort=True, err=True)
    asked = pb.RevokeRequest(
        request_id=ident,
        id=before.id,
        resource=resource_id(manager, resource),
        generation=generation,
        reason=reason,
        why=because_of(ctx, because),
    )
    found = manager.requests.Revoke(asked, timeout=manager.timeout)
    ctx.result(found, lambda: click.echo(f"{found.spec.material} of {found.owner}: the certificate is being revoked"))


@request.command()
@_material
@owner_option
@click.option("--on", is_flag=True, help="It is renewed again.")
@rule_options
@ident_option
@pass_context
def renewal(ctx: Context, /, material: str, owner: str, on: bool, ident: str, **rule: Any) -> None:
    """Say when a material is renewed, or that it is not; what is not given stays as it is. Without options: show its rule.

    \b
    Example: hsmvisor request renewal web --no-renewal
    Example: hsmvisor request renewal web --on --renew-lead 10d --cron '0 3 * * 1'
    """
    if on and rule["off"]:
        raise click.UsageError("--on and --no-renewal exclude each other")
    manager, current = manager_of(ctx), click.get_current_context()
    found = find(manager, material, owner)
    before = found.spec.renewal
    values = {
        "off": before.off,
        "same_key": before.same_key,
        "lead": before.lead_seconds,
        "cron": before.cron,
        "period": before.period_seconds,
        "days": before.days,
        "signatures": before.signatures,
    }
    given = {name: value for name, value in rule.items() if current.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    wanted = rule_of(values | given | ({"off": False} if on else {}))
    if wanted != before:
        asked = pb.SetRenewalRequest(request_id=ident, id=found.id, renewal=wanted)
        found = manager.requests.SetRenewal(asked, timeout=manager.timeout)
    ctx.result(found, lambda: click.echo(f"{found.spec.material} of {found.owner}, renewal: {rule_told(found.spec.renewal)}"))
