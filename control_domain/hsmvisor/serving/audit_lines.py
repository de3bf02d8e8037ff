"""Reading the audit log while it is written: its lines in order, over the files that it was cut into."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from hsmvisor.serving.audit import rotated

_BATCH = 500


async def lines(path: Path, after: int, limit: int, chosen: Callable[[dict[str, Any]], bool]) -> AsyncIterator[tuple[int, str]]:
    """Yields sequence and line of those behind `after` that there are when it begins; `limit` 0: all.

    They are read in another thread, a batch at a time.
    """
    found = _lines(path, after, chosen)
    left = limit or 2**63
    while left and (batch := await asyncio.to_thread(_take, found, min(left, _BATCH))):
        for line in batch:
            yield line
        left -= len(batch)


def _take(found: Iterator[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    return [line for _, line in zip(range(count), found, strict=False)]


def _lines(path: Path, after: int, chosen: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[int, str]]:
    files = [*rotated(path), path]
    # a rotated file is named by its first line: those that end before `after` are not read
    firsts = [int(file.suffix[1:]) for file in files[:-1]]
    skip = sum(1 for first in firsts[1:] if first <= after + 1)
    for file in files[skip:]:
        with open(file, encoding="ascii") as stream:
            for raw in stream:
                if not raw.endswith("\n"):
                    return  # being written
                line = raw[:-1]
                values = json.loads(line)
                if values["seq"] > after and chosen(values):
                    yield values["seq"], line
