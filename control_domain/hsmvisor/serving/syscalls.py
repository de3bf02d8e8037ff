"""System calls that a service and its helpers have no use for, and one who took them over would: refused with EPERM
(seccomp(2), by libseccomp through pyseccomp).  Helpers that hold keys have allow-lists of their own besides."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import Any

_CLONE_NEWUSER = 0x10000000

REFUSED = {
    "another process's memory and descriptors": (
        "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp", "perf_event_open",
        "userfaultfd",
    ),
    "the kernel": (
        "bpf", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "iopl", "ioperm",
        "syslog", "io_uring_setup", "io_uring_enter", "io_uring_register",
    ),
    "name spaces and mounts": (
        "unshare", "setns", "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick",
        "mount_setattr", "pivot_root", "chroot", "open_by_handle_at",
    ),
    "keys, clock, swap": (
        "keyctl", "add_key", "request_key", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "swapon", "swapoff",
        "sethostname", "setdomainname", "acct", "quotactl",
    ),
}  # fmt: skip


def refuse() -> str:
    """Loads the filter for this process and its children; raises OSError, ImportError."""
    try:
        import pyseccomp
    except RuntimeError as error:  # its library is missing
        raise OSError(f"libseccomp cannot be loaded: {error}") from None
    rules, number = refusing(pyseccomp, REFUSED)
    rules.load()
    return f"{number} system calls refused"


def refusing(pyseccomp: Any, refused: Mapping[str, Iterable[str]]) -> tuple[Any, int]:
    """Returns a filter that is not loaded, and how many it refuses: these, and clone with a name space of users."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    names = [name for group in refused.values() for name in group]
    for name in names:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    new_user = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_NEWUSER, _CLONE_NEWUSER)
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", new_user)
    return rules, len(names)
