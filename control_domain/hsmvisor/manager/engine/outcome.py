"""What one look at a line comes to."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Outcome:
    look_at: float  #: when to look again; 0: at once
    stage: str  #: waiting, keying, ordering, delivering, serving, denied, leaving, gone
    why: str = ""

    def or_sooner(self, look_at: float, why: str) -> Outcome:
        """As it is, but looked at again at `look_at` at the latest, for what `why` says, if it says anything."""
        return replace(self, look_at=min(self.look_at, look_at), why=why or self.why)


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
