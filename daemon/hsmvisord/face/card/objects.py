"""The card's data objects (NIST SP 800-73-4, part 1, section 3 and appendix A): what GET DATA answers."""

from __future__ import annotations

import hashlib

from hsmvisord.face.card.holdings import Contents
from hsmvisord.face.card.slots import AUTHENTICATION, CARD_AUTHENTICATION, KEY_MANAGEMENT, RETIRED, SIGNATURE
from hsmvisord.wire import tlv
from hsmvisord.wire.usb_descriptors import KEYS_MARK

CCC, CHUID, DISCOVERY, KEY_HISTORY = 0x5FC107, 0x5FC102, 0x7E, 0x5FC10C
CERTIFICATES: dict[int, int] = {  #: object, to its slot
    0x5FC105: AUTHENTICATION,
    0x5FC10A: SIGNATURE,
    0x5FC10B: KEY_MANAGEMENT,
    0x5FC101: CARD_AUTHENTICATION,
    **{0x5FC10D + at: slot for at, slot in enumerate(RETIRED)},
}
AID = bytes.fromhex("A000000308000010000100")
_OBJECT = 0x53
_FASC_N = bytes.fromhex("D4E739DA739CED39CE739D836858210842108421C84210C3EB")  #: agency 9999: not a federal card
_EXPIRES = b"20991231"
_PIN_POLICY = b"\x40\x00"  #: the application's own PIN, and no other (3.3.2)


def guid(serial: str, contents: Contents) -> bytes:
    """The card's id: the same for the same module with the same keys, also after a restart; another one with other keys.

    A UUID of what its maker likes, here of a digest (RFC 9562, 5.8).
    """
    made = bytearray(hashlib.sha256(b"hsmvisor card\0" + serial.encode() + b"\0" + _keys(contents)).digest()[:16])
    made[6], made[8] = 0x80 | made[6] & 0x0F, 0x80 | made[8] & 0x3F  # version 8, the variant of RFC 9562
    return bytes(made)


def serial_number(name: str, contents: Contents) -> str:
    """Of the USB device of a card that is another device for other keys: NAME~DIGEST, the same for the same keys."""
    return f"{name}{KEYS_MARK}{hashlib.sha256(_keys(contents)).hexdigest()[:8]}"


def _keys(contents: Contents) -> bytes:
    return b"".join(bytes([slot]) + hashlib.sha256(key.spki).digest() for slot, key in sorted(contents.items()))


def _made(*fields: tuple[int, bytes]) -> bytes:
    return tlv.encode(_OBJECT, b"".join(tlv.encode(tag, value) for tag, value in fields))


def chuid(card_id: bytes) -> bytes:
    """Without a signature: no issuer of a federation has made this card."""
    return _made((0x30, _FASC_N), (0x34, card_id), (0x35, _EXPIRES), (0x3E, b""), (0xFE, b""))


def capability_container(card_id: bytes) -> bytes:
    """CCC: all mandatory fields, most of them empty (appendix A, table 8)."""
    identifier = bytes.fromhex("A000000116FF02") + card_id[:14]
    empty = [(tag, b"") for tag in (0xF6, 0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE)]
    return _made((0xF0, identifier), (0xF1, b"\x21"), (0xF2, b"\x21"), (0xF3, b""), (0xF4, b"\0"), (0xF5, b"\x10"), *empty)


DISCOVERY_OBJECT = tlv.encode(DISCOVERY, tlv.encode(0x4F, AID) + tlv.encode(0x5F2F, _PIN_POLICY))


def key_history(contents: Contents) -> bytes:
    """How many retired keys have their certificates on the card: clients look at so many slots from the first one on, so those of
    a map with gaps count too (3.3.3).  None is kept elsewhere, so there is no URL."""
    certified = [slot for slot in RETIRED if slot in contents and contents[slot].certificate]
    count = certified[-1] - RETIRED[0] + 1 if certified else 0
    return _made((0xC1, bytes([count])), (0xC2, b"\0"), (0xFE, b""))


def certificate(der: bytes) -> bytes:
    """CertInfo 0: it is not compressed (appendix A, table 10)."""
    return _made((0x70, der), (0x71, b"\0"), (0xFE, b""))


#: The answer to SELECT (part 2, table 3).
APPLICATION_PROPERTY_TEMPLATE = tlv.encode(
    0x61, tlv.encode(0x4F, AID[5:]) + tlv.encode(0x79, tlv.encode(0x4F, AID[:5])) + tlv.encode(0x50, b"hsmvisor PIV")
)
