"""What kind of value an attribute has (PKCS#11 3.1), and how values travel as the client's memory."""

from __future__ import annotations

import enum
import struct
from typing import Any

from hsmvisord import ck, limits


class Kind(enum.Enum):
    BOOL = 1
    ULONG = 2
    BYTES = 3
    ULONGS = 4  #: CK_MECHANISM_TYPE array
    TEMPLATE = 5


#: What p11-kit writes as one byte, or as a u64 (p11-kit/rpc-message.c, map_attribute_to_value_type); the rest travels as memory.
P11KIT_BYTE = frozenset(
    {0x1, 0x2, 0x86, *range(0x103, 0x10D), 0x162, 0x163, 0x164, 0x165, 0x170, 0x171, 0x200, 0x202, 0x210, 0x301, 0x302, 0x405}
)
P11KIT_ULONG = frozenset(
    {0x0, 0x80, 0x87, 0x88, 0x100, 0x121, 0x133, 0x134, 0x160, 0x161, 0x166, 0x201, 0x300, *range(0x400, 0x405), 0x406, 0x500}
)

KINDS: dict[int, Kind] = (
    dict.fromkeys((*P11KIT_BYTE, ck.CKA_DESTROYABLE, ck.CKA_ENCAPSULATE, ck.CKA_DECAPSULATE), Kind.BOOL)
    | dict.fromkeys((*P11KIT_ULONG, ck.CKA_NAME_HASH_ALGORITHM, ck.CKA_PARAMETER_SET, ck.CKA_PROFILE_ID), Kind.ULONG)
    | {ck.CKA_ALLOWED_MECHANISMS: Kind.ULONGS}
    | dict.fromkeys((ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE), Kind.TEMPLATE)
)


def kind_of(attribute: int) -> Kind:
    return KINDS.get(attribute, Kind.BYTES)


def from_memory(attribute: int, raw: bytes, ulong_size: int) -> Any:
    """Returns the value that `raw`, the client's memory, means; bytes that do not have the kind's length stay bytes."""
    kind = kind_of(attribute)
    if kind is Kind.BOOL and len(raw) == 1:
        return raw != b"\0"
    if kind is Kind.ULONG and len(raw) == ulong_size:
        return widened(int.from_bytes(raw, "little"), ulong_size)
    if kind is Kind.ULONGS and len(raw) % ulong_size == 0 and len(raw) <= limits.MAX_ARRAY * ulong_size:
        return struct.unpack(f"<{len(raw) // ulong_size}{'Q' if ulong_size == 8 else 'I'}", raw)
    return raw


def widened(value: int, ulong_size: int) -> int:
    """CK_UNAVAILABLE_INFORMATION is all ones in the client's size; here it is 2^64-1."""
    return ck.CK_UNAVAILABLE_INFORMATION if ulong_size == 4 and value == 0xFFFFFFFF else value


def to_memory(value: Any, ulong_size: int) -> bytes:
    """Returns a value (not a template) as the client's memory, little-endian."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"\1" if value else b"\0"
    if isinstance(value, int):
        return (value & ((1 << 8 * ulong_size) - 1)).to_bytes(ulong_size, "little")
    return b"".join(to_memory(item, ulong_size) for item in value)
