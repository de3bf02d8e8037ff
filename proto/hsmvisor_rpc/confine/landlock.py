"""Landlock (kernel 5.13 and newer): which files may still be opened, and whether TCP sockets may be bound or connected.
landlock(7), by system calls 444-446."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH, _NET_PORT = 1, 2
_VERSION_FLAG = 1

#: File-system rights known to each ABI: how many bits of handled_access_fs.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
EXECUTING = 0b0001
READING = 0b1100  #: files, directories
WRITING_FILE = 0b10 | 1 << 14  #: and truncating
_FOR_FILES = EXECUTING | 0b0110 | 1 << 14 | 1 << 15  #: what a rule may say of something that is no directory
MAKING_DEVICES = 1 << 6 | 1 << 11
EVERYTHING = (1 << 16) - 1
NETWORK_FROM, _SCOPE_FROM = 4, 6
BIND_TCP, CONNECT_TCP = 0b01, 0b10
_SCOPE = 0b11  #: abstract unix sockets, signals to processes outside

Rules = Iterable[tuple[str | os.PathLike[str], int]]


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def abi() -> int:
    """Returns the kernel's Landlock ABI, 0 without Landlock."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)))


def restrict(rules: Rules = (), tcp: int = BIND_TCP | CONNECT_TCP, scoped: bool = True, connecting: Iterable[int] = ()) -> int:
    """Forbids every access to files but those of `rules` (a path, what may be done there and below), the `tcp` calls (not to
    connect to the ports `connecting`), and if `scoped` abstract unix sockets and signals to processes outside: as far as the
    kernel's ABI knows, which is returned.  For this thread and what it starts; raises OSError.  Needs no_new_privs."""
    version = abi()
    if not version:
        raise OSError("the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, lsm=landlock)")
    files = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    ruleset = _Ruleset(files, tcp if version >= NETWORK_FROM else 0, _SCOPE if scoped and version >= _SCOPE_FROM else 0)
    size = 8 if version < NETWORK_FROM else 16 if version < _SCOPE_FROM else 24
    descriptor = _checked(_libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0))
    try:
        for path, rights in rules:
            _allow(descriptor, path, rights & files)
        if version >= NETWORK_FROM and tcp & CONNECT_TCP:
            for port in connecting:
                rule = _NetPort(CONNECT_TCP, port)
                _checked(_libc.syscall(_ADD_RULE, descriptor, _NET_PORT, ctypes.byref(rule), 0))
        _checked(_libc.syscall(_RESTRICT_SELF, descriptor, 0))
    finally:
        os.close(descriptor)
    return version


def said(version: int, files: str, tcp: bool = True, scoped: bool = True) -> str:
    """Returns in words what an ABI of that version has forbidden."""
    parts = [files, *(["TCP"] if tcp and version >= NETWORK_FROM else [])]
    parts += ["abstract sockets", "signals"] if scoped and version >= _SCOPE_FROM else []
    return f"ABI {version}: {', '.join(parts)}"


def _allow(ruleset: int, path: str | os.PathLike[str], rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathBeneath(rights if os.path.isdir(path) else rights & _FOR_FILES, parent)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(parent)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
