"""Writes mails: plain text, one event or a list of many of one kind."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Any

from hsmvisor.manager.history.cleaning import printable
from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.notify import limits, signing
from hsmvisor.manager.notify.channels import Mail
from hsmvisor.manager.notify.subjects import SUBJECTS

_MAX_LINE = 700  #: characters of one detail


def mail(channel: Mail, events: Sequence[Event], now: float) -> EmailMessage:
    """The same events have the same Message-ID whenever they are sent."""
    made = EmailMessage(policy=SMTP)
    made["From"] = channel.sender
    made["To"] = ", ".join(channel.to)
    made["Subject"] = header(f"hsmvisor: {_subject(events)}")
    made["Date"] = format_datetime(datetime.datetime.fromtimestamp(now, datetime.UTC))
    made["Message-ID"] = f"<{signing.message_id(*events)}@{channel.sender.rpartition('@')[2]}>"
    made["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answers from holidays
    made.set_content(_one(events[0]) if len(events) == 1 else _many(events), cte="quoted-printable")
    return made


def header(text: str) -> str:
    """Returns a text that is one header's, whatever names are in it: one line, and no encoded word (RFC 2047) but our own."""
    return printable(text, limits.MAX_SUBJECT).replace("=?", "= ?")


def _subject(events: Sequence[Event]) -> str:
    first = events[0]
    words = SUBJECTS.get(first.kind, first.kind)
    if len(events) > 1:
        return f"{words} ({len(events)} events)"
    about = _about(first)
    return f"{words}: {about}" if about else words


def _about(event: Event) -> str:
    place = event.resource_id or event.host_id
    return (
        f"{event.material} on {place}"
        if event.material and place
        else event.material or place or str(event.detail.get("channel", ""))
    )


def _one(event: Event) -> str:
    rows = {
        "what": f"{SUBJECTS.get(event.kind, '')} ({event.kind})".strip(),
        "when": _time(event.at),
        "owner": event.owner,
        "material": event.material,
        "resource": event.resource_id,
        "host": event.host_id,
        "request": event.request_id,
    }
    lines = [f"{name + ':':<12}{printable(value, _MAX_LINE)}" for name, value in rows.items() if value]
    lines += ["", *(f"{name + ':':<12}{_shown(value)}" for name, value in event.detail.items())] if event.detail else []
    return "\n".join([*lines, "", f"This is event {event.id}.", ""])


def _many(events: Sequence[Event]) -> str:
    kind = events[0].kind
    lines = [f"{len(events)} events of one kind: {SUBJECTS.get(kind, kind)} ({kind})", ""]
    for event in events:
        why = next((f": {_shown(event.detail[name])}" for name in ("why", "reason", "error") if event.detail.get(name)), "")
        owner = f" of {printable(event.owner, _MAX_LINE)}" if event.owner else ""
        lines.append(f"{_time(event.at)}  {event.id}  {printable(_about(event), _MAX_LINE) or '-'}{owner}{why}")
    return "\n".join([*lines, ""])


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value), _MAX_LINE)


def _time(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
