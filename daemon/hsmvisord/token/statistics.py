"""Counters of one connection, written by its thread alone, and their sum for the module.

A cell counts one (operation, mechanism, generation); the sum is made when somebody asks, so that an operation costs one
dict lookup.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hsmvisord.lanes.lanes import Counts

#: Upper bounds of the latency histogram, seconds.
BOUNDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0)

CellKey = tuple[str, int, tuple[str, int] | None]  #: operation, mechanism (0 = none), (material, generation)


@dataclass(slots=True)
class Cell:
    count: int = 0
    errors: int = 0
    seconds: float = 0.0
    last: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def observe(self, seconds: float, now: float) -> None:
        self.count += 1
        self.seconds += seconds
        self.last = now
        self.buckets[bisect_left(BOUNDS, seconds)] += 1

    def add_lane(self, counts: Counts) -> None:
        self.add(Cell(counts.count, 0, counts.seconds, counts.last, counts.buckets))

    def add(self, other: Cell) -> None:
        self.count += other.count
        self.errors += other.errors
        self.seconds += other.seconds
        self.last = max(self.last, other.last)
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]


class Counters:
    """One connection's cells."""

    __slots__ = ("cells", "settle")

    def __init__(self) -> None:
        self.cells: dict[CellKey, Cell] = {}
        self.settle: Callable[[], None] | None = None  #: adds what a lane has counted

    def cell(self, operation: str, mechanism: int, generation: tuple[str, int] | None) -> Cell:
        key = (operation, mechanism, generation)
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell()
        return cell

    def with_added(self, other: Counters) -> Counters:
        """Returns the sum as a new value; what this one holds is not changed, and not copied but for what differs."""
        added = Counters()
        added.cells = dict(self.cells)
        for key, cell in other.cells.items():
            added.cells[key] = summed = Cell()
            summed.add(cell)
            if key in self.cells:
                summed.add(self.cells[key])
        return added


def total(counters: Iterable[Counters]) -> dict[CellKey, Cell]:
    """Returns the sum; the parts may be written to meanwhile."""
    summed: dict[CellKey, Cell] = {}
    for part in counters:
        if part.settle is not None:
            part.settle()
        for key, cell in list(part.cells.items()):
            summed.setdefault(key, Cell()).add(cell)
    return summed
