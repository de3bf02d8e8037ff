"""hsmvisor backup ..., restore: a host's sealed state, kept elsewhere and brought back (control_domain/docs/backup-and-loss.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import click
from hsmvisor.cli.context import FAILURE, REFUSED, USAGE, Command, CommandError, Context, Group, pass_context, table
from hsmvisor.files import sync_path
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from rich.console import Console
from rich.progress import Progress

_STREAM_WITHIN = 3600.0  #: seconds


@click.group(cls=Group, invoke_without_command=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the backup goes.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--why", default="", help="The reason, for the host's audit log.")
@click.pass_context
def backup(click_context: click.Context, out: Path | None, force: bool, why: str) -> None:
    """Keep the host's sealed state elsewhere; the service goes on meanwhile.

    The backup holds the modules' sealed state and the host's key, sealed with a key that comes from the master key. The master key
    is not in it: keep a copy of that in another place.

    Example: hsmvisor backup --out /mnt/backups/host-1.backup
    """
    if click_context.invoked_subcommand is not None:
        return
    if out is None:
        raise click.UsageError("give --out FILE, or show FILE, or verify FILE")
    ctx: Context = click_context.obj
    if out.exists() and not force:
        raise CommandError(f"{out} exists", REFUSED, "choose another name, or give --force to replace it")
    report = _fetch(ctx, out, force, why)
    ctx.result(report, lambda: _tell(ctx, out, report))


def _tell(ctx: Context, out: Path, report: dict[str, Any]) -> None:
    counts = f"{len(report['modules'])} modules, {report['bytes']} bytes"
    click.echo(f"{out}: {counts}, whole and signed by host {report['host_id'][:16]}")
    click.echo(f"  the master key ({report['provider']}) is not in it: keep a copy of that file in another place")


def _fetch(ctx: Context, out: Path, force: bool, why: str) -> dict[str, Any]:
    """Writes the file whole or not at all."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.new")
    parts: Any = ctx.hosts.Backup(pb.BackupRequest(), timeout=max(ctx.timeout, _STREAM_WITHIN), metadata=(("hsmvisor-why", why),))
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w+b") as file:
            _receive(ctx, parts, file)
            file.flush()
            os.fsync(file.fileno())
            report = _report(ctx, file, out)
        if force:
            temporary.rename(out)
        else:
            os.link(temporary, out)  # fails where somebody else made it meanwhile
        sync_path(out.absolute().parent)
        return report
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}", FAILURE, "look at the directory, its mode and its disk") from None
    finally:
        temporary.unlink(missing_ok=True)
        parts.cancel()


def _receive(ctx: Context, parts: Iterable[pb.BackupPart], file: BinaryIO) -> None:
    with Progress(console=Console(stderr=True), disable=ctx.json, transient=True) as progress:
        task = progress.add_task("receiving", total=None)
        for part in parts:
            file.write(part.data)
            progress.update(task, advance=len(part.data), total=part.total)


def _report(ctx: Context, file: BinaryIO, path: Path, host_key: bytes | None = None) -> dict[str, Any]:
    """Checks the whole file and says what is in it; raises CommandError."""
    from hsmvisor.host import backup_file

    try:
        manifest = backup_file.verify(file)
    except backup_file.BadBackup as error:
        raise CommandError(f"{path}: {error}", REFUSED, "take another backup") from None
    pinned = host_key or _pinned(ctx)
    if pinned is not None and pinned != manifest.host_key:
        raise CommandError(f"{path}: it is of host {manifest.host_id.hex()[:16]}, not of the host that was meant", REFUSED)
    return {
        "backup": manifest.backup_id.hex(),
        "host_id": manifest.host_id.hex(),
        "host_known": pinned is not None,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.made_at)),
        "version": manifest.version,
        "schema": manifest.schema,
        "provider": manifest.provider,
        "audit_sequence": manifest.audit_sequence,
        "modules": list(manifest.modules),
        "bytes": file.seek(0, os.SEEK_END),
    }


def _pinned(ctx: Context) -> bytes | None:
    """The host's key, where this authority knows it."""
    if not (ctx.authority_directory / "hosts.json").exists():
        return None
    return ctx.authority().hosts.get(ctx.host)


def _show(ctx: Context, report: dict[str, Any]) -> None:
    known = "" if report["host_known"] else " (its key is not pinned here)"
    shown = {**report, "modules": ", ".join(report["modules"]) or "-", "host_id": report["host_id"] + known}
    ctx.result(report, lambda: table(("", ""), [(k, v) for k, v in shown.items() if k != "host_known"]))


def _host_key_option(value: str | None) -> bytes | None:
    try:
        return bytes.fromhex(value) if value else None
    except ValueError:
        raise CommandError("--host-key is not hexadecimal", USAGE) from None


@backup.command()
@click.argument("file", type=click.File("rb"))
@pass_context
def show(ctx: Context, file: BinaryIO) -> None:
    """What is in a backup, of whatever host; checked as by verify."""
    _show(ctx, _report(ctx, file, Path(file.name), _own_key(file)))


def _own_key(file: BinaryIO) -> bytes | None:
    from hsmvisor.host import backup_file

    try:
        return backup_file.read_manifest(file).host_key
    except backup_file.BadBackup:
        return None


@backup.command()
@click.argument("file", type=click.File("rb"))
@click.option("--host-key", help="Hexadecimal identity key of the host; default: the pinned key of --host, if there is one.")
@pass_context
def verify(ctx: Context, file: BinaryIO, host_key: str | None) -> None:
    """Check that a backup is whole and signed by the host; needs no secret."""
    _show(ctx, _report(ctx, file, Path(file.name), _host_key_option(host_key)))


@click.command(cls=Command)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--config", "path", type=click.Path(path_type=Path), help="TOML file of the service; default as hsmvisor-host's.")
@click.option("--force", is_flag=True, help="Replace the state that is there; it is set aside, not deleted.")
@click.option("--check", is_flag=True, help="Check all and change nothing.")
@click.option("--why", default="", help="The reason, for the host's audit log.")
@pass_context
def restore(ctx: Context, file: Path, path: Path | None, force: bool, check: bool, why: str) -> None:
    """Bring a backup back, on the host itself while its service is stopped.

    All is checked before anything is changed. The master key must be in its place.

    Example: systemctl stop hsmvisor-host; hsmvisor restore host-1.backup --why "new disk"; systemctl start hsmvisor-host
    """
    from hsmvisor.host import config
    from hsmvisor.host.restore import restore as carry_out
    from hsmvisor.serving import limits
    from hsmvisor.serving.errors import Broken

    try:
        note = carry_out(config.load(path), file, why=limits.why(why), force=force, check=check, say=ctx.say)
    except Broken as error:
        raise CommandError(f"{error.reason}: {error.detail}", REFUSED, error.hint) from None
    age = note.restored_at - note.made_at
    report = {"backup": note.backup, "host_id": note.host_id, "modules": note.modules, "age_seconds": age, "aside": note.aside}

    def text() -> None:
        if check:
            click.echo("all is well; nothing was changed")
            return
        click.echo(f"restored: {note.modules} modules as they were {age} s ago")
        if note.aside:
            click.echo(f"  what was there before is in {note.aside}: delete it when all is well")
        click.echo("  start the service; then each authority looks for what was lost: hsmvisor material list MODULE")

    ctx.result(report, text)
