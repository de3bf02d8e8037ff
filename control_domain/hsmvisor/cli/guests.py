"""hsmvisor guest ...: what runs on a host, as the management plane sees it."""

from __future__ import annotations

from typing import Any

import click
import grpc
from hsmvisor.cli.context import Context, Group, pass_context, plain, table, when
from hsmvisor.cli.modules import request_id
from hsmvisor.host.limits import GUEST_KINDS
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


@click.group(cls=Group)
def guest() -> None:
    """What runs on the host and gets keys from the management plane: its owner and attributes decide what is delivered."""


class Attribute(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = str(value).partition("=")
        if not key or not separator:
            self.fail(f"{value!r} is no attribute: NAME=VALUE", param, ctx)
        return key, text


def _guests(ctx: Context) -> rpc.GuestServiceStub:
    return rpc.GuestServiceStub(ctx.channel)


def _find(ctx: Context, name: str) -> pb.Guest:
    return _guests(ctx).GetGuest(pb.GetGuestRequest(name=name), timeout=ctx.timeout)


def _there(ctx: Context, name: str) -> pb.Guest | None:
    try:
        return _find(ctx, name)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    return None


def _attributes(found: pb.Guest) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(found.attributes.items())) or "-"


def _show(found: pb.Guest) -> None:
    rows = [
        ("name", found.name),
        ("kind", found.kind),
        ("owner", found.owner),
        ("attributes", "\n".join(_attributes(found).split(", "))),
        ("module", found.module or "-"),
        ("changed", when(found.changed_at)),
    ]
    if found.refused:
        rows.append(("the manager", f"does not take it: {found.refused}"))
    table(("", ""), rows)


_ident = click.option("--request-id", "ident", help="Makes a repeated call the same call.")
_attribute = click.option(
    "--attribute", "attributes", multiple=True, type=Attribute(), help="NAME=VALUE, which requests select by; may be repeated."
)


@guest.command()
@click.argument("name")
@click.option("--owner", required=True, help="Whose it is: who may ask for its keys.")
@_attribute
@click.option("--kind", default=GUEST_KINDS[0], show_default=True, type=click.Choice(GUEST_KINDS), help="What it is.")
@click.option("--module", "module", default="", help="Its module; default: one of the guest's name. One that is not there is made.")
@click.option("--no-module", is_flag=True, help="It has none: nothing can be delivered to it.")
@_ident
@pass_context
def add(
    ctx: Context, name: str, owner: str, attributes: tuple[tuple[str, str], ...], kind: str, module: str, no_module: bool,
    ident: str | None,
) -> None:  # fmt: skip
    """Register guest NAME, and make its module, which obeys the manager that the host has joined; the same again changes nothing.

    Example: hsmvisor guest add web-1 --owner alice --attribute env=prod --attribute role=web
    """
    if module and no_module:
        raise click.UsageError("--module and --no-module exclude each other")
    request = pb.RegisterGuestRequest(
        request_id=ident or request_id(), name=name, kind=kind, owner=owner, attributes=dict(attributes), module=module,
        no_module=no_module,
    )  # fmt: skip
    with ctx.patience(f"registering {name}"):
        found = _guests(ctx).RegisterGuest(request, timeout=ctx.timeout)
    has = f"module {found.module}" if found.module else "no module"
    ctx.result(found, lambda: click.echo(f"guest {found.name} is registered, {has}"))


@guest.command("set")
@click.argument("name")
@click.option("--owner", help="Whose it is from now on; default: as before.")
@_attribute
@click.option("--no-attributes", is_flag=True, help="It has none from now on.")
@_ident
@pass_context
def set_(
    ctx: Context, name: str, owner: str | None, attributes: tuple[tuple[str, str], ...], no_attributes: bool, ident: str | None
) -> None:
    """Change guest NAME's owner, or replace its attributes: those that are given are all that it has then.

    Example: hsmvisor guest set web-1 --attribute env=test
    """
    if attributes and no_attributes:
        raise click.UsageError("--attribute and --no-attributes exclude each other")
    if owner is None and not attributes and not no_attributes:
        raise click.UsageError("give --owner, --attribute or --no-attributes")
    before = _find(ctx, name)
    values = dict(attributes) if attributes or no_attributes else dict(before.attributes)
    request = pb.UpdateGuestRequest(
        request_id=ident or request_id(), name=name, owner=before.owner if owner is None else owner, attributes=values
    )
    found = _guests(ctx).UpdateGuest(request, timeout=ctx.timeout)
    ctx.result(found, lambda: _show(found))


@guest.command("list")
@pass_context
def list_(ctx: Context) -> None:
    """The guests of the host."""
    found: list[pb.Guest] = []
    token = ""
    while True:
        answer = _guests(ctx).ListGuests(pb.ListGuestsRequest(page_token=token), timeout=ctx.timeout)
        found += answer.guests
        token = answer.next_page_token
        if not token:
            break
    columns = ("name", "kind", "owner", "module", "attributes", "")
    rows = [(g.name, g.kind, g.owner, g.module or "-", _attributes(g), f"refused: {g.refused}" if g.refused else "") for g in found]
    ctx.result({"guests": [plain(g) for g in found]}, lambda: table(columns, rows))


@guest.command()
@click.argument("name")
@pass_context
def show(ctx: Context, name: str) -> None:
    """One guest with its attributes, and whether the manager takes it."""
    found = _find(ctx, name)
    ctx.result(found, lambda: _show(found))


@guest.command()
@click.argument("name")
@click.option("--keep-module", is_flag=True, help="Its module and keys stay.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_ident
@pass_context
def remove(ctx: Context, name: str, keep_module: bool, yes: bool, ident: str | None) -> None:
    """Forget guest NAME and destroy its module with its keys, which cannot be undone; one that is not there is no error."""
    found = _there(ctx, name)
    if found is None and ident is None:
        ctx.result({"removed": "", "module": "", "keys_left": ""}, lambda: click.echo(f"there is no guest {name}"))
        return
    if found is not None and found.module and not keep_module and not yes:
        click.confirm(f"Destroy module {found.module} of guest {name} with all its keys?", abort=True, err=True)
    request = pb.RemoveGuestRequest(request_id=ident or request_id(), name=name, keep_module=keep_module)
    done = _guests(ctx).RemoveGuest(request, timeout=ctx.timeout)

    def text() -> None:
        click.echo(f"guest {name} is removed" + (f", module {done.module} is destroyed" if done.module else ""))
        if done.keys_left:
            click.echo(f"keys are still in its HSM ({done.keys_left}); the host destroys them there when that is possible")

    ctx.result({"removed": name, "module": done.module, "keys_left": done.keys_left}, text)
