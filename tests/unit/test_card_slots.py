"""Which material is in which slot of a card."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord.face.card import objects
from hsmvisord.face.card.slots import SLOTS, CardSettings, assigned, card_settings
from hypothesis import given
from hypothesis import strategies as st
from support.keystores import Bench
from support.smart_card import (
    OBJECTS,
    CardRig,
    Refused,
    der,
    shared_key,
)


def test_materials_fill_slots_as_they_came() -> None:
    rig = CardRig()
    for name, kind in (("zeta", "p256"), ("old", "p521"), ("alpha", "p384"), ("edwards", "ed25519")):
        rig.push(name, kind, profile="any")
    rig.bench.stage(1, shared_key("p256"), "staged", chained=True)
    rig.connect()
    assert [slot for slot in SLOTS if has(rig, slot)] == [0x9A, 0x82, 0x83]
    assert der(rig.certificate(0x82)) == leaf(rig.bench, "alpha"), "P-521 is nothing that PIV knows"
    assert der(rig.certificate(0x83)) == leaf(rig.bench, "edwards")


def has(rig: CardRig, slot: int) -> bool:
    try:
        rig.get(OBJECTS[slot])
    except Refused:
        return False
    return True


def leaf(bench: Bench, material: str) -> bytes:
    current = bench.keystore.state.materials[material].current
    assert current is not None
    return bench.keystore.state.certificates[current.leaf].der


@given(st.lists(st.text(min_size=1, max_size=5), max_size=40, unique=True))
def test_slots_without_a_map(names: list[str]) -> None:
    slots = assigned(CardSettings(), names)
    assert list(slots.values()) == names[:21]
    assert list(slots)[:3] == [0x9A, 0x82, 0x83][: len(slots)]
    assert 0x9C not in slots and 0x9E not in slots


def test_a_map_names_all_that_is_shown() -> None:
    settings = card_settings({"slots": {"9d": "seal", "95": "last"}})
    assert assigned(settings, ["web", "last", "seal"]) == {0x95: "last", 0x9D: "seal"}
    assert assigned(settings, ["web"]) == {}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "slots, yubikey and replug"),
        ({"slot": {}}, "slots, yubikey and replug"),
        ({"slots": ["9a"]}, "an object"),
        ({"slots": {"9b": "tls"}}, "'9b' is no slot"),
        ({"slots": {"0x9a": "tls"}}, "no slot"),
        ({"slots": {"81": "tls"}}, "no slot"),
        ({"slots": {"96": "tls"}}, "no slot"),
        ({"slots": {" 9a": "tls"}}, "no slot"),
        ({"slots": {154: "tls"}}, "no slot"),
        ({"slots": {"9a": ""}}, "slot 9a of a card has a material's name"),
        ({"slots": {"9a": 1}}, "slot 9a of a card has a material's name"),
        ({"slots": {"9a": "tls", "9A": "web"}}, "slot 9a of a card is there twice"),
        ({"slots": {"9a": "tls", "9c": "tls"}}, "one slot"),
        ({"yubikey": 1}, "true or false"),
        ({"yubikey": "no"}, "true or false"),
        ({"replug": 1}, "true or false"),
        ({"replug": None}, "true or false"),
    ],
)
def test_settings_that_cannot_be(values: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        card_settings(values)


def test_settings() -> None:
    assert card_settings({}) == CardSettings()
    assert card_settings({"replug": True}) == CardSettings(replug=True)
    assert card_settings({"slots": {"9E": "door", "9a": "tls"}, "yubikey": True}) == CardSettings(
        ((0x9A, "tls"), (0x9E, "door")), True
    )


def test_every_slot_has_an_object() -> None:
    assert set(objects.CERTIFICATES.values()) == set(SLOTS)
    assert {slot: tag for tag, slot in objects.CERTIFICATES.items()} == OBJECTS
