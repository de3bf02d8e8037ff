"""hsmvisor fleet events, fleet audit export: what happened in the fleet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import click
import grpc
from hsmvisor.cli.context import Context, pass_context, when
from hsmvisor.cli.fleet.reach import Manager, ManagerCommand, ManagerGroup, manager_of
from hsmvisor_rpc.v1 import manager_pb2 as pb

_PAUSE = 1.0  #: seconds before a stream that was cut is begun again
_CONNECTS = 10.0  #: seconds after which a call that ended was a stream, and no attempt to connect
_PATIENCE = 60.0  #: seconds without a manager after which following ends


@click.command(cls=ManagerCommand)
@click.option("--follow", is_flag=True, help="Then go on with what happens, until Ctrl-C; also over a manager's restart.")
@click.option("--kind", default="", help="Of one kind: denied, failed, expiring, rotated, host_joined, ...")
@click.option("--request", default="", help="Of the request with this id.")
@click.option("--resource", default="", help="Of the resource HOST/NAME.")
@click.option(
    "--limit", type=click.IntRange(0), default=50, show_default=True, help="How many, newest ones; 0 = all that are kept."
)
@pass_context
def events(ctx: Context, follow: bool, kind: str, request: str, resource: str, limit: int) -> None:
    """What happened, oldest first: the newest 50, or all that happens from now on with --follow. With --json one object a line.

    \b
    Example: hsmvisor fleet events --kind denied --limit 10
    Example: hsmvisor fleet events --follow --limit 0 --json >> events.json
    """
    manager = manager_of(ctx)
    asked = pb.ListFleetEventsRequest(kind=kind, request=request, resource=resource)
    found = manager.pages(manager.history.ListEvents, asked, "events", limit)
    last = 0
    for event in reversed(found):
        last = event.id
        ctx.line(event, _told(event))
    if not follow:
        return
    if not last:  # what comes between this and the first answer of the stream is not to be lost
        newest = manager.history.ListEvents(pb.ListFleetEventsRequest(page_size=1), timeout=manager.timeout).events
        last = newest[0].id if newest else 0
    for event in _following(manager, last, kind):
        if (not request or event.request == request) and (not resource or event.resource == resource):
            ctx.line(event, _told(event))


def _following(manager: Manager, after: int, kind: str) -> Iterator[pb.FleetEvent]:
    """A manager that is started anew is waited for."""
    away_since: float | None = None
    while True:
        began = time.monotonic()
        try:
            for event in manager.history.StreamEvents(pb.StreamFleetEventsRequest(after_id=after, kind=kind)):
                after, away_since = event.id, None
                yield event
        except grpc.RpcError as error:
            now = time.monotonic()
            away_since = now if away_since is None or now - began > _CONNECTS else away_since
            if error.code() is not grpc.StatusCode.UNAVAILABLE or now - away_since > _PATIENCE:
                raise
        time.sleep(_PAUSE)


def _told(event: pb.FleetEvent) -> str:
    about = " ".join(word for word in (event.owner, event.material, event.resource or event.host[:16]) if word)
    return f"{event.id} {when(event.at)} {event.kind} {about or '-'} {_detail(event.detail)}".rstrip()


def _detail(text: str) -> str:
    try:
        told = json.loads(text)
    except ValueError:
        return text
    if not isinstance(told, dict):
        return text
    return " ".join(f"{key}={_value(value)}" for key, value in told.items() if value not in ("", None, [], {}))


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if " " in text and isinstance(value, str) else text


@click.group(cls=ManagerGroup)
def audit() -> None:
    """The manager's audit log: each call that changed something, in a chain of hashes."""


@audit.command()
@click.option("--after", type=click.IntRange(0, 2**63 - 1), default=0, help="Go on after this sequence number.")
@click.option("--limit", type=click.IntRange(0, 2**63 - 1), default=0, help="How many lines at most; 0 = all.")
@pass_context
def export(ctx: Context, after: int, limit: int) -> None:
    """The lines of the audit log of the manager that answers, oldest first, as they stand. It is an auditor's.

    Example: hsmvisor fleet audit export --after 4711 >> manager.audit
    """
    manager = manager_of(ctx)
    for line in manager.history.ExportAudit(pb.ExportFleetAuditRequest(after_sequence=after, limit=limit)):
        click.echo(line.line.rstrip("\n"))
    sys.stdout.flush()


COMMANDS = (events, audit)  #: of the group `fleet`
