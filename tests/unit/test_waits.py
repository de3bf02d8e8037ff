"""Which requests a reactor answers itself: those of a session's own objects, and none that the host has to store."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.face.waits import MAY_WAIT, waits
from hsmvisord.wire.calls import Attribute, Call, Mechanism, Request
from support.own_keys import RW, OwnGuest, OwnToken

EC, RSA = Mechanism(ck.CKM_EC_KEY_PAIR_GEN), Mechanism(ck.CKM_RSA_PKCS_KEY_PAIR_GEN)
MINE = limits.FIRST_SESSION_OBJECT
DATA, PRIVATE = Attribute(ck.CKA_CLASS, ck.CKO_DATA), Attribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY)
PUBLIC = Attribute(ck.CKA_CLASS, ck.CKO_PUBLIC_KEY)
OF_TOKEN, OF_SESSION, ODD = (Attribute(ck.CKA_TOKEN, value) for value in (True, False, b"\1\1"))


@pytest.fixture(scope="module")
def guest() -> OwnGuest:
    return OwnToken().guest().begin()


def asked(guest: OwnGuest, call: Call, session: int, *args: Any) -> bool:
    return waits(guest.caller.application_or_none, Request(1, call, (session, *args)))


@pytest.mark.parametrize(
    ("call", "args", "expected"),
    [
        (Call.CREATE_OBJECT, ((DATA,),), False),
        (Call.CREATE_OBJECT, ((DATA, OF_SESSION),), False),
        (Call.CREATE_OBJECT, ((DATA, OF_TOKEN),), True),
        (Call.CREATE_OBJECT, ((DATA, ODD),), True),
        (Call.CREATE_OBJECT, ((DATA, OF_SESSION, OF_TOKEN),), True),
        (Call.CREATE_OBJECT, ((PRIVATE,),), True),
        (Call.CREATE_OBJECT, ((PUBLIC,),), True),
        (Call.CREATE_OBJECT, ((),), True),
        (Call.GENERATE_KEY, (Mechanism(ck.CKM_AES_KEY_GEN), ()), False),
        (Call.GENERATE_KEY, (Mechanism(ck.CKM_AES_KEY_GEN), (OF_TOKEN,)), True),
        (Call.GENERATE_KEY, (None, ()), True),
        (Call.GENERATE_KEY, (Mechanism(0x2000), ()), True),
        (Call.GENERATE_KEY_PAIR, (EC, (OF_SESSION,), ()), False),
        (Call.GENERATE_KEY_PAIR, (EC, (OF_TOKEN,), (OF_SESSION,)), True),
        (Call.GENERATE_KEY_PAIR, (EC, (OF_SESSION,), (OF_TOKEN,)), True),
        (Call.GENERATE_KEY_PAIR, (RSA, (), ()), True),
        (Call.GENERATE_KEY_PAIR, (None, (), ()), True),
        (Call.DERIVE_KEY, (EC, 5, ()), True),
        (Call.UNWRAP_KEY, (EC, 5, b"", ()), True),
        (Call.COPY_OBJECT, (MINE, ()), True),
        (Call.DESTROY_OBJECT, (MINE,), False),
        (Call.DESTROY_OBJECT, (MINE - 1,), True),
        (Call.SET_ATTRIBUTE_VALUE, (MINE, ()), True),
        (Call.INIT_PIN, (b"pin",), True),
        (Call.SET_PIN, (b"pin", b"new"), True),
        (Call.LOGIN, (ck.CKU_USER, b"pin"), True),
    ],
)
def test_of_slot_1(guest: OwnGuest, call: Call, args: tuple[Any, ...], expected: bool) -> None:
    assert call in MAY_WAIT
    assert asked(guest, call, guest.session, *args) is expected


def test_slot_0_stores_nothing_but_pins(guest: OwnGuest) -> None:
    session = guest.open(RW, slot=0)
    for call in (Call.CREATE_OBJECT, Call.DESTROY_OBJECT, Call.SET_PIN):
        assert not asked(guest, call, session, (OF_TOKEN,), ())
    assert not asked(guest, Call.CREATE_OBJECT, 99, (OF_TOKEN,)), "no such session"
    assert asked(guest, Call.LOGIN, session, ck.CKU_USER, b"") and asked(guest, Call.INIT_TOKEN, 1, b"pin", b"label")


def test_whatever_is_answered_at_once_stores_nothing(guest: OwnGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(*_: Any) -> None:
        raise AssertionError("the host was asked")

    monkeypatch.setattr(guest.token.keystore, "_commit", store)
    aes = guest.generate(ck.CKM_AES_KEY_GEN, {ck.CKA_VALUE_LEN: 32})
    guest.create({ck.CKA_CLASS: ck.CKO_DATA})
    guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}, {ck.CKA_SIGN: True})
    guest.call(Call.DESTROY_OBJECT, guest.session, aes)
