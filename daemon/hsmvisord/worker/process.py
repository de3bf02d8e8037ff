"""Small things that Python has no call for: the title in ps, descriptors."""

from __future__ import annotations

import ctypes
import os

from hsmvisor_rpc.confine.capabilities import PR_SET_NAME, prctl


def close_all_but(kept: set[int]) -> None:
    low = 0
    for descriptor in sorted(kept):
        if low < descriptor:  # an empty range would close everything
            os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


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


def not_before_others() -> None:
    """The service and its helpers may go before everybody else (the unit's Nice=), a guest's module does not."""
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
