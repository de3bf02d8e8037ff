"""Of tests that know two ways, one is run in each run of scripts/test, and the other one by scripts/soak."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from support import counts


def item(name: str, *marks: str) -> Any:
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: mark in marks)


TESTS = [item(f"tests/test_a.py::test_{number}[{way}-x]") for number in range(40) for way in ("sqlite", "postgresql")]
OTHERS = [item("tests/test_a.py::test_b"), item("tests/test_a.py::test_c[sqlite-x]"), item("tests/test_a.py::test_d[a-b]")]
OTHERS += [item(f"tests/test_a.py::test_quick[{library}]") for library in ("ours", "p11-kit")]
EVERY = [item(f"tests/test_a.py::test_e[{way}]", "every_way") for way in ("usbip", "usbredir")]
SLOW = [item(f"tests/test_a.py::test_slow[{library}-4]", "slow") for library in ("ours", "p11-kit")]


def run(monkeypatch: pytest.MonkeyPatch, ways: str) -> list[Any]:
    monkeypatch.setenv(counts.WAYS, ways)
    chosen, left = counts.chosen([*TESTS, *OTHERS, *EVERY])
    assert not set(map(id, chosen)) & set(map(id, left)) and len(chosen) + len(left) == len(TESTS) + len(OTHERS) + len(EVERY)
    return chosen


def test_each_test_is_run_in_one_way_and_both_ways_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = run(monkeypatch, counts.ONE)
    assert [one for one in chosen if one in (*OTHERS, *EVERY)] == [*OTHERS, *EVERY]
    tests = [one.nodeid for one in chosen if one in TESTS]
    assert sorted({name.partition("[")[0] for name in tests}) == sorted({one.nodeid.partition("[")[0] for one in TESTS})
    assert len(tests) == len(TESTS) // 2
    assert 10 < sum("sqlite" in name for name in tests) < 30


def test_the_soak_runs_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    one, others = run(monkeypatch, counts.ONE), run(monkeypatch, counts.OTHERS)
    assert [test for test in TESTS if (test in one) == (test in others)] == []
    assert not [test for test in others if test not in TESTS]
    assert run(monkeypatch, "") == [*TESTS, *OTHERS, *EVERY]


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.UsageError, match="'both'"):
        run(monkeypatch, "both")


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(counts.ALL_STEPS, "1")
    assert list(islice(counts.steps(4), 5)) == [1, 2, 3, 4, 5]
    monkeypatch.delenv(counts.ALL_STEPS)
    seen = {tuple(islice(counts.steps(4), 4)) for _ in range(500)}
    assert seen == {(1, first, first + 4, first + 8) for first in (2, 3, 4, 5)}


def test_a_slow_one_of_both_libraries_is_run_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(counts.WAYS, counts.ONE)
    one, left = counts.chosen(SLOW)
    assert len(one) == len(left) == 1
    monkeypatch.setenv(counts.WAYS, counts.OTHERS)
    assert counts.chosen(SLOW) == (left, one)
    yours = [item(f"tests/test_a.py::test_z[{way}-1]", "slow") for way in ("yours", "yp11-kit")]
    assert counts.chosen(yours) == ([], yours)
