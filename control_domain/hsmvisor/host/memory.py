"""How much memory a process takes, by the kernel's count."""

from __future__ import annotations

from pathlib import Path


def proportional_set_size(pid: int) -> int:
    """Returns PSS in bytes (proc(5), smaps_rollup): shared pages count by share.  0 when it may not be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
