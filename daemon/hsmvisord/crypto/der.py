"""The little DER (X.690) that keys and curves need which no library writes or reads for us."""

from __future__ import annotations

INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE = 0x02, 0x03, 0x04, 0x06, 0x30


def element(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(length))) + length + content


def integer(value: int) -> bytes:
    return element(INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def sequence(*parts: bytes) -> bytes:
    return element(SEQUENCE, b"".join(parts))


class Elements:
    """Reads elements one after the other; raises ValueError for what is not DER, or not the element that is wanted."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise ValueError("DER ends too early")
        self._at += size
        return taken

    def next(self, tag: int) -> bytes:
        """Returns the content of the next element."""
        found, size = self._take(2)
        if found != tag:
            raise ValueError(f"DER: tag 0x{found:x}, not 0x{tag:x}")
        if size & 0x80:
            count = size & 0x7F
            length = self._take(count)
            size = int.from_bytes(length)
            if count > 4 or size < 0x80 or not length[0]:
                raise ValueError("DER: a length that is not the shortest")
        return self._take(size)

    def number(self) -> int:
        """A positive INTEGER."""
        content = self.next(INTEGER)
        if not content or content[0] & 0x80 or (len(content) > 1 and not content[0] and not content[1] & 0x80):
            raise ValueError("DER: an INTEGER that is negative or not the shortest")
        return int.from_bytes(content)

    def end(self) -> None:
        if self.more:
            raise ValueError("DER: bytes too many")
