"""What a worker allocates lies side by side at the end of its heap, once its launcher has filled the holes."""

from __future__ import annotations

import json
import subprocess
import sys

from hsmvisor.environment import child_environment

_PROGRAM = """
import json, sys
from hsmvisord import memory

def below(end):
    taken = [memory._libc.malloc(size) for size in sizes]
    for address in taken:
        memory._libc.free(address)
    return sum(address < end for address in taken)

sizes = [24, 100, 500, 1000, 5000, 20000] * 20
holes = [bytes(size) for size in sizes for _ in range(4)]
kept = holes[::2]
del holes
before = below(memory._end() - memory.room())
filled = memory.fill_holes()
print(json.dumps([before, filled, below(memory._end() - memory.room())]))
"""


def test_holes_are_filled() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=child_environment(), capture_output=True, text=True, timeout=30, check=True
    )
    before, filled, after = json.loads(result.stdout)
    assert before > 80, "there were holes"
    assert filled > 100_000
    assert 4 * after < before, "a few that the program has freed since"
