"""A good record with one field replaced by what the input says: reaches past the decoder, into what is made of a record."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from fuzz.harness import Input
from hsmvisor_rpc.sealed.canonical import Record

R = TypeVar("R", bound=Record)


def varied(record: R, given: Input) -> R:
    """Takes `u8` field, `u64` number, block of text: one of the two becomes the field's value, by its type."""
    names = [f.name for f in fields(record)]
    if not names:
        return record
    name, number, text = names[given.byte() % len(names)], int.from_bytes(given.take(8), "big"), given.block()
    return replace(record, **{name: like(getattr(record, name), number, text)})


def like(value: Any, number: int, text: bytes) -> Any:
    match value:
        case bool():
            return bool(number & 1)
        case int():
            return number
        case str():
            return text.decode("utf-8", "replace")
        case bytes():
            return text
        case (first, *_):
            return (*value[1:], like(first, number, text))
    return ()
