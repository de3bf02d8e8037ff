"""Message-based functions and those of 3.2 of libhsmvisor-pkcs11.so against a scripted module: what it sends, and what it does not
believe."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from ctypes import byref, c_ulong
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import MORE_FOLLOWS, Call
from support.cryptoki import CkMechanism, Cryptoki
from support.cryptoki_messages import Interface, Parameter, attributes
from support.scripted_module import KEY, Close, Raw, Refuse, Request, Room, ScriptedModule

OK, BAD = ck.CKR_OK, ck.CKR_DEVICE_ERROR
GCM, CCM, CHACHA = ck.CKM_AES_GCM, ck.CKM_AES_CCM, ck.CKM_CHACHA20_POLY1305
IV, MADE, TAG, END = b"i" * 12, b"m" * 12, b"t" * 16, ck.CKF_END_OF_MESSAGE
ROOM = 16


def nothing(*_: Any) -> tuple[Any, ...]:
    return ()


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    plain = ("SIGN", "VERIFY", "ENCRYPT", "DECRYPT")
    module.answers = {Call[f"MESSAGE_{kind}_{step}"]: nothing for kind in plain for step in ("INIT", "FINAL")}
    yield module
    module.end()


@pytest.fixture
def p11(module: ScriptedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cryptoki]:
    config = tmp_path / "pkcs11.conf"
    config.write_text(f"address = {module.address}\nreconnect_ms = 500\ndeadline_ms = 1000\n")
    monkeypatch.setenv("HSMVISOR_PKCS11_CONFIG", str(config))
    monkeypatch.delenv("HSMVISOR_PKCS11_ADDRESS", raising=False)
    library = Cryptoki()
    library.initialize()
    yield library
    library.finalize()


@pytest.fixture
def lists(p11: Cryptoki) -> Interface:
    return Interface(p11)


@pytest.fixture
def session(p11: Cryptoki) -> int:
    return p11.open_session()


def mechanism(kind: int = GCM) -> Any:
    return byref(CkMechanism(kind, None, 0))


def begin(lists: Interface, session: int, kind: str = "Encrypt", which: int = GCM) -> None:
    lists.good(f"C_Message{kind}Init", session, mechanism(which), KEY)


def last(module: ScriptedModule) -> Request:
    return module.requests[-1]


# ---- what is sent -------------------------------------------------------------------------------------------------------


def test_parameters_travel_as_fields(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers |= {
        Call.ENCRYPT_MESSAGE: lambda *_: (MADE, TAG, b"data"),
        Call.DECRYPT_MESSAGE: lambda *_: (b"data",),
    }
    for kind, told in (
        (GCM, lambda iv, tag: (iv, 32, ck.CKG_GENERATE_COUNTER, tag, 128)),
        (CCM, lambda iv, tag: (4, iv, 32, ck.CKG_GENERATE_COUNTER, tag, 16)),
        (CHACHA, lambda iv, tag: (iv, tag)),
    ):
        sent = Parameter(kind, IV, b"\xaa" * 16, 4, 32, ck.CKG_GENERATE_COUNTER)
        lists.good("C_MessageEncryptInit", session, byref(sent.as_mechanism()), KEY)
        assert last(module).args == (session, (kind, told(IV, b"")), KEY), "the tag is the module's to make"
        assert lists.got("C_EncryptMessage", session, *sent.arguments(), b"more", 4, b"data", 4, room=4) == b"data"
        assert last(module).args == (session, (kind, told(IV, b"")), b"more", b"data", 4)
        assert (sent.iv, sent.tag) == (MADE, TAG)
        begin(lists, session, "Decrypt", kind)
        assert last(module).args == (session, (kind, None), KEY)
        assert lists.got("C_DecryptMessage", session, *sent.arguments(), None, 0, b"data", 4, room=4) == b"data"
        assert last(module).args == (session, (kind, told(MADE, TAG)), b"", b"data", 4)
        lists.good("C_SessionCancel", session, ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT)
    assert "C_SignMessage" not in module.names()


def test_messages_in_parts(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers |= {
        Call.ENCRYPT_MESSAGE_BEGIN: lambda *_: (b"",),
        Call.ENCRYPT_MESSAGE_NEXT: lambda m, a, request: (TAG if request.args[4] else b"", b"out!"),
        Call.SIGN_MESSAGE_BEGIN: nothing,
        Call.SIGN_MESSAGE_NEXT: lambda m, a, request: (Room(0) if request.args[3] == MORE_FOLLOWS else b"s" * 64,),
        Call.VERIFY_MESSAGE_NEXT: nothing,
    }
    sent = Parameter(GCM, IV, bytes(16))
    begin(lists, session)
    lists.good("C_EncryptMessageBegin", session, *sent.arguments(), b"more", 4)
    assert sent.iv == IV, "the caller's own"
    for flags, tag in ((0, bytes(16)), (END, TAG)):
        assert lists.got("C_EncryptMessageNext", session, *sent.arguments(), b"part", 4, room=9, after=(flags,)) == b"out!"
        assert (last(module).args[2:], sent.tag) == ((b"part", 9, flags), tag)
    begin(lists, session, "Sign")
    lists.good("C_SignMessageBegin", session, None, 0)
    lists.good("C_SignMessageNext", session, None, 0, b"part", 4, None, None)
    assert last(module).args == (session, None, b"part", MORE_FOLLOWS)
    assert lists.got("C_SignMessageNext", session, None, 0, b"part", 4, room=64) == b"s" * 64
    begin(lists, session, "Verify")
    lists.good("C_VerifyMessageNext", session, None, 0, b"part", 4, None, 0)
    assert last(module).args == (session, None, b"part", None)
    lists.good("C_VerifyMessageNext", session, None, 0, b"part", 4, b"s" * 64, 64)
    assert last(module).args == (session, None, b"part", b"s" * 64)


def test_keys_with_associated_data(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers |= {
        Call.WRAP_KEY_AUTHENTICATED: lambda *_: (MADE, TAG, b"wrapped"),
        Call.UNWRAP_KEY_AUTHENTICATED: lambda *_: (9,),
        Call.ENCAPSULATE_KEY: lambda m, a, request: (b"c" * 32, 10) if request.args[4] else (Room(32), 0),
        Call.DECAPSULATE_KEY: lambda *_: (11,),
    }
    sent, made = Parameter(GCM, IV, bytes(16)), c_ulong(77)
    how, values = byref(sent.as_mechanism()), attributes({ck.CKA_TOKEN: True})
    assert lists.got("C_WrapKeyAuthenticated", session, how, KEY, 6, b"more", 4, room=7) == b"wrapped"
    assert last(module).args == (session, (GCM, (IV, 0, 0, b"", 128)), KEY, 6, b"more", 7)
    assert (sent.iv, sent.tag) == (MADE, TAG)
    lists.good("C_UnwrapKeyAuthenticated", session, how, KEY, b"wrapped", 7, *values, b"more", 4, byref(made))
    template = [(ck.CKA_TOKEN, b"\1")]
    assert last(module).args == (session, (GCM, (MADE, 0, 0, TAG, 128)), KEY, b"wrapped", template, b"more")
    assert made.value == 9
    kem = mechanism(ck.CKM_ML_KEM)
    assert lists.output("C_EncapsulateKey", session, kem, KEY, *values, room=None, after=(byref(made),)) == (OK, 32)
    assert made.value == 9, "no key was made"
    assert lists.got("C_EncapsulateKey", session, kem, KEY, *values, room=32, after=(byref(made),)) == b"c" * 32
    assert (last(module).args, made.value) == ((session, (ck.CKM_ML_KEM, None), KEY, template, 32), 10)
    lists.good("C_DecapsulateKey", session, kem, KEY, *values, b"c" * 32, 32, byref(made))
    assert (last(module).args, made.value) == ((session, (ck.CKM_ML_KEM, None), KEY, b"c" * 32, template), 11)


# ---- what is not believed -----------------------------------------------------------------------------------------------


def says(call: Call, *fields: bytes) -> Callable[..., Raw]:
    return lambda *_: Raw(struct.pack(">I", call) + b"".join(fields))


def counted(data: bytes, valid: int = 1, count: int | None = None) -> bytes:
    return struct.pack(">BI", valid, len(data) if count is None else count) + data


LIES = {
    "a short IV": (counted(MADE[1:]), counted(TAG), counted(b"data")),
    "a long IV": (counted(MADE + b"m"), counted(TAG), counted(b"data")),
    "a giant IV": (counted(b"", count=0xFFFFFFFF), counted(TAG), counted(b"data")),
    "an IV that is not there": (counted(b"", valid=0, count=12), counted(TAG), counted(b"data")),
    "a short tag": (counted(MADE), counted(TAG[1:]), counted(b"data")),
    "a long tag": (counted(MADE), counted(TAG + b"t"), counted(b"data")),
    "a giant tag": (counted(MADE), counted(b"", count=0xFFFFFFFF), counted(b"data")),
    "no tag": (counted(MADE), counted(b""), counted(b"data")),
    "more than the room": (counted(MADE), counted(TAG), counted(bytes(ROOM + 1))),
    "a length past the message": (counted(MADE), counted(TAG), counted(b"data", count=5)),
    "room needed that is there": (counted(MADE), counted(TAG), counted(b"", valid=0, count=3)),
    "a tag without output": (counted(b""), counted(TAG), counted(b"", valid=0, count=ROOM + 1)),
    "bytes too many": (counted(MADE), counted(TAG), counted(b"data"), b"x"),
    "nothing": (),
}


@pytest.mark.parametrize("body", LIES.values(), ids=LIES.keys())
def test_messages(module: ScriptedModule, p11: Cryptoki, lists: Interface, session: int, body: tuple[bytes, ...]) -> None:
    module.answers[Call.ENCRYPT_MESSAGE] = says(Call.ENCRYPT_MESSAGE, *body)
    module.answers[Call.ENCRYPT_MESSAGE_NEXT] = says(Call.ENCRYPT_MESSAGE_NEXT, *body[1:])
    module.answers[Call.WRAP_KEY_AUTHENTICATED] = says(Call.WRAP_KEY_AUTHENTICATED, *body)
    sent = Parameter(GCM, IV, bytes(16))  # with guards: Parameter.iv and .tag look at them, Interface.output at its own
    begin(lists, session)
    assert lists.output("C_EncryptMessage", session, *sent.arguments(), None, 0, b"data", 4, room=ROOM)[0] == BAD
    how = byref(sent.as_mechanism())
    assert lists.output("C_WrapKeyAuthenticated", session, how, KEY, 6, None, 0, room=ROOM)[0] == BAD
    if b"".join(body).startswith(counted(MADE)):
        begin(lists, session)
        assert lists.output("C_EncryptMessageNext", session, *sent.arguments(), b"data", 4, room=ROOM, after=(END,))[0] == BAD
    assert sent.iv in (IV, MADE)
    assert sent.tag == bytes(16) or body == LIES["bytes too many"], "of what it cannot be, nothing is written"
    module.answers.clear()
    assert p11.find(session)


def test_a_tag_before_the_end(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers[Call.ENCRYPT_MESSAGE_NEXT] = lambda *_: (TAG, b"out!")
    sent = Parameter(GCM, IV, bytes(16))
    begin(lists, session)
    assert lists.output("C_EncryptMessageNext", session, *sent.arguments(), b"data", 4, room=ROOM, after=(0,))[0] == BAD
    assert sent.tag == bytes(16)


OUTPUTS = {
    "more than the room": (counted(bytes(ROOM + 1)),),
    "a giant length": (counted(b"A" * 32, count=0xFFFFFFFF),),
    "room needed that is there": (counted(b"", valid=0, count=3),),
    "half a length": (b"\1\0\0",),
    "nothing": (),
}
KEYED = {Call.ENCAPSULATE_KEY: struct.pack(">Q", 9)}


@pytest.mark.parametrize("body", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_other_outputs(module: ScriptedModule, lists: Interface, session: int, body: tuple[bytes, ...]) -> None:
    sent, made = Parameter(GCM, IV, TAG), c_ulong(77)
    cases: list[tuple[Call, str, str | None, tuple[Any, ...], tuple[Any, ...]]] = [
        (Call.DECRYPT_MESSAGE, "C_DecryptMessage", "Decrypt", (*sent.arguments(), None, 0, b"data", 4), ()),
        (Call.DECRYPT_MESSAGE_NEXT, "C_DecryptMessageNext", "Decrypt", (*sent.arguments(), b"data", 4), (END,)),
        (Call.SIGN_MESSAGE, "C_SignMessage", "Sign", (None, 0, b"data", 4), ()),
        (Call.SIGN_MESSAGE_NEXT, "C_SignMessageNext", "Sign", (None, 0, b"data", 4), ()),
        (Call.ENCAPSULATE_KEY, "C_EncapsulateKey", None, (mechanism(ck.CKM_ML_KEM), KEY, None, 0), (byref(made),)),
    ]
    for call, name, kind, arguments, after in cases:
        module.answers[call] = says(call, *body, KEYED.get(call, b"") if body else b"")
        if kind:
            begin(lists, session, kind)
        assert lists.output(name, session, *arguments, room=ROOM, after=after)[0] == BAD
    assert made.value == 77


def test_an_output_that_nobody_asked_for(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers[Call.SIGN_MESSAGE_NEXT] = lambda *_: (b"s" * 64,)
    begin(lists, session, "Sign")
    assert lists.call("C_SignMessageNext", session, None, 0, b"data", 4, None, None) == BAD


# ---- lost connections ---------------------------------------------------------------------------------------------------


def test_a_lost_process_says_so_once(module: ScriptedModule, lists: Interface, session: int) -> None:
    module.answers[Call.SIGN_MESSAGE] = lambda *_: (b"s" * 64,)
    begin(lists, session, "Sign")
    lists.got("C_SignMessage", session, None, 0, b"data", 4)
    module.restart()
    assert lists.output("C_SignMessage", session, None, 0, b"data", 4)[0] == BAD
    assert lists.output("C_SignMessage", session, None, 0, b"data", 4)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    begin(lists, session, "Sign")
    lists.got("C_SignMessage", session, None, 0, b"data", 4)


def test_a_message_in_doubt_ends_the_process(module: ScriptedModule, lists: Interface, session: int) -> None:
    """The module lives on, and nobody knows whether it has taken the part: the next Init cancels what may be open there."""
    begin(lists, session)
    sent = Parameter(GCM, IV, bytes(16))

    def lose(*_: Any) -> Any:
        raise Close

    module.answers[Call.ENCRYPT_MESSAGE_NEXT] = lose
    assert lists.output("C_EncryptMessageNext", session, *sent.arguments(), b"data", 4, after=(0,))[0] == BAD
    assert lists.output("C_EncryptMessageNext", session, *sent.arguments(), b"data", 4, after=(0,))[0] == 0x91
    module.requests.clear()
    begin(lists, session)
    assert module.names()[-2:] == ["SESSION_CANCEL", "MESSAGE_ENCRYPT_INIT"]
    assert module.requests[-2].args == (session, ck.CKF_MESSAGE_ENCRYPT)


def test_an_error_of_a_message_keeps_the_process(module: ScriptedModule, lists: Interface, session: int) -> None:
    def refuse(*_: Any) -> Any:
        raise Refuse(ck.CKR_AEAD_DECRYPT_FAILED)

    begin(lists, session, "Decrypt")
    sent = Parameter(GCM, IV, TAG)
    message = (*sent.arguments(), None, 0, b"data", 4)
    module.answers[Call.DECRYPT_MESSAGE] = refuse
    assert lists.output("C_DecryptMessage", session, *message)[0] == ck.CKR_AEAD_DECRYPT_FAILED
    module.answers[Call.DECRYPT_MESSAGE] = lambda *_: (b"data",)
    assert lists.got("C_DecryptMessage", session, *message) == b"data"
    lists.good("C_MessageDecryptFinal", session)
    assert lists.output("C_DecryptMessage", session, *message)[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_dual_functions_need_what_was_put_off(module: ScriptedModule, p11: Cryptoki, lists: Interface, session: int) -> None:
    """An Init that was proven before is sent before the call that needs it."""
    module.answers |= {
        Call.ENCRYPT_INIT: nothing,
        Call.SIGN_ENCRYPT_UPDATE: lambda m, a, request: (b"out!" if request.args[2] else Room(4),),
    }
    assert p11.sign_init(session, KEY) == OK
    p11.sign(session, b"first")
    assert p11.sign_init(session, KEY) == OK
    lists.good("C_EncryptInit", session, mechanism(ck.CKM_AES_ECB), KEY)
    module.requests.clear()
    assert lists.output("C_SignEncryptUpdate", session, b"data", 4, room=None) == (OK, 4)
    assert lists.got("C_SignEncryptUpdate", session, b"data", 4, room=4) == b"out!"
    assert module.names() == ["SIGN_INIT", "SIGN_ENCRYPT_UPDATE", "SIGN_ENCRYPT_UPDATE"]
    module.restart()
    assert lists.output("C_SignEncryptUpdate", session, b"data", 4)[0] == BAD
