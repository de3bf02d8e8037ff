"""A TPM that its guest uses and its module manages: which keys are wanted there stands outside of it, and is so after each start.

Its permanent state may be an older one (a snapshot that was brought back, a machine that came from another host): what is not
wanted goes before the guest's next command, what is wanted comes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

from hsmvisord import limits
from hsmvisord.tpm import endorsement, guard, library, quote, wanted
from hsmvisord.tpm.certificates import Certificates
from hsmvisord.tpm.commands import Commands
from hsmvisord.tpm.endorsement import Identity
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.kept import Asleep, Kept, State
from hsmvisord.tpm.plain import Left
from hsmvisord.tpm.platform import Platform
from hsmvisord.tpm.quote import Quoted
from hsmvisord.tpm.wanted import NotPlaced, Wanted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, LOCKOUT, OWNER, PLATFORM, BadResponse, Code, Tpm2Error, sized

__all__ = ["Asleep", "ManagedTpm", "NotPlaced", "Quoted", "State", "Wanted"]

_FROZEN = "a successor has this TPM"
#: After these we have something to do.
_FOLLOWED = frozenset({Code.STARTUP, Code.SHUTDOWN, Code.CLEAR, Code.CHANGE_EPS, Code.HIERARCHY_CONTROL})
_FAULTS = (Tpm2Error, BadResponse, TpmFault, OSError)  #: of the TPM, of what keeps its state


class ManagedTpm:
    """`commit` keeps the permanent state, or raises OSError; `log` gets what an operator should know.

    `firmware`: the guest has one, which takes the platform hierarchy for itself at each start; without, its guest must not have it,
    so nobody has.  What must be gone and does not go is barred: no guest's command reaches it.  Every method raises TpmFault after
    `freeze`.
    """

    def __init__(
        self, permanent: bytes, commit: Callable[[bytes], None], log: Callable[[str], None], firmware: bool = True
    ) -> None:
        """Raises NoLibrary, TpmFault."""
        self._kept = Kept(permanent, commit, _FOLLOWED)
        self.tpm, self._log, self._firmware = self._kept.tpm, log, firmware
        self._closed = not firmware  #: nobody gets the platform hierarchy
        self._commands = Commands(self.tpm.process)
        self._platform, self._certificates = Platform(self._commands), Certificates(self._commands)
        self._lock = threading.RLock()
        self.state = State.OFF
        self._brought = set[int]()  #: kinds of state that it goes on with when it is switched on
        self._wanted: dict[int, Wanted] | None = None  #: not told yet: what is there stays
        self._impossible = dict[int, str]()  #: by handle, why what was wanted there as well is not among it
        self._late = False  #: and not looked after yet, for the guest's sleep
        self._barred: Container[int] = ()  #: handles of keys that should be gone
        self._identity: Identity | None = None
        self._frozen = False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else's command comes meanwhile, and nothing of ours."""
        with self.tpm.held_off():
            self._lock.acquire()
        try:
            if self._frozen:
                raise TpmFault(_FROZEN)
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Beside the guest; one transaction.  Raises Asleep."""
        with self.turn():
            if self.state is not State.AWAKE:
                raise Asleep
            with self._kept.transaction(), self._commands.room():
                yield

    @contextlib.contextmanager
    def _aside(self, keep: bool = False) -> Iterator[None]:
        """As Kept.aside, and the platform is ours there."""
        with self.turn():
            if self._brought:
                raise Asleep  # a machine has yet to go on with it
            with self._kept.aside(keep):
                self._commands.claim(PLATFORM)
                yield

    # ---- the guest ----------------------------------------------------------------------------------------------------

    def process(self, command: bytes, locality: int = 0) -> bytes:
        """Answers a guest's command, whatever it is."""
        with self._lock:
            if self._frozen:
                raise TpmFault(_FROZEN)
            if refused := guard.refusal(command):
                return guard.response(refused)
            if self._late and self.state is State.ASLEEP and guard.uses(command, guard.Handles()):
                self.state = State.AWAKE  # it only said that it would sleep
                self._told()
            if guard.uses(command, self._barred):
                return guard.response(guard.RC_HANDLE)
            before = self.tpm.permanent
            response = self.tpm.process(command, locality)
            if self.state is State.ASLEEP and self.tpm.permanent != before and not self._kept.wakes():
                self.state = State.AWAKE  # what it had saved for its sleep is gone
            code = int.from_bytes(command[6 : HEAD.size], "big")
            if code in _FOLLOWED and HEAD.unpack_from(response)[2] == 0:
                self._follow(code, int.from_bytes(command[-2:], "big"))
            if self._late and self.state is State.AWAKE:
                self._told()
            return response

    def process_plain(self, sock: socket.socket, page: mmap.mmap, locality: Callable[[], int]) -> Left:
        """As Plain.serve, of commands that `process` would do nothing about: plain.c knows what guard.refusal and _FOLLOWED are;
        Left() where there is more to do.  `locality`: what it is while nobody else has a turn."""
        with self._lock:
            if self._frozen or self._late or self._barred != () or self.state is not State.AWAKE:
                return Left()
            return self.tpm.process_plain(sock, page, locality())

    def _follow(self, code: int, kind: int) -> None:
        """After a command that went well; `kind`: its last parameter, of one that starts or ends."""
        if code == Code.STARTUP:
            self.state = State.AWAKE
            self._told(*[self._claim] if kind == tpm2.CLEAR else [])
        elif code == Code.SHUTDOWN and kind == tpm2.STATE:
            self.state = State.ASLEEP
        elif code == Code.CLEAR:
            self._told(lambda: self._commands.claim(OWNER))
        elif code == Code.CHANGE_EPS:
            self._identity = None
        elif code == Code.HIERARCHY_CONTROL:  # what was in it could not be taken away while it was off
            self._told()

    def _claim(self) -> None:
        """The platform's hierarchy, whose authorization is empty now.  Raises Tpm2Error where somebody was quicker."""
        self._commands.claim(PLATFORM)
        if self._closed:
            self._commands.do(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(os.urandom(32)), EMPTY_PASSWORD)

    def _told(self, *before: Callable[[], None]) -> None:
        """Does that, and has what is wanted.  What fails here is nobody's question: it is told, and tried again when somebody asks
        or the TPM starts."""
        for act in (*before, self._reconcile):
            try:
                act()
            except Asleep:
                self._late = True
            except _FAULTS as error:
                self._log(f"the keys of the TPM are not as they should be: {error}")

    # ---- its machine --------------------------------------------------------------------------------------------------

    def set_state(self, kind: int, data: bytes) -> None:
        """As Tpm.set_state: of a TPM that goes on here.  Raises TpmFault also before `want`: what was in it elsewhere may not be
        wanted any more."""
        with self.turn():
            if not self.told:
                raise TpmFault("which keys are wanted is not known yet")
            self.tpm.set_state(kind, data)
            self._brought.add(kind)

    def forget_brought(self) -> None:
        """The machine that brought a state does not start with it, after all.  Of one that is off.  Raises TpmFault."""
        with self.turn():
            if self._brought:
                self._kept.forget()
                self._brought.clear()

    def blob(self, kind: int) -> tuple[bool, bytes]:
        """As Kept.blob."""
        with self.turn():
            return self._kept.blob(kind)

    def switch_on(self, machine: bool = True) -> None:
        """As Tpm.switch_on.  One that goes on with its volatile state was started by its guest before, elsewhere.

        `machine`: it is one's; without, there is no firmware either.
        """
        with self.turn():
            self._kept.moved_on()
            self.tpm.switch_on()
            self._closed = not (machine and self._firmware)
            brought, self._brought = self._brought, set()
            if brought:
                self._identity = None
            self.state = self._found() if library.VOLATILE in brought else State.ON
            if brought:
                self._told()

    def switch_off(self) -> None:
        with self.turn():
            self._kept.moved_on()
            self.tpm.switch_off()
            self.state = State.OFF

    def freeze(self) -> tuple[bytes, bool, bool]:
        """Returns the volatile state, empty where it is off, whether it is awake, and whether keys are barred: with these and the
        permanent state that was kept last, a successor goes on where this one stops.  Raises TpmFault, also between a state that
        was brought and its machine's start: no successor would have it."""
        with self.turn():
            if self._brought:
                raise TpmFault("a machine has yet to go on with the state that it brought")
            volatile = self.tpm.state(library.VOLATILE) if self.tpm.on else b""
            self._frozen = True
            return volatile, self.state is State.AWAKE, self._barred != ()

    def resume(self, volatile: bytes, awake: bool, barred: bool = False) -> None:
        """What `freeze` returned, for one that is off.  Raises TpmFault."""
        with self.turn():
            self._barred = guard.Handles() if barred else ()  # which of them is known with what is wanted
            if volatile:
                self.tpm.set_state(library.VOLATILE, volatile)
                self.tpm.switch_on()
                self.state = State.AWAKE if awake else self._found()

    def _found(self) -> State:
        """Of one that goes on here."""
        if not self._kept.started():
            return State.ON
        return State.ASLEEP if self._kept.wakes() else State.AWAKE

    # ---- the module's keys ------------------------------------------------------------------------------------------

    @property
    def told(self) -> bool:
        """`want` was called."""
        return self._wanted is not None

    def want(self, keys: dict[int, Wanted]) -> None:
        """Has these keys with their certificates, and no others of the module's: now, or when the guest's TPM is started.

        Raises Asleep where that comes later; NotPlaced for keys and certificates that no TPM can have, for what the guest's owner
        does not let come, or a certificate for which there is no room, and all else is as wanted, or comes later; Tpm2Error,
        BadResponse, TpmFault, and OSError of `commit`: of what was there only what is wanted or may stay (Wanted.earlier) can be
        used.
        """
        found, impossible = wanted.possible(keys)
        with self.turn():
            self._wanted, self._impossible = found, impossible
            if self.state is State.AWAKE:
                self._reconcile()
                return
            self._late = True
            if impossible:
                raise NotPlaced(impossible)
            raise Asleep

    def names(self) -> dict[int, bytes]:
        """The module's keys that are there now, by handle.  Raises Asleep, Tpm2Error, BadResponse."""
        with self._at_work():
            return self._platform.names()

    def _reconcile(self) -> None:
        """Where what is wanted does not come, what may not stay goes all the same.  Raises as `want`."""
        if self._wanted is None:
            return
        try:
            with self._at_work():
                self._late = False
                failures = wanted.place(self._platform, self._certificates, self._wanted)
        except _FAULTS:
            self._withdraw(self._wanted)
            raise
        self._barred = ()
        if failures := self._impossible | failures:
            raise NotPlaced(failures)

    def _withdraw(self, but: dict[int, Wanted]) -> None:
        """Takes away what may not stay: neither a guest that leaves no room in its TPM keeps a key by that, nor a full disk."""
        try:
            with self._at_work():
                wanted.withdraw(self._platform, self._certificates, but)
            self._barred = ()
        except _FAULTS as error:
            self._barred = self._unwanted(but)
            if self._barred:
                self._log(f"keys that should be gone are barred, for they could not be taken away: {error}")

    def _unwanted(self, but: dict[int, Wanted]) -> Container[int]:
        """All that there could be, where the TPM does not tell."""
        try:
            with self._commands.room():
                return wanted.unwanted(self._platform.names(), but) or ()
        except _FAULTS:
            return guard.Handles()

    # ---- who it is ----------------------------------------------------------------------------------------------------

    def manufacture(self) -> None:
        """Of one without a state: seeds, and a bank of PCRs for SHA-256 alone, as swtpm_setup makes it (kernels complain of banks
        that they cannot extend); the owner's hierarchy obeys the module too; power cuts do not lock a guest out.  It is off
        afterwards, and `commit` was called once.  Raises Tpm2Error, TpmFault, OSError."""
        with self._aside(keep=True):
            lockout = struct.pack(">III", *limits.TPM_LOCKOUT)
            self._commands.do(Code.DICTIONARY_ATTACK_PARAMETERS, (LOCKOUT,), lockout, EMPTY_PASSWORD)
            self._commands.do(Code.PCR_ALLOCATE, (PLATFORM,), tpm2.banks({tpm2.SHA256}), EMPTY_PASSWORD)
            self._commands.claim(OWNER)

    def endorsement_keys(self) -> tuple[bytes, bytes]:
        """SubjectPublicKeyInfo, DER: RSA-2048, P-256.  Whatever the TPM is at, and without a trace in it; others after a state was
        brought from elsewhere.  Raises Tpm2Error, BadResponse, TpmFault; Asleep between such a state and its machine's start."""
        known = self._known()
        return known.rsa, known.p256

    def attestation_key(self) -> bytes:
        """As endorsement_keys; P-256."""
        return self._known().attestation

    def certificates(self) -> tuple[bytes, ...]:
        """As endorsement_keys; DER, of these keys and of the platform, or none where they are not all there."""
        return self._known().certificates

    def _known(self) -> Identity:
        with self.turn():
            if self._identity is None:
                with self._aside():
                    found = endorsement.identity(self._commands, self._certificates)
                self._identity = found
            return self._identity

    def certify(self, rsa: bytes, p256: bytes, platform: bytes) -> None:
        """Has these certificates (DER) of the endorsement keys, and of the platform, where guests look for them.

        Of a TPM that is off or awake; else raises Asleep.  Raises ValueError, and nothing has changed; Tpm2Error, BadResponse,
        TpmFault, and OSError of `commit`, which is called once at most.
        """
        with self.turn():
            known = self._known()
            endorsement.check(known, rsa, p256, platform)
            with self._at_work() if self.tpm.on else self._aside(keep=True):
                endorsement.put(self._certificates, rsa, p256, platform)
            self._identity = replace(known, certificates=(rsa, p256, platform))

    def quote(self, nonce: bytes, pcrs: tuple[int, ...]) -> Quoted:
        """What these PCRs are in the SHA-256 bank, signed with the attestation key.  Raises ValueError, Asleep, Tpm2Error,
        BadResponse, TpmFault."""
        quote.check(nonce, pcrs)
        with self._at_work():
            return quote.quote(self._commands, nonce, pcrs)
