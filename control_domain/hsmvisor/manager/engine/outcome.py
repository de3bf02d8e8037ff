"""What one look at a line comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    look_at: float  #: when to look again; 0: at once
    stage: str  #: waiting, keying, ordering, delivering, serving, denied, leaving, gone
    why: str = ""

    def sooner(self, look_at: float) -> Outcome:
        return Outcome(min(self.look_at, look_at), self.stage, self.why)


class Interrupted(Exception):
    """A step that came to no end; `stage`: the line's, where that is another one now."""

    stage = ""


class Failed(Interrupted):
    """An attempt that failed; it is counted, and made again after a pause.  `not_before`: seconds from now, as others said."""

    def __init__(self, why: str, not_before: float = 0) -> None:
        super().__init__(why)
        self.not_before = not_before


class Again(Interrupted):
    """Not now, through nobody's fault: looked at again in `seconds`, and not counted."""

    def __init__(self, why: str, seconds: float) -> None:
        super().__init__(why)
        self.seconds = seconds
