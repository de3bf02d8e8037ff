"""The calls of both dialects and the plain values that they carry; the one thing that codecs and faces share.

A request is `Request(id, call, args)`; `args` follow the call's request signature, a reply's values its response signature:

    u, y  int            v  (major, minor)     s, z  bytes         ay  bytes, or None for a NULL pointer
    au    tuple of int   fy, fu  room: None for a NULL pointer (size query), else int >= 0
    Ny    room as fy, or MORE_FOLLOWS
    aA    tuple of Attribute                   fA    tuple of (type, room), room as fy
    M     Mechanism, or None for a NULL mechanism
In replies `ay` and `au` may be Needed(n) instead.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple


class Call(enum.IntEnum):
    """Call ids: 1-89 p11-kit's (p11-kit/rpc-message.h), from 256 the native dialect's (NATIVE.md)."""

    __hash__ = int.__hash__  # Enum's is Python: three lookups a signature

    INITIALIZE = 1
    FINALIZE = 2
    GET_INFO = 3
    GET_SLOT_LIST = 4
    GET_SLOT_INFO = 5
    GET_TOKEN_INFO = 6
    GET_MECHANISM_LIST = 7
    GET_MECHANISM_INFO = 8
    INIT_TOKEN = 9
    OPEN_SESSION = 10
    CLOSE_SESSION = 11
    CLOSE_ALL_SESSIONS = 12
    GET_SESSION_INFO = 13
    INIT_PIN = 14
    SET_PIN = 15
    GET_OPERATION_STATE = 16
    SET_OPERATION_STATE = 17
    LOGIN = 18
    LOGOUT = 19
    CREATE_OBJECT = 20
    COPY_OBJECT = 21
    DESTROY_OBJECT = 22
    GET_OBJECT_SIZE = 23
    GET_ATTRIBUTE_VALUE = 24
    SET_ATTRIBUTE_VALUE = 25
    FIND_OBJECTS_INIT = 26
    FIND_OBJECTS = 27
    FIND_OBJECTS_FINAL = 28
    ENCRYPT_INIT = 29
    ENCRYPT = 30
    ENCRYPT_UPDATE = 31
    ENCRYPT_FINAL = 32
    DECRYPT_INIT = 33
    DECRYPT = 34
    DECRYPT_UPDATE = 35
    DECRYPT_FINAL = 36
    DIGEST_INIT = 37
    DIGEST = 38
    DIGEST_UPDATE = 39
    DIGEST_KEY = 40
    DIGEST_FINAL = 41
    SIGN_INIT = 42
    SIGN = 43
    SIGN_UPDATE = 44
    SIGN_FINAL = 45
    SIGN_RECOVER_INIT = 46
    SIGN_RECOVER = 47
    VERIFY_INIT = 48
    VERIFY = 49
    VERIFY_UPDATE = 50
    VERIFY_FINAL = 51
    VERIFY_RECOVER_INIT = 52
    VERIFY_RECOVER = 53
    DIGEST_ENCRYPT_UPDATE = 54
    DECRYPT_DIGEST_UPDATE = 55
    SIGN_ENCRYPT_UPDATE = 56
    DECRYPT_VERIFY_UPDATE = 57
    GENERATE_KEY = 58
    GENERATE_KEY_PAIR = 59
    WRAP_KEY = 60
    UNWRAP_KEY = 61
    DERIVE_KEY = 62
    SEED_RANDOM = 63
    GENERATE_RANDOM = 64
    WAIT_FOR_SLOT_EVENT = 65
    LOGIN_USER = 66
    SESSION_CANCEL = 67
    MESSAGE_ENCRYPT_INIT = 68
    MESSAGE_ENCRYPT_FINAL = 72
    MESSAGE_DECRYPT_INIT = 73
    MESSAGE_DECRYPT_FINAL = 77
    MESSAGE_SIGN_INIT = 78
    SIGN_MESSAGE = 79
    SIGN_MESSAGE_BEGIN = 80
    SIGN_MESSAGE_NEXT = 81
    MESSAGE_SIGN_FINAL = 82
    MESSAGE_VERIFY_INIT = 83
    VERIFY_MESSAGE = 84
    VERIFY_MESSAGE_BEGIN = 85
    VERIFY_MESSAGE_NEXT = 86
    MESSAGE_VERIFY_FINAL = 87
    INIT_TOKEN2 = 88
    DERIVE_KEY2 = 89
    HELLO = 256
    RESTORE_SESSIONS = 257
    SIGN_ONCE = 258
    DECRYPT_ONCE = 259
    FIND_ONCE = 260
    VERIFY_ONCE = 261
    DIGEST_ONCE = 262
    ROTATION_WAIT = 263
    ENCRYPT_MESSAGE = 264
    ENCRYPT_MESSAGE_BEGIN = 265
    ENCRYPT_MESSAGE_NEXT = 266
    DECRYPT_MESSAGE = 267
    DECRYPT_MESSAGE_BEGIN = 268
    DECRYPT_MESSAGE_NEXT = 269
    VERIFY_SIGNATURE_INIT = 270
    VERIFY_SIGNATURE = 271
    VERIFY_SIGNATURE_UPDATE = 272
    VERIFY_SIGNATURE_FINAL = 273
    ENCAPSULATE_KEY = 274
    DECAPSULATE_KEY = 275
    WRAP_KEY_AUTHENTICATED = 276
    UNWRAP_KEY_AUTHENTICATED = 277
    GET_SESSION_VALIDATION_FLAGS = 278
    ENCRYPT_ONCE = 279


#: A room (`Ny`) of a caller that gives no place for an output: there is more to come.
MORE_FOLLOWS = -1


class Attribute(NamedTuple):
    """`value`: int (CK_ULONG), bool (CK_BBOOL), bytes, tuple of int (CK_MECHANISM_TYPE array), tuple of Attribute (template);
    in replies also None = unavailable.  A value of the wrong length in a request stays bytes: it matches nothing."""

    type: int
    value: Any


class Mechanism(NamedTuple):
    """`parameter`: None, a tuple of int and bytes (the fields of the parameter structure), or bytes."""

    type: int
    parameter: tuple[int | bytes, ...] | bytes | None = None


class Needed(NamedTuple):
    """Instead of output: the caller's buffer has no room (or is NULL); this many bytes or elements are needed."""

    size: int


@dataclass(slots=True, frozen=True)
class Request:
    """One decoded request; `deadline_ms` 0 = none."""

    id: int
    call: Call
    args: tuple[Any, ...]
    deadline_ms: int = 0


class WireError(Exception):
    """The connection cannot go on: broken framing.  It is closed."""


class BadMessage(Exception):
    """One message is malformed; the answer is this CK_RV and the connection goes on."""

    def __init__(self, request_id: int, rv: int, detail: str) -> None:
        super().__init__(detail)
        self.request_id = request_id
        self.rv = rv


class Unreadable(enum.Enum):
    """Why an attribute has no value in a reply to C_GetAttributeValue."""

    SENSITIVE = 0x11  #: CKR_ATTRIBUTE_SENSITIVE
    INVALID = 0x12  #: CKR_ATTRIBUTE_TYPE_INVALID: the object has no such attribute


SENSITIVE = Unreadable.SENSITIVE
INVALID = Unreadable.INVALID
