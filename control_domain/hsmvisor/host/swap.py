"""No swap for the service and what it starts: by its control group (cgroup v2, memory.swap.max).

Workers and the key provider lock their heaps and stacks besides; the rest of their memory, and ours, has this alone.
"""

from __future__ import annotations

import os
from pathlib import Path


class CannotKeepOut(OSError):
    """Why swap cannot be kept off, and what to do."""


def keep_out(mounts: Path = Path("/proc/self/mounts"), own: Path = Path("/proc/self/cgroup")) -> str:
    """Returns where swap is off; raises OSError.  Other processes' memory is not touched: a group that is shared is left alone."""
    root = _mount_point(mounts.read_text())
    relative = next((line[3:] for line in own.read_text().splitlines() if line.startswith("0::")), None)
    if root is None or relative is None:
        raise CannotKeepOut("there is no cgroup v2 here")
    group = root / relative.lstrip("/")
    for above in (group, *group.parents):
        if not above.is_relative_to(root):
            break
        if _limit(above) == "0":
            return f"memory.swap.max is 0 in {above}"
    if _limit(group) is None:
        raise CannotKeepOut(f"cgroup v2 has no memory controller in {group}")
    if set(map(int, (group / "cgroup.procs").read_text().split())) - {os.getpid()}:
        raise CannotKeepOut(f"other processes share {group}: start the service by its unit, or with systemd-run -p MemorySwapMax=0")
    (group / "memory.swap.max").write_text("0")
    return f"memory.swap.max made 0 in {group}"


def _mount_point(mounts: str) -> Path | None:
    for line in mounts.splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    return None


def _limit(group: Path) -> str | None:
    try:
        return (group / "memory.swap.max").read_text().strip()
    except FileNotFoundError:
        return None


def areas(swaps: Path = Path("/proc/swaps")) -> list[str]:
    """Returns the swap areas that are in use and not compressed memory (proc(5), swaps)."""
    rows = swaps.read_text().splitlines()[1:]
    return [row.split()[0] for row in rows if "zram" not in row]
