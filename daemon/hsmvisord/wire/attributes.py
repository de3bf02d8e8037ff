"""What kind of value an attribute has (PKCS#11 3.1), and how values travel as the client's memory."""

from __future__ import annotations

import enum
import functools
from typing import Any

from hsmvisord import ck


class Kind(enum.Enum):
    BOOL = 1
    ULONG = 2
    BYTES = 3
    DATE = 4
    ULONGS = 5
    TEMPLATE = 6


_BOOL = (
    "TOKEN PRIVATE TRUSTED SENSITIVE ENCRYPT DECRYPT WRAP UNWRAP SIGN SIGN_RECOVER VERIFY VERIFY_RECOVER DERIVE EXTRACTABLE LOCAL "
    "NEVER_EXTRACTABLE ALWAYS_SENSITIVE MODIFIABLE COPYABLE DESTROYABLE ALWAYS_AUTHENTICATE WRAP_WITH_TRUSTED"
)
_ULONG = (
    "CLASS CERTIFICATE_TYPE CERTIFICATE_CATEGORY JAVA_MIDP_SECURITY_DOMAIN KEY_TYPE MODULUS_BITS VALUE_LEN KEY_GEN_MECHANISM "
    "NAME_HASH_ALGORITHM PARAMETER_SET PROFILE_ID"
)

KINDS: dict[int, Kind] = (
    {getattr(ck, f"CKA_{name}"): Kind.BOOL for name in _BOOL.split()}
    | {getattr(ck, f"CKA_{name}"): Kind.ULONG for name in _ULONG.split()}
    | dict.fromkeys((ck.CKA_START_DATE, ck.CKA_END_DATE), Kind.DATE)
    | {ck.CKA_ALLOWED_MECHANISMS: Kind.ULONGS}
    | dict.fromkeys((ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE), Kind.TEMPLATE)
)


def kind_of(attribute: int) -> Kind:
    return KINDS.get(attribute, Kind.BYTES)


def from_memory(attribute: int, raw: bytes, ulong_size: int) -> Any:
    """Returns the value that `raw`, the client's memory, means; bytes that do not have the kind's length stay bytes."""
    match kind_of(attribute):
        case Kind.BOOL if len(raw) == 1:
            return raw != b"\0"
        case Kind.ULONG if len(raw) == ulong_size:
            return widened(int.from_bytes(raw, "little"), ulong_size)
        case Kind.ULONGS if len(raw) % ulong_size == 0:
            return tuple(
                int.from_bytes(raw[i : i + ulong_size], "little") for i in range(0, len(raw), ulong_size)
            )
    return raw


def widened(value: int, ulong_size: int) -> int:
    """CK_UNAVAILABLE_INFORMATION is all ones in the client's size; here it is 2^64-1."""
    return ck.CK_UNAVAILABLE_INFORMATION if ulong_size == 4 and value == 0xFFFFFFFF else value


@functools.cache
def _ulong_mask(ulong_size: int) -> int:
    return (1 << (8 * ulong_size)) - 1


def to_memory(value: Any, ulong_size: int) -> bytes:
    """Returns a value (not a template) as the client's memory, little-endian."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"\1" if value else b"\0"
    if isinstance(value, int):
        return (value & _ulong_mask(ulong_size)).to_bytes(ulong_size, "little")
    return b"".join(to_memory(item, ulong_size) for item in value)
