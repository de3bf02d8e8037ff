"""Finds processes of a host by what ps shows of them, and their memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.host_process import wait_for


def descendants(pid: int) -> dict[int, str]:
    """Live processes below `pid` with their command lines; workers below the launcher included."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                parents[int(entry.name)] = (int(fields[1]), title)
        except OSError:
            continue

    def belongs(candidate: int) -> bool:
        while candidate in parents:
            candidate = parents[candidate][0]
            if candidate == pid:
                return True
        return False

    return {p: title for p, (_, title) in parents.items() if belongs(p)}


def unreaped(pid: int) -> list[str]:
    """The dead below `pid` that nobody has waited for."""
    parents = {pid, *descendants(pid)}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state == "Z" and int(parent) in parents:
                name = (entry / "stat").read_text().partition("(")[2].rpartition(")")[0]
                found.append(f"zombie {entry.name} ({name}) of {descendants(1).get(int(parent), 'nobody')}")
    return found


def titled(pid: int, title: str) -> int:
    """The one descendant whose command line has `title` in it; 0: there is none."""
    return next((p for p, line in descendants(pid).items() if title in line), 0)


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process (proc(5), status)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def dumped(directory: Path, **pids: int) -> set[str]:
    """Those of the processes of which gcore(1) makes a core when it may not trace everybody, as an ordinary user's may not;
    "ordinary" is a process of the same user beside them that does not care about it."""
    caller = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", "--no-new-privs"]
    with subprocess.Popen([*caller, "sleep", "60"]) as ordinary:
        wait_for(lambda: b"sleep" in Path(f"/proc/{ordinary.pid}/cmdline").read_bytes()[:5])
        for name, pid in {"ordinary": ordinary.pid, **pids}.items():
            subprocess.run([*caller, "gcore", "-o", str(directory / name), str(pid)], capture_output=True, check=False, timeout=60)
        ordinary.kill()
    return {path.name.partition(".")[0] for path in directory.iterdir()}


def memory(pid: int, written: bool = False) -> Iterator[bytes]:
    """The readable memory of a process, region by region (needs ptrace rights).  `written`: what it may write to, alone."""
    return (data for _, data in regions(pid, written))


def regions(pid: int, written: bool = False) -> Iterator[tuple[tuple[int, int], bytes]]:
    """The same with start and end of each."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in maps:
            span, mode, *_ = line.split()
            if "r" not in mode or (written and "w" not in mode) or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(x, 16) for x in span.split("-"))
            try:
                mem.seek(start)
                yield (start, end), mem.read(end - start)
            except (OSError, OverflowError, ValueError):
                continue


def flags(pid: int) -> dict[tuple[int, int], set[str]]:
    """Start and end of each mapping with its VmFlags (proc(5), smaps): lo = locked, lf = as it is touched, dd = in no dump."""
    found: dict[tuple[int, int], set[str]] = {}
    span = (0, 0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if name == "VmFlags:":
            found[span] = set(values)
        elif not name.endswith(":"):
            start, end = name.split("-")
            span = (int(start, 16), int(end, 16))
    return found


def pss(pid: int) -> int:
    """Proportional set size in bytes (proc(5), smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")
