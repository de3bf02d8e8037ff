"""hsmvisor policy upload, show, list: the policies by which the manager decides."""

from __future__ import annotations

from pathlib import Path

import click
from hsmvisor.cli.context import FAILURE, CommandError, Context, pass_context, plain, table, when
from hsmvisor.cli.fleet.parameters import ident_option
from hsmvisor.cli.fleet.reach import Manager, ManagerCommand, manager_of
from hsmvisor_rpc.v1 import manager_pb2 as pb

_VERSION = click.IntRange(1, 2**31 - 1)


def _get(manager: Manager, version: int = 0) -> pb.Policies:
    return manager.policies.Get(pb.GetPolicyRequest(version=version), timeout=manager.timeout)


@click.command(cls=ManagerCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--comment", default="", help="What was changed, for those who look later.")
@click.option("--instead-of", type=_VERSION, help="The version that it is meant to follow: refused when another one counts by now.")
@ident_option
@pass_context
def upload(ctx: Context, file: Path, comment: str, instead_of: int | None, ident: str) -> None:
    """Put the policies of FILE into force on the manager, at once; what counts already is left as it is.

    The manager checks them as `hsmvisor policy check` does, and denies what they do not allow from then on.

    Example: hsmvisor policy upload fleet.cedar --comment 'the shop team has shop.example.net' --instead-of 3
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CommandError(f"{file}: not UTF-8 text", FAILURE) from None
    manager = manager_of(ctx)
    counts = _get(manager)
    if counts.text == text and instead_of in (None, counts.version):
        ctx.result(counts, lambda: click.echo(f"{file} counts already: version {counts.version}"))
        return
    asked = pb.UploadPolicyRequest(request_id=ident, text=text, comment=comment, instead_of=instead_of or 0)
    found = manager.policies.Upload(asked, timeout=manager.timeout)
    ctx.result(found, lambda: click.echo(f"{file} counts now, as version {found.version}"))


@click.command(cls=ManagerCommand)
@click.argument("version", type=_VERSION, required=False)
@pass_context
def show(ctx: Context, version: int | None) -> None:
    """Print the policies that count on the manager, or those of an earlier VERSION.

    \b
    Example: hsmvisor policy show > fleet.cedar
    Example: hsmvisor policy show 3
    """
    found = _get(manager_of(ctx), version or 0)
    ctx.result(found, lambda: click.echo(found.text, nl=not found.text.endswith("\n")))


@click.command("list", cls=ManagerCommand)
@pass_context
def list_(ctx: Context) -> None:
    """The versions of the policies that counted on the manager, newest first; the first one counts now.

    Example: hsmvisor policy list
    """
    manager = manager_of(ctx)
    found = manager.pages(manager.policies.List, pb.ListPoliciesRequest(), "policies")
    rows = [(one.version, when(one.uploaded_at), one.uploaded_by, one.comment) for one in found]
    ctx.result({"policies": [plain(one) for one in found]}, lambda: table(("version", "uploaded", "by", "comment"), rows))


COMMANDS = (upload, show, list_)
