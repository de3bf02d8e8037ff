"""Waiting until what was asked for is there, with progress for people: done, failing, or the time is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click
import grpc
from hsmvisor.cli.context import FAILURE, REFUSED, TIMEOUT, CommandError, Context
from hsmvisor.cli.fleet.finding import get
from hsmvisor.cli.fleet.reach import manager_of
from hsmvisor_rpc.v1 import manager_pb2 as pb
from rich.console import Console

_LOOK_EVERY = 0.5  #: seconds
_SETTLED = 1.0  #: seconds that it has to look done: a change is seen by the manager's engine a moment after it is stored
_NOBODY = 3.0  #: seconds after which nothing being meant is an answer
_RETRIED = 10.0  #: seconds after which failures count that were there before
_TOLD = 5  #: reasons in one line
DONE, WORKING, FAILING, WAITING = "done", "working", "failing", "waiting"


@dataclass(frozen=True)
class Look:
    """One look at a request."""

    state: str
    told: str
    why: tuple[str, ...] = ()


def look_at(found: pb.MaterialRequest, above: Mapping[str, int] | None, failed: Mapping[str, int]) -> Look:
    """`above`: the lines that count, with the generation that is to be followed by another one; None: all count.

    `failed`: by line, failures that were there before and may be over with what was asked now.
    """
    lines = [line for line in found.lines if line.stage not in ("gone", "denied") and (above is None or line.id in above)]
    old = {line.id for line in lines if above and line.generation <= above[line.id]}
    undone = [line for line in lines if line.stage != "serving" or line.id in old]
    counted = Counter("working" if line.stage == "serving" and line.id in old else line.stage for line in lines)
    told = ", ".join(f"{count} {stage}" for stage, count in sorted(counted.items())) or "no key yet"
    if failing := [line for line in lines if line.failures > failed.get(line.id, 0) or _is_unmeasured(line, failed)]:
        return Look(FAILING, told, tuple(map(_why, failing)))
    if undone:
        return Look(WORKING, told, tuple(map(_why, undone)))
    return Look(DONE if lines or found.denials else WAITING, told)


def _is_unmeasured(line: pb.Line, failed: Mapping[str, int]) -> bool:
    """Its guest's boot is not what it has to be: as good as a failure, unless it may be over with what was asked now."""
    return line.stage == "unmeasured" and line.id not in failed


def _why(line: pb.Line) -> str:
    held = next((h.why for h in line.holdings if h.state not in ("active", "gone") and h.why), "")
    return f"{line.resource or 'its key'}: {line.stage}: {line.why or held or 'nothing is said of it'}"


class Waiting:
    """`within`: seconds for all that is waited for."""

    def __init__(self, ctx: Context, within: float) -> None:
        self._ctx, self._manager, self._end = ctx, manager_of(ctx), time.monotonic() + within
        self._console = Console(stderr=True)

    def until_done(
        self,
        found: pb.MaterialRequest,
        above: Mapping[str, int] | None = None,
        stays: Callable[[pb.MaterialRequest], bool] = lambda found: False,
    ) -> pb.MaterialRequest:
        """Returns the request as it is then.  `stays`: it is not waited for any longer.  Raises CommandError.

        A manager that is away for a moment is waited for as well.
        """
        began, good_since, last = time.monotonic(), 0.0, ""
        failed = {line.id: line.failures for line in found.lines}
        with self._progress(found.spec.material) as tell:
            while True:
                now = time.monotonic()
                look = look_at(found, above, failed if now - began < _RETRIED else {})
                if look.told != last:
                    tell(look.told)
                    last = look.told
                good_since = (good_since or now) if look.state == DONE else 0.0
                if stays(found) or (look.state == WAITING and now - began > _NOBODY):
                    return found
                if look.state == FAILING or (good_since and now - good_since >= _SETTLED) or now >= self._end:
                    return _ended(found, look)
                time.sleep(_LOOK_EVERY)
                found = self._again(found)

    def _again(self, found: pb.MaterialRequest) -> pb.MaterialRequest:
        while True:
            try:
                return get(self._manager, pb.GetRequest(id=found.id))
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() >= self._end:
                    raise
            time.sleep(_LOOK_EVERY)

    @contextmanager
    def _progress(self, material: str) -> Iterator[Callable[[str], None]]:
        """On the standard error: a status line for a terminal, a line for each change otherwise, nothing for programs."""
        if self._ctx.json:
            yield lambda told: None
        elif self._console.is_terminal:
            with self._console.status(f"{material} ...") as status:
                yield lambda told: status.update(f"{material}: {told} ...")
        else:
            yield lambda told: click.echo(f"{material}: {told} ...", err=True)


def _ended(found: pb.MaterialRequest, look: Look) -> pb.MaterialRequest:
    """Raises CommandError, unless it is done."""
    material, why = found.spec.material, some(look.why) or look.told
    if look.state == FAILING:
        raise CommandError(f"{material} fails: {why}", FAILURE, _more(found))
    if look.state != DONE:
        raise CommandError(f"{material} is not done in time: {why}", TIMEOUT, f"it goes on; {_more(found)}")
    return found


def some(reasons: Sequence[str]) -> str:
    """Returns as many as one line holds."""
    left = len(reasons) - _TOLD
    return "; ".join(reasons[:_TOLD]) + (f"; and {left} more" if left > 0 else "")


def demand_allowed(found: pb.MaterialRequest) -> None:
    """Raises CommandError where policies deny it on a resource."""
    if denied := list(dict.fromkeys(f"{d.resource}: {d.why}" for d in found.denials)):
        raise CommandError(f"{found.spec.material} is denied on {some(denied)}", REFUSED, _more(found), "POLICY")


def _more(found: pb.MaterialRequest) -> str:
    return f"hsmvisor request show {found.id} tells more"


def generations(found: pb.MaterialRequest, resource: str = "") -> dict[str, int]:
    """Returns which generation of each line serves, of those that concern a resource; 0: none yet."""
    lines = [line for line in found.lines if line.stage not in ("gone", "denied")]
    return {line.id: line.generation for line in lines if resource in ("", line.resource) or not line.resource}


def serving(found: pb.MaterialRequest, resource: str = "") -> str:
    """Returns the same as people say it."""
    return ", ".join(str(number) for number in sorted(set(generations(found, resource).values()))) or "none"
