"""PINs and what keys have decrypted: in no repr, no exception's text, and nowhere in a card that has dealt with them."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hsmvisord.ck import CkError
from hsmvisord.wire import apdu, ccid
from hsmvisord.wire.apdu import BadApdu, ResponseApdu
from hsmvisord.wire.ccid import Command
from support.smart_card import PIN, RSA_2048, CardRig, Refused, extended, message, shared_key, short, template

PLAIN = b"what was sealed to the key"
WRONG = b"000000"
VERIFY = short(0, 0x20, 0, 0x80, PIN.ljust(8, b"\xff"), None)
CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def shows(text: str, secret: bytes) -> bool:
    return any(form in text for form in (secret.decode(), secret.hex(), repr(secret)[2:-1], ", ".join(map(str, secret))))


def reached(*roots: Any) -> Iterator[Any]:
    """All that these objects hold, however far; no code, and no constants of it."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, CODE):
            continue
        seen.add(id(one))
        yield one
        todo.extend(gc.get_referents(one))


def held(secret: bytes, *roots: Any) -> list[Any]:
    return [one for one in reached(*roots) if isinstance(one, bytes | bytearray | memoryview) and secret in bytes(one)]


@pytest.fixture
def rig() -> CardRig:
    rig = CardRig()
    rig.push("seal", "rsa2048", profile="decrypt")
    rig.set_pin()
    rig.connect()
    rig.read(0x9A)
    return rig


def test_reprs() -> None:
    asked = ccid.decode(message(Command.XFR_BLOCK, VERIFY))
    command = apdu.decode(VERIFY)
    for text in (repr(asked), str(asked), repr(command), f"{command}", repr([command])):
        assert not shows(text, PIN), text
    assert command.data.startswith(PIN) and asked.data == VERIFY
    assert "00200080, 8 bytes" in repr(command) and "13 bytes" in repr(asked)
    response = ResponseApdu(PLAIN, 0x9000)
    assert not shows(repr(response), PLAIN) and "9000" in repr(response)


def test_a_wrong_pin_is_told_by_its_status_word_alone(rig: CardRig) -> None:
    with pytest.raises(BadApdu) as caught:
        rig.card._piv.handle(apdu.decode(short(0, 0x20, 0, 0x80, WRONG + b"\xff\xff", None)))
    assert str(caught.value) == "63C2"
    with pytest.raises(CkError) as refused:
        rig.token.try_pin(WRONG)
    assert not shows(str(refused.value), WRONG)


def test_a_verified_card_does_not_know_the_pin(rig: CardRig) -> None:
    """In one block, in blocks, in a chain; right and wrong."""
    rig.exchange(VERIFY)
    rig.ask(Command.XFR_BLOCK, VERIFY[:9], b"\0\1\0")
    assert held(VERIFY[5:9], rig.reader), "that it is looked for in vain is no proof: here it is"
    assert rig.ask(Command.XFR_BLOCK, VERIFY[9:], b"\0\2\0")[10:] == b"\x90\0"
    rig.exchange(short(0x10, 0x20, 0, 0x80, PIN[:4], None))
    assert held(PIN[:4], rig.reader)
    assert rig.exchange(short(0, 0x20, 0, 0x80, PIN[4:] + b"\xff\xff", None)) == b"\x90\0"
    with pytest.raises(Refused, match="63C2"):
        rig.verify(WRONG)
    rig.verify()
    rig.verified()
    assert held(PIN, rig.reader, rig.card, rig.token) == []
    assert held(WRONG, rig.reader, rig.card, rig.token) == []


@pytest.mark.parametrize("end", ["power off", "power on", "reset", "out"])
def test_half_a_pin_ends_with_the_cards_power(rig: CardRig, end: str) -> None:
    """Also the half of a command, and the half of a chain."""
    rig.exchange(short(0x10, 0x20, 0, 0x80, PIN, None))
    rig.ask(Command.XFR_BLOCK, VERIFY[:12], b"\0\1\0")
    assert len(held(PIN, rig.reader)) == 2
    match end:
        case "power off":
            rig.ask(Command.ICC_POWER_OFF)
        case "power on":
            rig.ask(Command.ICC_POWER_ON)
        case "reset":
            rig.reader.power_down()
        case "out":
            rig.bench.keystore.set_token_present(False)
            rig.look()
    assert held(PIN, rig.reader) == []


def test_what_was_decrypted_is_given_and_gone(rig: CardRig) -> None:
    key = shared_key("rsa2048")
    assert isinstance(key, rsa.RSAPrivateKey)
    sealed = key.public_key().encrypt(PLAIN, padding.PKCS1v15())
    rig.verify()
    assert rig.use(0x9A, RSA_2048, sealed).endswith(b"\0" + PLAIN)
    assert held(PLAIN, rig.reader, rig.card, rig.token) == []


@pytest.mark.parametrize("after", [short(0, 0xC0, 0, 0), short(0, 0xCB, 0x3F, 0xFF, b"\x5c\x01\x7e"), None])
def test_the_rest_of_an_answer_waits_no_longer_than_for_the_next_command(rig: CardRig, after: bytes | None) -> None:
    key = shared_key("rsa2048")
    assert isinstance(key, rsa.RSAPrivateKey)
    sealed = key.public_key().encrypt(PLAIN, padding.PKCS1v15())
    rig.verify()
    assert rig.exchange(extended(0, 0x87, RSA_2048, 0x9A, template(0x81, sealed), 240))[-2] == 0x61
    assert held(PLAIN[-20:], rig.reader), "here it is"
    if after is None:
        rig.ask(Command.ICC_POWER_OFF)
    else:
        rig.exchange(after)
    assert held(PLAIN[-20:], rig.reader) == []
