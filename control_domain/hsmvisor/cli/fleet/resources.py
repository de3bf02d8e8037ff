"""hsmvisor fleet resources, fleet resource ...: guests of all hosts, and what each holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from hsmvisor.cli.context import Context, pass_context, plain, table, when
from hsmvisor.cli.fleet.parameters import HOST_NAME, RESOURCE_NAME, Pcrs, because_of, ident_option, why_option, yes_option
from hsmvisor.cli.fleet.reach import ManagerCommand, ManagerGroup, manager_of, words
from hsmvisor.cli.guests import Attribute
from hsmvisor.cli.tpms import save_certificates, save_option
from hsmvisor_rpc.v1 import manager_pb2 as pb

_MEASURED_WITHIN = 40.0  #: seconds: a host has 30
_TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

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


@resource.command()
@click.argument("name", type=RESOURCE_NAME)
@click.option("--pcr", "pcrs", multiple=True, type=Pcrs(), help="PCRs, as 4, 0-7 or 0,4,7; may be repeated. Default: 0-7.")
@click.option("--as", "called", default="", help="The table's name; default: the guest's.")
@save_option
@pass_context
def measure(ctx: Context, name: str, pcrs: tuple[tuple[int, ...], ...], called: str, save: Path | None) -> None:
    """What a guest's boot is now, attested by the TPM of its module: as a table for the manager's configuration.

    Whoever puts the table there says that this boot is right; policies and requests may then demand it by its name. PCRs that grow
    while the guest runs (10, in which Linux measures files) are never the same again: leave them out.

    The certificates of --save are verified: they are of the keys that the host has signed as this TPM's, and name host and module.

    Example: hsmvisor fleet resource measure rack1-host7/web-1 --pcr 0,4,7 --as golden >> /etc/hsmvisor/manager.toml
    """
    if called and not _TABLE_NAME.fullmatch(called):
        raise click.UsageError(f"--as {called!r}: a name is 1-64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")
    manager = manager_of(ctx)
    request = pb.MeasureResourceRequest(id=name, pcrs=sorted({pcr for some in pcrs for pcr in some}))
    with ctx.patience(f"measuring {name}"):
        found = manager.fleet.MeasureResource(request, timeout=max(manager.timeout, _MEASURED_WITHIN))
    if save is not None:
        save_certificates(save, found)
    ctx.result(found, lambda: click.echo(_block(found, called or found.resource.rpartition("/")[2])))


def _block(found: pb.Measurement, name: str) -> str:
    """A table of TOML; a name with a dot in it is quoted, or it would be two."""
    key = name if "." not in name else f'"{name}"'
    lines = [f"[measured.{key}]    # {found.resource}, {when(found.asked_at)}"]
    if found.fits:
        lines.append(f"# it fits {', '.join(found.fits)}, which is configured already")
    return "\n".join([*lines, *(f'pcrs.{pcr.number} = "{pcr.value.hex()}"' for pcr in found.pcrs)])


COMMANDS = (resources, resource)  #: of the group `fleet`
