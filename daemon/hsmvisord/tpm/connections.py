"""Who is connected with the TPM: one QEMU, by a control connection and the one for commands that it brings; and the TSS, by one
connection for each question."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record

from hsmvisord import limits, memory
from hsmvisord.tpm.engine import RC_FAILURE, failure
from hsmvisord.tpm.server import Server, shut
from hsmvisord.tpm.stream import Busy

Announce = Callable[[Record, list[int]], None]


class Connections:
    """`announce` tells the supervisor of QEMU's connections, which a successor of this process needs, and of their end."""

    def __init__(self, server: Server, announce: Announce) -> None:
        self._server, self._announce = server, announce
        self._lock = threading.Lock()
        self._plug = 0
        self._control: socket.socket | None = None
        self._commands: socket.socket | None = None
        self._busy = Busy()
        self._tss: set[socket.socket] = set()

    @property
    def plug(self) -> int:
        """Of the QEMU that there is; 0: none."""
        with self._lock:
            return self._plug

    def plug_in(self, plug: int, busy: Busy, control: socket.socket, commands: socket.socket | None = None) -> None:
        """Serves QEMU in the background, in the place of one before.  Raises OSError.

        `commands`: what it has brought to a process before this, which may have died over one that it had taken.
        """
        self.unplug()
        with self._lock:
            self._busy.release()
            self._plug, self._busy, self._control = plug, busy, control
        if commands is not None:
            if busy.is_so:
                busy.answer(commands, failure(RC_FAILURE), False)
            self._brought(plug, commands)
        memory.start_thread("tpm control", partial(self._serve, plug, control))

    def _serve(self, plug: int, control: socket.socket) -> None:
        why = self._server.serve_control(control, take=partial(self._brought, plug))
        with self._lock:
            if self._plug != plug or control.fileno() >= 0:  # another one's turn, or a successor's
                return
            commands, self._plug, self._control, self._commands = self._commands, 0, None, None
        shut(commands)
        self._server.machine_gone()
        self._announce(m.TpmGone(plug, why or "it closed the connection"), [])

    def _brought(self, plug: int, commands: socket.socket) -> None:
        with self._lock:
            if self._plug != plug or self._control is None:
                commands.close()
                return
            before, self._commands = self._commands, commands
            self._busy.forget()  # what the one before has taken is nobody's any more
            self._server.start_commands(commands, self._busy)
            self._announce_them()
        shut(before)

    def tell(self) -> None:
        """Announces QEMU's connections, if there are any."""
        with self._lock:
            if self._control is not None:
                self._announce_them()

    def _announce_them(self) -> None:
        busy = [self._busy.descriptor] if self._busy.descriptor >= 0 else []
        kept = busy + self._descriptors()
        self._announce(m.TpmPlugged(self._plug, len(kept), bool(busy)), kept)

    def _descriptors(self) -> list[int]:
        """Without one that was closed for what its peer said."""
        kept = [sock.fileno() for sock in (self._control, self._commands) if sock is not None]
        return [descriptor for descriptor in kept if descriptor >= 0]

    def serve_tss(self, kind: str, sock: socket.socket) -> None:
        """One question or command of the TSS after the other, in the background; one connection too many is closed."""
        serve = self._server.serve_commands if kind == m.TSS_COMMANDS else partial(self._server.serve_control, padded=False)
        with self._lock:
            if len(self._tss) >= limits.MAX_TSS_CONNECTIONS:
                sock.close()
                return
            self._tss.add(sock)

        def run() -> None:
            serve(sock)
            with self._lock:
                self._tss.discard(sock)

        memory.start_thread("tss", run)

    def unplug(self) -> None:
        """All that are connected are not any more."""
        with self._lock:
            ended = [self._control, self._commands, *self._tss]
            self._plug, self._control, self._commands = 0, None, None
        for sock in ended:
            shut(sock)

    def hand_over(self) -> tuple[int, list[int]]:
        """Returns the plug, and the descriptors of QEMU's connections, once the server has left; they stay open."""
        with self._lock:
            return (0, []) if self._control is None else (self._plug, self._descriptors())
