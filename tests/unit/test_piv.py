"""The PIV application as a client meets it through the reader: objects, the PIN, and what is refused."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisord import ck
from hsmvisord.face.card.slots import SLOTS, CardSettings, card_settings
from hsmvisord.keystore import pin
from hsmvisord.wire import tlv
from support.smart_card import (
    CCC,
    CHUID,
    DIGEST,
    DISCOVERY,
    KEY_HISTORY,
    OBJECTS,
    P_256,
    PIN,
    PIV,
    CardRig,
    der,
    extended,
    one_key,
    refused,
    short,
)


@pytest.fixture
def rig() -> CardRig:
    """A slot of each role, and two retired ones with a gap."""
    settings = card_settings({"slots": {"9a": "a", "9C": "c", "9d": "d", "9e": "e", "82": "r", "85": "s", "95": "none"}})
    rig = CardRig(settings=settings)
    for name in "acders":
        rig.push(name, key=None if name == "a" else ec.generate_private_key(ec.SECP256R1()))
    rig.connect()
    return rig


# ---- SELECT and objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 9, 11])
def test_select(rig: CardRig, size: int) -> None:
    aid = bytes.fromhex("A000000308000010000100")
    ((tag, value),) = tlv.decode(rig.select(aid[:size]))
    fields = dict(tlv.decode(value))
    assert tag == 0x61
    assert fields[0x4F] == aid[5:], "the version too"
    assert tlv.decode(fields[0x79]) == [(0x4F, PIV)]


@pytest.mark.parametrize(
    "aid", ["A0000003", "A000000308000010000101", "A00000030800001000010000", "A0000005272001", "D27600012401", ""]
)
def test_applications_that_there_are_not(rig: CardRig, aid: str) -> None:
    """The one that there is stays selected, with what was verified (SP 800-73-4, part 2, 3.1.1)."""
    rig.set_pin()
    rig.verify()
    refused(0x6A82, rig.select, bytes.fromhex(aid))
    rig.verified()
    rig.select()
    rig.verified()


def test_select_in_another_way(rig: CardRig) -> None:
    refused(0x6A86, rig.send, short(0, 0xA4, 0, 0, b"\x3f\x00"))
    refused(0x6A86, rig.send, short(0, 0xA4, 4, 2, PIV))


def test_piv_is_there_without_select(rig: CardRig) -> None:
    """OpenSC reads the discovery object of a card whose ATR it knows, and selects nothing."""
    assert rig.get(DISCOVERY)


def test_the_card_names_itself(rig: CardRig) -> None:
    fields = rig.object(CHUID)
    assert list(fields) == [0x30, 0x34, 0x35, 0x3E, 0xFE]
    assert fields[0x30].hex().startswith("d4e739da739c") and len(fields[0x30]) == 25
    assert uuid.UUID(bytes=fields[0x34]).variant == uuid.RFC_4122
    assert uuid.UUID(bytes=fields[0x34]).version == 8
    assert fields[0x35].isdigit()
    container = rig.object(CCC)
    assert container[0xF0][:7] == bytes.fromhex("A000000116FF02") and len(container[0xF0]) == 21
    assert list(container) == [0xF0, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE]


def test_discovery(rig: CardRig) -> None:
    assert rig.get(DISCOVERY).hex() == "7e124f0ba0000003080000100001005f2f024000"


def test_certificates(rig: CardRig) -> None:
    seen = {slot: der(rig.certificate(slot)) for slot in (0x9A, 0x9C, 0x9D, 0x9E, 0x82, 0x85)}
    assert len(set(seen.values())) == 6
    stored = {c.der for c in rig.bench.keystore.state.certificates.values() if not c.authority}
    assert set(seen.values()) == stored


def test_objects_that_there_are_not(rig: CardRig) -> None:
    empty = [OBJECTS[slot] for slot in SLOTS if slot not in (0x9A, 0x9C, 0x9D, 0x9E, 0x82, 0x85)]
    for tag in (0x5FC103, 0x5FC106, 0x5FC108, 0x5FC109, 0x5FC121, 0x7F61, 0x5FFF01, 0x53, *empty):
        refused(0x6A82, rig.get, tag)


def test_key_history_counts_from_the_first_slot_on(rig: CardRig) -> None:
    """Clients look at so many retired slots in a row (82 to 85 here: two of them are empty)."""
    assert rig.object(KEY_HISTORY) == {0xC1: b"\4", 0xC2: b"\0", 0xFE: b""}
    bare = CardRig()
    bare.connect()
    assert bare.object(KEY_HISTORY)[0xC1] == b"\0"


@pytest.mark.parametrize("data", ["", "5C00", "5D035FC102", "5C035FC10253", "5C035FC1025C035FC102", "5C84000000", "5C035FC1"])
def test_get_data_of_nothing(rig: CardRig, data: str) -> None:
    refused(0x6A82 if data == "5C00" else 0x6A80, rig.send, short(0, 0xCB, 0x3F, 0xFF, bytes.fromhex(data)))
    refused(0x6A86, rig.send, short(0, 0xCB, 0x3F, 0, b"\x5c\x01\x7e"))


def test_a_long_certificate_in_short_and_extended_apdus() -> None:
    rig = CardRig()
    authority = rig.bench.authority
    rig.push("tls", "rsa3072")
    rig.connect()
    wanted = b"\x5c\x03\x5f\xc1\x05"
    whole = rig.exchange(extended(0, 0xCB, 0x3F, 0xFF, wanted))
    assert whole[-2:] == b"\x90\0" and rig.get(0x5FC105) == whole[:-2]
    assert len(whole) > 2 * 256
    assert authority.intermediate.subject == rig.certificate(0x9A).issuer


def test_no_class_but_the_first(rig: CardRig) -> None:
    for cla in (0x0C, 0x80, 0x01, 0x84):
        refused(0x6E00, rig.send, short(cla, 0xCB, 0x3F, 0xFF, b"\x5c\x01\x7e"))


# ---- the PIN ------------------------------------------------------------------------------------------------------------


def test_without_a_pin_any_is_taken() -> None:
    rig = one_key()
    rig.verified()
    rig.verify(b"0000")
    rig.verified()
    rig.use(0x9A, P_256, DIGEST)


def test_the_pin_is_that_of_slot_0(rig: CardRig) -> None:
    rig.read(0x9A)
    rig.set_pin()
    refused(0x63C3, rig.verified)
    refused(0x6982, rig.use, 0x9A, P_256, DIGEST)
    rig.verify()
    rig.verified()
    rig.use(0x9A, P_256, DIGEST)
    rig.send(short(0, 0x20, 0xFF, 0x80, b"", None))
    refused(0x63C3, rig.verified)
    refused(0x6982, rig.use, 0x9A, P_256, DIGEST)


def test_wrong_pins_count_for_the_whole_token(rig: CardRig) -> None:
    rig.set_pin()
    rig.verify()
    for left in (2, 1, 0):
        refused(0x63C0 | left, rig.verify, b"000000")
        if left:
            refused(0x63C0 | left, rig.verified)
    assert rig.token.index.state.pin.failures == pin.FREE_ATTEMPTS
    refused(0x6983, rig.verify, PIN)
    refused(0x6983, rig.verified)
    rig.bench.now += 1
    refused(0x63C1, rig.verified)
    refused(0x63C0, rig.verify, b"000000")
    refused(0x6983, rig.verify, PIN)
    rig.bench.now += 2
    rig.verify()
    rig.verified()
    assert rig.token.index.state.pin.failures == 0


def test_a_pin_that_is_locked_elsewhere_leaves_what_was_verified(rig: CardRig) -> None:
    """Nothing was compared (SP 800-73-4, part 2, 3.2.1)."""
    rig.read(0x9A)
    rig.set_pin()
    rig.verify()
    for _ in range(3):
        with pytest.raises(ck.CkError):
            rig.token.try_pin(b"000000")
    refused(0x6983, rig.verify, PIN)
    rig.use(0x9A, P_256, DIGEST)


def test_a_wrong_pin_ends_what_was_verified(rig: CardRig) -> None:
    rig.read(0x9A)
    rig.set_pin()
    rig.verify()
    refused(0x63C2, rig.verify, b"000000")
    refused(0x6982, rig.use, 0x9A, P_256, DIGEST)


@pytest.mark.parametrize("end", [lambda rig: rig.set_pin(b"654321"), lambda rig: rig.set_pin(PIN)])
def test_a_new_pin_ends_what_was_verified(rig: CardRig, end: Any) -> None:
    rig.set_pin()
    rig.verify()
    end(rig)
    refused(0x63C3, rig.verified)
    rig.set_pin(b"")
    rig.verified()


def test_a_pin_that_comes_later_is_needed(rig: CardRig) -> None:
    rig.verify(b"anything")
    rig.set_pin()
    refused(0x63C3, rig.verified)


@pytest.mark.parametrize("data", [b"", b"123456", b"123456\xff", b"12345678\xff", b"\xff" * 8, b"123\xff\xff\xff\xff\xff"])
def test_what_cannot_be_a_pin_counts_for_nothing(rig: CardRig, data: bytes) -> None:
    rig.set_pin()
    refused(0x6A80 if data else 0x63C3, rig.send, short(0, 0x20, 0, 0x80, data, None))
    refused(0x63C3, rig.verified)


def test_the_shortest_and_the_longest_pin(rig: CardRig) -> None:
    for value in (b"1234", b"12345678"):
        rig.set_pin(value)
        rig.verify(value)
        rig.verified()


@pytest.mark.parametrize("reference", [0x00, 0x81, 0x96, 0x97, 0x98, 0x9B])
def test_other_references(rig: CardRig, reference: int) -> None:
    refused(0x6A88, rig.send, short(0, 0x20, 0, reference, b"", None))
    refused(0x6A88, rig.send, short(0, 0x20, 0, reference, PIN + b"\xff\xff", None))


def test_verify_in_ways_that_there_are_not(rig: CardRig) -> None:
    refused(0x6A86, rig.send, short(0, 0x20, 1, 0x80, b"", None))
    refused(0x6A80, rig.send, short(0, 0x20, 0xFF, 0x80, PIN, None))


def test_a_try_that_cannot_be_stored(rig: CardRig) -> None:
    rig.set_pin()
    rig.bench.full = True
    refused(0x6581, rig.verify, b"000000")
    rig.bench.full = False
    refused(0x63C3, rig.verified)


def test_the_signature_key_wants_the_pin_for_each_use(rig: CardRig) -> None:
    rig.read(0x9A, 0x9C, 0x9D)
    rig.set_pin()
    refused(0x6982, rig.use, 0x9C, P_256, DIGEST)
    rig.verify()
    rig.get(DISCOVERY)
    rig.select()
    rig.use(0x9C, P_256, DIGEST)
    refused(0x6982, rig.use, 0x9C, P_256, DIGEST)
    rig.verified()
    rig.use(0x9A, P_256, DIGEST)
    rig.verify()
    rig.use(0x9D, P_256, DIGEST)
    refused(0x6982, rig.use, 0x9C, P_256, DIGEST)
    rig.verify()
    refused(0x6A80, rig.use, 0x9C, P_256, b"")
    refused(0x6982, rig.use, 0x9C, P_256, DIGEST)


def test_the_card_authentication_key_wants_no_pin(rig: CardRig) -> None:
    rig.read(0x9E)
    rig.set_pin()
    rig.use(0x9E, P_256, DIGEST)
    refused(0x6982, rig.use, 0x82, P_256, DIGEST)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_yubikey", [False, True])
@pytest.mark.parametrize(
    ("command", "sw"),
    [
        (short(0, 0xDB, 0x3F, 0xFF, bytes.fromhex("5C035FC1055300")), 0x6982),  # PUT DATA
        (short(0, 0x47, 0, 0x9A, bytes.fromhex("AC03800111")), 0x6982),  # GENERATE ASYMMETRIC KEY PAIR
        (short(0, 0x24, 0, 0x80, b"123456\xff\xff654321\xff\xff"), 0x6D00),  # CHANGE REFERENCE DATA
        (short(0, 0x24, 0, 0x81, b"1234567812345678"), 0x6D00),
        (short(0, 0x2C, 0, 0x80, b"12345678654321\xff\xff"), 0x6D00),  # RESET RETRY COUNTER
        (short(0, 0xF6, 0x82, 0x9A), 0x6D00),  # MOVE KEY
        (short(0, 0xF9, 0x9A, 0), 0x6D00),  # ATTEST
        (short(0, 0xFA, 3, 3), 0x6D00),  # SET PIN RETRIES
        (short(0, 0xFB, 0, 0), 0x6D00),  # RESET
        (short(0, 0xFE, P_256, 0x9A, b"\6\1\1"), 0x6D00),  # IMPORT
        (short(0, 0xFF, 0xFF, 0xFF, b"\x03\x9b\x18" + bytes(24)), 0x6D00),  # SET MANAGEMENT KEY
        (short(0, 0x84, 0, 0, b"", 8), 0x6D00),  # GET CHALLENGE
        (short(0, 0xCA, 0, 0), 0x6D00),
    ],
)  # fmt: skip
def test_what_would_change_the_card_is_refused(rig: CardRig, command: bytes, sw: int, is_yubikey: bool) -> None:
    rig.card.settings = CardSettings(rig.card.settings.slots, is_yubikey)
    rig.set_pin()
    rig.verify()
    before = rig.bench.keystore.state
    refused(sw, rig.send, command)
    assert rig.bench.keystore.state is before


@pytest.mark.parametrize("ins", [0xF7, 0xF8, 0xFD])
def test_a_card_of_the_standard_is_no_yubikey(rig: CardRig, ins: int) -> None:
    refused(0x6D00, rig.send, short(0, ins, 0, 0x9A))
