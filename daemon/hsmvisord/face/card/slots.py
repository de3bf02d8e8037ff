"""Which material is in which slot of the card: the operator's map, or in the order in which materials came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

AUTHENTICATION, SIGNATURE, KEY_MANAGEMENT, CARD_AUTHENTICATION = 0x9A, 0x9C, 0x9D, 0x9E
RETIRED = range(0x82, 0x96)
SLOTS = (AUTHENTICATION, SIGNATURE, KEY_MANAGEMENT, CARD_AUTHENTICATION, *RETIRED)  #: NIST SP 800-73-4, part 1, table 4b
_NUMBERS = {f"{slot:02x}": slot for slot in SLOTS}
_ORDER = (AUTHENTICATION, *RETIRED)  #: in which materials come that no map names


@dataclass(frozen=True)
class CardSettings:
    slots: tuple[tuple[int, str], ...] = ()  #: slot and material; none: as materials come
    yubikey: bool = False  #: answers what ykcs11 and ykman ask of a YubiKey
    replug: bool = False  #: with another key the whole USB device goes, and comes back under another serial number


def card_settings(values: Any) -> CardSettings:
    """From JSON: {"slots": {"9a": NAME, ...}, "yubikey": false, "replug": false}.  Raises ValueError that names the fault."""
    if not isinstance(values, Mapping) or set(values) - {"slots", "yubikey", "replug"}:
        raise ValueError("a card has slots, yubikey and replug")
    slots, yubikey, replug = values.get("slots") or {}, values.get("yubikey", False), values.get("replug", False)
    if not isinstance(slots, Mapping):
        raise ValueError("a card's slots are an object: slot and material")
    if not isinstance(yubikey, bool) or not isinstance(replug, bool):
        raise ValueError("a card's yubikey and replug are true or false")
    found: dict[int, str] = {}
    for name, material in slots.items():
        number = _NUMBERS.get(str(name).lower())
        if number is None:
            raise ValueError(f"{name!r:.20} is no slot of a card: 9a, 9c, 9d, 9e, 82 to 95")
        if number in found:
            raise ValueError(f"slot {number:02x} of a card is there twice")
        if not isinstance(material, str) or not material:
            raise ValueError(f"slot {number:02x} of a card has a material's name")
        found[number] = material
    if len(set(found.values())) != len(found):
        raise ValueError("a material is in one slot of the card")
    return CardSettings(tuple(sorted(found.items())), yubikey, replug)


def assigned(settings: CardSettings, names: Iterable[str]) -> dict[int, str]:
    """Returns the material of each slot.  `names`: materials that a card knows, in the order in which they came."""
    known = list(names)
    if settings.slots:
        return {slot: material for slot, material in settings.slots if material in known}
    return dict(zip(_ORDER, known, strict=False))
