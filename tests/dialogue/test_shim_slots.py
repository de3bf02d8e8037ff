"""Which slots the library shows, and in which order (HSMVISOR_PKCS11_SLOTS; `slots` in pkcs11.conf)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from ctypes import byref, c_ubyte, c_ulong
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import Cryptoki
from support.scripted_module import Request, Room, ScriptedModule

OK = ck.CKR_OK


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    """It has slots 0, 1 and 7."""
    module = ScriptedModule(tmp_path / "guest.sock")

    def slots(module: ScriptedModule, application: Any, request: Request) -> Any:
        room = request.args[1]
        return ((0, 1, 7) if room is not None and room >= 3 else Room(3),)

    module.answers[Call.GET_SLOT_LIST] = slots
    yield module
    module.end()


Open = Callable[[str | None], Cryptoki]


@pytest.fixture
def library(module: ScriptedModule, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    opened: list[Cryptoki] = []

    def begin(slots: str | None) -> Cryptoki:
        if slots is None:
            monkeypatch.delenv("HSMVISOR_PKCS11_SLOTS", raising=False)
        else:
            monkeypatch.setenv("HSMVISOR_PKCS11_SLOTS", slots)
        p11 = Cryptoki()
        p11.initialize(module.address)
        opened.append(p11)
        return p11

    yield begin
    for p11 in opened:
        p11.finalize()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (None, [0, 1, 7]), ("", [0, 1, 7]), ("all", [0, 1, 7]),
        ("1", [1]), ("1,0", [1, 0]), ("7,1,0", [7, 1, 0]), ("5", []), ("5,0", [0]),
        ("0,1,2,3,4,5,6,7", [0, 1, 7]), ("255,1", [1]), ("01", [1]),
    ],
)  # fmt: skip
def test_the_slots_that_are_shown(library: Open, text: str | None, shown: list[int]) -> None:
    p11 = library(text)
    assert p11.slots() == shown
    count = c_ulong(99)
    p11.good("C_GetSlotList", 0, None, byref(count))
    assert count.value == len(shown)
    if shown:
        room, small = (c_ulong * 8)(*[99] * 8), c_ulong(len(shown) - 1)
        assert p11.call("C_GetSlotList", 0, room, byref(small)) == ck.CKR_BUFFER_TOO_SMALL
        assert small.value == len(shown) and list(room) == [99] * 8
        exact = c_ulong(len(shown))
        p11.good("C_GetSlotList", 0, room, byref(exact))
        assert list(room) == shown + [99] * (8 - len(shown))
    assert p11.call("C_GetSlotList", 0, None, None) == ck.CKR_ARGUMENTS_BAD


@pytest.mark.parametrize(
    "text", ["1;0", "1,", ",1", "one", "1,1", "-1", "256", "1 0", "All", "0,1,2,3,4,5,6,7,8", "99999999999999999999"]
)
def test_what_is_no_list_of_slots(module: ScriptedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    p11 = Cryptoki()
    monkeypatch.setenv("HSMVISOR_PKCS11_ADDRESS", module.address)
    monkeypatch.setenv("HSMVISOR_PKCS11_SLOTS", text)
    assert p11.call("C_Initialize", None) == ck.CKR_GENERAL_ERROR
    monkeypatch.delenv("HSMVISOR_PKCS11_SLOTS")
    config = tmp_path / "pkcs11.conf"
    config.write_text(f"address = {module.address}\nslots = {text}\n")
    monkeypatch.setenv("HSMVISOR_PKCS11_CONFIG", str(config))
    assert p11.call("C_Initialize", None) == ck.CKR_GENERAL_ERROR
    assert module.requests == []


def test_the_environment_goes_before_the_file(
    library: Open, module: ScriptedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pkcs11.conf"
    config.write_text("slots = 1,0  # the guest's own first\n")
    monkeypatch.setenv("HSMVISOR_PKCS11_CONFIG", str(config))
    p11 = library(None)
    assert p11.slots() == [1, 0]
    assert p11.finalize() == OK
    assert library("all").slots() == [0, 1, 7]


def test_a_hidden_slot_is_not_there(library: Open, module: ScriptedModule) -> None:
    p11 = library("1")
    module.requests.clear()
    session, info, count = c_ulong(), (c_ubyte * 512)(), c_ulong(0)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("C_GetSlotInfo", (info,)),
        ("C_GetTokenInfo", (info,)),
        ("C_GetMechanismList", (None, byref(count))),
        ("C_GetMechanismInfo", (ck.CKM_ECDSA, info)),
        ("C_InitToken", (b"1234", 4, b" " * 32)),
        ("C_OpenSession", (ck.CKF_SERIAL_SESSION, None, None, byref(session))),
        ("C_CloseAllSessions", ()),
    ]
    for slot in (0, 7, 8, 1 << 40):
        for name, arguments in calls:
            assert p11.call(name, slot, *arguments) == ck.CKR_SLOT_ID_INVALID, name
    assert module.requests == [], "nothing is asked of the module"
    assert p11.open_session(1) and bytes(info) == bytes(512)


def test_events_of_a_hidden_slot(library: Open, module: ScriptedModule) -> None:
    p11 = library("1")
    happened = iter((0, 0, 1))
    module.answers[Call.WAIT_FOR_SLOT_EVENT] = lambda *_: (next(happened),)
    slot = c_ulong(99)
    assert p11.call("C_WaitForSlotEvent", ck.CKF_DONT_BLOCK, byref(slot), None) == ck.CKR_NO_EVENT
    assert slot.value == 99
    thread = threading.Thread(target=p11.good, args=("C_WaitForSlotEvent", 0, byref(slot), None))
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and slot.value == 1
