"""Templates of a guest's objects: each of the standard's errors, and each way that an attribute may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.token import rules
from hsmvisord.token.rules import By
from hsmvisord.wire.attributes import Kind, kind_of
from hypothesis import given
from hypothesis import strategies as st

AES = ((ck.CKA_CLASS, ck.CKO_SECRET_KEY), (ck.CKA_KEY_TYPE, ck.CKK_AES))
VALUE = (ck.CKA_VALUE, bytes(16))
DATA = ((ck.CKA_CLASS, ck.CKO_DATA),)
RSA_PUBLIC = ((ck.CKA_CLASS, ck.CKO_PUBLIC_KEY), (ck.CKA_KEY_TYPE, ck.CKK_RSA))
MODULUS, EXPONENT = (ck.CKA_MODULUS, b"\x80" + bytes(255)), (ck.CKA_PUBLIC_EXPONENT, b"\1\0\1")


def refused(rv: int, call: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments, **more)
    assert caught.value.rv == rv, caught.value


def made(*template: tuple[int, Any], by: By = By.CREATE, **more: Any) -> dict[int, Any]:
    return rules.new_object(template, by, **more)[0]


def test_what_a_template_does_not_say_has_its_default() -> None:
    key = made(*AES, VALUE, (ck.CKA_ENCRYPT, True))
    assert key[ck.CKA_SENSITIVE] is True and key[ck.CKA_EXTRACTABLE] is False and key[ck.CKA_PRIVATE] is True
    assert key[ck.CKA_ENCRYPT] is True and key[ck.CKA_DECRYPT] is False and key[ck.CKA_TOKEN] is False
    assert key[ck.CKA_LABEL] == b"" and key[ck.CKA_VALUE] == bytes(16)
    assert made(*DATA)[ck.CKA_PRIVATE] is False and made(*RSA_PUBLIC, MODULUS, EXPONENT)[ck.CKA_PRIVATE] is False


def test_the_mechanism_says_class_and_key_type() -> None:
    key = made((ck.CKA_VALUE_LEN, 32), by=By.GENERATE, cls=ck.CKO_SECRET_KEY, key_type=ck.CKK_AES)
    assert (key[ck.CKA_CLASS], key[ck.CKA_KEY_TYPE]) == (ck.CKO_SECRET_KEY, ck.CKK_AES)
    for wrong in ((ck.CKA_CLASS, ck.CKO_DATA), (ck.CKA_KEY_TYPE, ck.CKK_GENERIC_SECRET)):
        refused(ck.CKR_TEMPLATE_INCONSISTENT, made, wrong, by=By.GENERATE, cls=ck.CKO_SECRET_KEY, key_type=ck.CKK_AES)


@pytest.mark.parametrize(
    ("rv", "template"),
    [
        (ck.CKR_TEMPLATE_INCOMPLETE, ()),
        (ck.CKR_TEMPLATE_INCOMPLETE, (AES[0],)),
        (ck.CKR_TEMPLATE_INCOMPLETE, AES),
        (ck.CKR_TEMPLATE_INCOMPLETE, (*RSA_PUBLIC, MODULUS)),
        (ck.CKR_TEMPLATE_INCONSISTENT, (*RSA_PUBLIC, MODULUS, EXPONENT, (ck.CKA_MODULUS_BITS, 2048))),
        (ck.CKR_TEMPLATE_INCONSISTENT, (*AES, VALUE, (ck.CKA_VALUE_LEN, 16))),
        (ck.CKR_TEMPLATE_INCONSISTENT, (*AES, VALUE, (ck.CKA_LABEL, b"a"), (ck.CKA_LABEL, b"b"))),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, ((ck.CKA_CLASS, 99),)),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, ((ck.CKA_CLASS, b"\4"),)),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, ((ck.CKA_CLASS, ck.CKO_SECRET_KEY), (ck.CKA_KEY_TYPE, ck.CKK_RSA), VALUE)),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, ((ck.CKA_CLASS, ck.CKO_SECRET_KEY), (ck.CKA_KEY_TYPE, (1,)), VALUE)),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, (*AES, VALUE, (ck.CKA_ENCRYPT, 1))),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, (*AES, VALUE, (ck.CKA_ENCRYPT, b"\1"))),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, (*AES, VALUE, (ck.CKA_LABEL, bytes(limits.MAX_VALUE + 1)))),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, (*AES, VALUE, (ck.CKA_START_DATE, b"2026-1-1"))),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, (*AES, VALUE, (ck.CKA_END_DATE, b"202611"))),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, (*AES, VALUE, (ck.CKA_MODULUS, b"1"))),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, (*DATA, (ck.CKA_ID, b"1"))),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, (*DATA, (0x80000001, b"1"))),
        (ck.CKR_ATTRIBUTE_READ_ONLY, (*AES, VALUE, (ck.CKA_LOCAL, True))),
        (ck.CKR_ATTRIBUTE_READ_ONLY, (*AES, VALUE, (ck.CKA_NEVER_EXTRACTABLE, False))),
        (ck.CKR_ATTRIBUTE_READ_ONLY, (*AES, VALUE, (ck.CKA_UNIQUE_ID, b"1"))),
        (ck.CKR_ATTRIBUTE_READ_ONLY, (*AES, VALUE, (ck.CKA_TRUSTED, True))),
    ],
)
def test_templates_that_are_refused(rv: int, template: tuple[tuple[int, Any], ...]) -> None:
    refused(rv, made, *template)


def test_the_limits_of_a_template() -> None:
    made(*AES, VALUE, (ck.CKA_LABEL, bytes(limits.MAX_VALUE)), (ck.CKA_START_DATE, b"20260101"), (ck.CKA_END_DATE, b""))
    made(*DATA, (ck.CKA_VALUE, bytes(limits.MAX_OBJECT_VALUE)))
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, made, *DATA, (ck.CKA_VALUE, bytes(limits.MAX_OBJECT_VALUE + 1)))
    many = [(0x80000000 + n, b"") for n in range(limits.MAX_TEMPLATE - 1)]
    refused(ck.CKR_ATTRIBUTE_TYPE_INVALID, made, *DATA, *many)
    refused(ck.CKR_TEMPLATE_INCONSISTENT, made, *DATA, *many, (0x90000000, b""))
    assert made(*AES, *AES, VALUE)[ck.CKA_VALUE] == VALUE[1], "the same value twice is one"


def test_the_security_officer_trusts() -> None:
    assert made(*AES, VALUE, (ck.CKA_TRUSTED, True), officer=True)[ck.CKA_TRUSTED] is True
    assert made(*AES, VALUE, (ck.CKA_TRUSTED, False))[ck.CKA_TRUSTED] is False


@pytest.mark.parametrize(
    ("by", "wrong"), [(By.GENERATE, VALUE), (By.UNWRAP, VALUE), (By.DERIVE, VALUE), (By.UNWRAP, (ck.CKA_VALUE_LEN, 16))]
)
def test_what_comes_from_elsewhere_is_not_given(by: By, wrong: tuple[int, Any]) -> None:
    refused(ck.CKR_TEMPLATE_INCONSISTENT, made, *AES, wrong, by=by)


@pytest.mark.parametrize("pair", rules.TABLES)
def test_every_table_is_whole(pair: tuple[int, int | None]) -> None:
    """Each rule's default is of its type and passes its own check; what is required is not forbidden at the same time."""
    for kind, rule in rules.TABLES[pair].items():
        assert not rule.required & rule.forbidden
        assert rule.default is None or type(rule.default) is rule.like, hex(kind)
        assert not (rule.read_only and (rule.changes or rule.required)), hex(kind)


def test_every_attribute_goes_over_the_wire_as_it_is() -> None:
    likes = {Kind.BOOL: bool, Kind.ULONG: int, Kind.ULONGS: tuple, Kind.TEMPLATE: tuple, Kind.BYTES: bytes}
    wrong = {hex(k) for table in rules.TABLES.values() for k, rule in table.items() if likes[kind_of(k)] is not rule.like}
    assert not wrong


# ---- changes ------------------------------------------------------------------------------------------------------------


def test_what_changes_and_what_does_not() -> None:
    key = made(*AES, VALUE, (ck.CKA_SENSITIVE, False), (ck.CKA_EXTRACTABLE, True))
    after = rules.changed(key, [(ck.CKA_LABEL, b"new"), (ck.CKA_ENCRYPT, True)])
    assert (after[ck.CKA_LABEL], after[ck.CKA_ENCRYPT]) == (b"new", True) and key[ck.CKA_LABEL] == b""
    for kind, value in [
        (ck.CKA_VALUE, bytes(16)),
        (ck.CKA_TOKEN, True),
        (ck.CKA_CLASS, 4),
        (ck.CKA_KEY_TYPE, 31),
        (ck.CKA_LOCAL, True),
    ]:
        refused(ck.CKR_ATTRIBUTE_READ_ONLY, rules.changed, key, [(kind, value)])
    refused(ck.CKR_ATTRIBUTE_TYPE_INVALID, rules.changed, key, [(ck.CKA_MODULUS, b"")])
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, rules.changed, key, [(ck.CKA_ENCRYPT, 1)])
    refused(ck.CKR_TEMPLATE_INCONSISTENT, rules.changed, key, [(ck.CKA_LABEL, b"a"), (ck.CKA_LABEL, b"b")])


@pytest.mark.parametrize(
    ("kind", "open_value"),
    [(ck.CKA_SENSITIVE, False), (ck.CKA_EXTRACTABLE, True), (ck.CKA_WRAP_WITH_TRUSTED, False), (ck.CKA_COPYABLE, True)],
)
def test_what_goes_one_way_alone(kind: int, open_value: bool) -> None:
    key = made(*AES, VALUE, (kind, open_value))
    rules.changed(key, [(kind, open_value)])
    shut = rules.changed(key, [(kind, not open_value)])
    for copying in (False, True):
        refused(ck.CKR_ATTRIBUTE_READ_ONLY, rules.changed, shut, [(kind, open_value)], copying=copying)


def test_trust_is_the_security_officers() -> None:
    key = made(*AES, VALUE)
    refused(ck.CKR_ATTRIBUTE_READ_ONLY, rules.changed, key, [(ck.CKA_TRUSTED, True)])
    trusted = rules.changed(key, [(ck.CKA_TRUSTED, True)], officer=True)
    assert rules.changed(trusted, [(ck.CKA_TRUSTED, True), (ck.CKA_LABEL, b"x")])[ck.CKA_TRUSTED] is True
    assert rules.changed(trusted, [(ck.CKA_TRUSTED, False)])[ck.CKA_TRUSTED] is False


def test_an_object_that_is_not_modifiable() -> None:
    key = made(*AES, VALUE, (ck.CKA_MODIFIABLE, False))
    refused(ck.CKR_ACTION_PROHIBITED, rules.changed, key, [(ck.CKA_LABEL, b"x")])
    copy = rules.changed(key, [(ck.CKA_LABEL, b"x"), (ck.CKA_MODIFIABLE, True), (ck.CKA_TOKEN, True)], copying=True)
    assert (copy[ck.CKA_LABEL], copy[ck.CKA_MODIFIABLE], copy[ck.CKA_TOKEN]) == (b"x", True, True)


_CHANGES = st.lists(
    st.tuples(st.sampled_from([ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE, ck.CKA_WRAP_WITH_TRUSTED]), st.booleans()), max_size=8
)


@given(_CHANGES, st.booleans(), st.booleans())
def test_no_changes_open_a_key_again(steps: list[tuple[int, bool]], sensitive: bool, extractable: bool) -> None:
    """What is closed once is closed, whatever is tried, by changing and by copying."""
    key = made(*AES, VALUE, (ck.CKA_SENSITIVE, sensitive), (ck.CKA_EXTRACTABLE, extractable))
    closed = rules.hides(key, ck.CKA_VALUE)
    for number, step in enumerate(steps):
        try:
            key = rules.changed(key, [step], copying=bool(number % 2))
        except CkError as error:
            assert error.rv == ck.CKR_ATTRIBUTE_READ_ONLY
        assert rules.hides(key, ck.CKA_VALUE) >= closed
        closed = rules.hides(key, ck.CKA_VALUE)


# ---- what is told of a key's life ---------------------------------------------------------------------------------------


def test_what_is_hidden() -> None:
    shown = made(*AES, VALUE, (ck.CKA_SENSITIVE, False), (ck.CKA_EXTRACTABLE, True))
    assert not rules.hides(shown, ck.CKA_VALUE)
    for one in ((ck.CKA_SENSITIVE, True), (ck.CKA_EXTRACTABLE, False)):
        assert rules.hides(rules.changed(shown, [one]), ck.CKA_VALUE)
        assert not rules.hides(rules.changed(shown, [one]), ck.CKA_LABEL)
    assert not rules.hides(made(*DATA, (ck.CKA_VALUE, b"x")), ck.CKA_VALUE)


LIFE = (ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE)


@pytest.mark.parametrize(
    ("by", "parent", "expected"),
    [
        (By.GENERATE, None, (True, True, True)),
        (By.CREATE, None, (False, False, False)),
        (By.UNWRAP, None, (False, False, False)),
        (By.DERIVE, (True, True, True), (False, True, True)),
        (By.DERIVE, (True, False, True), (False, False, True)),
        (By.DERIVE, (True, True, False), (False, True, False)),
        (By.COPY, (True, True, True), (True, True, True)),
        (By.COPY, (False, True, False), (False, True, False)),
    ],
)
def test_the_history_of_a_key(by: By, parent: tuple[bool, ...] | None, expected: tuple[bool, ...]) -> None:
    key = made(*AES, VALUE)
    older = dict(zip(LIFE, parent, strict=True)) if parent else None
    assert tuple(rules.history(key, by, older)[kind] for kind in LIFE) == expected
    shown = rules.changed(made(*AES, VALUE, (ck.CKA_SENSITIVE, False), (ck.CKA_EXTRACTABLE, True)), [])
    assert tuple(rules.history(shown, by, older)[kind] for kind in LIFE[1:]) == (False, False)
    assert rules.history(made(*RSA_PUBLIC, MODULUS, EXPONENT), by, older) == {ck.CKA_LOCAL: expected[0]}
