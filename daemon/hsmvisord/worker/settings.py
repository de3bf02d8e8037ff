"""The operator's settings of a module, from JSON: each checked, an unknown one refused."""

from __future__ import annotations

import dataclasses
import json

from hsmvisord import limits
from hsmvisord.token.token import Settings


def parse_settings(text: str) -> Settings:
    """Raises ValueError that names the setting.  0 or a missing one is the default."""
    values = json.loads(text or "{}")
    if not isinstance(values, dict):
        raise ValueError("settings are a JSON object")
    known = {f.name for f in dataclasses.fields(Settings)}
    if unknown := set(values) - known:
        raise ValueError(f"unknown setting {min(unknown)!r}")
    settings = Settings(
        log_signatures=bool(values.get("log_signatures", False)),
        max_sessions=int(values.get("max_sessions") or limits.MAX_SESSIONS),
        max_connections=int(values.get("max_connections") or limits.MAX_CONNECTIONS),
    )
    if not 1 <= settings.max_sessions <= limits.MOST_SESSIONS:
        raise ValueError(f"max_sessions is 1 to {limits.MOST_SESSIONS}")
    if not 1 <= settings.max_connections <= limits.MOST_CONNECTIONS:
        raise ValueError(f"max_connections is 1 to {limits.MOST_CONNECTIONS}")
    return settings
