"""That somebody asked for a generation out of turn, and with what; it stands with the line until a generation answers it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Trigger:
    why: str
    by: str = ""
    urgent: bool = False  #: the drain of the generation before ends at once
    revoke: bool = False  #: its certificate is revoked, for `reason`
    reason: str = "superseded"  #: of RFC 5280, 5.3.1
    rekey: bool = False  #: a new key, also where the rule keeps the old one

    @classmethod
    def of_text(cls, text: str) -> Trigger | None:
        """None: of an empty text."""
        return cls(**json.loads(text)) if text else None

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))
