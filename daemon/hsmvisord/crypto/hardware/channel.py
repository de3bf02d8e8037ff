"""The socket to the module's helper: one question at a time, from any thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TypeVar

from hsmvisor_rpc.internal import hsm
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

from hsmvisord import ck, limits
from hsmvisord.ck import CkError

R = TypeVar("R", bound=Record)


class Away(CkError):
    """Nobody answers: of what was asked nothing is known."""

    def __init__(self, detail: str) -> None:
        super().__init__(ck.CKR_DEVICE_ERROR, detail)


class Channel:
    """`connect` gives it the socket of a helper, and of each one that takes its place."""

    def __init__(self) -> None:
        self._one = threading.Lock()  #: a question is under way
        self._changed = threading.Condition()
        self._sock: socket.socket | None = None
        self._connected = 0  #: how often
        self.token = ""
        self.mechanisms: frozenset[int] = frozenset()

    def connect(self, sock: socket.socket) -> None:
        """Takes the socket over.  Raises Away when there is no helper at its other end."""
        sock.settimeout(limits.HSM_SECONDS)
        try:
            welcome = hsm.receive(sock, hsm.ANSWERS)
        except (OSError, MalformedRecord):
            welcome = None
        if not isinstance(welcome, hsm.Welcome):
            sock.close()
            raise Away("the helper that speaks with the hardware does not answer")
        with self._changed:
            old, self._sock = self._sock, sock
            self._connected += 1
            self.token, self.mechanisms = welcome.token, frozenset(welcome.mechanisms)
            self._changed.notify_all()
        if old is not None:
            with contextlib.suppress(OSError):
                old.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._changed:
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    def ask(self, question: Record, expected: type[R]) -> R:
        """Asks again, once, when the helper ended meanwhile and another one comes soon.  Raises CkError."""
        with self._one:
            sock, connected = self._current(0)
            answer = self._exchange(sock, question)
            if answer is None:
                sock, _ = self._current(connected)
                answer = self._exchange(sock, question)
        if isinstance(answer, hsm.Failed):
            raise CkError(answer.rv, answer.detail)
        if not isinstance(answer, expected):
            raise Away("the hardware does not answer")
        return answer

    def _current(self, after: int) -> tuple[socket.socket, int]:
        """Returns the socket, of a later connection than `after`, waiting a moment for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._sock is not None and self._connected > after, limits.HSM_WAIT)
            if self._sock is None or self._connected <= after:
                raise Away("the hardware is away")
            return self._sock, self._connected

    def _exchange(self, sock: socket.socket, question: Record) -> Record | None:
        """Returns the answer, None when there is nobody (any more) to give it."""
        try:
            hsm.send(sock, question)
            answer = hsm.receive(sock, hsm.ANSWERS)
        except (OSError, MalformedRecord):
            answer = None
        if answer is None:  # an answer that comes late would be taken for that to the next question
            with self._changed:
                if self._sock is sock:
                    self._sock = None
            sock.close()
        return answer
