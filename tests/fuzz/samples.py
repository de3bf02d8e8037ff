"""A valid request of every call in each dialect, from the call table: where mutations begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hsmvisord import ck
from hsmvisord.wire.calls import Attribute, Call, Mechanism
from hsmvisord.wire.table import CALLS, NATIVE_CALLS, P11KIT_CALLS
from support.native_client import NativeEncoding
from support.p11kit_client import MAGIC, RELEASES, P11KitEncoding
from support.wire_client import Encoding

#: The first byte of a connection: p11-kit's three versions and the native dialect.
FIRST_BYTES = (0, 1, 2, 0x81)
_RELEASES = {0: "0.24.1", 1: "0.25.5", 2: "0.26.4"}

TEMPLATE = (Attribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), Attribute(ck.CKA_SIGN, True), Attribute(ck.CKA_LABEL, b"tls"))
ROOMS = ((ck.CKA_CLASS, 8), (ck.CKA_ID, 64), (ck.CKA_VALUE, 4096), (ck.CKA_MODULUS, None))

GCM = Mechanism(ck.CKM_AES_GCM, (b"i" * 12, 32, ck.CKG_GENERATE_COUNTER, b"", 128))
GCM_TAGGED = Mechanism(ck.CKM_AES_GCM, (b"i" * 12, 0, ck.CKG_NO_GENERATE, b"t" * 16, 128))

_ARGUMENTS: dict[str, Any] = {
    "u": 1,
    "y": 1,
    "s": b"label".ljust(32),
    "z": b"text",
    "ay": b"0123456789abcdef0123456789abcdef",
    "au": (1, 0, 4),
    "fy": 4096,
    "fu": 16,
    "Ny": 4096,
    "aA": TEMPLATE,
    "fA": ROOMS,
    "M": Mechanism(ck.CKM_ECDSA),
}

#: Where the table's arguments would reach nothing.
_SPECIAL: dict[Call, tuple[Any, ...]] = {
    Call.INITIALIZE: (MAGIC, 0, b"\0"),
    Call.OPEN_SESSION: (0, ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION),
    Call.HELLO: (8, 0, None, 0, b"program", 1),
    Call.GET_SLOT_INFO: (0,),
    Call.GET_TOKEN_INFO: (0,),
    Call.GET_MECHANISM_LIST: (0, 64),
    Call.GET_MECHANISM_INFO: (0, ck.CKM_ECDSA),
    Call.CLOSE_ALL_SESSIONS: (0,),
    Call.DIGEST_INIT: (1, Mechanism(ck.CKM_SHA256)),
    Call.DIGEST_ONCE: (1, Mechanism(ck.CKM_SHA256), b"data", 64),
    Call.ENCRYPT_MESSAGE: (1, GCM, b"more", b"data", 64),
    Call.ENCRYPT_MESSAGE_BEGIN: (1, GCM, b"more"),
    Call.ENCRYPT_MESSAGE_NEXT: (1, GCM, b"data", 64, ck.CKF_END_OF_MESSAGE),
    Call.DECRYPT_MESSAGE: (1, GCM_TAGGED, b"more", b"data", 64),
    Call.DECRYPT_MESSAGE_BEGIN: (1, GCM_TAGGED, b"more"),
    Call.DECRYPT_MESSAGE_NEXT: (1, GCM_TAGGED, b"data", 64, ck.CKF_END_OF_MESSAGE),
    Call.SIGN_MESSAGE: (1, None, b"data", 64),
    Call.SIGN_MESSAGE_BEGIN: (1, None),
    Call.SIGN_MESSAGE_NEXT: (1, None, b"data", 64),
    Call.VERIFY_MESSAGE: (1, None, b"data", b"s" * 64),
    Call.VERIFY_MESSAGE_BEGIN: (1, None),
    Call.VERIFY_MESSAGE_NEXT: (1, None, b"data", b"s" * 64),
}


def arguments(call: Call) -> tuple[Any, ...]:
    return _SPECIAL.get(call) or tuple([_ARGUMENTS[code] for code in CALLS[call][0]])


def encoding(first: int, ulong_size: int = 8) -> Encoding:
    return NativeEncoding(ulong_size) if first >= 0x80 else P11KitEncoding(RELEASES[_RELEASES[min(first, 2)]])


def messages(first: int) -> Iterator[tuple[Call, bytes]]:
    """Gives a request of every call of the dialect that begins with this byte."""
    spoken = encoding(first)
    for call in sorted(NATIVE_CALLS if first >= 0x80 else P11KIT_CALLS):
        yield call, spoken.request(call, *arguments(call))
