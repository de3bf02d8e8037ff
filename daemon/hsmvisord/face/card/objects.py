"""The card's data objects (NIST SP 800-73-4, part 1, section 3 and appendix A): what GET DATA answers."""

from __future__ import annotations

import hashlib
import uuid

from hsmvisord.face.card.holdings import Contents
from hsmvisord.face.card.slots import AUTHENTICATION, CARD_AUTHENTICATION, KEY_MANAGEMENT, RETIRED, SIGNATURE
from hsmvisord.wire import tlv

CCC, CHUID, DISCOVERY, KEY_HISTORY = 0x5FC107, 0x5FC102, 0x7E, 0x5FC10C
CERTIFICATES: dict[int, int] = {  #: object, to its slot
    0x5FC105: AUTHENTICATION,
    0x5FC10A: SIGNATURE,
    0x5FC10B: KEY_MANAGEMENT,
    0x5FC101: CARD_AUTHENTICATION,
    **{0x5FC10D + at: slot for at, slot in enumerate(RETIRED)},
}
AID = bytes.fromhex("A000000308000010000100")
_FASC_N = bytes.fromhex("D4E739DA739CED39CE739D836858210842108421C84210C3EB")  #: agency 9999: not a federal card
_EXPIRES = b"20991231"
_PIN_POLICY = b"\x40\x00"  #: the card's own PIN


def guid(serial: str, contents: Contents) -> bytes:
    """The card's id: the same for the same module with the same keys, also after a restart; another one with other keys."""
    keys = b"".join(bytes([slot]) + hashlib.sha256(key.spki).digest() for slot, key in sorted(contents.items()))
    digest = hashlib.sha256(b"hsmvisor card " + serial.encode() + b"\0" + keys).digest()
    return uuid.UUID(bytes=digest[:16], version=4).bytes


def chuid(card_id: bytes) -> bytes:
    fields = ((0x30, _FASC_N), (0x34, card_id), (0x35, _EXPIRES), (0x3E, b""), (0xFE, b""))
    return tlv.encode(0x53, b"".join(tlv.encode(tag, value) for tag, value in fields))


def capability_container(card_id: bytes) -> bytes:
    """CCC: all mandatory fields, most of them empty (part 1, appendix A, table 8)."""
    fields = [(0xF0, b"\xa0\x00\x00\x01\x16\xff\x02" + card_id[:14]), (0xF1, b"\x21"), (0xF2, b"\x21")]
    fields += [(tag, b"") for tag in (0xF3, 0xF4)] + [(0xF5, b"\x10")]
    fields += [(tag, b"") for tag in (0xF6, 0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE)]
    return tlv.encode(0x53, b"".join(tlv.encode(tag, value) for tag, value in fields))


def discovery() -> bytes:
    return tlv.encode(DISCOVERY, tlv.encode(0x4F, AID) + tlv.encode(0x5F2F, _PIN_POLICY))


def key_history(contents: Contents) -> bytes:
    """How many retired keys there are, all with their certificates on the card."""
    count = sum(slot in RETIRED for slot in contents)
    return tlv.encode(
        0x53, tlv.encode(0xC1, bytes([count])) + tlv.encode(0xC2, b"\0") + tlv.encode(0xF3, b"") + tlv.encode(0xFE, b"")
    )


def certificate(der: bytes) -> bytes:
    return tlv.encode(0x53, tlv.encode(0x70, der) + tlv.encode(0x71, b"\0") + tlv.encode(0xFE, b""))


def application_property_template() -> bytes:
    """The answer to SELECT (part 2, table 3)."""
    authority = tlv.encode(0x79, tlv.encode(0x4F, AID[:5]))
    label = tlv.encode(0x50, b"hsmvisor PIV")
    return tlv.encode(0x61, tlv.encode(0x4F, AID[5:]) + authority + label)
