"""hsmvisor policy ...: a fleet's policies, checked and tested before anybody uploads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from hsmvisor.cli.context import FAILURE, REFUSED, Command, CommandError, Context, Group, pass_context, table

if TYPE_CHECKING:
    from hsmvisor.manager.policy.engine import Policies

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=Group)
def policy() -> None:
    """Who may have which key and certificate, on which resource: policies in Cedar's language.

    Nobody may do anything but by a permit, and a forbid is stronger than every permit. Each rule has an @id, and each forbid a
    @reason: whoever is denied is told both.

    \b
      hsmvisor policy schema                          what policies may speak about
      hsmvisor policy check fleet.cedar               are they right?
      hsmvisor policy test fleet.cedar cases.toml     do they decide as they should?
    """


def _engine() -> type[Policies]:
    try:
        from hsmvisor.manager.policy.engine import Policies
    except ImportError as error:
        raise CommandError(
            f"the manager's part is not installed ({error.name} is missing)", FAILURE, "install hsmvisor with the extra [manager]"
        ) from None
    return Policies


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(f"{path}: {what}", FAILURE) from None


def _policies(path: Path) -> Policies:
    engine = _engine()
    try:
        return engine(_read(path))
    except ValueError as error:
        raise CommandError(f"{path}: {error}", REFUSED, "see hsmvisor policy schema for what policies may speak about") from None


@policy.command(cls=Command)
@pass_context
def schema(ctx: Context) -> None:
    """Print what policies may speak about: the Cedar schema that they are validated against."""
    _engine()
    from hsmvisor.manager.policy.engine import SCHEMA

    ctx.result({"schema": SCHEMA}, lambda: click.echo(SCHEMA, nl=False))


@policy.command(cls=Command)
@click.argument("policies", type=_FILE)
@pass_context
def check(ctx: Context, policies: Path) -> None:
    """Check a file of policies: its language, its types, an @id at each rule and a @reason at each forbid.

    Example: hsmvisor policy check fleet.cedar
    """
    found = _policies(policies)
    rows = [{"id": rule.id, "reason": rule.reason} for rule in found.rules]
    ctx.result({"rules": rows}, lambda: click.echo(f"{policies}: {len(rows)} rules, well made"))


@policy.command(cls=Command)
@click.argument("policies", type=_FILE)
@click.argument("cases", type=_FILE)
@click.option("--all-rules", is_flag=True, help="Fail too when there is a rule that no case meets.")
@pass_context
def test(ctx: Context, policies: Path, cases: Path, all_rules: bool) -> None:
    """Decide the cases of a file and compare with what they expect.

    \b
    A case, in TOML:
      [[case]]
      name = "the web team has its names"
      act = "request"             # distribute, renew, import, rotate, revoke, cancel
      owner = { name = "ann", groups = ["web"] }
      resource = { name = "web-1", kind = "VM", attributes = { env = "prod" } }
      material = { name = "web", names = ["web.example.net"] }
      expect = "allow"            # or "deny"
      rule = "web-team"           # which rule decides; may be left out
    """
    found = _policies(policies)
    from hsmvisor.manager.policy import cases as files

    try:
        results = files.run(found, files.parse(_read(cases)))
    except files.BadCases as error:
        raise CommandError(f"{cases}: {error}", REFUSED, "see hsmvisor policy test --help for a case") from None
    unmet = files.unused(found, results)
    rows = [
        {
            "case": result.case.name,
            "decision": "allow" if result.decision.allowed else "deny",
            "why": result.decision.why,
            "failure": result.failure,
        }
        for result in results
    ]
    failed = [row for row in rows if row["failure"]]

    def tell() -> None:
        for row in failed:
            click.echo(f"FAILED  {row['case']}: {row['failure']}")
        if not failed:
            table(("case", "decision", "why"), [(row["case"], row["decision"], row["why"]) for row in rows])
        met = len(found.rules) - len(unmet)
        click.echo(f"{len(rows) - len(failed)} of {len(rows)} cases hold, {met} of {len(found.rules)} rules are met")
        if unmet:
            click.echo(f"no case meets: {', '.join(unmet)}")

    ctx.result({"cases": rows, "unmet": list(unmet)}, tell)
    if failed or (all_rules and unmet):
        raise click.exceptions.Exit(FAILURE)
