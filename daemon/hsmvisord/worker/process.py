"""Small things that Python has no call for: the title in ps, descriptors, process attributes."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38


def prctl(option: int, value: int | bytes = 0) -> None:
    """Raises OSError (prctl(2))."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _libc.prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


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


_CAPABILITY_VERSION_3 = 0x20080522
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4


CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 6, 7, 8


def drop_bounding_set(kept: frozenset[int] = frozenset()) -> None:
    """Empties the capability bounding set (capabilities(7)): needs CAP_SETPCAP, so before the change of user.  Raises OSError."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if capability not in kept:
            prctl(PR_CAPBSET_DROP, capability)


def clear_capabilities(kept: frozenset[int] = frozenset()) -> None:
    """Empties the ambient, inheritable, permitted and effective sets, the last two but for `kept` (below 32); raises OSError."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    left = sum(1 << capability for capability in kept)
    data = (ctypes.c_uint32 * 6)(left, left)
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def capability_sets() -> dict[str, int]:
    """Returns the five sets as the kernel tells them: CapInh, CapPrm, CapEff, CapBnd, CapAmb."""
    with open("/proc/self/status", encoding="ascii") as file:
        rows = (line.split() for line in file if line.startswith("Cap"))
        return {name.rstrip(":"): int(value, 16) for name, value in rows}
