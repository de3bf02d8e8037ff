"""How much of what can be counted is done: scripts/test does a part, scripts/soak all of it.

Steps: a walk that dies at each of them dies at one in four, or sixteen, not always the same.  Ways: a test that is the same on two
databases or by two USB transports is run in one of them, another test in the other; a slow one of both client libraries with one.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence

import pytest

#: Set: walks die at every step.
ALL_STEPS = "HSMVISOR_ALL_STEPS"

#: What is run of tests that know several ways: one of them, the others, or (not set) each.
WAYS, ONE, OTHERS = "HSMVISOR_WAYS", "one", "others"
_SETS = (("postgresql", "sqlite"), ("usbip", "usbredir"))
_SETS_OF_SLOW = (*_SETS, ("ours", "p11-kit"))


def steps(stride: int) -> Iterator[int]:
    """Numbers of steps to die at, without end: the first one, and of the others all, or one in `stride`."""
    if all_counts():
        return itertools.count(1)
    return itertools.chain([1], itertools.count(random.randint(2, stride + 1), stride))


def all_counts() -> bool:
    """Says whether all is done that scripts/soak does."""
    return ALL_STEPS in os.environ


def chosen(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Returns the tests to run, and those not to run, by the variable WAYS.  Of those with the mark `every_way` all are run."""
    wanted = os.environ.get(WAYS, "")
    if wanted not in ("", ONE, OTHERS):
        raise pytest.UsageError(f"{WAYS} is {wanted!r}: it may be {ONE!r} or {OTHERS!r}")
    run: list[pytest.Item] = []
    left: list[pytest.Item] = []
    names = {item.nodeid for item in items}
    for item in items:
        sets = _SETS_OF_SLOW if item.get_closest_marker("slow") else _SETS
        first = None if item.get_closest_marker("every_way") else _is_first(item.nodeid, names, sets)
        keep = not wanted or (first is False if wanted == OTHERS else first is not False)
        (run if keep else left).append(item)
    return run, left


def _is_first(name: str, names: set[str], sets: Sequence[Sequence[str]]) -> bool | None:
    """Whether this way of the test is the one to run; None: it knows one alone."""
    test, _, parameters = name.partition("[")
    for ways in sets:
        for way in ways:
            for found in re.finditer(rf"(?<![^-]){re.escape(way)}(?=[-\]])", parameters):
                before, after = f"{test}[{parameters[: found.start()]}", parameters[found.end() :]
                there = [other for other in ways if before + other + after in names]
                if len(there) > 1:
                    return way == there[zlib.crc32((before + after).encode()) % len(there)]
    return None
