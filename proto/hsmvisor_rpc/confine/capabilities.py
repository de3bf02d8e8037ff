"""prctl(2) and the five capability sets of this process (capabilities(7))."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, IPC_LOCK, SYS_RESOURCE = (
    0,
    1,
    3,
    5,
    6,
    7,
    8,
    10,
    14,
    24,
)
NAMES = {
    CHOWN: "chown",
    DAC_OVERRIDE: "dac_override",
    FOWNER: "fowner",
    KILL: "kill",
    SETGID: "setgid",
    SETUID: "setuid",
    SETPCAP: "setpcap",
    NET_BIND_SERVICE: "net_bind_service",
    IPC_LOCK: "ipc_lock",
}
#: What a launcher needs: its workers change their user, lock their memory, empty their bounding set, and so give up all of these.
FOR_WORKERS = frozenset({SETGID, SETUID, SETPCAP, IPC_LOCK})

_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int | bytes = 0) -> int:
    """Raises OSError (prctl(2))."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    result = int(_libc.prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def drop_bounding_set(kept: frozenset[int] = frozenset()) -> None:
    """Empties the bounding set but for `kept`: needs CAP_SETPCAP, so before the change of user.  Raises OSError."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if capability not in kept:
            prctl(PR_CAPBSET_DROP, capability)


def clear(kept: frozenset[int] = frozenset()) -> None:
    """Empties the ambient, inheritable, permitted and effective sets, the last two but for `kept` (below 32); raises OSError."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    left = sum(1 << capability for capability in kept)
    data = (ctypes.c_uint32 * 6)(left, left)
    if _libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def keep_only(wanted: frozenset[int]) -> str:
    """Gives up, here and for all children, every capability but those of `wanted` that are there; returns which these are."""
    held = permitted()
    kept = wanted & held
    if SETPCAP in held:
        drop_bounding_set(kept)
    clear(kept)
    return ", ".join(NAMES[c] for c in sorted(kept)) + " left" if kept else "none left"


def sets() -> dict[str, int]:
    """Returns the five sets as the kernel tells them: CapInh, CapPrm, CapEff, CapBnd, CapAmb."""
    with open("/proc/self/status", encoding="ascii") as file:
        rows = (line.split() for line in file if line.startswith("Cap"))
        return {name.rstrip(":"): int(value, 16) for name, value in rows}


def permitted() -> frozenset[int]:
    """Returns the capabilities of this process, by number."""
    held = sets()["CapPrm"]
    return frozenset(number for number in range(64) if held >> number & 1)
