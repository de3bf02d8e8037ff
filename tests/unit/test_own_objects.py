"""Slot 1: login, objects and their visibility, as a guest's program meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.token.keepers import EVER
from hsmvisord.wire.calls import Call, Mechanism, Needed
from support.own_keys import LABEL, RW, SLOT, SO, USER, OwnGuest, OwnToken, template
from support.wire_client import Refused

DATA = {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_LABEL: b"note", ck.CKA_VALUE: b"content"}
AES = {ck.CKA_VALUE_LEN: 32}
RO = ck.CKF_SERIAL_SESSION


@contextmanager
def refused(rv: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv == rv, caught.value


@pytest.fixture
def own() -> OwnToken:
    return OwnToken()


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


# ---- the slot -----------------------------------------------------------------------------------------------------------


def test_without_the_setting_there_is_no_second_slot() -> None:
    guest = OwnToken(initialized=False, guest_token=False).guest()
    assert guest.call(Call.GET_SLOT_LIST, 0, 8) == ((0,),)
    for call, arguments in [(Call.GET_SLOT_INFO, (1,)), (Call.GET_TOKEN_INFO, (1,)), (Call.OPEN_SESSION, (1, RW))]:
        with refused(ck.CKR_SLOT_ID_INVALID):
            guest.call(call, *arguments)
    with refused(ck.CKR_SLOT_ID_INVALID):
        guest.call(Call.INIT_TOKEN, 1, SO, LABEL)


def test_a_token_before_and_after_its_initialization() -> None:
    own = OwnToken(initialized=False)
    guest = own.guest()
    assert guest.call(Call.GET_SLOT_LIST, 1, 8) == ((0, 1),)
    flags = guest.call(Call.GET_TOKEN_INFO, SLOT)[4]
    assert not flags & (ck.CKF_TOKEN_INITIALIZED | ck.CKF_USER_PIN_INITIALIZED | ck.CKF_WRITE_PROTECTED)
    assert flags & ck.CKF_LOGIN_REQUIRED
    with refused(ck.CKR_TOKEN_NOT_RECOGNIZED):
        guest.open()
    with refused(ck.CKR_PIN_LEN_RANGE):
        guest.call(Call.INIT_TOKEN, SLOT, b"abc", LABEL)
    with refused(ck.CKR_PIN_LEN_RANGE):
        guest.call(Call.INIT_TOKEN, SLOT, b"a" * 65, LABEL)
    guest.call(Call.INIT_TOKEN, SLOT, SO, LABEL)
    told = guest.call(Call.GET_TOKEN_INFO, SLOT)
    assert told[0] == LABEL and told[4] & ck.CKF_TOKEN_INITIALIZED and not told[4] & ck.CKF_USER_PIN_INITIALIZED
    guest.begin(None)
    with refused(ck.CKR_USER_PIN_NOT_INITIALIZED):
        guest.login()
    guest.login(ck.CKU_SO)
    guest.call(Call.INIT_PIN, guest.session, USER)
    assert guest.call(Call.GET_TOKEN_INFO, SLOT)[4] & ck.CKF_USER_PIN_INITIALIZED
    own.restart()
    own.guest().begin()


def test_the_operators_slot_is_as_it_was(own: OwnToken) -> None:
    guest = own.guest()
    assert guest.call(Call.GET_TOKEN_INFO, 0)[4] & ck.CKF_WRITE_PROTECTED
    session = guest.open(slot=0)
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.call(Call.GENERATE_KEY, session, Mechanism(ck.CKM_AES_KEY_GEN), template(AES))
    with refused(ck.CKR_TOKEN_WRITE_PROTECTED):
        guest.call(Call.CREATE_OBJECT, session, template(DATA | {ck.CKA_TOKEN: True}))
    with refused(ck.CKR_TOKEN_WRITE_PROTECTED):
        guest.call(Call.INIT_TOKEN, 0, SO, LABEL)
    assert ck.CKM_AES_KEY_GEN not in guest.call(Call.GET_MECHANISM_LIST, 0, 256)[0]
    assert {ck.CKM_AES_KEY_GEN, ck.CKM_AES_GCM, ck.CKM_ML_KEM} <= set(guest.call(Call.GET_MECHANISM_LIST, SLOT, 256)[0])
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.call(Call.GET_MECHANISM_INFO, 0, ck.CKM_AES_GCM)
    assert guest.call(Call.GET_MECHANISM_INFO, SLOT, ck.CKM_AES_GCM)[:2] == (16, 32)


def test_each_slot_has_its_own_objects(own: OwnToken) -> None:
    own.bench.push(1)
    guest = own.guest().begin()
    mine = guest.create(DATA)
    managed = guest.open(slot=0)
    delivered = guest.find({}, managed)
    assert mine not in delivered and not set(delivered) & set(guest.find({}))
    with refused(ck.CKR_OBJECT_HANDLE_INVALID):
        guest.call(Call.GET_OBJECT_SIZE, managed, mine)
    with refused(ck.CKR_OBJECT_HANDLE_INVALID):
        guest.call(Call.GET_OBJECT_SIZE, guest.session, delivered[0])
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_ECDSA), delivered[0])
    with refused(ck.CKR_OBJECT_HANDLE_INVALID):
        guest.call(Call.DESTROY_OBJECT, guest.session, delivered[0])


# ---- login --------------------------------------------------------------------------------------------------------------


def test_who_is_logged_in(own: OwnToken) -> None:
    guest = own.guest().begin(None)
    state = lambda: guest.call(Call.GET_SESSION_INFO, guest.session)[1]  # noqa: E731
    assert state() == ck.CKS_RW_PUBLIC_SESSION
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.LOGOUT, guest.session)
    with refused(ck.CKR_USER_TYPE_INVALID):
        guest.login(9, USER)
    with refused(ck.CKR_PIN_INCORRECT):
        guest.login(attempt=b"wrong")
    guest.login()
    assert state() == ck.CKS_RW_USER_FUNCTIONS
    with refused(ck.CKR_USER_ALREADY_LOGGED_IN):
        guest.login()
    with refused(ck.CKR_USER_ANOTHER_ALREADY_LOGGED_IN):
        guest.login(ck.CKU_SO)
    read_only = guest.open(RO)
    assert guest.call(Call.GET_SESSION_INFO, read_only)[1] == ck.CKS_RO_USER_FUNCTIONS
    guest.call(Call.LOGOUT, guest.session)
    with refused(ck.CKR_SESSION_READ_ONLY_EXISTS):
        guest.login(ck.CKU_SO)
    guest.call(Call.CLOSE_SESSION, read_only)
    guest.login(ck.CKU_SO)
    assert state() == ck.CKS_RW_SO_FUNCTIONS
    with refused(ck.CKR_SESSION_READ_WRITE_SO_EXISTS):
        guest.open(RO)


def test_the_last_session_closed_logs_out(own: OwnToken) -> None:
    guest = own.guest().begin()
    managed = guest.open(slot=0)
    guest.call(Call.CLOSE_SESSION, guest.session)
    guest.begin(None)
    assert guest.call(Call.GET_SESSION_INFO, guest.session)[1] == ck.CKS_RW_PUBLIC_SESSION
    guest.login()
    guest.call(Call.CLOSE_ALL_SESSIONS, SLOT)
    guest.call(Call.GET_SESSION_INFO, managed)
    guest.begin(None)
    assert guest.call(Call.GET_SESSION_INFO, guest.session)[1] == ck.CKS_RW_PUBLIC_SESSION


def test_pins_are_changed_by_whom_they_belong_to(own: OwnToken) -> None:
    guest = own.guest().begin(None)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.INIT_PIN, guest.session, b"new user")
    guest.call(Call.SET_PIN, guest.session, USER, b"changed")
    with refused(ck.CKR_PIN_INCORRECT):
        guest.call(Call.SET_PIN, guest.session, USER, b"again")
    for wrong in (b"abc", b"a" * 65):
        with refused(ck.CKR_PIN_LEN_RANGE):
            guest.call(Call.SET_PIN, guest.session, b"changed", wrong)
    guest.login(attempt=b"changed")
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.INIT_PIN, guest.session, b"new user")
    guest.call(Call.LOGOUT, guest.session)
    guest.login(ck.CKU_SO)
    guest.call(Call.SET_PIN, guest.session, SO, b"officer-2")
    guest.call(Call.INIT_PIN, guest.session, b"third")
    guest.call(Call.LOGOUT, guest.session)
    guest.login(ck.CKU_SO, b"officer-2")
    guest.call(Call.LOGOUT, guest.session)
    guest.login(attempt=b"third")
    read_only = guest.open(RO)
    with refused(ck.CKR_SESSION_READ_ONLY):
        guest.call(Call.SET_PIN, read_only, b"third", b"fourth")


def test_wrong_pins_lock_the_token_across_restarts(own: OwnToken) -> None:
    for _ in range(3):
        with refused(ck.CKR_PIN_INCORRECT):
            own.guest().begin(None).login(attempt=b"wrong")
        own.restart()
    guest = own.guest().begin(None)
    with refused(ck.CKR_PIN_LOCKED):
        guest.login()
    flags = guest.call(Call.GET_TOKEN_INFO, SLOT)[4]
    assert flags & ck.CKF_USER_PIN_LOCKED and flags & ck.CKF_USER_PIN_COUNT_LOW and not flags & ck.CKF_SO_PIN_LOCKED
    own.bench.now += 2
    guest.login()


def test_a_new_initialization_takes_everything_away(own: OwnToken) -> None:
    guest = own.guest().begin()
    guest.create(DATA | {ck.CKA_TOKEN: True})
    with refused(ck.CKR_SESSION_EXISTS):
        own.guest().call(Call.INIT_TOKEN, SLOT, SO, LABEL)
    guest.call(Call.CLOSE_SESSION, guest.session)
    with refused(ck.CKR_PIN_INCORRECT):
        guest.call(Call.INIT_TOKEN, SLOT, b"not it", LABEL)
    guest.call(Call.INIT_TOKEN, SLOT, SO, b"another".ljust(32))
    guest.begin(ck.CKU_SO)
    assert guest.find({}) == [] and guest.call(Call.GET_TOKEN_INFO, SLOT)[0] == b"another".ljust(32)


# ---- objects ------------------------------------------------------------------------------------------------------------


def test_objects_of_the_token_and_of_a_session(own: OwnToken, guest: OwnGuest) -> None:
    of_token, of_session = guest.create(DATA | {ck.CKA_TOKEN: True}), guest.create(DATA)
    assert of_token < limits.FIRST_SESSION_OBJECT <= of_session
    assert sorted(guest.find(DATA)) == [of_token, of_session]
    assert guest.find({ck.CKA_TOKEN: True}) == [of_token]
    other = own.guest().begin(None)
    assert other.find({}) == [of_token], "session objects are their application's"
    assert other.get(of_token, ck.CKA_LABEL, ck.CKA_VALUE, ck.CKA_TOKEN) == [b"note", b"content", True]
    second = guest.open()
    assert of_session in guest.find({}, second), "of all sessions of the application"
    guest.call(Call.CLOSE_SESSION, guest.session)
    guest.session = second
    assert guest.find({}) == [of_token]
    own.restart()
    again = own.guest().begin(None)
    assert again.find({}) == [of_token] and again.get(of_token, ck.CKA_VALUE) == [b"content"]


def test_private_objects_are_the_users(own: OwnToken, guest: OwnGuest) -> None:
    private = DATA | {ck.CKA_PRIVATE: True}
    stored, passing = guest.create(private | {ck.CKA_TOKEN: True}), guest.create(private)
    assert sorted(guest.find({})) == [stored, passing]
    other = own.guest().begin(None)
    assert other.find({}) == []
    for call in (Call.GET_OBJECT_SIZE, Call.DESTROY_OBJECT):
        with refused(ck.CKR_OBJECT_HANDLE_INVALID):
            other.call(call, other.session, stored)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        other.create(private)
    other.login(ck.CKU_SO)
    assert other.find({}) == [], "not the security officer's"
    guest.call(Call.LOGOUT, guest.session)
    assert guest.find({}) == []
    guest.login()
    assert guest.find({}) == [stored], "private session objects go with the login"


def test_a_private_key_asks_for_the_login(own: OwnToken, guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: True, ck.CKA_TOKEN: True})
    other = own.guest().begin(None)
    for handle, rv in ((key, ck.CKR_USER_NOT_LOGGED_IN), (key + 1, ck.CKR_KEY_HANDLE_INVALID)):
        with refused(rv):
            other.encrypt(Mechanism(ck.CKM_AES_ECB), handle, bytes(16))
    other.login()
    other.encrypt(Mechanism(ck.CKM_AES_ECB), key, bytes(16))


def test_a_read_only_session_keeps_the_token_as_it_is(guest: OwnGuest) -> None:
    stored = guest.create(DATA | {ck.CKA_TOKEN: True})
    guest.session = guest.open(RO)
    with refused(ck.CKR_SESSION_READ_ONLY):
        guest.create(DATA | {ck.CKA_TOKEN: True})
    with refused(ck.CKR_SESSION_READ_ONLY):
        guest.set(stored, {ck.CKA_LABEL: b"x"})
    with refused(ck.CKR_SESSION_READ_ONLY):
        guest.call(Call.DESTROY_OBJECT, guest.session, stored)
    guest.create(DATA)


def test_changes_last(own: OwnToken, guest: OwnGuest) -> None:
    stored, passing = guest.create(DATA | {ck.CKA_TOKEN: True}), guest.create(DATA)
    for handle in (stored, passing):
        guest.set(handle, {ck.CKA_LABEL: b"changed"})
        assert guest.get(handle, ck.CKA_LABEL) == [b"changed"]
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(handle, {ck.CKA_TOKEN: False})
    guest.call(Call.DESTROY_OBJECT, guest.session, passing)
    assert guest.find({}) == [stored]
    own.restart()
    again = own.guest().begin()
    assert again.get(stored, ck.CKA_LABEL) == [b"changed"]
    again.call(Call.DESTROY_OBJECT, again.session, stored)
    with refused(ck.CKR_OBJECT_HANDLE_INVALID):
        again.get(stored, ck.CKA_LABEL)
    own.restart()
    assert own.guest().begin().find({}) == []


def test_what_may_not_be_destroyed_or_copied(guest: OwnGuest) -> None:
    kept = guest.create(DATA | {ck.CKA_DESTROYABLE: False, ck.CKA_COPYABLE: False})
    with refused(ck.CKR_ACTION_PROHIBITED):
        guest.call(Call.DESTROY_OBJECT, guest.session, kept)
    with refused(ck.CKR_ACTION_PROHIBITED):
        guest.call(Call.COPY_OBJECT, guest.session, kept, ())


def test_copies(own: OwnToken, guest: OwnGuest) -> None:
    first = guest.create(DATA)
    (copy,) = guest.call(Call.COPY_OBJECT, guest.session, first, template({ck.CKA_TOKEN: True, ck.CKA_LABEL: b"copy"}))
    assert guest.get(copy, ck.CKA_LABEL, ck.CKA_VALUE, ck.CKA_TOKEN) == [b"copy", b"content", True]
    assert guest.get(first, ck.CKA_LABEL) == [b"note"]
    one, other = (guest.get(handle, ck.CKA_UNIQUE_ID)[0] for handle in (first, copy))
    assert one != other
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True})
    (again,) = guest.call(Call.COPY_OBJECT, guest.session, key, template({ck.CKA_TOKEN: True}))
    own.restart()
    after = own.guest().begin()
    assert after.get(again, ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE) == [True, True, True]
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        after.call(Call.COPY_OBJECT, after.session, again, template({ck.CKA_PRIVATE: False}))


def test_what_the_token_cannot_store_is_not_there(own: OwnToken, guest: OwnGuest) -> None:
    stored = guest.create(DATA | {ck.CKA_TOKEN: True})
    own.bench.full = True
    public, private = {ck.CKA_EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}, {ck.CKA_TOKEN: True}
    attempts: list[Callable[[], Any]] = [
        lambda: guest.create(DATA | {ck.CKA_TOKEN: True}),
        lambda: guest.set(stored, {ck.CKA_LABEL: b"x"}),
        lambda: guest.call(Call.DESTROY_OBJECT, guest.session, stored),
        lambda: guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_TOKEN: True}),
        lambda: guest.pair(ck.CKM_EC_KEY_PAIR_GEN, public, private),
        lambda: guest.call(Call.SET_PIN, guest.session, USER, b"another"),
    ]
    for attempt in attempts:
        with refused(ck.CKR_DEVICE_ERROR):
            attempt()
    assert guest.find({}) == [stored], "nor half of a pair"
    guest.create(DATA)
    own.bench.full = False
    assert guest.get(stored, ck.CKA_LABEL) == [b"note"]


def test_nothing_is_stored_while_a_successor_takes_over(own: OwnToken, guest: OwnGuest) -> None:
    own.bench.keystore.freeze()
    with pytest.raises(AssertionError, match="parked"):
        guest.create(DATA | {ck.CKA_TOKEN: True})
    with pytest.raises(AssertionError, match="parked"):
        guest.call(Call.SET_PIN, guest.session, USER, b"another")
    own.bench.keystore.thaw()
    guest.create(DATA | {ck.CKA_TOKEN: True})


def test_session_objects_have_a_limit(guest: OwnGuest) -> None:
    handles = [guest.create(DATA) for _ in range(limits.MAX_SESSION_OBJECTS)]
    with refused(ck.CKR_DEVICE_MEMORY):
        guest.create(DATA)
    guest.call(Call.DESTROY_OBJECT, guest.session, handles[0])
    guest.create(DATA)
    guest.call(Call.CLOSE_SESSION, guest.session)
    guest.begin()
    assert guest.find({}) == []
    for _ in range(limits.MAX_SESSION_OBJECTS):
        guest.create(DATA)


def test_what_is_not_shown_and_not_guessed(guest: OwnGuest) -> None:
    key = guest.create({ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_VALUE: b"k" * 16})
    answer, rv = guest.call(Call.GET_ATTRIBUTE_VALUE, guest.session, key, ((ck.CKA_VALUE, 64), (EVER, 64), (ck.CKA_MODULUS, 64)))
    assert rv in (ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID) and [value for _, value in answer] == [None] * 3
    assert guest.find({ck.CKA_VALUE: b"k" * 16}) == [] and guest.find({EVER: ()}) == []
    open_key = guest.create(
        {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_VALUE: b"k" * 16, ck.CKA_SENSITIVE: False}
        | {ck.CKA_EXTRACTABLE: True}
    )
    assert guest.get(open_key, ck.CKA_VALUE, ck.CKA_VALUE_LEN) == [b"k" * 16, 16]
    assert guest.find({ck.CKA_VALUE: b"k" * 16}) == [open_key]


def test_a_size_query_makes_nothing(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_WRAP: True})
    other = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_EXTRACTABLE: True})
    mechanism = Mechanism(ck.CKM_AES_KEY_WRAP)
    assert guest.call(Call.WRAP_KEY, guest.session, mechanism, key, other, None) == (Needed(40),)
    assert guest.call(Call.WRAP_KEY, guest.session, mechanism, key, other, 39) == (Needed(40),)
    assert len(guest.wrap(mechanism, key, other)) == 40
