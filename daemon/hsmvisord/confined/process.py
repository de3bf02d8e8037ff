"""Small things of a process: the title in ps, descriptors, its turn."""

from __future__ import annotations

import os

from hsmvisor_rpc.confine.title import set_title

__all__ = ["close_all_but", "not_before_others", "set_title"]


def close_all_but(kept: set[int]) -> None:
    low = 0
    for descriptor in sorted(kept):
        if low < descriptor:  # an empty range would close everything
            os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def not_before_others() -> None:
    """The service and its helpers may go before everybody else (the unit's Nice=), a guest's module does not."""
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
