"""With which key state is sealed that QEMU asks for, and with which it opens what QEMU brings: the TPM's own, or that of a move."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from hsmvisord import limits
from hsmvisord.tpm.blobs import CAPTURE, BadBlob, Blobs
from hsmvisord.wire.tpm_control import Blob


class Seals:
    """`own`: of this module's TPM on this host, for what a machine keeps of itself (a snapshot).

    A move to another host has a key of its own, which both ends are given: state that QEMU asks for meanwhile is for the other end
    alone, once, and what comes from there is taken once.  What was captured together belongs together: no part of an older one
    comes with a newer one.
    """

    def __init__(
        self, own: Blobs, log: Callable[[str], None] = lambda text: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._own, self._log, self._clock = own, log, clock
        self._lock = threading.Lock()
        self._leaving: Blobs | None = None
        self._left = False  #: a capture for the move under way was asked for
        self._capture = b""  #: under way
        self._coming: Blobs | None = None
        self._opened = b""  #: the capture that was brought
        self._until = 0.0

    def move(self, leaves: bool, ident: bytes, key: bytes) -> None:
        """The machine is about to leave, or to come; an empty key: it is not, after all.  It has limits.TPM_MOVE_SECONDS."""
        blobs = Blobs(key, ident) if key else None
        with self._lock:
            if leaves:
                self._leaving, self._left, self._capture = blobs, False, b""
            else:
                self._coming, self._opened = blobs, b""
            self._until = self._clock() + limits.TPM_MOVE_SECONDS

    def seal(self, kind: int, begins: bool, data: bytes) -> bytes:
        """`begins`: it is of another moment than the state before, which is another capture."""
        with self._lock:
            self._expire()
            if begins or not self._capture:
                self._capture = os.urandom(CAPTURE)
                if self._left and self._leaving is not None:  # the machine has gone on since: the first one is an older one
                    self._leaving = None
                    self._log("its state was captured for the move before: another attempt needs another hsmvisor module move-tpm")
                self._left = self._leaving is not None
            return (self._leaving or self._own).seal(kind, self._capture, data)

    def open(self, kind: int, sealed: bytes) -> bytes:
        """The permanent state comes first, as QEMU brings it.  Raises BadBlob."""
        with self._lock:
            self._expire()
            capture, data = (self._coming or self._own).open(kind, sealed)
            if kind == Blob.PERMANENT:
                self._opened = capture
            elif capture != self._opened:
                raise BadBlob("it is of another moment than the permanent state")
            return data

    def arrived(self) -> None:
        """The TPM goes on with what was brought: of a move the same comes no second time."""
        with self._lock:
            if self._opened:
                self._coming, self._opened = None, b""

    def departed(self) -> None:
        """QEMU has ended here."""
        with self._lock:
            self._leaving, self._capture, self._opened = None, b"", b""

    def _expire(self) -> None:
        if self._clock() > self._until:
            self._leaving = self._coming = None


__all__ = ["BadBlob", "Seals"]
