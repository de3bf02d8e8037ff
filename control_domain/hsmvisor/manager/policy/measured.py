"""What a guest's boot has to be: values of PCRs that an operator names in the manager's configuration.

[measured.golden]
pcrs.4 = "3d45...64 hexadecimal digits"
pcrs.7 = ["e58a...", "b4f1..."]         # either of them

A boot is measured as `golden` where each PCR that stands there has one of its values; others may have any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PCRS = range(24)  #: of a bank (PC Client Platform TPM Profile, 4.6.2)
FIRMWARES = range(8)  #: that each firmware which measures extends
SIZE = 32  #: bytes of a value
MOST_NAMES = 64
MOST_VALUES = 64  #: of one PCR
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VALUE = re.compile(r"[0-9A-Fa-f]{64}")
_SHOWN = 2  #: of what differs, and of the values that would be right


class BadMeasured(ValueError):
    """A table that is not one of these; the message names the key, and what may stand there."""


@dataclass(frozen=True)
class Measured:
    name: str
    pcrs: Mapping[int, tuple[bytes, ...]]  #: of the SHA-256 bank

    def differing(self, found: Mapping[int, bytes]) -> list[int]:
        """Returns the PCRs that have another value, or none that is known."""
        return [number for number, values in sorted(self.pcrs.items()) if found.get(number) not in values]

    def fits(self, found: Mapping[int, bytes]) -> bool:
        return not self.differing(found)

    def told(self, found: Mapping[int, bytes]) -> str:
        """What differs, for people; empty: nothing."""
        wrong = self.differing(found)
        parts = [_told(number, found.get(number), self.pcrs[number]) for number in wrong[:_SHOWN]]
        if len(wrong) > _SHOWN:
            parts.append(f"and PCR {', '.join(map(str, wrong[_SHOWN:]))}")
        return "; ".join(parts)


def _told(number: int, found: bytes | None, wanted: tuple[bytes, ...]) -> str:
    values = " or ".join(value.hex() for value in wanted[:_SHOWN])
    more = f" or {len(wanted) - _SHOWN} others" if len(wanted) > _SHOWN else ""
    return f"PCR {number} is {found.hex() if found else 'not told'}, wanted {values}{more}"


def nearest(known: Iterable[Measured], found: Mapping[int, bytes]) -> str:
    """Says of the one that differs least what differs; empty: one of them fits, or there is none."""
    ranked = sorted(known, key=lambda one: (len(one.differing(found)), one.name))
    told = ranked[0].told(found) if ranked else ""
    return f"{ranked[0].name}: {told}" if told else ""


def parse(untrusted_tables: Mapping[str, Any]) -> dict[str, Measured]:
    """Returns what a configuration's section [measured] says.  Raises BadMeasured."""
    if len(untrusted_tables) > MOST_NAMES:
        raise BadMeasured(f"measured: {len(untrusted_tables)} tables, at most {MOST_NAMES}")
    return {name: _measured(name, table) for name, table in untrusted_tables.items()}


def _measured(name: str, untrusted_table: Any) -> Measured:
    where = f"measured.{name}"
    if not NAME.fullmatch(name):
        raise BadMeasured(f"{where}: a name is 1-64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")
    if not isinstance(untrusted_table, dict) or set(untrusted_table) != {"pcrs"} or not isinstance(untrusted_table["pcrs"], dict):
        raise BadMeasured(f'{where} is a table with pcrs alone, as pcrs = {{ 7 = "64 hexadecimal digits" }}')
    if not untrusted_table["pcrs"]:
        raise BadMeasured(f"{where}.pcrs: no PCR stands there, so every boot would do")
    pcrs: dict[int, tuple[bytes, ...]] = {}
    for key, value in untrusted_table["pcrs"].items():
        if key not in map(str, PCRS):
            raise BadMeasured(f"{where}.pcrs.{key}: a PCR is {PCRS.start} to {PCRS.stop - 1}")
        pcrs[int(key)] = _values(f"{where}.pcrs.{key}", value)
        if int(key) in FIRMWARES and bytes(SIZE) in pcrs[int(key)]:
            raise BadMeasured(
                f"{where}.pcrs.{key}: zeros are what a guest has that measured nothing, and could have extended itself"
            )
    return Measured(name, pcrs)


def _values(where: str, untrusted_value: Any) -> tuple[bytes, ...]:
    texts = untrusted_value if isinstance(untrusted_value, list) else [untrusted_value]
    if not 1 <= len(texts) <= MOST_VALUES or not all(isinstance(one, str) and _VALUE.fullmatch(one) for one in texts):
        raise BadMeasured(f"{where} is a SHA-256 value, 64 hexadecimal digits, or a list of 1 to {MOST_VALUES} of them")
    return tuple(dict.fromkeys(map(bytes.fromhex, texts)))


def either(names: Iterable[str], together: bool = False) -> str:
    """As what a guest has to be measured, for people."""
    return (" and " if together else " or ").join(sorted(names))
