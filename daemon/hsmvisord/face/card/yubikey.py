"""What ykcs11, yubico-piv-tool and ykman ask of a YubiKey's PIV application beside the standard: Yubico's GET VERSION, GET SERIAL
and GET METADATA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from hsmvisord.face.card.holdings import Contents, SlotKey
from hsmvisord.face.card.slots import CARD_AUTHENTICATION, SIGNATURE
from hsmvisord.keystore import pin
from hsmvisord.wire import tlv

GET_METADATA, GET_SERIAL, GET_VERSION = 0xF7, 0xF8, 0xFD
VERSION = bytes([5, 4, 3])

_PIN, _PUK, _MANAGEMENT = 0x80, 0x81, 0x9B  #: key references
_ALGORITHM, _POLICY, _ORIGIN, _PUBLIC, _IS_DEFAULT, _RETRIES = range(1, 7)  #: tags
_NEVER, _ONCE, _ALWAYS = 1, 2, 3  #: PIN policies
_NO_TOUCH = 1
_GENERATED, _IMPORTED = 1, 2
_TDES, _OF_A_PIN = b"\x03", b"\xff"
_NOT_DEFAULT = b"\0"


def serial_number(serial: str) -> bytes:
    """Four bytes that a YubiKey would have printed on it; below 2^31."""
    digest = hashlib.sha256(serial.encode()).digest()
    return bytes([digest[0] & 0x7F]) + digest[1:4]


def metadata(what: int, tries_left: int, contents: Contents) -> bytes | None:
    """Returns what is told of a PIN, a slot's key or the management key; None of what there is not."""
    key = contents.get(what)
    fields: Mapping[int, bytes]
    if key is not None:
        policy = {SIGNATURE: _ALWAYS, CARD_AUTHENTICATION: _NEVER}.get(what, _ONCE)
        fields = {
            _ALGORITHM: bytes([key.algorithm]),
            _POLICY: bytes([policy, _NO_TOUCH]),
            _ORIGIN: bytes([_GENERATED if key.made_here else _IMPORTED]),
            _PUBLIC: _public(key),
        }
    elif what == _PIN:
        fields = {_ALGORITHM: _OF_A_PIN, _IS_DEFAULT: _NOT_DEFAULT, _RETRIES: bytes([pin.FREE_ATTEMPTS, tries_left])}
    elif what == _PUK:  # there is none, so nobody has a try
        fields = {_ALGORITHM: _OF_A_PIN, _IS_DEFAULT: _NOT_DEFAULT, _RETRIES: bytes([pin.FREE_ATTEMPTS, 0])}
    elif what == _MANAGEMENT:  # nor is there this one; yubikit wants to know its type before anything else
        fields = {_ALGORITHM: _TDES, _POLICY: bytes([0, _NO_TOUCH]), _IS_DEFAULT: _NOT_DEFAULT}
    else:
        return None
    return b"".join(tlv.encode(tag, value) for tag, value in fields.items())


def _public(key: SlotKey) -> bytes:
    public = load_der_public_key(key.spki)
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        exponent = numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")
        return tlv.encode(0x81, numbers.n.to_bytes((public.key_size + 7) // 8, "big")) + tlv.encode(0x82, exponent)
    if isinstance(public, ec.EllipticCurvePublicKey):
        return tlv.encode(0x86, public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    return tlv.encode(0x86, public.public_bytes(Encoding.Raw, PublicFormat.Raw))
