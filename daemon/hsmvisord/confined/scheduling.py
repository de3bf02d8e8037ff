"""The turns that the kernel's scheduler gives a worker: short ones, so that one which computes for long keeps no other waiting.

sched_setattr(2): since Linux 6.12 `sched_runtime` is the length of a turn also for SCHED_OTHER.  Who wakes with short turns need
not wait for the end of a long one.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SETATTR, _GETATTR = {"x86_64": (314, 315), "aarch64": (274, 275)}.get(os.uname().machine, (-1, -1))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    )


def turn(pid: int = 0) -> int:
    """Returns the length of a thread's turns in nanoseconds, 0 where the kernel does not tell.  Raises OSError."""
    attributes = _Attributes()
    _call(_GETATTR, pid, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    return int(attributes.sched_runtime)


def shorten(nanoseconds: int) -> None:
    """For this thread and those that it will start.  Raises OSError, also where the kernel knows no such thing."""
    attributes = _Attributes()
    _call(_GETATTR, 0, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    attributes.sched_runtime = nanoseconds
    _call(_SETATTR, 0, ctypes.byref(attributes), 0)
    if turn() != nanoseconds:
        raise OSError("the kernel's turns have one length (Linux before 6.12)")


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(number, *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
