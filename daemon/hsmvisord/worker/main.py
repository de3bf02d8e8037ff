"""A worker's life after the fork: shed what is not its own, give up privileges, then serve one module."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading

from hsmvisor_rpc.internal import messages as m

from hsmvisord import limits, memory
from hsmvisord.confined import process, sandbox
from hsmvisord.confined.link import Link
from hsmvisord.worker.module import Module


def run(spawn: m.Spawn, control: int, guest: int, key_pipe: int) -> None:
    """Never returns.  The descriptors are the control listener, the guest listener and the key pipe."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the supervisor's to handle
    process.not_before_others()
    process.close_all_but({0, 1, 2, control, guest, key_pipe})
    process.set_title(f"hsmvisord: {spawn.name}")
    gc.enable()
    threading.stack_size(limits.THREAD_STACK)
    with contextlib.suppress(OSError):  # a kernel before 4.14
        memory.open_size()
    measures = sandbox.enter(spawn.uid)
    link = Link(socket.socket(fileno=control), spawn.supervisor_uid)
    Module(spawn, link, socket.socket(fileno=guest), key_pipe, measures).start()
    try:
        link.run()
    finally:
        os._exit(1)
