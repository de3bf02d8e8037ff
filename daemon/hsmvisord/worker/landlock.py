"""Landlock (kernel 5.13 and newer): no file may be opened, no TCP socket bound or connected.  landlock(7), by system
calls 444-446."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_VERSION_FLAG = 1

#: File-system rights known to each ABI: how many bits of handled_access_fs.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_READING = 0b1101  #: execute, read files, read directories
_NETWORK_FROM, _SCOPE_FROM = 4, 6
_NETWORK = 0b11  #: bind, connect TCP
_SCOPE = 0b11  #: abstract unix sockets, signals to processes outside


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """Returns the kernel's Landlock ABI, 0 without Landlock."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)))


def restrict(reading: bool = False) -> str:
    """Forbids everything that the kernel's ABI knows, but for `reading` files; returns what.  Raises OSError.  Needs
    no_new_privs."""
    version = abi()
    if not version:
        raise OSError("the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, lsm=landlock)")
    files = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    network = _NETWORK if version >= _NETWORK_FROM else 0
    readable = _READING if reading else 0
    scope = _SCOPE if version >= _SCOPE_FROM else 0
    ruleset = _Ruleset(files, network, scope)
    size = 8 if version < _NETWORK_FROM else 16 if version < _SCOPE_FROM else 24
    descriptor = int(_libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        if readable:
            _allow_below_root(descriptor, readable)
        if _libc.syscall(_RESTRICT_SELF, descriptor, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)
    parts = [
        "files but for reading" if reading else "files",
        *(["TCP"] if network else []),
        *(["abstract sockets", "signals"] if scope else []),
    ]
    return f"ABI {version}: {', '.join(parts)}"


def _allow_below_root(ruleset: int, rights: int) -> None:
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathBeneath(rights, root)
        if _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(root)
