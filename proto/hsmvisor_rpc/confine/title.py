"""What ps shows of a process."""

from __future__ import annotations

import ctypes

from hsmvisor_rpc.confine.capabilities import PR_SET_NAME, prctl


def set_title(title: str) -> None:
    """Shows `title` in ps: writes it over the process's own argument strings, as far as they reach (proc(5): arg_start,
    arg_end)."""
    prctl(PR_SET_NAME, title.encode()[:15])
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # fields 48 and 49 of the file; two stand before the bracket
    room = end - start
    if start and room > 1:
        ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)
