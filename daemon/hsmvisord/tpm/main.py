"""A TPM's process after the fork: shed what is not its own, give up privileges, then be one module's TPM."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import TPM_MAY_BE_ASKED

from hsmvisord import limits, memory
from hsmvisord.confined import process, sandbox, seccomp
from hsmvisord.confined.link import Link
from hsmvisord.tpm import library
from hsmvisord.tpm.process import TpmProcess

THREADS = 5 + limits.MAX_TSS_CONNECTIONS  #: link, requests, keys, QEMU's two, the TSS'


def preload() -> None:
    """In the launcher: a confined process opens no file.  A host without libtpms says so when a module is to have a TPM."""
    with contextlib.suppress(library.NoLibrary):
        library.callbacks()


def run(spawn: m.Spawn, control: int, key_pipe: int) -> None:
    """Never returns.  The descriptors are the control listener and the key pipe."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the supervisor's to handle
    process.not_before_others()
    process.close_all_but({0, 1, 2, control, key_pipe})
    process.set_title(f"hsmvisord: tpm of {spawn.name}")
    gc.enable()
    threading.stack_size(limits.THREAD_STACK)
    with contextlib.suppress(OSError):  # a kernel before 4.14
        memory.open_size()
    measures = sandbox.enter(spawn.uid, THREADS, seccomp.load_for_tpm)
    link = Link(socket.socket(fileno=control), spawn.supervisor_uid, TPM_MAY_BE_ASKED)
    TpmProcess(spawn, link, key_pipe, measures).start()
    try:
        link.run()
    finally:
        os._exit(1)
