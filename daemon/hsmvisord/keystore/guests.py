"""Changes of slot 1: pure functions from a State to the next one.  What is refused raises CkError and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import AnyKey
from hsmvisord.keystore import values
from hsmvisord.keystore.pages import GuestObject, Objects
from hsmvisord.keystore.state import GuestToken, Pin, State

#: What a new object is made of.
Made = tuple[Mapping[int, Any], AnyKey | None]


def size(attributes: Mapping[int, Any], key: bytes) -> int:
    """Returns how many bytes an object counts: those of its attributes and of its key, and what it costs beside them."""
    return limits.OBJECT_COST + len(key) + sum(len(values.encode_value(value)) for value in attributes.values())


def key_bytes(attributes: Mapping[int, Any], key: Any) -> bytes:
    """Returns what is stored of an object's key: what its cryptoprocessor keeps, SubjectPublicKeyInfo; nothing of other objects."""
    if key is None:
        return b""
    found: bytes = key.spki if attributes[ck.CKA_CLASS] == ck.CKO_PUBLIC_KEY else key.stored()
    return found


def used(state: State) -> int:
    return state.objects.size


def added(state: State, made: Sequence[Made]) -> tuple[State, list[GuestObject]]:
    """All of them or none; a key pair is two."""
    objects = [
        GuestObject(state.next_handle + n, attributes, key, size(attributes, key_bytes(attributes, key)))
        for n, (attributes, key) in enumerate(made)
    ]
    after = state.next_handle + len(objects)
    if after > limits.FIRST_SESSION_OBJECT:
        raise CkError(ck.CKR_DEVICE_MEMORY, "the module has used up its handles")
    if len(state.objects) + len(objects) > limits.MAX_GUEST_OBJECTS:
        raise CkError(ck.CKR_DEVICE_MEMORY, f"the token keeps at most {limits.MAX_GUEST_OBJECTS} objects")
    return _within(replace(state, objects=state.objects.with_items(objects), next_handle=after)), objects


def changed(state: State, handle: int, attributes: Mapping[int, Any]) -> State:
    item = _there(state, handle)
    item = replace(item, attributes=attributes, size=size(attributes, key_bytes(attributes, item.key)))
    return _within(replace(state, objects=state.objects.with_items([item])))


def removed(state: State, handle: int) -> State:
    _there(state, handle)
    return replace(state, objects=state.objects.without(handle))


def initialized(state: State, label: bytes, so: Pin) -> State:
    """C_InitToken: all objects go, and so does the user's PIN (5.5.3)."""
    return replace(state, guest=GuestToken(label, so), objects=Objects())


def _there(state: State, handle: int) -> GuestObject:
    try:
        return state.objects[handle]
    except KeyError:
        raise CkError(ck.CKR_OBJECT_HANDLE_INVALID) from None


def _within(state: State) -> State:
    if used(state) > limits.MAX_GUEST_BYTES:
        raise CkError(ck.CKR_DEVICE_MEMORY, f"the token keeps at most {limits.MAX_GUEST_BYTES} bytes of objects")
    return state
