"""libhsmvisor-pkcs11.so against a scripted module: what it sends for which calls, and what it answers itself."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import addressof, byref, c_ubyte, c_ulong, create_string_buffer
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import UNAVAILABLE, CkInitializeArgs, Cryptoki, mechanism
from support.scripted_module import FOREIGN_KEY, KEY, SIGNATURE, Refuse, Request, Room, ScriptedModule, signature

OK = ck.CKR_OK


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    yield module
    module.end()


@pytest.fixture
def p11(module: ScriptedModule) -> Iterator[Cryptoki]:
    library = Cryptoki()
    library.initialize(module.address)
    yield library
    library.finalize()


@pytest.fixture
def session(p11: Cryptoki) -> int:
    return p11.open_session()


def prove(p11: Cryptoki, session: int, module: ScriptedModule) -> None:
    """After this, an Init with the same words is deferred."""
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"first") == (OK, signature(b"first"))
    module.requests.clear()


def test_hello_tells_who_calls(module: ScriptedModule, p11: Cryptoki) -> None:
    (hello,) = module.requests
    size, mode, ticket, watermark, program, pid = hello.args
    assert (size, mode, ticket, watermark) == (8, 0, None, 0)
    assert program and pid


def test_first_signature_is_init_then_sign_and_the_next_one_round_trip(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    module.requests.clear()
    for data in (b"one", b"two", b"three"):
        assert p11.sign_init(session, KEY) == OK
        assert p11.sign(session, data) == (OK, signature(data))
    assert module.names() == ["SIGN_INIT", "SIGN", "SIGN_ONCE", "SIGN_ONCE"]
    assert module.requests[-1].args == (session, (ck.CKM_ECDSA, None), KEY, b"three", 256)


def test_another_key_or_mechanism_is_not_proven(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, FOREIGN_KEY) == ck.CKR_KEY_HANDLE_INVALID
    assert p11.sign_init(session, KEY, mechanism(ck.CKM_ECDSA_SHA256)) == OK
    assert p11.sign(session, b"x") == (OK, signature(b"x"))
    assert module.names() == ["SIGN_INIT", "SIGN_INIT", "SIGN"]


def test_a_proof_serves_every_session(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    other = p11.open_session()
    assert p11.sign_init(other, KEY) == OK
    assert p11.sign(other, b"x")[0] == OK
    assert module.names() == ["OPEN_SESSION", "SIGN_ONCE"]


def test_an_error_of_the_one_shot_call_ends_operation_and_proof(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)

    def refuse(*_: Any) -> Any:
        raise Refuse(ck.CKR_KEY_HANDLE_INVALID)

    module.answers = {Call.SIGN_ONCE: refuse, Call.SIGN_INIT: refuse}
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"x")[0] == ck.CKR_KEY_HANDLE_INVALID
    assert p11.sign_init(session, KEY) == ck.CKR_KEY_HANDLE_INVALID
    module.answers = {}
    assert p11.sign(session, b"x")[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_second_init_while_one_is_deferred(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign_init(session, KEY) == ck.CKR_OPERATION_ACTIVE
    assert p11.sign(session, b"x") == (OK, signature(b"x"))
    assert module.names() == ["SIGN_ONCE"]


def test_the_state_of_a_deferred_operation_is_that_of_an_open_one(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, KEY) == OK
    length = c_ulong(64)
    assert p11.call("C_GetOperationState", session, (c_ubyte * 64)(), byref(length)) == ck.CKR_STATE_UNSAVEABLE
    assert p11.sign(session, b"x") == (OK, signature(b"x"))
    assert module.names() == ["SIGN_ONCE"]


def test_second_init_while_one_is_open_is_the_modules_to_answer(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign_init(session, KEY) == ck.CKR_OPERATION_ACTIVE
    assert p11.sign(session, b"x") == (OK, signature(b"x"))


@pytest.mark.parametrize("cancel", ["C_SessionCancel", "NULL mechanism"])
def test_a_cancelled_deferred_operation(module: ScriptedModule, p11: Cryptoki, session: int, cancel: str) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, KEY) == OK
    if cancel == "C_SessionCancel":
        p11.good("C_SessionCancel", session, 0x800)
    else:
        p11.good("C_SignInit", session, None, KEY)
    assert p11.sign(session, b"x")[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"x")[0] == OK


def test_size_queries_keep_the_operation(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"x", None) == (OK, SIGNATURE)
    assert p11.sign(session, b"x", 10) == (ck.CKR_BUFFER_TOO_SMALL, SIGNATURE)
    assert p11.sign(session, b"x", 0) == (ck.CKR_BUFFER_TOO_SMALL, SIGNATURE)
    assert p11.sign(session, b"x") == (OK, signature(b"x"))
    assert [r.args[2] for r in module.requests if r.call is Call.SIGN] == [None, 10, 0, 256]


def test_a_known_size_costs_no_round_trip(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"x", None) == (OK, SIGNATURE)
    assert p11.sign(session, b"x", 63) == (ck.CKR_BUFFER_TOO_SMALL, SIGNATURE)
    assert p11.sign(session, b"x", 64) == (OK, signature(b"x"))
    assert module.names() == ["SIGN_ONCE"]


def test_a_deferred_init_is_sent_when_parts_follow(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    prove(p11, session, module)
    assert p11.sign_init(session, KEY) == OK
    p11.good("C_SignUpdate", session, b"ab", 2)
    p11.good("C_SignUpdate", session, b"cd", 2)
    assert p11.sign(session, b"", None, "C_SignFinal") == (OK, SIGNATURE)
    assert p11.sign(session, b"", 64, "C_SignFinal") == (OK, signature(b"abcd"))
    assert module.names() == ["SIGN_INIT", "SIGN_UPDATE", "SIGN_UPDATE", "SIGN_FINAL", "SIGN_FINAL"]


@pytest.mark.parametrize("proven", [False, True])
def test_null_arguments_end_the_operation(module: ScriptedModule, p11: Cryptoki, session: int, proven: bool) -> None:
    if proven:
        prove(p11, session, module)
    for arguments in ((None, 5, None, byref(c_ulong())), (b"x", 1, None, None)):
        assert p11.sign_init(session, KEY) == OK
        assert p11.call("C_Sign", session, *arguments) == ck.CKR_ARGUMENTS_BAD
        assert p11.sign(session, b"x")[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_proofs_end_with_a_logout(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    p11.good("C_Login", session, ck.CKU_USER, b"1234", 4)
    prove(p11, session, module)
    p11.good("C_Logout", session)
    assert p11.sign_init(session, KEY) == OK
    assert module.names() == ["LOGOUT", "SIGN_INIT"]


def test_a_search_is_one_round_trip(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    module.requests.clear()
    assert p11.find(session, template=[(ck.CKA_CLASS, (3).to_bytes(8, "little")), (ck.CKA_LABEL, b"web")]) == [KEY, FOREIGN_KEY]
    assert module.names() == ["FIND_ONCE"]
    assert module.requests[0].args[1] == [(ck.CKA_CLASS, (3).to_bytes(8, "little")), (ck.CKA_LABEL, b"web")]


def test_a_search_in_small_steps_and_its_states(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    handle, count = c_ulong(), c_ulong()
    assert p11.call("C_FindObjects", session, byref(handle), 1, byref(count)) == ck.CKR_OPERATION_NOT_INITIALIZED
    p11.good("C_FindObjectsInit", session, None, 0)
    assert p11.call("C_FindObjectsInit", session, None, 0) == ck.CKR_OPERATION_ACTIVE
    seen = []
    for _ in range(3):
        p11.good("C_FindObjects", session, byref(handle), 1, byref(count))
        seen.append((count.value, handle.value))
    assert seen == [(1, KEY), (1, FOREIGN_KEY), (0, FOREIGN_KEY)]
    p11.good("C_FindObjectsFinal", session)
    assert p11.call("C_FindObjectsFinal", session) == ck.CKR_OPERATION_NOT_INITIALIZED


def test_a_long_search_goes_on_in_the_module(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    rest = list(range(1000, 1300))

    def more(module: ScriptedModule, application: Any, request: Request) -> Any:
        found, rest[:] = rest[: request.args[1]], rest[request.args[1] :]
        return (found,)

    module.answers = {
        Call.FIND_ONCE: lambda *_: (range(1, 257), 1, 7),
        Call.FIND_OBJECTS: more,
        Call.FIND_OBJECTS_FINAL: lambda *_: (),
    }
    handles, count, seen = (c_ulong * 200)(), c_ulong(), []
    p11.good("C_FindObjectsInit", session, None, 0)
    while True:
        p11.good("C_FindObjects", session, handles, 200, byref(count))
        if not count.value:
            break
        seen += handles[: count.value]
    p11.good("C_FindObjectsFinal", session)
    assert seen == [*range(1, 257), *range(1000, 1300)]
    assert module.names()[-1] == "FIND_OBJECTS_FINAL"


def test_attributes_values_lengths_and_errors(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    def answer(module: ScriptedModule, application: Any, request: Request) -> Any:
        assert request.args[2] == [(1, 4), (2, None), (3, 2), (4, 8)]
        return [(1, b"\1\0\0\0\2ab"), (2, b"\3\0\0\0\5"), (3, b"\3\0\0\0\5"), (4, b"\0")], ck.CKR_BUFFER_TOO_SMALL

    module.answers[Call.GET_ATTRIBUTE_VALUE] = answer
    rv, told = p11.attributes(session, KEY, [(1, 4), (2, None), (3, 2), (4, 8)])
    assert (rv, told) == (ck.CKR_BUFFER_TOO_SMALL, [b"ab", 5, UNAVAILABLE, UNAVAILABLE])


def test_mechanism_parameters_travel_as_fields(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    module.answers[Call.SIGN_INIT] = lambda *_: ()
    numbers = b"".join(n.to_bytes(8, "little") for n in (0x250, 2, 32))
    assert p11.sign_init(session, KEY, mechanism(0xD, numbers)) == OK
    assert module.requests[-1].args[1] == (0xD, (0x250, 2, 32))


@pytest.mark.parametrize("kind", [ck.CKM_EDDSA, ck.CKM_ML_DSA])
def test_a_context_that_is_promised_and_not_there(module: ScriptedModule, p11: Cryptoki, session: int, kind: int) -> None:
    """It is no signature without a context: the structure travels as it is, and the module refuses that."""
    module.answers[Call.SIGN_INIT] = lambda *_: ()
    context = ctypes.create_string_buffer(b"context")
    for pointer, length, expected in ((ctypes.addressof(context), 7, (0, b"context")), (0, 0, (0, b"")), (0, 7, None)):
        first, second = (length, pointer) if kind == ck.CKM_EDDSA else (pointer, length)
        parameter = b"".join(n.to_bytes(8, "little") for n in (0, first, second))
        assert p11.sign_init(session, KEY, mechanism(kind, parameter)) == OK
        assert module.requests[-1].args[1] == (kind, parameter if expected is None else expected)


def test_parameters_of_derivation_and_of_macs(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    module.answers[Call.DERIVE_KEY] = lambda *_: (9,)

    def derive(kind: int, parameter: bytes) -> Any:
        handle = c_ulong()
        p11.good("C_DeriveKey", session, byref(mechanism(kind, parameter)), KEY, None, 0, byref(handle))
        assert handle.value == 9
        return module.requests[-1].args[1]

    data = create_string_buffer(b"sixteen bytes...", 16)
    pointer, length, iv = addressof(data).to_bytes(8, "little"), (16).to_bytes(8, "little"), bytes(range(16))
    assert derive(0x1104, pointer + length) == (0x1104, (b"sixteen bytes...",))
    assert derive(0x1104, bytes(8) + length) == (0x1104, (b"",)), "a pointer that is NULL has no bytes"
    assert derive(0x1105, iv + pointer + length) == (0x1105, (iv, b"sixteen bytes..."))
    assert derive(0x1105, iv + pointer + bytes(8)) == (0x1105, (iv, b""))
    for kind, other in ((0x1104, b"x" * 15), (0x1104, b"x" * 17), (0x1105, b"x" * 31), (0x1105, b"x" * 33), (0x21, b"public")):
        assert derive(kind, other) == (kind, other), "what is no such structure goes as it is, and the module refuses it"
    module.answers[Call.SIGN_INIT] = lambda *_: ()
    assert p11.sign_init(session, KEY, mechanism(0x1084, (4).to_bytes(8, "little"))) == OK
    assert module.requests[-1].args[1] == (0x1084, (4,))


def test_calls_in_flight_have_a_connection_each_and_share_them_later(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    barrier = threading.Barrier(4)

    def meet(module: ScriptedModule, application: Any, request: Request) -> Any:
        barrier.wait(10)
        return ScriptedModule.sign_init(module, application, request)

    module.answers[Call.SIGN_INIT] = meet
    sessions = [p11.open_session() for _ in range(4)]
    results: list[int] = []
    threads = [threading.Thread(target=lambda s=s: results.append(p11.sign_init(s, KEY))) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [OK] * 4
    inits = [r for r in module.requests if r.call is Call.SIGN_INIT]
    assert len({r.connection for r in inits}) == 4
    assert [r.args[1] for r in module.requests if r.call is Call.HELLO] == [0, 1, 1, 1]
    assert len(module.applications) == 1
    for s in sessions:
        assert p11.sign(s, b"x")[0] == OK
    assert module.connections() == 4


@pytest.mark.parametrize("refused", [False, True], ids=["cap told by Hello", "refused when full"])
def test_calls_beyond_the_cap_wait(tmp_path: Path, refused: bool) -> None:
    module = ScriptedModule(tmp_path / "guest.sock")
    module.max_connections = 64 if refused else 2
    module.refuse_after = 2 if refused else None
    p11 = Cryptoki()
    p11.initialize(module.address)
    sessions = [p11.open_session() for _ in range(6)]
    results: list[int] = []

    def work(session: int) -> None:
        for _ in range(20):
            results.append(p11.sign_init(session, KEY))
            results.append(p11.sign(session, b"x")[0])

    threads = [threading.Thread(target=work, args=(s,)) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [OK] * 240
    assert len({r.connection for r in module.requests if r.call is not Call.HELLO}) <= 2
    assert p11.finalize() == OK
    module.end()


def test_initialize_arguments(module: ScriptedModule) -> None:
    p11 = Cryptoki()
    pointers = (1, 1, 1, 1)
    for args, rv in (
        (CkInitializeArgs(reserved=1), ck.CKR_ARGUMENTS_BAD),
        (CkInitializeArgs(mutexes=(1, 0, 0, 0)), ck.CKR_ARGUMENTS_BAD),
        (CkInitializeArgs(mutexes=pointers), ck.CKR_CANT_LOCK),
    ):
        assert p11.call("C_Initialize", byref(args)) == rv
    assert p11.call("C_GetSlotList", 1, None, byref(c_ulong())) == ck.CKR_CRYPTOKI_NOT_INITIALIZED
    p11.initialize(module.address)
    assert p11.call("C_Initialize", None) == ck.CKR_CRYPTOKI_ALREADY_INITIALIZED
    assert p11.call("C_Finalize", b"x") == ck.CKR_ARGUMENTS_BAD
    assert p11.finalize() == OK
    assert p11.finalize() == ck.CKR_CRYPTOKI_NOT_INITIALIZED


def test_random_and_functions_of_older_standards(module: ScriptedModule, p11: Cryptoki, session: int) -> None:
    buffer = (c_ubyte * 70000)()
    p11.good("C_GenerateRandom", session, buffer, 70000)
    assert bytes(buffer) == b"r" * 70000
    assert p11.call("C_GetFunctionStatus", session) == ck.CKR_FUNCTION_NOT_PARALLEL
    assert p11.call("C_CancelFunction", session) == ck.CKR_FUNCTION_NOT_PARALLEL


def test_output_that_needs_more_room_than_there_is(module: ScriptedModule, p11: Cryptoki) -> None:
    count = c_ulong(0)
    p11.good("C_GetSlotList", 1, None, byref(count))
    assert count.value == 1
    module.answers[Call.GET_SLOT_LIST] = lambda *_: (Room(3),)
    slots, count = (c_ulong * 2)(), c_ulong(2)
    assert p11.call("C_GetSlotList", 1, slots, byref(count)) == ck.CKR_BUFFER_TOO_SMALL
    assert count.value == 3
