"""When a material is renewed: a table of snapshots, and what holds for any of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hsmvisor.manager.renewal import timing
from hsmvisor.manager.renewal.decisions import (
    LOOK,
    MOST_SIGNATURES,
    SHORTEST_PERIOD,
    Act,
    BadRule,
    Failures,
    Held,
    Rule,
    Snapshot,
    Suggested,
    decide,
)
from hsmvisor.manager.renewal.timing import DAY, HOUR, Lifetime
from hypothesis import example, given
from hypothesis import strategies as st

T0 = 1_800_000_000.0
LIFE = Lifetime(T0, T0 + 90 * DAY)
HELD = Held(1, T0, LIFE, drawn=1.0)
SOON = replace(HELD, suggested=Suggested(T0 + DAY, T0 + 2 * DAY, "https://ca/why"))
PAST = replace(HELD, suggested=Suggested(T0 - 9, T0 - 1))
FAR = replace(HELD, suggested=Suggested(T0 + 900 * DAY, T0 + 901 * DAY))
FAILED = Failures(5, T0 + 60 * DAY)


def asked(rule: Rule = Rule(), held: Held | None = HELD, **more: object) -> Snapshot:  # noqa: B008
    return Snapshot(rule, held, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("snapshot", "now", "act", "why"),
    [
        (asked(held=None), T0, Act.RENEW, "there is no generation yet"),
        (asked(), T0 + 59 * DAY, Act.WAIT, "its certificate nears its end, at 2027-03-16 08:00:00 UTC"),
        (asked(), T0 + 60 * DAY, Act.RENEW, "its certificate nears its end"),
        (asked(), T0 + 200 * DAY, Act.RENEW, "its certificate has expired"),
        (asked(Rule(lead=10 * DAY)), T0 + 79.9 * DAY, Act.WAIT, "its certificate nears its end"),
        (asked(Rule(lead=10 * DAY)), T0 + 80 * DAY, Act.RENEW, "its certificate nears its end"),
        (asked(Rule(enabled=False)), T0 + 200 * DAY, Act.WAIT, "renewal is off"),
        (asked(Rule(enabled=False), replace(HELD, revoked_at=T0 + 1)), T0 + 2, Act.RENEW, "its certificate was revoked"),
        (asked(Rule(enabled=False), triggered_at=T0 + 5), T0 + 5, Act.RENEW, "somebody asked for it"),
        (asked(triggered_at=T0 - 5), T0 + 5, Act.WAIT, "its certificate nears its end"),
        (asked(changed_at=T0 + 5), T0 + 6, Act.RENEW, "the request was changed"),
        (
            asked(held=SOON),
            T0 + DAY,
            Act.WAIT,
            "the authority suggests it",
        ),
        (
            asked(held=SOON),
            T0 + 2 * DAY,
            Act.RENEW,
            "the authority suggests it (https://ca/why)",
        ),
        (asked(held=PAST), T0 + 1, Act.WAIT, "the authority suggests it"),
        (asked(held=PAST), T0 + 3601, Act.RENEW, "the authority suggests it"),
        (
            asked(held=FAR),
            T0 + 90 * DAY,
            Act.RENEW,
            "the authority suggests",
        ),
        (asked(Rule(cron="0 3 * * 0")), T0 + 6 * DAY, Act.RENEW, "by its schedule"),
        (asked(Rule(cron="0 3 1 1 *")), T0 + 6 * DAY, Act.WAIT, "its certificate nears its end"),
        (asked(Rule(cron="0 3 30 2 *")), T0 + 6 * DAY, Act.WAIT, "its certificate nears its end"),
        (asked(Rule(period=DAY)), T0 + DAY - 1, Act.WAIT, "by its period"),
        (asked(Rule(period=DAY)), T0 + DAY, Act.RENEW, "by its period"),
        (asked(Rule(days=30)), T0 + 30 * DAY, Act.RENEW, "a generation serves 30 days at most"),
        (asked(Rule(signatures=100), replace(HELD, signatures=99)), T0 + 1, Act.WAIT, "its certificate nears its end"),
        (asked(Rule(signatures=100), replace(HELD, signatures=100)), T0 + 61, Act.RENEW, "makes 100 signatures at most"),
        (asked(held=Held(1, T0)), T0 + 900 * DAY, Act.WAIT, "no rule asks for it"),
        (asked(failures=Failures(1, T0 + 60 * DAY)), T0 + 60 * DAY + HOUR - 1, Act.WAIT, "after 1 failures it is tried again at"),
        (asked(failures=Failures(1, T0 + 60 * DAY)), T0 + 60 * DAY + HOUR, Act.RENEW, "its certificate nears its end"),
        (asked(failures=Failures(3, T0 + 60 * DAY)), T0 + 60 * DAY + 4 * HOUR - 1, Act.WAIT, "after 3 failures"),
        (asked(failures=Failures(9, T0 + 60 * DAY)), T0 + 60 * DAY + 32 * HOUR, Act.RENEW, "its certificate nears its end"),
        (asked(failures=Failures(1, T0 + 60 * DAY, T0 + 62 * DAY)), T0 + 61 * DAY, Act.WAIT, "after 1 failures"),
        (
            asked(failures=FAILED, changed_at=T0 + 60 * DAY + 1),
            T0 + 60 * DAY + 2,
            Act.RENEW,
            "the request was changed",
        ),
        (
            asked(failures=FAILED, triggered_at=T0 + 60 * DAY + 1),
            T0 + 60 * DAY + 2,
            Act.RENEW,
            "somebody asked",
        ),
        (asked(failures=Failures(5, T0 + 95 * DAY)), T0 + 97 * DAY, Act.RENEW, "its certificate has expired"),
    ],
)
def test_decisions(snapshot: Snapshot, now: float, act: Act, why: str) -> None:
    decision = decide(snapshot, now)
    assert decision.act is act and why in decision.why, decision


@pytest.mark.parametrize(
    ("snapshot", "urgent", "rekey"),
    [
        (asked(Rule(rekey=False), changed_at=T0 + 1), False, False),
        (asked(Rule(rekey=True), changed_at=T0 + 1), False, True),
        (asked(Rule(rekey=False), replace(HELD, revoked_at=T0 + 1)), True, True),
        (asked(Rule(rekey=False, days=1)), False, True),
        (asked(Rule(rekey=False), None), False, True),
    ],
)
def test_which_key(snapshot: Snapshot, urgent: bool, rekey: bool) -> None:
    decision = decide(snapshot, T0 + 2 * DAY)
    assert (decision.act, decision.urgent, decision.rekey) == (Act.RENEW, urgent, rekey)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(cron="not a schedule"), "is no schedule"),
        (Rule(cron="* * * * * *"), "five fields"),
        (Rule(cron="61 * * * *"), "is no schedule"),
        (Rule(lead=-1), "lead is 0 to"),
        (Rule(period=SHORTEST_PERIOD - 1), "60 seconds or more"),
        (Rule(signatures=MOST_SIGNATURES + 1), "signatures are 0 to"),
        (Rule(signatures=-1), "signatures are 0 to"),
    ],
)
def test_rules_that_cannot_be(rule: Rule, said: str) -> None:
    with pytest.raises(BadRule, match=said):
        rule.check()


def test_rules_at_the_limit() -> None:
    assert Rule(cron="*/5 * * * *", period=SHORTEST_PERIOD, signatures=MOST_SIGNATURES).check()


# ---- what holds for all -------------------------------------------------------------------------------------------------

lives = st.builds(lambda begin, seconds: Lifetime(T0 + begin, T0 + begin + seconds), st.floats(0, 1e6), st.floats(60, 400 * DAY))
drawn = st.floats(0, 1, exclude_max=True)


@given(lives, drawn, st.floats(0, 500 * DAY))
@example(Lifetime(T0, T0 + 60), 0.999, 1e-300)
def test_it_is_due_while_it_lives_and_never_at_once(life: Lifetime, number: float, lead: float) -> None:
    at = timing.due(life, number, lead)
    assert life.not_before <= at < life.not_after
    if not 0 < lead < life.seconds:
        assert at >= life.not_before + life.seconds * (1 / 2 - timing.SPREAD) - 1, "no hot loop"


@given(lives, st.integers(1, 60), st.floats(0, 600 * DAY))
def test_pauses_fit_what_is_left(life: Lifetime, failures: int, after: float) -> None:
    now = life.not_before + after
    pause = timing.pause(failures, life, now)
    assert timing.LEAST <= pause <= timing.LONGEST_PAUSE
    if life.left(now) > 4 * timing.ENOUGH:
        assert pause <= life.left(now) / 4 + 1e-6


@given(lives, drawn, st.integers(0, 30), st.floats(0, 500 * DAY))
def test_a_decision_is_asked_again_in_time(life: Lifetime, number: float, failures: int, after: float) -> None:
    held = Held(1, life.not_before, life, number)
    now = life.not_before + after
    decision = decide(Snapshot(Rule(), held, Failures(failures, now - 1 if failures else 0)), now)
    assert now <= decision.look_at <= now + LOOK
    if decision.act is Act.WAIT and not failures:
        assert now < timing.due(life, number)


@given(drawn)
def test_two_minutes_are_enough(number: float) -> None:
    """Of an authority whose certificates hold two minutes: renewed well before the end, with attempts to spare."""
    life = Lifetime(T0, T0 + 120)
    at = timing.due(life, number)
    assert 45 <= at - T0 <= 60
    attempts, now = 1, at
    while (now := now + timing.pause(attempts, life, now)) < life.not_after:
        attempts += 1
    assert attempts >= 6


def test_ten_thousand_that_were_issued_together_are_spread() -> None:
    life, numbers = Lifetime(T0, T0 + 90 * DAY), random.Random(7)
    points = sorted(timing.due(life, numbers.random()) for _ in range(10_000))
    assert points[-1] - points[0] > 7 * DAY
    busiest = max(sum(1 for p in points if start <= p < start + HOUR) for start in points[::100])
    assert busiest < 120, "in the busiest hour; all at once would be 10,000"
