"""What the module says to its TPM: at a locality that no guest has, and by a policy which demands it; and room for that among what
the guest has loaded, which stays where it was."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, Authorization, Code, Response, Tpm2Error, sized

LOCALITY = 200  #: the module's own (part 1, 11.4.7: extended localities are 32 to 255); QEMU is refused any above 4
SLOTS = 3  #: of loaded objects, and of loaded sessions (libtpms' MAX_LOADED_OBJECTS, MAX_LOADED_SESSIONS)
_LISTED = 254  #: handles of one answer (part 2, 6.13: MAX_CAP_HANDLES)
_HOARDED = (0x901, 0x905)  #: TPM_RC_CONTEXT_GAP, TPM_RC_SESSION_HANDLES

_ANY = 0xFFFFFF

#: Carries out a command at a locality; nobody else's comes between two of them while the module is at work.
Process = Callable[[bytes, int], bytes]


@dataclass(frozen=True)
class _Saved:
    """A guest's object or session that had to make room."""

    handle: int
    context: bytes


class Commands:
    """Each raises Tpm2Error, BadResponse."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._apart = set[int]()  #: sessions that are saved meanwhile, by what of a handle is the same of a saved one

    def do(
        self, code: Code, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
    ) -> Response:
        return Response(code, self._process(tpm2.command(code, handles, parameters, authorization), LOCALITY))

    def by_policy(self, code: Code, handles: tuple[int, ...], parameters: bytes = b"") -> Response:
        """With the authorization of a hierarchy that is the first handle."""
        with self._authorized() as authorization:
            return self.do(code, handles, parameters, authorization)

    def claim(self, hierarchy: int) -> None:
        """Has it obey the module, as long as its authorization is empty: later nobody's password keeps the module out."""
        policy = sized(tpm2.locality_policy(LOCALITY)) + struct.pack(">H", tpm2.SHA256)
        self.do(Code.SET_PRIMARY_POLICY, (hierarchy,), policy, EMPTY_PASSWORD)

    @contextlib.contextmanager
    def primary(self, hierarchy: int, template: bytes, password: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """A primary key, loaded meanwhile: its handle and its TPMT_PUBLIC.  By policy, but for those of the endorsement
        hierarchy, which has none of ours."""
        parameters = sized(sized(password) + sized(b"")) + sized(template) + sized(b"") + struct.pack(">I", 0)
        if hierarchy == tpm2.ENDORSEMENT:
            answer = self.do(Code.CREATE_PRIMARY, (hierarchy,), parameters, EMPTY_PASSWORD)
        else:
            answer = self.by_policy(Code.CREATE_PRIMARY, (hierarchy,), parameters)
        handle = answer.number()
        try:
            answer.parameters()
            yield handle, answer.sized()
        finally:
            self.flush(handle)

    def handles(self, first: int, last: int) -> list[int]:
        """Those that are there, ascending."""
        found: list[int] = []
        while True:
            answer = self.do(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, first, _LISTED))
            more = answer.number(1)
            answer.number()
            listed = [answer.number() for _ in range(answer.number())]
            found += [handle for handle in listed if handle <= last]
            if not more or not listed or listed[-1] >= last:
                return found
            first = listed[-1] + 1

    def flush(self, handle: int) -> None:
        self.do(Code.FLUSH_CONTEXT, (), struct.pack(">I", handle))

    @contextlib.contextmanager
    def _authorized(self) -> Iterator[Authorization]:
        """A session that fulfils the policy, for one command: the TPM ends it with a command that succeeds."""
        parameters = sized(os.urandom(16)) + sized(b"") + struct.pack(">BHH", tpm2.POLICY_SESSION, tpm2.NULL_ALGORITHM, tpm2.SHA256)
        session = self._sparing(Code.START_AUTH_SESSION, (tpm2.NULL, tpm2.NULL), parameters).number()
        try:
            self.do(Code.POLICY_LOCALITY, (session,), bytes([LOCALITY]))
            yield Authorization(session)
        except BaseException:
            self.flush(session)
            raise

    def _sparing(self, code: Code, handles: tuple[int, ...], parameters: bytes = b"") -> Response:
        """A guest that has as many sessions as there can be loses those that it has saved: else it could keep its keys from being
        taken away."""
        try:
            return self.do(code, handles, parameters)
        except Tpm2Error as error:
            if error.code not in _HOARDED:
                raise
            for saved in self.handles(tpm2.SAVED_SESSION, tpm2.SAVED_SESSION | _ANY):
                if saved & _ANY not in self._apart:
                    self.flush(saved)
            return self.do(code, handles, parameters)

    # ---- room -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Two objects and a session of ours fit in (a persistent key that is used is one); the guest's own are at their handles
        afterwards."""
        objects = self.handles(tpm2.TRANSIENT, tpm2.TRANSIENT | _ANY)
        sessions = self.handles(tpm2.LOADED_SESSION, tpm2.SAVED_SESSION | _ANY)  # those of policies have the other's first byte
        saved = [self._save(handle, flush=True) for handle in objects] if len(objects) > SLOTS - 2 else []
        apart = [self._save(handle, flush=False) for handle in sessions[:1]] if len(sessions) == SLOTS else []
        self._apart = {one.handle & _ANY for one in apart}
        try:
            yield
        finally:
            self._apart = set()
            for one in apart:
                self.do(Code.CONTEXT_LOAD, (), one.context)
            if saved:
                self._restore(saved)

    def _save(self, handle: int, flush: bool) -> _Saved:
        """A session that is saved is not loaded any more; an object is."""
        context = self._sparing(Code.CONTEXT_SAVE, (handle,)).rest()
        if flush:
            self.flush(handle)
        return _Saved(handle, context)

    def _restore(self, saved: list[_Saved]) -> None:
        """Objects come to the lowest free handle; where the guest had none before, something stands for it meanwhile."""
        fillers = []
        for one in saved:  # ascending
            while (handle := self.do(Code.CONTEXT_LOAD, (), one.context).number()) != one.handle:
                fillers.append(handle)
        for handle in fillers:
            self.flush(handle)
