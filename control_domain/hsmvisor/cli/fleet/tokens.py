"""hsmvisor fleet token ...: access tokens, with which owners' programs and the console call."""

from __future__ import annotations

from pathlib import Path

import click
from hsmvisor.cli.context import Context, pass_context, plain, table, when
from hsmvisor.cli.fleet.parameters import TOKEN_ID, ident_option
from hsmvisor.cli.fleet.reach import ManagerGroup, manager_of, words
from hsmvisor.cli.fleet.secrets import demand_place, give_token
from hsmvisor.cli.parameters import Duration
from hsmvisor_rpc.v1 import manager_pb2 as pb

_ROLES = ("owner", "operator", "auditor")


@click.group(cls=ManagerGroup)
def token() -> None:
    """Access tokens: who shows one is the owner that stands in it. Nobody gives more than it has itself."""


@token.command()
@click.option("--owner", default="", help="Who bears it; default: you.")
@click.option("--group", "groups", multiple=True, help="A group of that owner, as policies know it; may be repeated.")
@click.option("--role", "roles", multiple=True, type=click.Choice(_ROLES), help="What it may be; may be repeated. Default: owner.")
@click.option("--lifetime", type=Duration(), default=90 * 86400, show_default="90d", help="How long it counts: 12h, 30d.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it there, for your eyes alone (mode 600).")
@ident_option
@pass_context
def create(
    ctx: Context, owner: str, groups: tuple[str, ...], roles: tuple[str, ...], lifetime: int, out: Path | None, ident: str
) -> None:
    """Make an access token; it is shown this once.

    \b
    Example: hsmvisor fleet token create --owner alice --group web --lifetime 30d --out alice.token
    Then:    hsmvisor --manager manager.example.net:8472 --tls-ca ca.pem --token-file alice.token fleet whoami
    """
    demand_place(out)
    manager = manager_of(ctx)
    request = pb.CreateTokenRequest(request_id=ident, owner=owner, groups=groups, roles=roles, lifetime_seconds=lifetime)
    made = manager.fleet.CreateToken(request, timeout=manager.timeout)
    where = f"token {made.id} is in {out}" if out is not None else f"  token {made.id}"
    give_token(ctx, made, out, f"{where}, until {when(made.expires_at)}")


@token.command("list")
@pass_context
def list_(ctx: Context) -> None:
    """The access tokens that you may see, without their secrets.

    Example: hsmvisor fleet token list
    """
    manager = manager_of(ctx)
    found = manager.pages(manager.fleet.ListTokens, pb.ListTokensRequest(), "tokens")
    columns = ("id", "owner", "groups", "roles", "created", "expires", "")
    rows = [
        (t.id, t.owner, words(t.groups), words(t.roles), when(t.created_at), when(t.expires_at), "revoked" if t.revoked else "")
        for t in found
    ]
    ctx.result({"tokens": [plain(t) for t in found]}, lambda: table(columns, rows))


@token.command()
@click.argument("id", type=TOKEN_ID)
@ident_option
@pass_context
def revoke(ctx: Context, id: str, ident: str) -> None:
    """Let the token with this ID count no more, nor those that were made with it; the same again changes nothing.

    Example: hsmvisor fleet token revoke 5f1d0c2b7a9e4f3680d1c2b3a4958677
    """
    manager = manager_of(ctx)
    manager.fleet.RevokeToken(pb.RevokeTokenRequest(request_id=ident, id=id), timeout=manager.timeout)
    ctx.result({"revoked": id}, lambda: click.echo(f"token {id} counts no more"))


COMMANDS = (token,)  #: of the group `fleet`
