"""Which steps from line to line an input takes through the code under test; the kept corpus is what reaches more of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

_SOURCES = tuple(
    str(Path(__file__).resolve().parents[2] / name)
    for name in ("daemon", *(f"control_domain/hsmvisor/{part}" for part in ("host", "serving", "attestation")), "proto")
)

Arc = tuple[str, int, int]


def arcs(run: Callable[[bytes], None], data: bytes) -> set[Arc]:
    """Returns the arcs of one input; raises what `run` raises."""
    found: set[Arc] = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_SOURCES):
            return None
        last = 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        run(data)
    finally:
        sys.settrace(before)
    return found


def worth_keeping(run: Callable[[bytes], None], known: Iterable[bytes], more: Iterable[bytes]) -> list[bytes]:
    """Returns those of `more`, the smallest first, that take steps which neither `known` nor the ones before take."""
    reached: set[Arc] = set()
    for data in known:
        reached |= arcs(run, data)
    kept = []
    for data in sorted(more, key=len):
        if new := arcs(run, data) - reached:
            reached |= new
            kept.append(data)
    return kept
