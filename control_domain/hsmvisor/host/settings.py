"""What an operator may set for a module; the worker checks it again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from hsmvisor.host import limits
from hsmvisor.host.errors import Invalid


@dataclass(frozen=True)
class Settings:
    log_signatures: bool = False  #: an audit line for each signature
    max_sessions: int = 0  #: 0 = the worker's default
    max_connections: int = 0

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    def check(self) -> Settings:
        """Raises Invalid."""
        for name, most in (("max_sessions", limits.MAX_SESSIONS), ("max_connections", limits.MAX_CONNECTIONS)):
            if not 0 <= getattr(self, name) <= most:
                raise Invalid("SETTINGS", f"{name} is at most {most}; 0 is the default")
        return self
