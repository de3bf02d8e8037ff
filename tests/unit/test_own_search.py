"""Searches in slot 1 find by the pages' indexes what a look at every object would find, whatever was made and destroyed."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.keystore import pages
from hsmvisord.keystore.pages import GuestObject, Objects
from hsmvisord.token.catalogue import matches
from hsmvisord.wire.calls import Call
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.own_keys import OwnGuest, OwnToken

DATA = {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_TOKEN: True, ck.CKA_PRIVATE: False}

_LABELS = st.sampled_from([b"", b"one", b"two", b"\1"])
_ATTRIBUTES = st.fixed_dictionaries(
    {
        ck.CKA_CLASS: st.sampled_from([ck.CKO_DATA, ck.CKO_CERTIFICATE, ck.CKO_SECRET_KEY]),
        ck.CKA_PRIVATE: st.booleans(),
        ck.CKA_LABEL: _LABELS,
    },
    optional={ck.CKA_ID: _LABELS, ck.CKA_UNIQUE_ID: _LABELS, ck.CKA_APPLICATION: _LABELS},
)
#: Few pages, and several objects on some.
_HANDLES = st.integers(1, 6).map(lambda n: n * 50)
_VALUES = st.integers(0, 5) | _LABELS | st.booleans()


class Changes(RuleBasedStateMachine):
    """Beside the pages stands a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.objects, self.plain = Objects(), dict[int, GuestObject]()

    @rule(made=st.dictionaries(_HANDLES, st.tuples(_ATTRIBUTES, st.integers(1, 9)), max_size=4))
    def put(self, made: dict[int, tuple[dict[int, Any], int]]) -> None:
        items = [GuestObject(handle, attributes, None, size) for handle, (attributes, size) in made.items()]
        before = dict(self.objects)
        after = self.objects.with_items(items)
        assert dict(self.objects) == before, "an immutable value"
        self.objects = after
        self.plain |= {item.handle: item for item in items}

    @rule(handle=_HANDLES)
    def remove(self, handle: int) -> None:
        if handle in self.plain:
            self.objects = self.objects.without(handle)
            del self.plain[handle]
        else:
            with pytest.raises(KeyError):
                self.objects.without(handle)

    @rule(kind=st.sampled_from(pages.INDEXED), value=_VALUES, private=st.booleans())
    def search(self, kind: int, value: Any, private: bool) -> None:
        wanted = {kind: value, ck.CKA_PRIVATE: private}
        found = self.objects.having(kind, value, private)
        assert sorted(found) == sorted(h for h, item in self.plain.items() if matches(item.attributes, wanted))

    @rule(private=st.booleans())
    def all(self, private: bool) -> None:
        found = self.objects.having(None, None, private)
        assert sorted(found) == sorted(h for h, item in self.plain.items() if item.attributes[ck.CKA_PRIVATE] == private)

    @invariant()
    def same(self) -> None:
        assert dict(self.objects) == self.plain and len(self.objects) == len(self.plain)
        assert self.objects.size == sum(item.size for item in self.plain.values())
        assert all(handle in self.objects for handle in self.plain) and 7 not in self.objects


Changes.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestChanges = Changes.TestCase


# ---- as a guest sees it -------------------------------------------------------------------------------------------------


def _made(guest: OwnGuest, n: int) -> int:
    private, token = bool(n % 2), bool(n % 3)
    told = {ck.CKA_PRIVATE: private, ck.CKA_TOKEN: token}
    return guest.create(DATA | told | {ck.CKA_LABEL: b"%d" % (n % 4), ck.CKA_APPLICATION: b"%d" % (n % 5)})


@pytest.fixture(scope="module")
def filled() -> tuple[OwnToken, OwnGuest]:
    own = OwnToken()
    guest = own.guest().begin()
    for n in range(60):
        _made(guest, n)
    return own, guest


_SEARCHED: dict[int, st.SearchStrategy[Any]] = {
    ck.CKA_CLASS: st.sampled_from([ck.CKO_DATA, ck.CKO_SECRET_KEY]),
    ck.CKA_LABEL: st.integers(0, 4).map(lambda n: b"%d" % n),
    ck.CKA_APPLICATION: st.integers(0, 5).map(lambda n: b"%d" % n),
    ck.CKA_PRIVATE: st.booleans(),
    ck.CKA_TOKEN: st.booleans(),
    ck.CKA_ID: st.just(b""),
}


@settings(max_examples=150, deadline=None)
@given(wanted=st.fixed_dictionaries({}, optional=_SEARCHED), logged_in=st.booleans())
def test_a_search_finds_what_a_look_at_all_would(
    filled: tuple[OwnToken, OwnGuest], wanted: dict[int, Any], logged_in: bool
) -> None:
    own, user = filled
    guest = user if logged_in else own.guest().begin(None)
    stored = {h: item.attributes for h, item in own.token.keystore.state.objects.items()}
    mine = {h: item.attributes for h, item in guest.caller.application.guest.items.items()}
    seen = {h: a for h, a in (stored | mine).items() if logged_in or not a[ck.CKA_PRIVATE]}
    found = guest.find(wanted)
    assert sorted(found) == sorted(h for h, attributes in seen.items() if matches(attributes, wanted))
    assert found == sorted(found), "in the order of their handles"


def test_a_search_reaches_every_object_that_there_may_be() -> None:
    assert limits.MAX_FOUND >= limits.MAX_GUEST_OBJECTS + limits.MAX_SESSION_OBJECTS


def test_what_was_changed_is_found_by_its_new_values_alone() -> None:
    guest = OwnToken().guest().begin()
    handle = guest.create(DATA | {ck.CKA_LABEL: b"old"})
    assert guest.find({ck.CKA_LABEL: b"old"}) == [handle]
    guest.set(handle, {ck.CKA_LABEL: b"new"})
    assert guest.find({ck.CKA_LABEL: b"old"}) == [] and guest.find({ck.CKA_LABEL: b"new"}) == [handle]
    guest.call(Call.DESTROY_OBJECT, guest.session, handle)
    assert guest.find({ck.CKA_LABEL: b"new"}) == guest.find({}) == []
