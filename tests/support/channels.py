"""Channels of a manager's configuration, from lists of sections as JSON has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hsmvisor.manager.config import parse
from hsmvisor.manager.notify.channels import Channel


def channels(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Channel]:
    """Raises BadConfig."""
    return parse("".join(f"{name} = [{', '.join(map(_inline, sections))}]\n" for name, sections in lists.items()), "x").channels


def _inline(section: Mapping[str, Any]) -> str:
    """Returns a TOML inline table; strings, numbers, booleans and lists are written as in JSON."""
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in section.items()) + "}"
