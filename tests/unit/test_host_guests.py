"""Guests on a host: what is refused, at the limit and one past it; what is stored, and what is not there twice."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hsmvisor.host import limits
from hsmvisor.host.database import Database
from hsmvisor.host.guest_rows import Guest, GuestRows
from hsmvisor.serving.errors import Exhausted, Exists, Invalid, NotFound, WrongState
from hsmvisor.serving.requests import Request


def guest(name: str = "web", module: str = "web", owner: str = "alice", **attributes: str) -> Guest:
    return Guest(name, "VM", owner, attributes, module)


def asked(id: str) -> Request:
    return Request(id, "Method", b"c")


def with_rows(path: Path, work: Callable[[GuestRows], Awaitable[None]]) -> None:
    database = Database(path / "state.db")
    try:
        asyncio.run(work(GuestRows(database)))  # type: ignore[arg-type]
    finally:
        database.close()


# ---- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0.x_y-z", "a" * 64])
def test_a_name(name: str) -> None:
    assert limits.guest_name(name) == name


@pytest.mark.parametrize("name", ["", "a" * 65, "A", ".a", "a b", "ä", "a/b", "a\n"])
def test_no_name(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        limits.guest_name(name)
    assert caught.value.reason == "NAME"


def test_kinds() -> None:
    assert [limits.guest_kind(kind) for kind in ("", *limits.GUEST_KINDS)] == ["VM", *limits.GUEST_KINDS]
    for kind in ("vm", "container", "VM "):
        with pytest.raises(Invalid):
            limits.guest_kind(kind)


def test_an_owner_at_its_limit_and_past_it() -> None:
    for owner in ("a", "ä" * limits.MAX_OWNER, "team blue/shift 1"):
        assert limits.owner(owner) == owner
    for owner in ("", "a" * (limits.MAX_OWNER + 1), "a\n", "a\x00", "a\u202e"):
        with pytest.raises(Invalid):
            limits.owner(owner)


def test_attributes_at_their_limits() -> None:
    full = {f"{i:064}": "ä" * limits.MAX_ATTRIBUTE_VALUE for i in range(limits.MAX_ATTRIBUTES)}
    assert limits.attributes(full) == full
    letters = string.ascii_letters + string.digits + "._-"
    assert limits.attributes({letters[:64]: "", letters[-64:]: " "})
    assert list(limits.attributes({"b": "", "a": ""})) == ["a", "b"]


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({str(i): "" for i in range(limits.MAX_ATTRIBUTES + 1)}, "ATTRIBUTES"),
        ({"a" * (limits.MAX_ATTRIBUTE_KEY + 1): ""}, "ATTRIBUTE_KEY"),
        ({"": ""}, "ATTRIBUTE_KEY"),
        ({"a b": ""}, "ATTRIBUTE_KEY"),
        ({"ä": ""}, "ATTRIBUTE_KEY"),
        ({"a": "b" * (limits.MAX_ATTRIBUTE_VALUE + 1)}, "ATTRIBUTE_VALUE"),
        ({"a": "b\n"}, "ATTRIBUTE_VALUE"),
    ],
)
def test_attributes_past_them(attributes: dict[str, str], word: str) -> None:
    with pytest.raises(Invalid) as caught:
        limits.attributes(attributes)
    assert caught.value.reason == word


def test_as_many_guests_as_a_host_has_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_GUESTS", 3)

    async def work(rows: GuestRows) -> None:
        for number in range(3):
            await rows.register(guest(f"g{number}", ""), asked(str(number)))
        with pytest.raises(Exhausted):
            await rows.register(guest("g3", ""), asked("3"))
        await rows.register(guest("g2", ""), asked("4"))  # the same again is none more
        await rows.remove("g0", asked("5"), b"")
        await rows.register(guest("g3", ""), asked("6"))
        assert [row.name for row in await rows.all()] == ["g1", "g2", "g3"]

    with_rows(tmp_path, work)


# ---- the state file -----------------------------------------------------------------------------------------------------


def test_the_same_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    async def work(rows: GuestRows) -> None:
        made = await rows.register(guest(env="prod"), asked("1"))
        assert made.changed > 0 and made.at > 0
        assert await rows.register(guest(env="prod"), asked("2")) == made
        for other in (guest(env="test"), guest(owner="bob", env="prod"), guest(module="", env="prod")):
            with pytest.raises(Exists):
                await rows.register(other, asked("3"))
        assert await rows.all() == [made]

    with_rows(tmp_path, work)


def test_the_number_rises_with_each_change_also_over_a_removal(tmp_path: Path) -> None:
    async def work(rows: GuestRows) -> None:
        numbers = [(await rows.register(guest(), asked("1"))).changed]
        numbers.append((await rows.update("web", "alice", {"a": "b"}, asked("2"))).changed)
        same = await rows.update("web", "alice", {"a": "b"}, asked("3"))
        assert same.changed == numbers[-1]
        await rows.remove("web", asked("4"), b"")
        numbers.append((await rows.register(guest(), asked("5"))).changed)
        assert numbers == sorted(set(numbers))
        with pytest.raises(NotFound):
            await rows.update("other", "alice", {}, asked("6"))

    with_rows(tmp_path, work)


def test_a_module_is_one_guests(tmp_path: Path) -> None:
    async def work(rows: GuestRows) -> None:
        await rows.register(guest("one", "m"), asked("1"))
        with pytest.raises(WrongState) as caught:
            await rows.register(guest("two", "m"), asked("2"))
        assert caught.value.reason == "MODULE_TAKEN"
        for name in ("three", "four"):
            await rows.register(guest(name, ""), asked(name))

    with_rows(tmp_path, work)
