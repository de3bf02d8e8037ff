"""Certificates in a TPM's NV memory (part 1, 37): anybody may read them, and who has not the platform hierarchy can neither write
nor delete them.  TPM2_Clear leaves them where they are."""

from __future__ import annotations

import struct

from hsmvisord import limits
from hsmvisord.tpm.commands import Commands
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code, NvAttributes, Parts, Tpm2Error, sized

_PART = 1024  #: bytes that a command may have (TPM_PT_NV_BUFFER_MAX of libtpms)
_NO_HANDLE = 0x18B  #: TPM_RC_HANDLE of the first handle: nothing is there

#: As swtpm_setup defines those of endorsement keys: written once, and locked then until the platform deletes it.
ATTRIBUTES = (
    NvAttributes.PLATFORMCREATE
    | NvAttributes.PPWRITE
    | NvAttributes.WRITEDEFINE
    | NvAttributes.PPREAD
    | NvAttributes.OWNERREAD
    | NvAttributes.AUTHREAD
    | NvAttributes.NO_DA
)
_WHOLE = ATTRIBUTES | NvAttributes.WRITTEN | NvAttributes.WRITELOCKED


class Certificates:
    """Within `Commands.room`, and with the platform's hierarchy claimed.  Each raises Tpm2Error, BadResponse."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def put(self, index: int, der: bytes) -> None:
        """In the place of whatever is there.  Where it fails that may be gone."""
        assert 0 < len(der) <= limits.MAX_TPM_CERTIFICATE
        self.remove(index)
        public = struct.pack(">IHI", index, tpm2.SHA256, ATTRIBUTES) + sized(b"") + struct.pack(">H", len(der))
        self._commands.by_policy(Code.NV_DEFINE_SPACE, (PLATFORM,), sized(b"") + sized(public))
        for at in range(0, len(der), _PART):
            part = sized(der[at : at + _PART]) + struct.pack(">H", at)
            self._commands.by_policy(Code.NV_WRITE, (PLATFORM, index), part)
        self._commands.by_policy(Code.NV_WRITE_LOCK, (PLATFORM, index))

    def remove(self, index: int) -> None:
        """What is there, if anything: the platform may delete what is the owner's."""
        if self._public(index) is not None:
            self._commands.by_policy(Code.NV_UNDEFINE_SPACE, (PLATFORM, index))

    def at(self, index: int) -> bytes:
        """Empty where there is none of ours: somebody else's data is none, whatever it says."""
        public = self._public(index)
        if public is None or public[0] != _WHOLE:
            return b""
        try:
            return b"".join(self._read(index, at, min(_PART, public[1] - at)) for at in range(0, public[1], _PART))
        except Tpm2Error:  # it has a password
            return b""

    def indices(self, first: int, last: int) -> list[int]:
        """Those of ours."""
        found = []
        for index in self._commands.handles(first, last):
            public = self._public(index)
            if public is not None and public[0] & ~(NvAttributes.WRITTEN | NvAttributes.WRITELOCKED) == ATTRIBUTES:
                found.append(index)
        return found

    def _public(self, index: int) -> tuple[int, int] | None:
        """Its attributes and its size."""
        try:
            public = Parts(self._commands.do(Code.NV_READ_PUBLIC, (index,)).sized(), "TPMS_NV_PUBLIC")
        except Tpm2Error as error:
            if error.code == _NO_HANDLE:
                return None
            raise
        public.take(6)
        attributes = public.number()
        public.sized()
        return attributes, public.number(2)

    def _read(self, index: int, at: int, count: int) -> bytes:
        answer = self._commands.do(Code.NV_READ, (index, index), struct.pack(">HH", count, at), EMPTY_PASSWORD)
        answer.parameters()
        return answer.sized()
