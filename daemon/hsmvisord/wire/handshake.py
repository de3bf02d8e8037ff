"""The first byte of a connection tells the dialect."""

from __future__ import annotations

from hsmvisord.wire.calls import WireError
from hsmvisord.wire.native import VERSION, NativeCodec
from hsmvisord.wire.p11kit import MAX_VERSION, P11KitCodec

_NATIVE = 0x80


def negotiate(first: int) -> tuple[NativeCodec | P11KitCodec, bytes]:
    """Returns the codec for a client that begins with this byte, and the byte that answers it."""
    if first < _NATIVE:
        return P11KitCodec(first), bytes((min(first, MAX_VERSION),))
    if first == _NATIVE:
        raise WireError("version 0 of the native dialect does not exist")
    return NativeCodec(), bytes((_NATIVE + min(first - _NATIVE, VERSION),))
