"""A module that lies must not take over the application.

Whatever it answers, no byte is written past a buffer, and no length is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from ctypes import byref, c_ubyte, c_ulong, create_string_buffer
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import UNAVAILABLE, Cryptoki
from support.scripted_module import KEY, Raw, Room, ScriptedModule

BAD = ck.CKR_DEVICE_ERROR


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    yield module
    module.end()


@pytest.fixture
def p11(module: ScriptedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cryptoki]:
    config = tmp_path / "pkcs11.conf"
    config.write_text(f"address = {module.address}\nreconnect_ms = 200\ndeadline_ms = 500\n")
    monkeypatch.setenv("HSMVISOR_PKCS11_CONFIG", str(config))
    monkeypatch.delenv("HSMVISOR_PKCS11_ADDRESS", raising=False)
    library = Cryptoki()
    library.initialize()
    yield library
    library.finalize()


@pytest.fixture
def session(p11: Cryptoki) -> int:
    return p11.open_session()


def says(call: Call, body: bytes) -> Callable[..., Raw]:
    return lambda *_: Raw(struct.pack(">I", call) + body)


def counted(valid: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack(">BI", valid, count) + data


ROOM = 16  #: bytes or elements of the caller's buffer

OUTPUTS = {
    "more than the room": counted(1, ROOM + 1, b"A" * (ROOM + 1)),
    "a length past the message": counted(1, 10, b"A" * 9),
    "a giant length": counted(1, 0xFFFFFFFF, b"A" * 32),
    "less data than it could be": counted(1, 4, b"A" * 9),
    "no room needed that is not there": counted(0, 3),
    "a giant need": counted(0, 0xFFFFFFFF),
    "nothing": b"",
    "half a length": b"\1\0\0",
}


@pytest.mark.parametrize("body", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs(module: ScriptedModule, p11: Cryptoki, session: int, body: bytes) -> None:
    assert p11.sign_init(session, KEY) == ck.CKR_OK
    module.answers[Call.SIGN] = says(Call.SIGN, body)
    guarded = create_string_buffer(b"\x5a" * 64, 64)
    length = c_ulong(ROOM)
    assert p11.call("C_Sign", session, b"x", 1, guarded, byref(length)) == BAD
    assert guarded.raw[ROOM:] == b"\x5a" * (64 - ROOM)
    module.answers.clear()
    assert p11.find(session)


COUNTS = {
    "more than the room": counted(1, ROOM + 1, bytes(8 * (ROOM + 1))),
    "more than the message": counted(1, ROOM, bytes(8 * ROOM - 1)),
    "a count that overflows": counted(1, 0x20000001, bytes(8)),
    "a giant count": counted(1, 0xFFFFFFFF),
    "too many bytes": counted(1, 1, bytes(9)),
}


@pytest.mark.parametrize("body", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("name", ["C_GetSlotList", "C_GetMechanismList"])
def test_lists_of_numbers(module: ScriptedModule, p11: Cryptoki, body: bytes, name: str) -> None:
    call = Call.GET_SLOT_LIST if name == "C_GetSlotList" else Call.GET_MECHANISM_LIST
    module.answers[call] = says(call, body)
    guarded, count = (c_ulong * (ROOM + 4))(*[7] * (ROOM + 4)), c_ulong(ROOM)
    assert p11.call(name, 0, guarded, byref(count)) == BAD
    assert list(guarded[ROOM:]) == [7] * 4


FINDS = {
    "more than was asked for": counted(1, 257, bytes(8 * 257)) + b"\0" + bytes(8),
    "a giant count": counted(1, 0xFFFFFFFF) + b"\0" + bytes(8),
    "not valid": counted(0, 5) + b"\0" + bytes(8),
    "cut": counted(1, 2, bytes(12)),
}


@pytest.mark.parametrize("body", FINDS.values(), ids=FINDS.keys())
def test_searches(module: ScriptedModule, p11: Cryptoki, session: int, body: bytes) -> None:
    module.answers[Call.FIND_ONCE] = says(Call.FIND_ONCE, body)
    assert p11.call("C_FindObjectsInit", session, None, 0) == BAD
    handle, count = c_ulong(), c_ulong()
    assert p11.call("C_FindObjects", session, byref(handle), 1, byref(count)) == ck.CKR_OPERATION_NOT_INITIALIZED


@pytest.mark.parametrize("reply", [Room(3), [1, 2, 3]], ids=["a need", "more than asked for"])
def test_the_rest_of_a_search(module: ScriptedModule, p11: Cryptoki, session: int, reply: Any) -> None:
    module.answers = {Call.FIND_ONCE: lambda *_: ((), 1, 7), Call.FIND_OBJECTS: lambda *_: (reply,)}
    p11.good("C_FindObjectsInit", session, None, 0)
    handles, count = (c_ulong * 3)(9, 9, 9), c_ulong()
    assert p11.call("C_FindObjects", session, handles, 2, byref(count)) == BAD
    assert handles[2] == 9


OK_RV = struct.pack(">Q", ck.CKR_OK)


def attributes(count: int, *items: tuple[int, bytes], rv: bytes = OK_RV) -> bytes:
    return struct.pack(">I", count) + b"".join([struct.pack(">Q", kind) + form for kind, form in items]) + rv


ATTRIBUTES = {
    "longer than the room": attributes(2, (1, b"\1" + struct.pack(">I", 17) + bytes(17)), (2, b"\0")),
    "a giant length": attributes(2, (1, b"\1\xff\xff\xff\xff"), (2, b"\0")),
    "another count": attributes(3, (1, b"\0"), (2, b"\0"), (3, b"\0")),
    "another type": attributes(2, (2, b"\1\0\0\0\0"), (1, b"\1\0\0\0\0")),
    "an unknown form": attributes(2, (1, b"\7"), (2, b"\0")),
    "success without a value": attributes(2, (1, b"\1\0\0\0\1a"), (2, b"\0")),
    "success for a buffer that was too small": attributes(2, (1, b"\3\0\0\0\x20"), (2, b"\1\0\0\0\0")),
    "an error that is none of these": attributes(2, (1, b"\0"), (2, b"\0"), rv=struct.pack(">Q", ck.CKR_CRYPTOKI_NOT_INITIALIZED)),
    "templates that nobody asked for": attributes(2, (1, b"\2\0\0\0\1" + bytes(9)), (2, b"\0")),
}


@pytest.mark.parametrize("body", ATTRIBUTES.values(), ids=ATTRIBUTES.keys())
def test_attributes(module: ScriptedModule, p11: Cryptoki, session: int, body: bytes) -> None:
    module.answers[Call.GET_ATTRIBUTE_VALUE] = says(Call.GET_ATTRIBUTE_VALUE, body)
    assert p11.attributes(session, KEY, [(1, 16), (2, 16)]) == (BAD, [UNAVAILABLE, UNAVAILABLE])


FRAMES = {
    "another id": struct.pack(">III", 0xDEAD, 0, 4) + struct.pack(">I", 5),
    "options": struct.pack(">III", 3, 8, 4) + bytes(12),
    "more than 16 MiB": struct.pack(">III", 3, 0, (16 << 20) + 1),
    "the largest number": struct.pack(">III", 3, 0, 0xFFFFFFFF),
    "half a header": b"\0\0\0",
    "a header alone": struct.pack(">III", 3, 0, 4),
    "two answers": (struct.pack(">III", 3, 0, 12) + struct.pack(">IQ", 0, 5)) * 2,
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_frames(module: ScriptedModule, p11: Cryptoki, frame: bytes) -> None:
    session = p11.open_session()  # the second request of this connection; the third is answered so:
    module.answers[Call.GET_SESSION_INFO] = lambda *_: Raw(frame=frame)
    info = (c_ubyte * 64)()
    assert p11.call("C_GetSessionInfo", session, info) == BAD
    module.answers.clear()
    assert p11.find(session)


HEADS = {
    "another call": struct.pack(">I", Call.SIGN) + bytes(32),
    "an error that is CKR_OK": struct.pack(">IQ", 0, 0),
    "an error and more": struct.pack(">IQ", 0, 5) + b"x",
    "no call": b"",
}


@pytest.mark.parametrize("message", HEADS.values(), ids=HEADS.keys())
def test_heads(module: ScriptedModule, p11: Cryptoki, session: int, message: bytes) -> None:
    module.answers[Call.GET_SESSION_INFO] = lambda *_: Raw(message)
    assert p11.call("C_GetSessionInfo", session, (c_ubyte * 64)()) == BAD


def test_texts_of_another_width(module: ScriptedModule, p11: Cryptoki) -> None:
    module.answers[Call.GET_SLOT_INFO] = lambda *_: (b"x" * 4096, b"m" * 32, 1, (1, 0), (1, 0))
    guarded = create_string_buffer(b"\x5a" * 512, 512)
    assert p11.call("C_GetSlotInfo", 0, guarded) == BAD
    assert guarded.raw[128:] == b"\x5a" * 384


HELLOS = {
    "a short ticket": counted(1, 15, bytes(15)) + bytes(33),
    "a giant ticket": counted(1, 0xFFFFFFFF) + bytes(33),
    "no ticket": counted(0, 16, bytes(16)) + bytes(33),
    "cut": counted(1, 16, bytes(16)) + bytes(32),
    "too long": counted(1, 16, bytes(16)) + bytes(34),
}


@pytest.mark.parametrize("body", HELLOS.values(), ids=HELLOS.keys())
def test_greetings(module: ScriptedModule, p11: Cryptoki, body: bytes) -> None:
    p11.finalize()
    module.answers[Call.HELLO] = says(Call.HELLO, body)
    p11.initialize()
    assert p11.slots() == []
    assert p11.call("C_OpenSession", 0, 4, None, None, byref(c_ulong())) == BAD


def test_restored_sessions_of_another_count(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    module.answers[Call.RESTORE_SESSIONS] = lambda *_: ([0] * 9,)
    module.restart()
    assert p11.sign_init(session, KEY) == BAD
    module.answers.clear()
    assert p11.sign_init(session, KEY) == ck.CKR_OK
