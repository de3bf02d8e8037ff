"""Templates, and how times and names are written in them.

All text is escaped: others chose the names of materials and resources, and the reasons.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.store.lines import FAR
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_UNITS = ((365 * 86400, "year"), (30 * 86400, "month"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def environment() -> Environment:
    """With all templates read: later no file is."""
    made = Environment(
        loader=PackageLoader("hsmvisor.manager.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,
    )
    made.filters |= {"stamp": stamp, "moment": moment, "span": span, "words": words, "distance": distance}
    made.globals |= {"path": path, "query": query}
    for name in made.list_templates(extensions=["html"]):
        made.get_template(name)
    return made


def known(at: float) -> bool:
    """Whether a time is one: 0 is never, and what is far is not told."""
    return 0 < at < FAR / 2


def stamp(at: float) -> str:
    """As people read it."""
    return _date(at).strftime("%Y-%m-%d %H:%M UTC") if known(at) else "–"


def iso(at: float) -> str:
    return _date(at).strftime("%Y-%m-%dT%H:%M:%SZ")


def _date(at: float) -> datetime:
    return datetime.fromtimestamp(min(at, 253402300799), UTC)


def moment(at: float, now: float = 0) -> Markup:
    """A time as an element; with how far it is where `now` is given."""
    if not known(at):
        return Markup("–")
    far = f" ({distance(at, now)})" if now else ""
    return Markup('<time datetime="{}">{}</time>{}').format(iso(at), stamp(at), far)


def distance(at: float, now: float) -> str:
    ahead = at - now
    if abs(ahead) < 1:
        return "now"
    return f"in {span(ahead)}" if ahead > 0 else f"{span(-ahead)} ago"


def span(seconds: float) -> str:
    """Returns a duration in its largest unit, and the next one where that is small."""
    left = int(abs(seconds))
    for number, (size, name) in enumerate(_UNITS):
        if left >= size or size == 1:
            count, rest = divmod(left, size)
            text = f"{count} {name}{'' if count == 1 else 's'}"
            if count < 3 and number + 1 < len(_UNITS):
                smaller, small_name = _UNITS[number + 1]
                if more := rest // smaller:
                    text += f" {more} {small_name}{'' if more == 1 else 's'}"
            return text
    return "0 seconds"


def words(kind: str) -> str:
    """rolled_back → rolled back"""
    return kind.replace("_", " ").replace("-", " ")


def path(*segments: str) -> str:
    return "/" + "/".join(quote(segment, safe="") for segment in segments)


def query(**fields: str) -> str:
    """Empty ones are left out."""
    told = urlencode({name: value for name, value in fields.items() if value})
    return f"?{told}" if told else ""


# ---- events ---------------------------------------------------------------------------------------------------------------


def told(event: Event) -> dict[str, Any]:
    """What a page, and the script of one that is open, show of an event: plain texts."""
    resource = event.resource_id
    host, _, name = resource.partition("/")
    return {
        "id": event.id,
        "at": iso(event.at),
        "time": stamp(event.at),
        "kind": words(event.kind),
        "tone": _TONES.get(event.kind, ""),
        "material": event.material,
        "material_href": path("materials", event.request_id) if event.request_id else "",
        "resource": resource,
        "resource_href": path("resources", host, name) if name else "",
        "owner": event.owner,
        "text": sentence(event.detail),
    }


def sentence(detail: dict[str, Any]) -> str:
    """The reason first."""
    first = [str(detail[name]) for name in ("why",) if detail.get(name)]
    rest = [f"{words(name)} {_plain(value)}" for name, value in detail.items() if name != "why" and value not in ("", None, [])]
    return " · ".join(first + rest)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return json.dumps(value) if isinstance(value, dict) else str(value).replace("\n", ", ")


_TONES = {
    "failed": "bad",
    "health_failed": "bad",
    "not_measured": "bad",
    "expired": "bad",
    "denied": "bad",
    "straggler": "warn",
    "expiring": "warn",
    "rolled_back": "warn",
    "revoked": "warn",
    "host_away": "warn",
    "host_refused": "bad",
    "host_revoked": "warn",
    "resource_refused": "bad",
    "notice_lost": "bad",
    "delivered": "good",
    "rotated": "good",
    "recovered": "good",
    "host_joined": "good",
    "host_back": "good",
}
