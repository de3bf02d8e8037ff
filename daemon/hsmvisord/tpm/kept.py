"""A TPM's permanent state, and when it is kept: at each change, but for what belongs together, which is kept once."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from hsmvisord.tpm import library
from hsmvisord.tpm.engine import Tpm, TpmFault
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import Code, Response, Tpm2Error

_KINDS = (library.PERMANENT, library.VOLATILE, library.SAVED)


class State(StrEnum):
    """What the guest's machine has made of it."""

    OFF = "off"
    ON = "on"  #: and not started: its firmware has not come so far
    AWAKE = "awake"
    ASLEEP = "asleep"  #: what the hierarchies and the contexts are is what Startup(STATE) expects


class Asleep(Exception):
    """The guest has said that it goes to sleep, or was never started: nothing may be touched until it wakes."""


class Kept:
    """`commit` keeps the permanent state whole, or raises OSError: then what changed it fails."""

    def __init__(self, permanent: bytes, commit: Callable[[bytes], None], followed: Iterable[int] = ()) -> None:
        """`followed`: as Tpm's.  Raises NoLibrary, TpmFault."""
        self.tpm = Tpm(permanent, self._changed, followed)
        self._commit, self._held = commit, False
        self._asked = dict[int, bytes]()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What changes meanwhile is kept at its end, once, or not at all: where it fails, the TPM is as it was, to the last of what
        its guest has loaded.  Raises TpmFault, OSError."""
        before, volatile = self.tpm.permanent, self._volatile()
        self._held = True
        try:
            yield
            self._keep_since(before)
        except BaseException:
            self._return_to(before, volatile)
            raise
        finally:
            self._held = False

    @contextlib.contextmanager
    def aside(self, keep: bool = False) -> Iterator[None]:
        """A start that no guest sees: the TPM is on or off afterwards as it was.  `keep`: what changes there is kept, of one that
        is off, once or not at all; else there is no trace of it.

        Raises Tpm2Error, TpmFault, OSError; Asleep where a guest would not wake any more.
        """
        before, volatile = self.tpm.permanent, self._volatile()
        after = before
        self._held = True
        try:
            self.tpm.switch_on()
            if keep and self._started(tpm2.STATE):
                raise Asleep
            self._say(Code.STARTUP, tpm2.CLEAR)
            yield
            self._say(Code.SHUTDOWN, tpm2.CLEAR)
            if keep:
                self._keep_since(before)
                after = self.tpm.permanent
        finally:
            self._return_to(after, volatile)
            self._held = False

    def forget(self) -> None:
        """What was set for the next start: libtpms lets go of it by a start, of which there is no trace."""
        before = self.tpm.permanent
        self._held = True
        try:
            with contextlib.suppress(TpmFault):
                self.tpm.switch_on()
        finally:
            self._return_to(before, b"")
            self._held = False

    def wakes(self) -> bool:
        """Whether a guest that has said Shutdown(STATE) would go on after that.  Raises TpmFault."""
        before, volatile = self.tpm.permanent, self._volatile()
        self._held = True
        try:
            self.tpm.switch_on()
            return self._started(tpm2.STATE)
        finally:
            self._return_to(before, volatile)
            self._held = False

    def started(self) -> bool:
        """Whether it was, of one that is on.  Raises BadResponse."""
        try:
            Response(
                Code.GET_CAPABILITY,
                self.tpm.process(tpm2.command(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, 0, 1))),
            )
        except Tpm2Error:
            return False
        return True

    def blob(self, kind: int) -> tuple[bool, bytes]:
        """As Tpm.state, and whether it is of another moment than the one before: the kinds that are asked for one after the other,
        the permanent one first and each once, are of one."""
        begins = kind == library.PERMANENT or kind not in self._asked
        if begins:
            self._asked = {one: self.tpm.state(one) for one in _KINDS}
        return begins, self._asked.pop(kind)

    def moved_on(self) -> None:
        """What is asked for from now on is of another moment."""
        self._asked = {}

    def _changed(self, permanent: bytes) -> None:
        if not self._held and permanent != self.tpm.permanent:
            self._commit(permanent)

    def _keep_since(self, before: bytes) -> None:
        if self.tpm.permanent != before:
            self._commit(self.tpm.permanent)

    def _volatile(self) -> bytes:
        """Empty where it is off."""
        return self.tpm.state(library.VOLATILE) if self.tpm.on else b""

    def _return_to(self, permanent: bytes, volatile: bytes) -> None:
        self.tpm.switch_off()
        self.tpm.permanent = permanent
        if volatile:
            self.tpm.set_state(library.VOLATILE, volatile)
            self.tpm.switch_on()

    def _started(self, kind: int) -> bool:
        try:
            self._say(Code.STARTUP, kind)
        except Tpm2Error:
            return False
        return True

    def _say(self, code: Code, kind: int) -> None:
        """At locality 0: a TPM is started by no higher one but 3 (part 3, 9.3)."""
        Response(code, self.tpm.process(tpm2.command(code, (), tpm2.number(kind))))
