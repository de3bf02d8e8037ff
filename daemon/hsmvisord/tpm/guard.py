"""What a guest may not command, whatever passwords it has: the platform's part that is the module's.

A guest whose firmware knows no TPM has the platform hierarchy's empty password.  A firmware needs none of these.
"""

from __future__ import annotations

from collections.abc import Container

from hsmvisord.tpm import endorsement
from hsmvisord.tpm.wanted import OWNERS, OWNERS_INDEX, PLATFORMS, PLATFORMS_INDEX
from hsmvisord.wire.tpm2 import HEAD, NO_SESSIONS, PLATFORM, SESSIONS, Code

RC_HIERARCHY, RC_HANDLE = 0x185, 0x18B  #: TPM_RC_HIERARCHY and TPM_RC_HANDLE, of the first handle (part 2, 6.6.3)

_INDICES = range(PLATFORMS_INDEX, OWNERS_INDEX + 0x10000)
_FIRST, _SECOND = HEAD.size, HEAD.size + 4  #: where a command has its handles; a third one is no persistent object (part 3)
_WITHOUT_HANDLES = frozenset({Code.GET_CAPABILITY, Code.FLUSH_CONTEXT})  #: and with parameters that look like one


class Handles:
    """All that keys of a module may have."""

    def __contains__(self, handle: object) -> bool:
        return handle in PLATFORMS or handle in OWNERS


def refusal(command: bytes) -> int:
    """Returns the response's code, 0 where the TPM itself is to answer."""
    if len(command) < _SECOND or _number(command, _FIRST) != PLATFORM:
        return 0
    code = _number(command, 6)
    if code in (Code.SET_PRIMARY_POLICY, Code.EVICT_CONTROL, Code.CHANGE_PPS):
        return RC_HIERARCHY
    if code == Code.NV_UNDEFINE_SPACE:
        return RC_HIERARCHY if _is_ours(_number(command, _SECOND)) else 0
    if code == Code.NV_DEFINE_SPACE:
        return RC_HIERARCHY if _is_ours(_defined(command)) else 0
    return 0


def uses(command: bytes, handles: Container[int]) -> bool:
    """Says whether it may use one of these persistent objects."""
    if len(command) < _SECOND or _number(command, 6) in _WITHOUT_HANDLES:
        return False
    return any(_number(command, at) in handles for at in (_FIRST, _SECOND))


def response(code: int) -> bytes:
    return HEAD.pack(NO_SESSIONS, HEAD.size, code)


def _is_ours(index: int) -> bool:
    return index in _INDICES or index in endorsement.INDICES


def _defined(command: bytes) -> int:
    """The index that TPM2_NV_DefineSpace makes (part 3, 31.3): behind its sessions, a TPM2B_AUTH and a size."""
    at = _SECOND
    if command[:2] == SESSIONS.to_bytes(2, "big"):
        at += 4 + _number(command, at)
    at += 2 + int.from_bytes(command[at : at + 2], "big")
    return _number(command, at + 2)


def _number(command: bytes, at: int) -> int:
    return int.from_bytes(command[at : at + 4], "big")
