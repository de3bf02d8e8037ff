"""One TPM 2.0 (TCG, Trusted Platform Module Library, family 2.0): libtpms, its state, and when it may be asked.

It is off at the beginning, as hardware is; `switch_on` is what _TPM_Init is there.  Its permanent state goes to whoever keeps it at
each change, whole, before the command that changed it is answered.
"""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from hsmvisord import limits
from hsmvisord.tpm import library
from hsmvisord.tpm.library import TpmFault, ffi
from hsmvisord.tpm.plain import Left, Plain
from hsmvisord.wire.tpm2 import HEAD, NO_SESSIONS

__all__ = ["Tpm", "TpmFault"]

RC_FAILURE, RC_COMMAND_SIZE = 0x101, 0x142  #: part 2, 6.6.3

_PERMANENT = b"permall"  #: as libtpms names it (tpm_nvfilename.h)
_created = False


class Tpm:
    """The one of this process.

    `store`: keeps the permanent state; where it raises, the command fails, and the TPM is out of order until it is switched on
    again.  `followed`: codes of commands that are not plain.
    """

    def __init__(self, permanent: bytes, store: Callable[[bytes], None], followed: Iterable[int] = ()) -> None:
        """`permanent`: as `store` was given it; empty: it is manufactured when it is switched on.  Raises NoLibrary, TpmFault."""
        global _created
        if _created:
            raise TpmFault("libtpms has one TPM in a process")
        libraries = library.load()
        self._lib, self._libc = libraries.tpms, libraries.c
        self._plain = Plain(libraries.plain, ffi.addressof(libraries.tpms, "TPMLIB_Process"), followed)
        self._lock = threading.Lock()
        self._store, self.permanent = store, permanent
        self.on = False
        self._callbacks = library.callbacks()
        library.owner = self
        self._do("ChooseTPMVersion", self._lib.TPMLIB_ChooseTPMVersion(library.TPM_2))
        self._do("RegisterCallbacks", self._lib.TPMLIB_RegisterCallbacks(self._callbacks))
        _created = True

    # ---- power ------------------------------------------------------------------------------------------------------

    def switch_on(self) -> None:
        """It goes on with a volatile state that was set.  Raises TpmFault."""
        with self._lock:
            if self.on:
                self._lib.TPMLIB_Terminate()
                self.on = False
            self._do("MainInit", self._lib.TPMLIB_MainInit())
            self.on = True

    def switch_off(self) -> None:
        with self._lock:
            if self.on:
                self._lib.TPMLIB_Terminate()
            self.on = False

    def close(self) -> None:
        """It is off, and this process may have another one."""
        global _created
        self.switch_off()
        library.owner, _created = None, False

    # ---- commands ---------------------------------------------------------------------------------------------------

    def process(self, command: bytes, locality: int = 0) -> bytes:
        """Answers one command; whatever comes gets a response."""
        if not HEAD.size <= len(command) <= limits.MAX_TPM_COMMAND:
            return failure(RC_COMMAND_SIZE)
        with self._lock:
            if not self.on:
                return failure(RC_FAILURE)
            self._plain.at_locality(locality)
            return self._plain.answer(command)

    def process_plain(self, sock: socket.socket, page: mmap.mmap, locality: int) -> Left:
        """As Plain.serve; Left() where it is off.  Raises TpmFault."""
        with self._lock:
            if not self.on:
                return Left()
            self._plain.at_locality(locality)
            return self._plain.serve(sock, page)

    def held_off(self) -> AbstractContextManager[None]:
        """As Plain.held_off, by any thread."""
        return self._plain.held_off()

    def cancel(self) -> None:
        """The command that runs, if there is one, ends soon with TPM_RC_CANCELED, or as if nobody had asked.  By any thread."""
        self._lib.TPMLIB_CancelCommand()

    def buffer_size(self, wanted: int = 0) -> tuple[int, int, int]:
        """Sets it while the TPM is off; 0 or one that runs: it stays.  Returns size, least and most."""
        least, most = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        with self._lock:
            size = self._lib.TPMLIB_SetBufferSize(0 if self.on else wanted, least, most)
        return size, least[0], most[0]

    # ---- what was measured before -------------------------------------------------------------------------------------

    @property
    def established(self) -> bool:
        """Raises TpmFault."""
        found = ffi.new("TPM_BOOL *")
        with self._lock:
            self._demand_on()
            self._do("TpmEstablished_Get", self._lib.TPM_IO_TpmEstablished_Get(found))
        return bool(found[0])

    def reset_established(self, locality: int) -> None:
        """Raises TpmFault: only localities 3 and 4 may."""
        with self._lock:
            self._demand_on()
            self._plain.at_locality(locality)
            self._do("TpmEstablished_Reset", self._lib.TPM_IO_TpmEstablished_Reset())

    def hash(self, parts: list[bytes]) -> None:
        """A dynamic root of trust: resets and extends PCR 17, as locality 4 (part 1, 34.3).  Raises TpmFault."""
        with self._lock:
            self._demand_on()
            self._do("Hash_Start", self._lib.TPM_IO_Hash_Start())
            for part in parts:
                self._do("Hash_Data", self._lib.TPM_IO_Hash_Data(part, len(part)))
            self._do("Hash_End", self._lib.TPM_IO_Hash_End())

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self, kind: int) -> bytes:
        """`kind`: library.PERMANENT, VOLATILE or SAVED; empty where there is none.  In the clear.  Raises TpmFault."""
        data, length = ffi.new("unsigned char **"), ffi.new("uint32_t *")
        with self._lock:
            result = self._lib.TPMLIB_GetState(kind, data, length)
            if result & library.RETRY:
                return b""
            self._do("GetState", result)
        try:
            return bytes(ffi.buffer(data[0], length[0])) if data[0] != ffi.NULL else b""
        finally:
            self._libc.free(data[0])

    def set_state(self, kind: int, data: bytes) -> None:
        """For a TPM that is off: it goes on there when it is switched on.  Raises TpmFault, and then nothing has changed."""
        with self._lock:
            if self.on:
                raise TpmFault("a TPM that is on has its state")
            self._do("SetState", self._lib.TPMLIB_SetState(kind, data, len(data)))

    # ---- callbacks; whoever caused them holds the lock ----------------------------------------------------------------------

    def load(self, data: Any, length: Any, number: int, name: Any) -> int:
        if ffi.string(name) != _PERMANENT or not self.permanent:
            return library.RETRY
        room = self._libc.malloc(len(self.permanent))
        if room == ffi.NULL:
            return library.FAIL
        ffi.memmove(room, self.permanent, len(self.permanent))
        data[0], length[0] = ffi.cast("unsigned char *", room), len(self.permanent)
        return 0

    def save(self, data: Any, length: int, number: int, name: Any) -> int:
        if ffi.string(name) != _PERMANENT:
            return 0  # the volatile state is asked for, not kept
        changed = bytes(ffi.buffer(data, length))
        try:
            self._store(changed)
        except Exception:
            return library.FAIL
        self.permanent = changed
        return 0

    def _demand_on(self) -> None:
        if not self.on:
            raise TpmFault("the TPM is off")

    def _do(self, what: str, result: int) -> None:
        if result:
            raise TpmFault(f"{what}: {result:#x}")


def failure(result: int) -> bytes:
    """A response without anything in it."""
    return HEAD.pack(NO_SESSIONS, HEAD.size, result)
