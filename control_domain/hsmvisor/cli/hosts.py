"""hsmvisor host ..., authority ..., events, audit ...: a host, who commands it, and what it recorded."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
from hsmvisor.authority import Authority
from hsmvisor.cli.context import FAILURE, USAGE, Command, CommandError, Context, Group, pass_context, table, when
from hsmvisor.cli.modules import request_id
from hsmvisor.cli.parameters import HexBytes
from hsmvisor.client import WrongHost
from hsmvisor.client import enrol as enrol_host
from hsmvisor_rpc.sealed.commands import fingerprint
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


@click.group(cls=Group)
def host() -> None:
    """The host service, and the trust between it and this authority."""


@host.command()
@pass_context
def show(ctx: Context) -> None:
    """The host, and who you are to it."""
    found = ctx.hosts.GetHost(pb.GetHostRequest(), timeout=ctx.timeout)
    rows: list[tuple[str, Any]] = [
        ("host id", fingerprint(found.host_key).hex()),
        ("version", found.version),
        ("started", when(found.started_at)),
        ("modules", found.modules),
        ("key provider", found.key_provider),
        ("you are", f"{found.caller} ({', '.join(found.roles) or 'no role'})"),
    ]

    if found.HasField("manager"):
        rows += _manager(found.manager)
    else:
        rows.append(("manager", "none joined (hsmvisor host join)"))

    def text() -> None:
        table(("", ""), rows)
        table(("measure", "", "detail"), [(m.name, "yes" if m.applied else "NO", m.detail) for m in found.measures])
        if found.hsms:
            table(("HSM", "token", "library", "modules", ""), [_hsm(hsm) for hsm in found.hsms])

    ctx.result(found, text)


def _manager(link: pb.ManagerLink) -> list[tuple[str, Any]]:
    now = "connected" if link.connected else f"NOT connected: {link.failure or 'not yet'}"
    renewal = f"; NOT renewed: {link.renewal_failure}" if link.renewal_failure else ""
    rows: list[tuple[str, Any]] = [
        ("manager", f"{link.address or ', '.join(link.addresses)}, {now}, since {when(link.since)}"),
        ("joined as", f"{link.host_name}, certificate until {when(link.certificate_ends_at)}{renewal}"),
        ("its root", link.root.hex()[:16]),
    ]
    return rows


def _hsm(hsm: pb.Hsm) -> tuple[str, ...]:
    told = [f"{hsm.failure}; not tried again"] if hsm.failure else []
    told += [f"keys of {hsm.purges} modules that are gone are still to be destroyed"] if hsm.purges else []
    return hsm.name, hsm.token, hsm.library, str(hsm.modules), "; ".join(told) or "-"


@host.command("new-secret")
@click.option("--lifetime", default=600, show_default=True, help="Seconds.")
@pass_context
def new_secret(ctx: Context, lifetime: int) -> None:
    """Make a one-time secret, with which a manager enrols the host."""
    request = pb.CreateEnrolmentRequest(request_id=request_id(), lifetime_seconds=lifetime)
    made = ctx.hosts.CreateEnrolment(request, timeout=ctx.timeout)
    ctx.result(made, lambda: click.echo(made.secret))


@host.command()
@click.option("--secret-file", type=click.File("rb"), help="The one-time secret; - reads standard input. Default: a prompt.")
@click.option("--replace", is_flag=True, help="The host was set up anew: its new key takes the place of the pinned one.")
@pass_context
def enrol(ctx: Context, secret_file: BinaryIO | None, replace: bool) -> None:
    """Pin the host's identity key: both ends prove that they know the one-time secret."""
    authority = ctx.authority(create=True)
    secret = secret_file.read().decode() if secret_file else click.prompt("Secret", hide_input=True, err=True)
    try:
        key = enrol_host(ctx.channel, secret, f"authority {authority.root_public.hex()[:16]}", ctx.timeout)
    except WrongHost as error:
        raise CommandError(str(error)) from None
    if replace:
        authority.replace(ctx.host, key)
    else:
        authority.pin(ctx.host, key)
    host_id = fingerprint(key).hex()
    ctx.result({"host": ctx.host, "host_id": host_id}, lambda: click.echo(f"{ctx.host} is enrolled, host id {host_id}"))


@host.command()
@pass_context
def forget(ctx: Context) -> None:
    """Forget the pinned identity key of a host that was set up anew."""
    ctx.authority().forget(ctx.host)
    ctx.result({"forgotten": ctx.host}, lambda: click.echo(f"{ctx.host} is forgotten"))


@host.command()
@click.argument("token_file", type=click.File("r"), required=False)
@click.option("--name", default="", help="Of this host in the fleet; default: the machine's own.")
@click.option("--replace", is_flag=True, help="Leave the management plane that the host has joined.")
@click.option("--certificate", type=click.File("rb"), help="PEM, with its chain: one that the manager's configuration names.")
@click.option("--key", type=click.File("rb"), help="And its key, PEM.")
@click.option("--address", "addresses", multiple=True, help="host:port of a manager, where no token says it; may be repeated.")
@click.option("--manager-ca", type=click.File("rb"), help="PEM: whom to believe as manager, where no token says it.")
@click.option("--request-id", "ident", help="Makes a repeated call the same call.")
@pass_context
def join(
    ctx: Context, token_file: TextIO | None, name: str, replace: bool, certificate: BinaryIO | None, key: BinaryIO | None,
    addresses: tuple[str, ...], manager_ca: BinaryIO | None, ident: str | None,
) -> None:  # fmt: skip
    """Join a management plane with the token in TOKEN_FILE (- reads standard input); the same token again changes nothing.

    Only on the host itself.  The host proves that it knows the token's one-time secret, and demands the same of the manager; its
    guests are told to that manager from then on, and new guests' modules obey it.

    \b
    Example: hsmvisor host join --name rack1-host7 token.txt
    Without a secret: hsmvisor host join --certificate host.pem --key host.key --address manager:8471 --manager-ca ca.pem
    """
    if bool(certificate) != bool(key):
        raise click.UsageError("--certificate and --key come together")
    if token_file is None and (certificate is None or not addresses or manager_ca is None):
        raise click.UsageError("give TOKEN_FILE; or --certificate, --key, --address and --manager-ca")
    request = pb.JoinManagerRequest(
        request_id=ident or request_id(),
        token=token_file.read() if token_file else "",
        name=name,
        replace=replace,
        certificate=certificate.read() if certificate else b"",
        key=key.read() if key else b"",
        addresses=addresses,
        authorities=manager_ca.read() if manager_ca else b"",
    )
    with ctx.patience("joining"):
        found = ctx.hosts.JoinManager(request, timeout=ctx.timeout)
    where = ", ".join(found.addresses)
    ctx.result(found, lambda: click.echo(f"this host has joined as {found.host_name}; managers: {where}"))


@host.command()
@click.option("--request-id", "ident", help="Makes a repeated call the same call.")
@pass_context
def leave(ctx: Context, ident: str | None) -> None:
    """Leave the management plane: it is called no more.  Guests, modules and keys stay; modules obey the root that they obey."""
    done = ctx.hosts.LeaveManager(pb.LeaveManagerRequest(request_id=ident or request_id()), timeout=ctx.timeout)
    told = "this host has left its management plane" if done.was_joined else "this host had joined no management plane"
    ctx.result(done, lambda: click.echo(told))


@host.command()
@pass_context
def metrics(ctx: Context) -> None:
    """The host's metrics, in Prometheus' text format."""
    text = ctx.hosts.GetMetrics(pb.GetMetricsRequest(), timeout=ctx.timeout).text
    ctx.result({"text": text}, lambda: click.echo(text, nl=False))


# ---- authority ------------------------------------------------------------------------------------------------------


@click.group(cls=Group)
def authority() -> None:
    """The root key that modules obey, and the signer that it certifies."""


def _show_authority(ctx: Context, found: Authority) -> None:
    certificate = found.certificate()
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(certificate.not_after))
    report: dict[str, Any] = {
        "directory": str(found.directory),
        "root": found.root_public.hex(),
        "signer": certificate.name,
        "signer_valid_until": until,
        "hosts": {address: fingerprint(key).hex() for address, key in found.hosts.items()},
    }
    ctx.result(report, lambda: table(("", ""), [(k, v if k != "hosts" else "\n".join(v)) for k, v in report.items()]))


@authority.command()
@pass_context
def init(ctx: Context) -> None:
    """Make a root key and a signer."""
    _show_authority(ctx, Authority.create(ctx.authority_directory, ctx.root_passphrase))


@authority.command("show")
@pass_context
def show_authority(ctx: Context) -> None:
    """Where the authority is, its root, its signer, the hosts that it trusts."""
    _show_authority(ctx, ctx.authority())


@authority.command()
@click.argument("name", required=False, default="")
@pass_context
def certify(ctx: Context, name: str) -> None:
    """Make a new signer, certified by the root for 90 days."""
    found = ctx.authority()
    found.renew_signer(name)
    _show_authority(ctx, found)


@authority.command("change-root")
@click.argument("module")
@click.option(
    "--to",
    "other",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Directory of the new authority.",
)
@pass_context
def change_root(ctx: Context, module: str, other: Path) -> None:
    """Have MODULE obey another authority; the old root itself signs this."""
    new = Authority.open(other)
    answer = ctx.pusher().change_root(module, new.root_public)
    ctx.result(answer, lambda: click.echo(f"module {module} obeys the authority in {other}"))


# ---- records --------------------------------------------------------------------------------------------------------


@click.command(cls=Command)
@click.option("--after", default=0, help="Go on after this id.")
@click.option("--module", "name", default="", help="Of one module alone.")
@pass_context
def events(ctx: Context, after: int, name: str) -> None:
    """Follow what happens on the host until Ctrl-C."""
    stub = rpc.EventServiceStub(ctx.channel)
    for event in stub.StreamEvents(pb.StreamEventsRequest(after_id=after, module=name)):
        ctx.line(event, f"{event.id} {when(event.at)} {event.module or '-'} {event.kind} {event.detail}")


@click.group(cls=Group)
def audit() -> None:
    """The audit log."""


@audit.command()
@click.option("--after", default=0, help="Go on after this sequence number.")
@click.option("--module", "name", default="", help="Of one module alone.")
@click.option("--limit", default=0, help="0 = all.")
@pass_context
def export(ctx: Context, after: int, name: str, limit: int) -> None:
    """The lines of the audit log, oldest first, as they stand."""
    stub = rpc.AuditServiceStub(ctx.channel)
    for line in stub.ExportAudit(pb.ExportAuditRequest(after_sequence=after, module=name, limit=limit)):
        click.echo(line.line.rstrip("\n"))


@audit.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--host-key",
    type=HexBytes(32),
    help="Hexadecimal identity key of the host that wrote it; default: the pinned key of --host. Of a manager: the key of its "
    "audit log, as `hsmvisor fleet whoami` prints it.",
)
@click.option(
    "--exported", is_flag=True, help="FILE is what `hsmvisor audit export` wrote: lines cut off at its end are not missed."
)
@click.option("--first", type=click.IntRange(1), default=1, help="First line that is kept here; older files are elsewhere.")
@click.option("--service", type=click.Choice(["host", "manager"]), default="host", show_default=True, help="Who wrote it.")
@pass_context
def verify(ctx: Context, file: Path, host_key: bytes | None, exported: bool, first: int, service: str) -> None:
    """Find changed, removed, reordered or cut lines in an audit log.

    FILE is the log as it stands on its host, with FILE.head and the files it went on from beside it, or an export of all modules.
    """
    from hsmvisor.serving.audit_verify import verify as verify_log

    if host_key is None and service == "manager":
        raise CommandError("the manager's key is not known", USAGE, "give --host-key, as hsmvisor fleet whoami prints it")
    key = host_key or ctx.authority().hosts.get(ctx.host)
    if key is None:
        raise CommandError("the host's identity key is not known", USAGE, "give --host-key, or enrol the host")
    try:
        with ctx.patience(f"reading {file}"):
            verdict = verify_log(file, key, service=service, exported=exported, first=first)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", USAGE) from None
    report = {"sound": verdict.sound, "lines": verdict.lines, "findings": [str(f) for f in verdict.findings]}
    signed = verdict.signed_until or "none yet"
    good = f"the log is whole: lines {verdict.first} to {verdict.last}, by checkpoints signed up to {signed}"
    ctx.result(report, lambda: click.echo(good if verdict.sound else "\n".join(str(f) for f in verdict.findings)))
    if not verdict.sound:
        sys.exit(FAILURE)
