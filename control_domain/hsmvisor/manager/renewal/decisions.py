"""Whether a material is renewed now.  A snapshot is gathered first; then a chain of checks, of which the first that speaks decides.

Nothing here looks at a clock, a database or an authority.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from croniter import CroniterError, croniter
from hsmvisor.manager.limits import MAX_CRON
from hsmvisor.manager.renewal import timing
from hsmvisor.manager.renewal.timing import DAY, Lifetime
from hsmvisor.manager.renewal.trigger import Trigger

LOOK = 6 * 3600.0  #: seconds after which one looks again in any case
SHORTEST_PERIOD = 60.0  #: of a rule
REST, LONGEST_REST = 8, 3600.0  #: a generation serves an eighth of its life at least, or an hour, unless somebody asks
MOST_SIGNATURES = 10**12
LONGEST = 10 * 365 * DAY  #: of what a rule says, in seconds or days


class BadRule(ValueError):
    """The message says what is wrong, and what may stand there."""


class Act(enum.StrEnum):
    WAIT = "wait"
    RENEW = "renew"


@dataclass(frozen=True)
class Rule:
    """What an owner wants.  Several reasons may stand beside each other: the first that is due counts."""

    enabled: bool = True
    rekey: bool = True  #: a new key; otherwise the same key gets a new certificate
    lead: float = 0  #: seconds before the end; 0: by the lifetime
    cron: str = ""  #: five fields, UTC
    period: float = 0  #: seconds after the activation
    days: float = 0  #: that a generation serves at most
    signatures: int = 0  #: that a generation makes at most

    def check(self) -> Rule:
        """Raises BadRule."""
        if len(self.cron) > MAX_CRON:
            raise BadRule(f"a schedule has at most {MAX_CRON} characters")
        if self.cron and not croniter.is_valid(self.cron, second_at_beginning=False):
            raise BadRule(f"{self.cron!r} is no schedule: five fields as in crontab(5), in UTC")
        if len(self.cron.split()) > 5:
            raise BadRule("a schedule has five fields: minutes are the finest")
        for name, value in (("lead", self.lead), ("period", self.period), ("days", self.days)):
            if not 0 <= value <= LONGEST:  # nor is it none at all: NaN is not
                raise BadRule(f"{name} is 0 to {LONGEST:.0f}")
        if self.period and self.period < SHORTEST_PERIOD:
            raise BadRule(f"a period is {SHORTEST_PERIOD:.0f} seconds or more")
        if not 0 <= self.signatures <= MOST_SIGNATURES:
            raise BadRule(f"signatures are 0 to {MOST_SIGNATURES}")
        return self


@dataclass(frozen=True)
class Suggested:
    """An authority's window (RFC 9773)."""

    start: float
    end: float
    why: str = ""


@dataclass(frozen=True)
class Held:
    """The generation that serves."""

    number: int
    activated_at: float
    life: Lifetime | None = None  #: of its certificate; None: a bare key
    drawn: float = 0.5  #: stored with it
    suggested: Suggested | None = None
    revoked_at: float = 0
    signatures: int = 0
    begun_at: float = 0  #: what was asked since then it does not answer; 0: as `activated_at`

    @property
    def answers(self) -> float:
        return self.begun_at or self.activated_at


@dataclass(frozen=True)
class Failures:
    """Of the attempts since the last success."""

    count: int = 0
    last_at: float = 0
    not_before: float = 0  #: as the authority said


@dataclass(frozen=True)
class Snapshot:
    rule: Rule
    held: Held | None
    failures: Failures = field(default_factory=Failures)
    triggered_at: float = 0  #: somebody asked for it
    trigger: Trigger | None = None
    changed_at: float = 0  #: the request says something else since then: names, key type, authority


@dataclass(frozen=True)
class Decision:
    act: Act
    why: str
    look_at: float  #: when to ask again at the latest
    urgent: bool = False  #: the old generation's drain ends at once
    rekey: bool = True
    compromised: bool = False  #: the key is not to be certified again, if there is no other one
    due: float = 0  #: when it is renewed, as far as that is known now; 0: nothing asks for it


@dataclass(frozen=True)
class _Due:
    at: float
    why: str
    urgent: bool = False
    rekey: bool = False  #: whatever the rule says
    compromised: bool = False
    rest: float | None = None  #: seconds after the activation before which it does not come; None: a part of the lifetime


_Check = Callable[[Snapshot, float], _Due | None]


def decide(snapshot: Snapshot, now: float) -> Decision:
    """`now`: seconds since 1970."""
    found = [_not_at_once(snapshot, due) for check in _CHECKS if (due := check(snapshot, now)) is not None]
    if not found:
        return Decision(Act.WAIT, "renewal is off" if not snapshot.rule.enabled else "no rule asks for it", now + LOOK)
    over = [due for due in found if due.at <= now]
    if not over:
        first = min(found, key=lambda due: due.at)
        return Decision(Act.WAIT, f"{first.why}, at {_shown(first.at)}", min(first.at, now + LOOK), due=first.at)
    urgent, rekey = any(due.urgent for due in over), any(due.rekey for due in over) or snapshot.rule.rekey
    renew = Decision(Act.RENEW, over[0].why, now, urgent, rekey, any(due.compromised for due in over), now)
    if (again := again_at(snapshot)) > now:
        why = f"{renew.why}; after {snapshot.failures.count} failures it is tried again at {_shown(again)}"
        return replace(renew, act=Act.WAIT, why=why, look_at=min(again, now + LOOK), due=again)
    return renew


def _not_at_once(snapshot: Snapshot, due: _Due) -> _Due:
    """What nobody asked for does not come again as soon as it is there: a suggestion that is always past, a rule that is always
    due would have a certificate made every few seconds."""
    held = snapshot.held
    if held is None:
        return due
    usual = min(held.life.seconds / REST, LONGEST_REST) if held.life is not None else SHORTEST_PERIOD
    rest = usual if due.rest is None else due.rest
    return replace(due, at=max(due.at, held.activated_at + rest))


def again_at(snapshot: Snapshot) -> float:
    """Returns when it is tried again after failures; 0: at once, as a request that was changed since the last one."""
    failures = snapshot.failures
    if not failures.count or snapshot.changed_at > failures.last_at or snapshot.triggered_at > failures.last_at:
        return 0.0
    life = snapshot.held.life if snapshot.held else None
    return max(failures.last_at + timing.pause(failures.count, life, failures.last_at), failures.not_before)


def _shown(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---- checks, the first that is due gives the reason -----------------------------------------------------------------------


def _nothing_yet(snapshot: Snapshot, now: float) -> _Due | None:
    return _Due(now, "there is no generation yet", rekey=True) if snapshot.held is None else None


def _revoked(snapshot: Snapshot, now: float) -> _Due | None:
    """Also where renewal is off: a revoked certificate serves nobody.  Its key may be known to others: always another one."""
    held = snapshot.held
    if held is None or not held.revoked_at:
        return None
    return _Due(held.revoked_at, "its certificate was revoked", urgent=True, rekey=True, compromised=True, rest=0)


def _triggered(snapshot: Snapshot, now: float) -> _Due | None:
    held = snapshot.held
    if held is None or snapshot.triggered_at <= held.answers:
        return None
    asked = snapshot.trigger or Trigger("")
    why = "somebody asked for it"
    return _Due(snapshot.triggered_at, why, asked.urgent, asked.rekey, compromised=asked.rekey, rest=0)


def _changed(snapshot: Snapshot, now: float) -> _Due | None:
    held = snapshot.held
    if held is None or snapshot.changed_at <= held.answers:
        return None
    return _Due(snapshot.changed_at, "the request was changed", rest=0)


def _expiry(snapshot: Snapshot, now: float) -> _Due | None:
    """The authority's window is stronger than the lifetime (RFC 9773), but never later than the end."""
    held = snapshot.held
    if not snapshot.rule.enabled or held is None or held.life is None:
        return None
    if held.suggested is not None:
        told = held.suggested
        why = "the authority suggests it" + (f" ({told.why})" if told.why else "")
        return _Due(min(timing.within(told.start, told.end, held.drawn), held.life.not_after), why)
    over = held.life.left(now) <= 0
    return _Due(
        timing.due(held.life, held.drawn, snapshot.rule.lead),
        "its certificate has expired" if over else "its certificate nears its end",
    )


def _schedule(snapshot: Snapshot, now: float) -> _Due | None:
    """The first time on the schedule after the activation."""
    held, rule = snapshot.held, snapshot.rule
    if not rule.enabled or held is None or not rule.cron:
        return None
    try:
        at = croniter(rule.cron, datetime.fromtimestamp(held.activated_at, UTC)).get_next(float)
    except CroniterError:
        return None  # it never comes: 30 February
    return _Due(float(at), "by its schedule")


def _period(snapshot: Snapshot, now: float) -> _Due | None:
    held, rule = snapshot.held, snapshot.rule
    if not rule.enabled or held is None or not rule.period:
        return None
    return _Due(held.activated_at + rule.period, "by its period")


def _age(snapshot: Snapshot, now: float) -> _Due | None:
    held, rule = snapshot.held, snapshot.rule
    if not rule.enabled or held is None or not rule.days:
        return None
    return _Due(held.activated_at + rule.days * DAY, f"a generation serves {rule.days:g} days at most", rekey=True)


def _signatures(snapshot: Snapshot, now: float) -> _Due | None:
    held, rule = snapshot.held, snapshot.rule
    if not rule.enabled or held is None or not rule.signatures or held.signatures < rule.signatures:
        return None
    why = f"a generation makes {rule.signatures} signatures at most, this one has made {held.signatures}"
    return _Due(now, why, rekey=True, rest=SHORTEST_PERIOD)


_CHECKS: tuple[_Check, ...] = (
    _nothing_yet,
    _revoked,
    _triggered,
    _changed,
    _signatures,
    _age,
    _expiry,
    _schedule,
    _period,
)
