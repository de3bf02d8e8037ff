"""hsmvisor fleet hosts, fleet host ...: who has joined, who may join, and who may no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import grpc
from hsmvisor.cli.context import Context, pass_context, plain, table, when
from hsmvisor.cli.fleet.parameters import HOST_NAME, because_of, ident_option, why_option, yes_option
from hsmvisor.cli.fleet.reach import Manager, ManagerCommand, ManagerGroup, manager_of, words
from hsmvisor.cli.fleet.secrets import demand_place, give_token
from hsmvisor.cli.parameters import Duration
from hsmvisor_rpc.v1 import manager_pb2 as pb


@click.command(cls=ManagerCommand)
@pass_context
def hosts(ctx: Context) -> None:
    """The hosts of the fleet.

    Example: hsmvisor fleet hosts
    """
    manager = manager_of(ctx)
    found = manager.pages(manager.fleet.ListHosts, pb.ListHostsRequest(), "hosts")
    columns = ("host", "state", "trusted", "guests", "to do", "heard of", "reports guests of", "version")
    rows = [(h.name, _state(h), _yes(h.trusted), h.resources, h.pending, when(h.seen_at), _owners(h), h.version) for h in found]
    ctx.result({"hosts": [plain(h) for h in found]}, lambda: table(columns, rows))


def _state(host: pb.FleetHost) -> str:
    return f"{host.state}, away" if host.away else host.state


def _owners(host: pb.FleetHost) -> str:
    return words(host.owners) if host.owners else "all owners"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


@click.group(cls=ManagerGroup)
def host() -> None:
    """One host: how it joins, whether it is trusted, and how it leaves."""


def _find(manager: Manager, name: str) -> pb.FleetHost:
    return manager.fleet.GetHost(pb.GetFleetHostRequest(name=name), timeout=manager.timeout)


def _show(found: pb.FleetHost) -> None:
    rows: list[tuple[str, Any]] = [
        ("name", found.name),
        ("id", found.id),
        ("state", _state(found)),
        ("trusted", _yes(found.trusted)),
        ("reports guests of", _owners(found)),
        ("guests", found.resources),
        ("to do", f"{found.pending} commands"),
        ("joined", when(found.joined_at)),
        ("heard of", when(found.seen_at)),
        ("certificate until", when(found.certificate_ends_at)),
        ("version", found.version or "-"),
    ]
    table(("", ""), rows)


@host.command()
@click.argument("name", type=HOST_NAME)
@pass_context
def show(ctx: Context, name: str) -> None:
    """One host: when it was heard of, what it has not carried out yet, until when its certificate is.

    Example: hsmvisor fleet host show rack1-host7
    """
    found = _find(manager_of(ctx), name)
    ctx.result(found, lambda: _show(found))


@host.command()
@click.option("--for", "name", default="", type=HOST_NAME, help="The one name that may join with it; default: any new one.")
@click.option("--owner", "owners", multiple=True, help="Whose guests the host may report; may be repeated. None = everybody's.")
@click.option("--lifetime", type=Duration(), default=3600, show_default="1h", help="How long it may be used: 90s, 30m, 2h, 7d.")
@click.option("--replace", is_flag=True, help="The host joined before and was set up anew; with --for.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it there, for its owner's eyes alone (mode 600)."
)
@ident_option
@pass_context
def token(ctx: Context, name: str, owners: tuple[str, ...], lifetime: int, replace: bool, out: Path | None, ident: str) -> None:
    """Make a token with which a host joins the fleet, once: hsmvisor host join, on that host.

    It says where the manager is, whom to believe as manager, and a one-time secret: keep it as a password.

    \b
    Example: hsmvisor fleet host token --for rack1-host7 --owner alice --out host7.token
    Then on the host: hsmvisor host join --name rack1-host7 host7.token
    """
    if replace and not name:
        raise click.UsageError("--replace is for one host: say which with --for")
    demand_place(out)
    manager = manager_of(ctx)
    request = pb.CreateJoinTokenRequest(request_id=ident, host=name, owners=owners, lifetime_seconds=lifetime, replace=replace)
    made = manager.fleet.CreateJoinToken(request, timeout=manager.timeout)
    joins = name or "NAME"
    more = f"it counts until {when(made.expires_at)}; on the host: hsmvisor host join --name {joins} {out or 'FILE'}"
    give_token(ctx, made, out, f"  {more}" if out is None else f"the token is in {out}: {more}")


def _update(
    ctx: Context, name: str, ident: str, trusted: bool | None = None, owners: tuple[str, ...] | None = None
) -> pb.FleetHost:
    """What is not given stays."""
    manager = manager_of(ctx)
    before = _find(manager, name)
    request = pb.UpdateHostRequest(
        request_id=ident,
        name=name,
        trusted=before.trusted if trusted is None else trusted,
        owners=list(before.owners) if owners is None else owners,
    )
    return manager.fleet.UpdateHost(request, timeout=manager.timeout)


@host.command()
@click.argument("name", type=HOST_NAME)
@ident_option
@pass_context
def trust(ctx: Context, name: str, ident: str) -> None:
    """Say that host NAME is trusted: policies see it as resource.host.trusted, and by the first policies its guests get keys.

    Example: hsmvisor fleet host trust rack1-host7
    """
    found = _update(ctx, name, ident, trusted=True)
    ctx.result(found, lambda: click.echo(f"host {found.name} is trusted"))


@host.command()
@click.argument("name", type=HOST_NAME)
@ident_option
@pass_context
def distrust(ctx: Context, name: str, ident: str) -> None:
    """Say that host NAME is not trusted: by the first policies its guests get nothing new; what they have stays.

    Example: hsmvisor fleet host distrust rack1-host7
    """
    found = _update(ctx, name, ident, trusted=False)
    ctx.result(
        found, lambda: click.echo(f"host {found.name} is not trusted: its guests get nothing new, where policies ask for that")
    )


@host.command()
@click.argument("name", type=HOST_NAME)
@click.argument("owners", nargs=-1)
@click.option("--everybody", is_flag=True, help="The host may report guests of all owners.")
@ident_option
@pass_context
def owners(ctx: Context, name: str, owners: tuple[str, ...], everybody: bool, ident: str) -> None:
    """Say whose guests host NAME may report: those that are given are all. It tells all its guests again then.

    Example: hsmvisor fleet host owners rack1-host7 alice bob
    """
    if bool(owners) == everybody:
        raise click.UsageError("give OWNERS, or --everybody")
    found = _update(ctx, name, ident, owners=owners)
    told = _owners(found)
    ctx.result(found, lambda: click.echo(f"host {found.name} reports guests of {told}"))


@host.command()
@click.argument("name", type=HOST_NAME)
@why_option
@yes_option
@ident_option
@pass_context
def revoke(ctx: Context, name: str, because: str, yes: bool, ident: str) -> None:
    """Speak to host NAME no more: its certificate counts nothing. Its modules keep what they have, until it joins again.

    Example: hsmvisor fleet host revoke rack1-host7 --why 'stolen from the rack' --yes
    """
    manager = manager_of(ctx)
    if not yes and _find(manager, name).state != "revoked":
        click.confirm(f"Revoke host {name}? It has to join again to get anything", abort=True, err=True)
    request = pb.RevokeHostRequest(request_id=ident, name=name, why=because_of(ctx, because))
    found = manager.fleet.RevokeHost(request, timeout=manager.timeout)
    ctx.result(found, lambda: click.echo(f"host {found.name} is {found.state}"))


@host.command()
@click.argument("name", type=HOST_NAME)
@click.option(
    "--revoke-certificates", is_flag=True, help="What its modules hold is revoked, and keys that they share are replaced elsewhere."
)
@yes_option
@ident_option
@pass_context
def remove(ctx: Context, name: str, revoke_certificates: bool, yes: bool, ident: str) -> None:
    """Forget host NAME with its guests; one that is not there is no error.

    Example: hsmvisor fleet host remove rack1-host7 --revoke-certificates --yes
    """
    manager = manager_of(ctx)
    try:
        found = _find(manager, name)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        nothing = {"removed": "", "resources": 0, "revoked": 0}
        ctx.result(nothing, lambda: click.echo(f"there is no host {name}"))
        return
    if not yes:
        also = " and revoke their certificates" if revoke_certificates else ""
        click.confirm(f"Forget host {name} with {found.resources} guests{also}?", abort=True, err=True)
    request = pb.RemoveHostRequest(request_id=ident, name=name, revoke_certificates=revoke_certificates)
    with ctx.patience(f"removing {name}"):
        done = manager.fleet.RemoveHost(request, timeout=max(manager.timeout, 60))
    told = {"removed": name, "resources": done.resources, "revoked": done.revoked}
    more = f", {done.revoked} certificates are revoked" if revoke_certificates else ""
    ctx.result(told, lambda: click.echo(f"host {name} is forgotten, with {done.resources} guests{more}"))


COMMANDS = (hosts, host)  #: of the group `fleet`
