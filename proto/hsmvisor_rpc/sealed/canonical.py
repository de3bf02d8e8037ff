"""One canonical byte encoding for everything that is signed, sealed or spoken inside a host.

A record is a frozen dataclass.  Its encoding is

    b"hsmvisor/1:" + TYPE + b"\\0" + field + field + ...

with every field as `u32 length` (big-endian) and its value: an int as 8 bytes big-endian, a bool as one
byte 0 or 1, a str as UTF-8, bytes as they are, a tuple as the concatenation of its length-prefixed items.
There is exactly one encoding of a record and exactly one record for an encoding, so bytes that were signed
are never rebuilt and the TYPE prefix separates the domains of signatures.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Self

MAGIC = b"hsmvisor/1:"
MAX_RECORD = 8 * 1024 * 1024  #: bytes of one encoded record
MAX_ITEMS = 65536  #: items of one tuple


class MalformedRecord(ValueError):
    """The bytes are not the canonical encoding of the expected record; the message says where."""


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _split(data: bytes, offset: int, what: str) -> tuple[bytes, int]:
    """Returns one length-prefixed value and the offset behind it."""
    start = offset + 4
    if start > len(data):
        raise MalformedRecord(f"{what}: length is cut off")
    end = start + int.from_bytes(data[offset:start], "big")
    if end > len(data):
        raise MalformedRecord(f"{what}: value is cut off")
    return data[start:end], end


def _encode_int(value: Any) -> bytes:
    return int(value).to_bytes(8, "big")


def _decode_int(data: bytes) -> int:
    if len(data) != 8:
        raise MalformedRecord("an integer has 8 bytes")
    return int.from_bytes(data, "big")


def _decode_bool(data: bytes) -> bool:
    if data not in (b"\0", b"\1"):
        raise MalformedRecord("a boolean is one byte, 0 or 1")
    return data == b"\1"


def _decode_str(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedRecord("text is not UTF-8") from None


_SCALARS: dict[Any, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    int: (_encode_int, _decode_int),
    bool: (lambda v: b"\1" if v else b"\0", _decode_bool),
    str: (lambda v: str(v).encode("utf-8"), _decode_str),
    bytes: (bytes, bytes),
}


def _tuple_codec(item: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    encode, decode = _SCALARS[item]

    def decode_all(data: bytes) -> tuple[Any, ...]:
        values: list[Any] = []
        offset = 0
        while offset < len(data):
            if len(values) >= MAX_ITEMS:
                raise MalformedRecord("too many items")
            value, offset = _split(data, offset, "item")
            values.append(decode(value))
        return tuple(values)

    return (lambda v: b"".join(_prefixed(encode(i)) for i in v)), decode_all


#: Field names with their codecs, by record class.
_LAYOUTS: dict[type, list[tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]]] = {}


def _layout(cls: Any) -> list[tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]]:
    known = _LAYOUTS.get(cls)
    if known is not None:
        return known
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        codec = _SCALARS.get(hint) or _tuple_codec(typing.get_args(hint)[0])
        rows.append((field.name, *codec))
    _LAYOUTS[cls] = rows
    return rows


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of all records; a subclass names its TYPE and declares its fields in wire order."""

    TYPE: ClassVar[str]

    def encode(self) -> bytes:
        """Returns the one canonical encoding of this record."""
        parts = [MAGIC, self.TYPE.encode("ascii"), b"\0"]
        parts += [_prefixed(encode(getattr(self, name))) for name, encode, _ in _layout(type(self))]
        data = b"".join(parts)
        if len(data) > MAX_RECORD:
            raise MalformedRecord(f"{self.TYPE}: {len(data)} bytes, the limit is {MAX_RECORD}")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Returns the record whose encoding `data` is; raises MalformedRecord."""
        if record_type(data) != cls.TYPE:
            raise MalformedRecord(f"expected a record of type {cls.TYPE}")
        offset = len(MAGIC) + len(cls.TYPE) + 1
        values: dict[str, Any] = {}
        for name, _, decode in _layout(cls):
            value, offset = _split(data, offset, f"{cls.TYPE}.{name}")
            try:
                values[name] = decode(value)
            except MalformedRecord as error:
                raise MalformedRecord(f"{cls.TYPE}.{name}: {error}") from None
        if offset != len(data):
            raise MalformedRecord(f"{cls.TYPE}: {len(data) - offset} bytes too many")
        return cls(**values)


def record_type(data: bytes) -> str:
    """Returns the TYPE of an encoded record; raises MalformedRecord."""
    if len(data) > MAX_RECORD:
        raise MalformedRecord(f"{len(data)} bytes, the limit is {MAX_RECORD}")
    end = data.find(b"\0", len(MAGIC), len(MAGIC) + 64)
    if not data.startswith(MAGIC) or end < 0:
        raise MalformedRecord("not an hsmvisor record")
    return data[len(MAGIC) : end].decode("ascii", "replace")
