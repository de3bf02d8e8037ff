"""hsmvisor fleet resources, fleet resource ...: guests of all hosts, and what each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
from hsmvisor.cli.context import Context, pass_context, plain, table, when
from hsmvisor.cli.fleet.parameters import HOST_NAME, RESOURCE_NAME, because_of, ident_option, why_option, yes_option
from hsmvisor.cli.fleet.reach import ManagerCommand, ManagerGroup, manager_of, words
from hsmvisor.cli.guests import Attribute
from hsmvisor_rpc.v1 import manager_pb2 as pb

HOLDINGS = ("material", "resource", "state", "active", "staged", "wanted", "since", "why")


def holding_rows(holdings: Sequence[pb.Holding]) -> list[tuple[object, ...]]:
    return [
        (h.material, h.resource, h.state, h.active or "-", h.staged or "-", h.wanted or "-", when(h.changed_at), h.why or "-")
        for h in holdings
    ]


def attributes(known: Mapping[str, str]) -> str:
    return words(f"{key}={value}" for key, value in sorted(known.items()))


@click.command(cls=ManagerCommand)
@click.option("--attribute", "selector", multiple=True, type=Attribute(), help="NAME=VALUE that all have; may be repeated.")
@click.option("--host", "host", default="", type=HOST_NAME, help="Of one host alone.")
@click.option("--owner", default="", help="Of one owner alone.")
@pass_context
def resources(ctx: Context, selector: tuple[tuple[str, str], ...], host: str, owner: str) -> None:
    """The guests that hosts have told of: their owners, attributes and modules. An owner sees its own.

    Example: hsmvisor fleet resources --attribute env=prod --attribute role=web
    """
    manager = manager_of(ctx)
    request = pb.ListResourcesRequest(selector=dict(selector), host=host, owner=owner)
    found = manager.pages(manager.fleet.ListResources, request, "resources")
    columns = ("resource", "kind", "owner", "module", "materials", "attributes")
    rows = [(r.id, r.kind, r.owner, _module(r), _materials(r), attributes(r.attributes)) for r in found]
    ctx.result({"resources": [plain(r) for r in found]}, lambda: table(columns, rows))


def _module(found: pb.Resource) -> str:
    if not found.present:
        return "gone"
    if not found.module:
        return "-"
    return found.module if found.obeys else f"{found.module} (obeys another root)"


def _materials(found: pb.Resource) -> str:
    return words(f"{h.material} ({h.state})" for h in found.holdings)


def _show(found: pb.Resource) -> None:
    rows = [
        ("resource", found.id),
        ("kind", found.kind),
        ("owner", found.owner),
        ("attributes", "\n".join(attributes(found.attributes).split(", "))),
        ("module", _module(found)),
        ("first seen", when(found.first_seen_at)),
        ("changed", when(found.changed_at)),
    ]
    table(("", ""), rows)
    if found.holdings:
        table(HOLDINGS, holding_rows(found.holdings))


@click.group(cls=ManagerGroup)
def resource() -> None:
    """One guest, written HOST/NAME, or NAME where there is only one of it."""


@resource.command()
@click.argument("name", type=RESOURCE_NAME)
@pass_context
def show(ctx: Context, name: str) -> None:
    """One guest: its attributes, its module, and which generation of which material it holds.

    Example: hsmvisor fleet resource show rack1-host7/web-1
    """
    manager = manager_of(ctx)
    found = manager.fleet.GetResource(pb.GetResourceRequest(id=name), timeout=manager.timeout)
    ctx.result(found, lambda: _show(found))


@resource.command()
@click.argument("name", type=RESOURCE_NAME)
@click.option(
    "--compromised", is_flag=True, help="Its keys may be known to others: old certificates are revoked, old keys end at once."
)
@why_option
@yes_option
@ident_option
@pass_context
def rekey(ctx: Context, name: str, compromised: bool, because: str, yes: bool, ident: str) -> None:
    """Replace every key of a guest now, also those that it shares with others.

    Example: hsmvisor fleet resource rekey web-1 --compromised --why 'its disk was copied' --yes
    """
    manager = manager_of(ctx)
    if compromised and not yes:
        click.confirm(f"Revoke the certificates of {name} and end its keys?", abort=True, err=True)
    request = pb.RekeyResourceRequest(request_id=ident, id=name, compromised=compromised, why=because_of(ctx, because))
    found = manager.fleet.RekeyResource(request, timeout=manager.timeout)
    count = len({h.request for h in found.holdings})
    ctx.result(
        found,
        lambda: click.echo(f"{count} materials of {found.id} get new keys; hsmvisor fleet resource show {found.id} tells how far"),
    )


COMMANDS = (resources, resource)  #: of the group `fleet`
