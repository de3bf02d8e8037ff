"""The bench of a fleet shows what failed, and judges by it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from support.guest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from benchlib import bench, fleet


def _row(kind: str, hosts: int, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(fleet.FIGURES, 20.0) | {"failures": 0, "refused": 0}
    return {"database": kind, "hosts": hosts, "modules": hosts * 100} | figures | changes


def _rows(**changes: Any) -> list[dict[str, Any]]:
    """`changes`: of the last of them, PostgreSQL's large one."""
    return [_row("sqlite", 5), _row("postgresql", 5), _row("sqlite", 200), _row("postgresql", 200, **changes)]


def _written(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    lines, met = bench.written({"times": {"fleet": "today"}, "fleet": rows})
    return "\n".join(lines), met


def test_both_databases_and_sizes_stand_side_by_side() -> None:
    text, met = _written(_rows(renewal_ms=25.0))
    head = next(line for line in text.splitlines() if line.startswith("| figure"))
    assert head.index("SQLite, 5 hosts, 500") < head.index("SQLite, 200 hosts, 20,000") < head.index("PostgreSQL, 200 hosts")
    cost = next(line for line in text.splitlines() if line.startswith("| a renewal, ms"))
    assert [cell.strip() for cell in cost.split("|")[2:-1]] == ["20.0", "20.0", "1.00x", "20.0", "25.0", "1.25x"]
    assert met and "met." in text and "transactions a renewal" in text and "MISSED" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failures": 3}, "PostgreSQL, 200 hosts: 3 exchanges that failed"),
        ({"refused": 1}, "PostgreSQL, 200 hosts: 1 commands that were refused"),
        ({"statements_a_renewal": 31.0}, "PostgreSQL: statements a renewal: more than 1.5 times those of the small fleet"),
        ({"processor_ms": 31.0}, "PostgreSQL: processor time a renewal, ms: more than 1.5 times those of the small fleet"),
        ({"ended": "TimeoutError: 5 of 20000"}, "PostgreSQL, 200 hosts: it did not end: TimeoutError: 5 of 20000"),
    ],
)
def test_what_fails_or_does_not_grow_in_line_is_said_and_fails(changes: dict[str, Any], said: str) -> None:
    text, met = _written(_rows(**changes))
    assert not met and "MISSED" in text and said in text


def test_a_cost_that_was_not_measured_is_no_goal_that_is_met() -> None:
    rows = _rows()
    del rows[-1]["processor_ms"]
    text, met = _written(rows)
    assert not met and "PostgreSQL: processor time a renewal, ms: not measured" in text


def test_what_was_not_come_to_is_left_open() -> None:
    rows = [_row("sqlite", 5), {"database": "postgresql", "hosts": 5, "modules": 500, "ended": "OSError: no server"}]
    text, met = _written(rows)
    cost = next(line for line in text.splitlines() if line.startswith("| a renewal, ms"))
    assert [cell.strip() for cell in cost.split("|")[2:-1]] == ["20.0", "-"] and not met
