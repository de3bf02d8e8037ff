"""What ykcs11, yubico-piv-tool and ykman ask of a YubiKey's PIV application beside the standard: Yubico's GET VERSION, GET SERIAL
and GET METADATA."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from hsmvisord.face.card.holdings import Contents, Holdings, SlotKey
from hsmvisord.face.card.slots import CARD_AUTHENTICATION, SIGNATURE
from hsmvisord.wire import tlv

GET_METADATA, GET_SERIAL, GET_VERSION = 0xF7, 0xF8, 0xFD
VERSION = bytes([5, 4, 3])
PIN = 0x80
_RETRIES = 3
_NEVER, _ONCE, _ALWAYS = 1, 2, 3  #: PIN policies
_NO_TOUCH = 1
_IMPORTED = 2  #: origin


def serial_number(serial: str) -> bytes:
    """Four bytes that a YubiKey would have printed on it; below 2^31."""
    return bytes([0x7F & (digest := hashlib.sha256(serial.encode()).digest())[0]]) + digest[1:4]


def metadata(what: int, holdings: Holdings, contents: Contents) -> bytes | None:
    """Returns what is told of the PIN or of a slot, None of what there is not."""
    if what == PIN:
        fields = [(0x01, b"\xff"), (0x05, b"\0"), (0x06, bytes([_RETRIES, holdings.tries_left]))]
    elif (key := contents.get(what)) is not None:
        policy = {SIGNATURE: _ALWAYS, CARD_AUTHENTICATION: _NEVER}.get(what, _ONCE)
        fields = [(0x01, bytes([key.algorithm])), (0x02, bytes([policy, _NO_TOUCH])), (0x03, bytes([_IMPORTED]))]
        fields.append((0x04, _public(key)))
    else:
        return None
    return b"".join(tlv.encode(tag, value) for tag, value in fields)


def _public(key: SlotKey) -> bytes:
    public = load_der_public_key(key.spki)
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        size = (public.key_size + 7) // 8
        exponent = numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")
        return tlv.encode(0x81, numbers.n.to_bytes(size, "big")) + tlv.encode(0x82, exponent)
    if key.algorithm in (0x11, 0x14):
        return tlv.encode(0x86, public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    return tlv.encode(0x86, public.public_bytes(Encoding.Raw, PublicFormat.Raw))
