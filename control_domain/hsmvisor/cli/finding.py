"""What `hsmvisor doctor` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    check: str
    result: str
    found: str
    do: str = ""
