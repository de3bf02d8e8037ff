"""The module's keys in its guest's TPM: put in, swapped and taken away while the guest uses it.

The module has the platform hierarchy by a policy that no guest can fulfil: a locality that is the module's alone.  A key is an
object that the guest may use, and can neither take away, re-authorise, duplicate nor bring back: its parent is made anew each time
from a secret, and forgotten.  What is loaded of the guest's own stays where it was.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Attributes, Authorization, Code, Response, Tpm2Error, sized

LOCALITY = 200  #: the module's own (part 1, 11.4.7: extended localities are 32 to 255); QEMU is refused any above 4
FIRST, LAST = 0x81800000, 0x81FFFFFF  #: persistent handles of the platform
SLOTS = 3  #: of loaded objects, and of loaded sessions (libtpms' MAX_LOADED_OBJECTS, MAX_LOADED_SESSIONS)
_NO_HANDLE = 0x18B  #: TPM_RC_HANDLE of the first handle: nothing is there

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

#: Carries out a command at a locality; nobody else's comes between two of them while the platform is at work.
Process = Callable[[bytes, int], bytes]


@dataclass(frozen=True)
class _Saved:
    """A guest's object or session that had to make room."""

    handle: int
    context: bytes


class Platform:
    def __init__(self, process: Process) -> None:
        self._process = process

    # ---- the hierarchy ------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """After each Startup(CLEAR), before the guest's next command: then the hierarchy's authorization is empty.  Raises
        Tpm2Error where somebody was quicker."""
        policy = sized(tpm2.locality_policy(LOCALITY)) + struct.pack(">H", tpm2.SHA256)
        self._do(Code.SET_PRIMARY_POLICY, (PLATFORM,), policy, EMPTY_PASSWORD)

    # ---- keys; all within `room` ----------------------------------------------------------------------------------------

    @staticmethod
    def attributes(decrypt: bool) -> Attributes:
        """Of a key: with ADMIN_WITH_POLICY and no policy nobody may change its authorization."""
        use = Attributes.DECRYPT if decrypt else Attributes.SIGN
        return Attributes.USER_WITH_AUTH | Attributes.ADMIN_WITH_POLICY | Attributes.NO_DA | use

    def put(self, handle: int, key: PrivateKey, decrypt: bool = False) -> bytes:
        """Has `key` at `handle`, in the place of whatever is there; returns its Name.

        `decrypt`: it decrypts and agrees, and signs nothing.  Raises Tpm2Error, KeyError for a curve that TPMs do not have; then an
        earlier key may be gone, so the caller commits the permanent state when all went well, and not before.
        """
        public = tpm2.public_area(key.public_key(), self.attributes(decrypt))
        loaded = self._load(public, tpm2.sensitive_area(key))
        try:
            self.remove(handle)
            self._evict(loaded, handle)
        finally:
            self._flush(loaded)
        return tpm2.name_of(public)

    def remove(self, handle: int) -> bool:
        """Returns whether there was something."""
        if self.name_at(handle) is None:
            return False
        self._evict(handle, handle)
        return True

    def name_at(self, handle: int) -> bytes | None:
        """The Name of what is at a persistent handle."""
        try:
            answer = self._do(Code.READ_PUBLIC, (handle,))
        except Tpm2Error as error:
            if error.code == _NO_HANDLE:
                return None
            raise
        answer.sized()
        return answer.sized()

    def handles(self) -> list[int]:
        """The persistent handles of the platform."""
        return [handle for handle in self._handles(FIRST) if handle <= LAST]

    def _load(self, public: bytes, sensitive: bytes) -> int:
        parent, password = self._make_parent()
        try:
            authorization = Authorization(password=password)
            duplicate = sized(b"") + sized(public) + sized(sensitive) + sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM)
            answer = self._do(Code.IMPORT, (parent,), duplicate, authorization)
            answer.parameters()
            private = answer.sized()
            return self._do(Code.LOAD, (parent,), sized(private) + sized(public), authorization).number()
        finally:
            self._flush(parent)

    def _make_parent(self) -> tuple[int, bytes]:
        password = os.urandom(32)
        sensitive = sized(sized(password) + sized(b""))
        parameters = sensitive + sized(tpm2.parent_template(os.urandom(32))) + sized(b"") + struct.pack(">I", 0)
        with self._authorized() as authorization:
            answer = self._do(Code.CREATE_PRIMARY, (PLATFORM,), parameters, authorization)
        return answer.number(), password

    def _evict(self, handle: int, persistent: int) -> None:
        with self._authorized() as authorization:
            self._do(Code.EVICT_CONTROL, (PLATFORM, handle), struct.pack(">I", persistent), authorization)

    @contextlib.contextmanager
    def _authorized(self) -> Iterator[Authorization]:
        """A session that the platform's policy lets pass, for one command: the TPM ends it with a command that succeeds."""
        parameters = sized(os.urandom(16)) + sized(b"") + struct.pack(">BHH", tpm2.POLICY_SESSION, tpm2.NULL_ALGORITHM, tpm2.SHA256)
        session = self._do(Code.START_AUTH_SESSION, (tpm2.NULL, tpm2.NULL), parameters).number()
        try:
            self._do(Code.POLICY_LOCALITY, (session,), bytes([LOCALITY]))
            yield Authorization(session)
        except BaseException:
            self._flush(session)
            raise

    # ---- room -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Two objects and a session of ours fit in (a persistent key that is used is one); the guest's own are at their handles
        afterwards."""
        objects, sessions = self._handles(tpm2.TRANSIENT), self._handles(tpm2.LOADED_SESSION)
        saved = [self._save(handle, flush=True) for handle in objects] if len(objects) > SLOTS - 2 else []
        apart = [self._save(handle, flush=False) for handle in sessions[:1]] if len(sessions) == SLOTS else []
        try:
            yield
        finally:
            for one in apart:
                self._do(Code.CONTEXT_LOAD, (), one.context)
            if saved:
                self._restore(saved)

    def _save(self, handle: int, flush: bool) -> _Saved:
        """A session that is saved is not loaded any more; an object is."""
        context = self._do(Code.CONTEXT_SAVE, (handle,)).rest()
        if flush:
            self._flush(handle)
        return _Saved(handle, context)

    def _restore(self, saved: list[_Saved]) -> None:
        """Objects come to the lowest free handle; where the guest had none before, something stands for it meanwhile."""
        fillers = []
        for one in saved:  # ascending
            while (handle := self._do(Code.CONTEXT_LOAD, (), one.context).number()) != one.handle:
                fillers.append(handle)
        for handle in fillers:
            self._flush(handle)

    # ---- commands -------------------------------------------------------------------------------------------------------

    def _handles(self, first: int) -> list[int]:
        """Those of one kind that are there, from `first` on, ascending."""
        answer = self._do(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, first, 254))
        answer.number(1)
        answer.number()
        return [answer.number() for _ in range(answer.number())]

    def _flush(self, handle: int) -> None:
        self._do(Code.FLUSH_CONTEXT, (), struct.pack(">I", handle))

    def _do(
        self, code: Code, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
    ) -> Response:
        return Response(code, self._process(tpm2.command(code, handles, parameters, authorization), LOCALITY))
