"""BER-TLV as smart cards have it (ISO/IEC 7816-4, 5.2.2): tags of one to three bytes, definite lengths.  Sans-IO."""

from __future__ import annotations

from collections.abc import Iterator

from hsmvisord import limits


class BadTlv(Exception):
    """Bytes that are no BER-TLV, or more of it than there may be."""


def encode(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        coded = bytes([size])
    else:
        digits = (size.bit_length() + 7) // 8
        coded = bytes([0x80 | digits]) + size.to_bytes(digits, "big")
    return tag.to_bytes(max(1, (tag.bit_length() + 7) // 8), "big") + coded + value


def decode(data: bytes) -> list[tuple[int, bytes]]:
    """Returns tag and value of each object in a row; what is within a constructed one is not looked at.  Raises BadTlv."""
    return list(_objects(data))


def _objects(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = count = 0
    while at < len(data):
        count += 1
        if count > limits.MAX_TLV_OBJECTS:
            raise BadTlv(f"more than {limits.MAX_TLV_OBJECTS} objects in a row")
        tag, at = _tag(data, at)
        size, at = _length(data, at)
        if size > len(data) - at:
            raise BadTlv(f"an object of {size} bytes where {len(data) - at} are left")
        yield tag, data[at : at + size]
        at += size


def _tag(data: bytes, at: int) -> tuple[int, int]:
    tag = data[at]
    at += 1
    if tag & 0x1F == 0x1F:
        for _ in range(2):
            if at >= len(data):
                raise BadTlv("a tag without its end")
            byte = data[at]
            tag, at = tag << 8 | byte, at + 1
            if not byte & 0x80:
                return tag, at
        raise BadTlv("a tag of more than three bytes")
    return tag, at


def _length(data: bytes, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise BadTlv("a tag without a length")
    first = data[at]
    at += 1
    if first < 0x80:
        return first, at
    digits = first & 0x7F
    if not 1 <= digits <= 3 or at + digits > len(data):
        raise BadTlv(f"a length of {digits} bytes")
    return int.from_bytes(data[at : at + digits], "big"), at + digits
