"""Wycheproof vectors (tests/conformance/vectors)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_VECTORS = Path(__file__).parents[1] / "conformance/vectors"


def groups(name: str) -> list[dict[str, Any]]:
    data: dict[str, Any] = json.loads(gzip.decompress((_VECTORS / f"{name}.json.gz").read_bytes()))
    return list(data["testGroups"])


def vectors(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Gives (group, vector)."""
    for group in groups(name):
        for vector in group["tests"]:
            yield group, vector


def title(vector: dict[str, Any]) -> str:
    return f"vector {vector['tcId']} ({vector['comment']}, {vector['result']})"
