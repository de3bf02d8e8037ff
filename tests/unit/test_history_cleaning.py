"""What an event's texts become: short, printable, no secrets; and no text keeps an event from being written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hsmvisor.manager.history import cleaning, limits
from hypothesis import given
from hypothesis import strategies as st

KEY = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----"


def told(**detail: Any) -> Any:
    return json.loads(cleaning.detail(detail))


def test_texts_at_the_limit_and_one_past() -> None:
    assert cleaning.text("x" * limits.MAX_TEXT) == "x" * limits.MAX_TEXT
    assert cleaning.text("x" * (limits.MAX_TEXT + 1)) == "x" * (limits.MAX_TEXT - 1) + "…"
    assert cleaning.printable("a\r\nb\tc\0d\ud800", 20) == "a  b c?d?"


@pytest.mark.parametrize(
    "name",
    ["password", "PIN", "token", "access_token", "client-secret", "private_key", "webhook_secret", "Authorization", "passphrase"],
)
def test_details_that_are_named_like_secrets(name: str) -> None:
    assert told(**{name: "hunter2"}) == {name: cleaning.HIDDEN}
    assert told(**{name: ["hunter2"]}) == {name: cleaning.HIDDEN}
    assert told(inner={name: 1234}) == {"inner": {name: cleaning.HIDDEN}}


def test_names_that_only_look_so() -> None:
    detail = {"token_id": "4f", "key": "P-256", "pinned": True, "secretary": "bob", "secret": None}
    assert told(**detail) == detail


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        (f"the key {KEY} is here", f"the key {cleaning.HIDDEN} is here"),
        (KEY[:40], cleaning.HIDDEN),
        ("postgresql://me:hunter2@db/x", f"postgresql://{cleaning.HIDDEN}@db/x"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {cleaning.HIDDEN}"),
        ("key whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw!", f"key {cleaning.HIDDEN}!"),
        ("https://example.net:8443/a@b", "https://example.net:8443/a@b"),
    ],
)
def test_secrets_in_texts(given_text: str, shown: str) -> None:
    assert told(why=given_text) == {"why": shown}


def test_bytes_are_counted_and_not_shown() -> None:
    assert told(key=b"hunter2") == {"key": "(7 bytes)"}


def test_numbers_lists_and_objects() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    assert told(n=limits.LARGEST_NUMBER, m=limits.LARGEST_NUMBER + 1) == {"n": limits.LARGEST_NUMBER, "m": hex(2**63)}
    assert told(huge=10**5000)["huge"].startswith("0x")
    assert told(x=float("nan"), y=float("inf"), z=1.5) == {"x": "nan", "y": "inf", "z": 1.5}
    assert told(x={"b", "a"}, y=Bad()) == {"x": ["a", "b"], "y": "(Bad)"}
    assert len(told(x=list(range(limits.MOST_ITEMS + 1)))["x"]) == limits.MOST_ITEMS
    assert told(a={"b": {"c": {"d": 1}}})["a"]["b"]["c"] == "{'d': 1}"


def test_details_at_the_limit_and_one_past() -> None:
    many = {f"k{i}": i for i in range(limits.MOST_KEYS)}
    assert told(**many) == many
    assert told(**many, more=1) == many | {"cut": True}
    pieces = {f"k{i:02}": "x" * limits.MAX_TEXT for i in range(20)}
    cut = cleaning.detail(pieces)
    assert len(cut) <= limits.MAX_DETAIL and json.loads(cut)["cut"] is True
    frame = len('{"cut":true}')
    each = len('"k00":"",') + limits.MAX_TEXT
    count, rest = divmod(limits.MAX_DETAIL - frame, each)
    fitting = {f"k{i:02}": "x" * limits.MAX_TEXT for i in range(count)} | {"z": "y" * (rest - len('"z":"",'))}
    assert told(**fitting) == fitting
    assert told(**{**fitting, "z": fitting["z"] + "y"}) == {k: v for k, v in fitting.items() if k != "z"} | {"cut": True}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2000) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=50,
)


@given(st.dictionaries(st.text(), anything))
def test_whatever_is_given(detail: dict[str, Any]) -> None:
    shown = cleaning.detail(detail)
    assert isinstance(json.loads(shown), dict)
    assert len(shown) <= limits.MAX_DETAIL and shown.isascii() and shown.isprintable()
