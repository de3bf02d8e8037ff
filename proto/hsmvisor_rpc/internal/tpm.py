"""What a module's worker says to its TPM's process: which keys are wanted there.

On a stream socket, one question at a time, framed as an HSM helper's (hsm.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hsmvisor_rpc.internal.phases import by_type
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.canonical import Record

MAX_KEYS = 64  #: of a module, in its TPM
MAX_EARLIER = MAX_KEYS * (limits.MAX_GENERATIONS - 1)  #: generations that may be there instead
#: Persistent handles that a key may have: of the owner, who may take it away, and of the platform.
OWNER_HANDLES, PLATFORM_HANDLES = range(0x81000000, 0x81010000), range(0x81800000, 0x81810000)

DONE, LATER, FAILED = "done", "later", "failed"


@dataclass(frozen=True)
class WantKeys(Record):
    """These keys, and no others; parallel tuples of each key, and of each earlier generation of one.  -> KeysWanted"""

    TYPE: ClassVar[str] = "want-keys"
    handles: tuple[int, ...]
    keys: tuple[bytes, ...] = field(repr=False)  #: PrivateKeyInfo, DER
    decrypt: tuple[bool, ...]  #: it decrypts and agrees, and signs nothing
    certificates: tuple[bytes, ...]  #: DER; empty: none
    earlier_handles: tuple[int, ...] = ()
    earlier: tuple[bytes, ...] = ()  #: SubjectPublicKeyInfo, DER: it may stay at its handle as long as the key does not come


@dataclass(frozen=True)
class Move(Record):
    """The machine goes to another host, or comes from one: state that QEMU asks for, or brings, is sealed with this key, once.
    -> KeysWanted"""

    TYPE: ClassVar[str] = "move"
    leaves: bool  #: or it comes
    ident: bytes  #: 16 bytes, the same at both ends
    key: bytes = field(repr=False)  #: 32 bytes; empty: what was to go stays


@dataclass(frozen=True)
class KeysWanted(Record):
    TYPE: ClassVar[str] = "keys-wanted"
    result: str  #: DONE, LATER (the guest sleeps, or was not started), FAILED
    detail: str


QUESTIONS = by_type(frozenset({WantKeys, Move}))
ANSWERS = by_type(frozenset({KeysWanted}))
