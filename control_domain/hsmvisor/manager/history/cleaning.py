"""Events are read by many, stored for long and sent away: texts in them are short, printable and no secrets.

An event never fails for its texts: it is written in the transaction of what it tells, and would undo that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from hsmvisor.manager.history import limits

HIDDEN = "(not shown)"
#: Details whose names say that they are secrets.  Nobody should give one; this is for the day on which somebody does.
_SECRET_NAME = re.compile(
    r"(?:.*[_-])?(?:passwords?|passwd|passphrase|secrets?|tokens?|pins?|private_?keys?|authorization|bearer|cookies?|credentials?)",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"  # PEM, also cut off
    r"|\bwhsec_[A-Za-z0-9+/=]+"  # a webhook's key
    r"|(?<=://)[^/\s@]*:[^/\s]*(?=@)"  # a URL's password
    r"|(?<=\bBearer )\S+|(?<=\bBasic )\S+",
    re.DOTALL | re.IGNORECASE,
)


def text(untrusted_text: str, most: int = limits.MAX_TEXT) -> str:
    """Returns it without secrets, on one line, of at most `most` characters."""
    return printable(_SECRET_TEXT.sub(HIDDEN, untrusted_text[: most * 4]), most)


def printable(untrusted_text: str, most: int) -> str:
    """Returns it on one line, cut."""
    shown = "".join(c if c.isprintable() else " " if c in "\r\n\t" else "?" for c in untrusted_text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def detail(untrusted_detail: Mapping[str, Any]) -> str:
    """Returns a JSON object of at most MAX_DETAIL bytes; what does not fit is left out, and `"cut": true` says so."""
    told: dict[str, Any] = {}
    size, cut = len('{"cut":true}'), len(untrusted_detail) > limits.MOST_KEYS
    for key, value in list(untrusted_detail.items())[: limits.MOST_KEYS]:
        name = printable(str(key), limits.MAX_KEY)
        shown = _value(name, value, limits.MAX_DEPTH)
        more = len(_json({name: shown})) - 1
        if size + more > limits.MAX_DETAIL:
            cut = True
            continue
        told[name], size = shown, size + more
    if cut:
        told["cut"] = True
    return _json(told)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))  # ASCII: characters are bytes


def _value(name: str, value: Any, depth: int) -> Any:
    if _SECRET_NAME.fullmatch(name) and not isinstance(value, bool | None):
        return HIDDEN
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if abs(value) <= limits.LARGEST_NUMBER else _large(value)
        case float():
            return float(value) if math.isfinite(value) else str(value)
        case str():
            return text(value)
        case bytes() | bytearray() | memoryview():
            return f"({len(value)} bytes)"
        case Mapping() if depth > 1:
            items = list(value.items())[: limits.MOST_KEYS]
            return {(n := printable(str(k), limits.MAX_KEY)): _value(n, v, depth - 1) for k, v in items}
        case list() | tuple() | set() | frozenset() if depth > 1:
            items = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
            return [_value("", v, depth - 1) for v in items[: limits.MOST_ITEMS]]
    return text(_shown(value))


def _large(number: int) -> str:
    return text(hex(number))


def _shown(value: Any) -> str:
    """What is neither a text nor a number, as a text: an exception must not come out of it."""
    try:
        return str(value)
    except Exception:
        return f"({type(value).__name__})"
