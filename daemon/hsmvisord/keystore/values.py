"""Attributes as pairs of tuples, for records: CKA_ types, and a value of each as bytes that begin with what it is.

b  a bool: one byte           y  bytes
u  an int: 8 bytes            l  a tuple of int: 8 bytes each
t  a template: of each attribute 8 bytes of type, 4 of length, its value
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ULONG = 8


def encode(attributes: Mapping[int, Any]) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    return tuple(attributes), tuple(map(encode_value, attributes.values()))


def decode(kinds: tuple[int, ...], values: tuple[bytes, ...]) -> dict[int, Any]:
    """Raises ValueError."""
    return dict(zip(kinds, map(decode_value, values), strict=True))


def encode_value(value: Any) -> bytes:
    match value:
        case bool():
            return b"b" + bytes((value,))
        case int():
            return b"u" + value.to_bytes(_ULONG)
        case bytes():
            return b"y" + value
        case tuple() if all(type(item) is int for item in value):
            return b"l" + b"".join(item.to_bytes(_ULONG) for item in value)
    parts = [(kind, encode_value(item)) for kind, item in value]
    return b"t" + b"".join(kind.to_bytes(_ULONG) + len(item).to_bytes(4) + item for kind, item in parts)


def decode_value(data: bytes) -> Any:
    """Raises ValueError."""
    kind, value = data[:1], data[1:]
    match kind:
        case b"b" if len(value) == 1 and value[0] < 2:
            return value == b"\1"
        case b"u" if len(value) == _ULONG:
            return int.from_bytes(value)
        case b"y":
            return value
        case b"l" if len(value) % _ULONG == 0:
            return tuple(int.from_bytes(value[at : at + _ULONG]) for at in range(0, len(value), _ULONG))
        case b"t":
            return _template(value)
    raise ValueError(f"a value of kind {kind!r}")


def _template(data: bytes) -> tuple[tuple[int, Any], ...]:
    found = []
    while data:
        kind, size = int.from_bytes(data[:_ULONG]), int.from_bytes(data[_ULONG : _ULONG + 4])
        item, data = data[_ULONG + 4 : _ULONG + 4 + size], data[_ULONG + 4 + size :]
        if len(item) != size or item[:1] == b"t":  # templates in templates are not kept
            raise ValueError("a template that ends early, or in a template")
        found.append((kind, decode_value(item)))
    return tuple(found)
