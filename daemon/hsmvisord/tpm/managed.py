"""A TPM that its guest uses and its module manages: which keys are wanted there stands outside of it, and is so after each start.

Its permanent state may be an older one (a snapshot that was brought back, a machine that came from another host): what is not
wanted goes before the guest's next command, what is wanted comes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hsmvisord.tpm import library
from hsmvisord.tpm.engine import Tpm, TpmFault
from hsmvisord.tpm.platform import FIRST, LAST, Platform, PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, PLATFORM, BadResponse, Code, Response, Tpm2Error, sized

_FAULTS = (Tpm2Error, BadResponse, TpmFault, OSError)  #: of the TPM, of what keeps its state


@dataclass(frozen=True)
class Wanted:
    """What is to be at a handle.  `decrypt`: it decrypts and agrees, and signs nothing."""

    key: PrivateKey = field(repr=False)
    decrypt: bool = False


class Asleep(Exception):
    """The guest has said that it goes to sleep, or was never started: what is wanted comes when it wakes."""


class ManagedTpm:
    """`commit` keeps the permanent state, or raises OSError; `log` gets what an operator should know.

    `firmware`: the guest has one, which takes the platform hierarchy for itself at each start; without, its guest must not have it,
    so nobody has.
    """

    def __init__(
        self, permanent: bytes, commit: Callable[[bytes], None], log: Callable[[str], None], firmware: bool = True
    ) -> None:
        """Raises NoLibrary, TpmFault."""
        self.tpm = Tpm(permanent, self._keep)
        self._commit, self._log, self._firmware = commit, log, firmware
        self._platform = Platform(self.tpm.process)
        self._lock = threading.RLock()  #: no guest's command comes between two of ours
        self._uncommitted: bytes | None = None
        self._in_transaction = False
        self._awake = self._resumes = False
        self._wanted: dict[int, Wanted] = {}

    def manufacture(self) -> None:
        """Of one without a state: seeds, and a bank of PCRs for SHA-256 alone, as swtpm_setup makes it (kernels complain of banks
        that they cannot extend).  It is off afterwards.  Raises Tpm2Error, TpmFault."""
        with self._lock:
            self.tpm.switch_on()
            for code, handles, parameters, authorization in (
                (Code.STARTUP, (), tpm2.number(tpm2.CLEAR), None),
                (Code.PCR_ALLOCATE, (PLATFORM,), tpm2.banks({tpm2.SHA256}), EMPTY_PASSWORD),
                (Code.SHUTDOWN, (), tpm2.number(tpm2.CLEAR), None),
            ):
                Response(code, self.tpm.process(tpm2.command(code, handles, parameters, authorization)))
            self.tpm.switch_off()

    # ---- the guest ----------------------------------------------------------------------------------------------------

    def process(self, command: bytes, locality: int = 0) -> bytes:
        """Answers a guest's command, whatever it is."""
        with self._lock:
            response = self.tpm.process(command, locality)
            if len(command) == HEAD.size + 2 and HEAD.unpack_from(response)[2] == 0:
                code, kind = HEAD.unpack_from(command)[2], int.from_bytes(command[HEAD.size :], "big")
                if code == Code.STARTUP:
                    self._started(kind)
                elif code == Code.SHUTDOWN and kind == tpm2.STATE:
                    self._awake = False  # what the hierarchy and the contexts are is what Startup(STATE) expects
            return response

    def set_state(self, kind: int, data: bytes) -> None:
        """As Tpm.set_state: of a TPM that goes on here."""
        with self._lock:
            self.tpm.set_state(kind, data)
            self._resumes |= kind == library.VOLATILE

    def switch_on(self) -> None:
        """As Tpm.switch_on.  One that goes on with its volatile state was started by its guest before, elsewhere."""
        with self._lock:
            self.tpm.switch_on()
            self._awake, self._resumes = self._resumes, False
            if self._awake:
                self._told(self._reconcile)

    def switch_off(self) -> None:
        with self._lock:
            self.tpm.switch_off()
            self._awake = False

    def _started(self, kind: int) -> None:
        self._awake = True
        if kind == tpm2.CLEAR:
            self._told(self._claim)
        self._told(self._reconcile)

    def _claim(self) -> None:
        self._platform.claim()
        if not self._firmware:
            code = Code.HIERARCHY_CHANGE_AUTH
            Response(code, self.tpm.process(tpm2.command(code, (PLATFORM,), sized(os.urandom(32)), EMPTY_PASSWORD)))

    def _told(self, act: Callable[[], None]) -> None:
        """What fails here is nobody's question: it is told, and tried again when somebody asks or the TPM starts."""
        try:
            act()
        except _FAULTS as error:
            self._log(f"the keys of the TPM are not as they should be: {error}")

    # ---- the module -------------------------------------------------------------------------------------------------

    def want(self, wanted: dict[int, Wanted]) -> None:
        """Has these keys, and no others, at the platform's handles: now, or when the guest's TPM is started.

        Raises Asleep where that comes later; ValueError for a handle that is not the platform's, KeyError for a curve that TPMs do
        not have, and then nothing has changed; Tpm2Error, BadResponse, TpmFault, and OSError of `commit`: the TPM has what it had,
        as far as it can.
        """
        for handle, one in wanted.items():
            if not FIRST <= handle <= LAST:
                raise ValueError(f"{handle:#x} is no handle of the platform: {FIRST:#x} to {LAST:#x}")
            _name(one)
        with self._lock:
            before, self._wanted = self._wanted, dict(wanted)
            if not self._awake:
                raise Asleep
            try:
                self._reconcile()
            except _FAULTS:
                self._wanted = before
                with contextlib.suppress(*_FAULTS):
                    self._reconcile()
                raise

    def names(self) -> dict[int, bytes]:
        """What is there now, by handle.  Raises Tpm2Error."""
        with self._lock, self._platform.room():
            return self._names()

    def _names(self) -> dict[int, bytes]:
        return {handle: self._platform.name_at(handle) or b"" for handle in self._platform.handles()}

    def _reconcile(self) -> None:
        with self._platform.room(), self._transaction():
            names = self._names()
            for handle in names.keys() - self._wanted.keys():
                self._platform.remove(handle)
            for handle, one in sorted(self._wanted.items()):
                if names.get(handle) != _name(one):
                    self._platform.put(handle, one.key, one.decrypt)

    # ---- state ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """What changes meanwhile is kept at its end, once: whoever is killed before has the state of before.  Where it fails, its
        changes are kept with the next one."""
        self._in_transaction, self._uncommitted = True, None
        try:
            yield
        finally:
            self._in_transaction = False
        if self._uncommitted is not None:
            self._commit(self._uncommitted)

    def _keep(self, permanent: bytes) -> None:
        if self._in_transaction:
            self._uncommitted = permanent
        else:
            self._commit(permanent)


def _name(one: Wanted) -> bytes:
    return tpm2.name_of(tpm2.public_area(one.key.public_key(), Platform.attributes(one.decrypt)))
