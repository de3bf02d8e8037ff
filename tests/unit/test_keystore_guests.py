"""Slot 1 in the sealed state: objects and PINs come back as they were, limits hold, and what is refused changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import generation
from hsmvisord.crypto.interface import Wanted
from hsmvisord.keystore import guests, persistence, values
from hsmvisord.keystore.keystore import StorageError
from hsmvisord.keystore.vault import UnsealError
from hypothesis import given
from hypothesis import strategies as st
from support.keystores import Bench

DATA: dict[int, Any] = {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_TOKEN: True, ck.CKA_LABEL: b"note", ck.CKA_VALUE: b"\0" * 20}
SECRET: dict[int, Any] = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_SENSITIVE: True}
PRIVATE: dict[int, Any] = {
    ck.CKA_CLASS: ck.CKO_PRIVATE_KEY,
    ck.CKA_KEY_TYPE: ck.CKK_EC,
    ck.CKA_UNWRAP_TEMPLATE: ((ck.CKA_SIGN, True),),
}
PUBLIC: dict[int, Any] = {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_ALLOWED_MECHANISMS: (ck.CKM_ECDSA,)}
SO, USER, LABEL = b"officer1", b"user 1", b"a token".ljust(32)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(rv: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments)
    assert caught.value.rv == rv, caught.value


def test_objects_come_back(bench: Bench) -> None:
    pair = generation.key_pair(ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06082a8648ce3d030107")))
    secret = generation.secret(ck.CKM_AES_KEY_GEN, 32)
    made = [(DATA, None), (SECRET, secret), (PRIVATE, pair), (PUBLIC, pair.public)]
    objects = bench.keystore.add_objects(made)
    handles = [item.handle for item in objects]
    assert handles == list(range(handles[0], handles[0] + 4)) and handles[-1] < limits.FIRST_SESSION_OBJECT
    bench.keystore.change_object(handles[0], DATA | {ck.CKA_LABEL: b"changed"})
    bench.restart()
    again = bench.keystore.state.objects
    assert [again[h].attributes for h in handles] == [DATA | {ck.CKA_LABEL: b"changed"}, SECRET, PRIVATE, PUBLIC]
    keys: list[Any] = [again[h].key for h in handles]
    assert keys[0] is None and keys[1].value == secret.value
    assert keys[2].pkcs8() == pair.pkcs8() and keys[3].spki == pair.public.spki
    bench.keystore.remove_object(handles[1])
    bench.restart()
    assert sorted(bench.keystore.state.objects) == [handles[0], *handles[2:]]
    assert not [name for name in bench.stored if name == f"object/{handles[1]}"]
    (new,) = bench.keystore.add_objects([(DATA, None)])
    assert new.handle > handles[-1], "a handle is given once"


def test_no_record_shows_a_secret(bench: Bench) -> None:
    secret = generation.secret(ck.CKM_AES_KEY_GEN, 32)
    bench.keystore.add_objects([(SECRET, secret)])
    assert secret.value.hex() not in repr(bench.keystore.state)
    assert not [name for name, blob in bench.stored.items() if secret.value[:16] in blob]


def test_what_is_not_stored_has_not_happened(bench: Bench) -> None:
    (item,) = bench.keystore.add_objects([(DATA, None)])
    before, stored = bench.keystore.state, dict(bench.stored)
    bench.full = True
    for call in (
        lambda: bench.keystore.add_objects([(DATA, None)]),
        lambda: bench.keystore.change_object(item.handle, DATA),
        lambda: bench.keystore.remove_object(item.handle),
        lambda: bench.keystore.initialize_guest(LABEL, SO),
    ):
        with pytest.raises(StorageError):
            call()
    assert bench.keystore.state is before and bench.stored == stored


def test_objects_that_are_not_there(bench: Bench) -> None:
    for call in (bench.keystore.remove_object, lambda handle: bench.keystore.change_object(handle, DATA)):
        refused(ck.CKR_OBJECT_HANDLE_INVALID, call, 5)


def test_how_many_and_how_much(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_GUEST_OBJECTS", 3)
    bench.keystore.add_objects([(DATA, None)] * 2)
    refused(ck.CKR_DEVICE_MEMORY, bench.keystore.add_objects, [(DATA, None)] * 2)
    first, *_ = bench.keystore.add_objects([(DATA, None)])
    refused(ck.CKR_DEVICE_MEMORY, bench.keystore.add_objects, [(DATA, None)])
    monkeypatch.setattr(limits, "MAX_GUEST_BYTES", guests.used(bench.keystore.state))
    bench.keystore.change_object(first.handle, DATA | {ck.CKA_LABEL: b"name"})
    refused(ck.CKR_DEVICE_MEMORY, bench.keystore.change_object, first.handle, DATA | {ck.CKA_LABEL: b"names"})
    assert len(bench.keystore.state.objects) == 3


def test_keys_count_too(bench: Bench) -> None:
    pair = generation.key_pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048))
    rsa = PRIVATE | {ck.CKA_KEY_TYPE: ck.CKK_RSA}
    (item,) = bench.keystore.add_objects([(rsa, pair)])
    assert item.size > len(pair.pkcs8()) + limits.OBJECT_COST
    bench.keystore.change_object(item.handle, rsa)
    assert bench.keystore.state.objects[item.handle].size == item.size
    bench.restart()
    assert bench.keystore.state.objects[item.handle].size == item.size


def test_handles_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_SESSION_OBJECT", bench.keystore.state.next_handle + 1)
    bench.keystore.add_objects([(DATA, None)])
    refused(ck.CKR_DEVICE_MEMORY, bench.keystore.add_objects, [(DATA, None)])


def test_a_guest_does_not_have_its_host_store_without_end(bench: Bench) -> None:
    (item,) = bench.keystore.add_objects([(DATA, None)])
    for _ in range(limits.STORE_BURST - 1):
        bench.keystore.change_object(item.handle, DATA)
    refused(ck.CKR_FUNCTION_REJECTED, bench.keystore.change_object, item.handle, DATA)
    bench.now += 1
    for _ in range(int(limits.STORE_RATE)):
        bench.keystore.change_object(item.handle, DATA)
    refused(ck.CKR_FUNCTION_REJECTED, bench.keystore.remove_object, item.handle)


# ---- who may log in -----------------------------------------------------------------------------------------------------


def test_the_token_is_initialized(bench: Bench) -> None:
    keystore = bench.keystore
    assert not keystore.state.guest
    assert keystore.initialize_guest(LABEL, SO) is True
    keystore.set_guest_pin(USER, officer=False)
    keystore.add_objects([(DATA, None)])
    bench.restart()
    keystore = bench.keystore
    assert keystore.state.guest.label == LABEL
    assert keystore.try_guest_pin(SO, officer=True) and keystore.try_guest_pin(USER, officer=False)
    assert keystore.try_guest_pin(USER, officer=True) is False
    assert keystore.initialize_guest(b"again", b"another officer") is False
    assert keystore.state.objects and keystore.state.guest.label == LABEL
    assert keystore.initialize_guest(b"again", SO) is True
    assert not keystore.state.objects and not keystore.state.guest.user and keystore.state.guest.label == b"again"
    assert keystore.try_guest_pin(SO, officer=True)


@pytest.mark.parametrize("officer", [True, False])
def test_wrong_pins_are_counted_across_restarts(bench: Bench, officer: bool) -> None:
    bench.keystore.initialize_guest(LABEL, SO)
    bench.keystore.set_guest_pin(USER, officer=False)
    right = SO if officer else USER
    for _ in range(2):
        assert bench.keystore.try_guest_pin(b"wrong", officer) is False
        bench.restart()
    assert bench.keystore.try_guest_pin(b"wrong", officer) is False
    assert bench.keystore.try_guest_pin(right, officer) is None, "locked"
    assert bench.keystore.try_guest_pin(USER if officer else SO, not officer) is True, "the other role is not"
    bench.now += 2
    assert bench.keystore.try_guest_pin(right, officer) is True
    bench.restart()
    guest = bench.keystore.state.guest
    assert (guest.so if officer else guest.user).failures == 0


def test_pins_change(bench: Bench) -> None:
    bench.keystore.initialize_guest(LABEL, SO)
    bench.keystore.set_guest_pin(USER, officer=False)
    bench.keystore.set_guest_pin(b"officer2", officer=True)
    bench.restart()
    assert bench.keystore.try_guest_pin(SO, officer=True) is False
    assert bench.keystore.try_guest_pin(b"officer2", officer=True) and bench.keystore.try_guest_pin(USER, officer=False)


# ---- attributes in records ----------------------------------------------------------------------------------------------

_PLAIN = (
    st.booleans() | st.integers(0, 2**64 - 1) | st.binary(max_size=40) | st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple)
)
_TEMPLATE = st.lists(st.tuples(st.integers(0, 2**64 - 1), _PLAIN), max_size=4).map(tuple)


@given(st.dictionaries(st.integers(0, 2**64 - 1), _PLAIN | _TEMPLATE, max_size=8))
def test_attributes_come_back(attributes: dict[int, Any]) -> None:
    again = values.decode(*values.encode(attributes))
    assert again == attributes
    assert [type(value) for value in again.values()] == [type(value) for value in attributes.values()]


@given(st.binary(max_size=60))
def test_values_by_chance(data: bytes) -> None:
    try:
        value = values.decode_value(data)
    except ValueError:
        return
    assert values.encode_value(value) == data or value == ()


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"b", b"b\2", b"b\1\1", b"u\1", b"l\1", b"t\1", b"t" + bytes(8) + b"\0\0\0\5y", b"t" + bytes(8) + b"\0\0\0\1t"],
)
def test_values_that_are_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        values.decode_value(data)


@pytest.mark.parametrize("attributes", [{}, {ck.CKA_CLASS: 99}, {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_TOKEN: True}])
def test_an_object_of_another_release_is_named_so(bench: Bench, attributes: dict[int, Any]) -> None:
    (item,) = bench.keystore.add_objects([(DATA, None)])
    name = f"object/{item.handle}"
    version = int.from_bytes(bench.stored[name][:8])
    record = persistence.ObjectRecord(item.handle, *values.encode(attributes), b"a key")
    stored = bench.stored | {name: bench.vault.seal(name, version, record.encode())}
    with pytest.raises(UnsealError, match="another"):
        persistence.load(stored, bench.vault, bench.provider, bench.version)
