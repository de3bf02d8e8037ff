"""libhsmvisor-pkcs11.so against a scripted module: encryption and decryption in as few round trips and messages as there can be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ctypes import Structure, byref, c_char_p, c_ubyte, c_ulong, c_void_p, cast, sizeof
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call
from support.cryptoki import CkMechanism, Cryptoki, mechanism
from support.scripted_module import KEY, Refuse, Room, ScriptedModule

OK = ck.CKR_OK
FIRST = 1 << 20  #: bytes of a message that every module takes
TAG = b"tag." * 4


class CkGcmParams(Structure):
    _fields_ = (
        ("iv", c_char_p),
        ("iv_len", c_ulong),
        ("iv_bits", c_ulong),
        ("more", c_char_p),
        ("more_len", c_ulong),
        ("tag", c_ulong),
    )


def gcm(iv: bytes, more: bytes = b"", tag: int = 128) -> CkMechanism:
    params = CkGcmParams(iv, len(iv), 8 * len(iv), more, len(more), tag)
    made = CkMechanism(ck.CKM_AES_GCM, cast(byref(params), c_void_p), sizeof(params))
    made.kept = params
    return made


def cbc(iv: bytes) -> CkMechanism:
    return mechanism(ck.CKM_AES_CBC_PAD, iv)


def sealed(data: bytes) -> bytes:
    return bytes(data) + TAG


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")

    def whole(module: ScriptedModule, application: Any, request: Any) -> Any:
        *_, data, room = request.args
        return (sealed(data) if room is not None and room >= len(data) + len(TAG) else Room(len(data) + len(TAG)),)

    for kind in ("ENCRYPT", "DECRYPT"):
        module.answers |= {Call[f"{kind}_INIT"]: lambda *_: (), Call[kind]: whole, Call[f"{kind}_ONCE"]: whole}
    yield module
    module.end()


@pytest.fixture
def p11(module: ScriptedModule) -> Iterator[Cryptoki]:
    library = Cryptoki()
    library.initialize(module.address)
    yield library
    library.finalize()


def run(p11: Cryptoki, session: int, how: CkMechanism, data: bytes = b"data", what: str = "Encrypt") -> tuple[int, bytes]:
    rv = p11.call(f"C_{what}Init", session, byref(how), KEY)
    if rv != OK:
        return rv, b""
    out, length = (c_ubyte * (len(data) + 200))(), c_ulong(len(data) + 200)
    rv = p11.call(f"C_{what}", session, data, len(data), out, byref(length))
    return rv, bytes(out[: length.value]) if rv == OK else b""


@pytest.mark.parametrize("what", ["Encrypt", "Decrypt"])
@pytest.mark.parametrize("how", [gcm, cbc])
def test_another_iv_needs_no_init_of_its_own(module: ScriptedModule, p11: Cryptoki, what: str, how: Any) -> None:
    session, other = p11.open_session(), p11.open_session()
    module.requests.clear()
    for number, used in enumerate((session, session, other)):
        assert run(p11, used, how(bytes([number]) * 16), b"%d" % number, what) == (OK, sealed(b"%d" % number))
    name = what.upper()
    assert module.names() == [f"{name}_INIT", name, f"{name}_ONCE", f"{name}_ONCE"]
    used, (_, parameter), key, data, room = module.requests[-1].args
    assert (used, key, data, room) == (other, KEY, b"2", 201)
    assert (parameter[0] if how is gcm else parameter) == b"\2" * 16, "and it is the new one that travels"


def test_what_an_init_looks_at_is_proven_anew(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    first = gcm(b"i" * 12, b"more")
    run(p11, session, first)
    for how in (
        gcm(b"i" * 13, b"more"),
        gcm(b"i" * 12, b"mor"),
        gcm(b"i" * 12, b"more", 96),
        cbc(b"i" * 16),
        mechanism(ck.CKM_AES_ECB),
    ):
        module.requests.clear()
        assert run(p11, session, how)[0] == OK
        assert module.names() == ["ENCRYPT_INIT", "ENCRYPT"]
    module.requests.clear()
    assert run(p11, session, first, what="Decrypt")[0] == OK
    assert module.names() == ["DECRYPT_INIT", "DECRYPT"], "what encrypts proves nothing of decryption"


def test_a_parameter_that_is_long_is_not_deferred(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    for _ in range(2):
        module.requests.clear()
        assert run(p11, session, gcm(b"i" * 12, b"m" * 200))[0] == OK
        assert module.names() == ["ENCRYPT_INIT", "ENCRYPT"]


def test_an_error_ends_the_proof(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    run(p11, session, gcm(b"a" * 12))

    def refuse(*_: Any) -> Any:
        raise Refuse(ck.CKR_KEY_HANDLE_INVALID)

    module.answers |= {Call.ENCRYPT_ONCE: refuse, Call.ENCRYPT_INIT: refuse}
    assert p11.call("C_EncryptInit", session, byref(gcm(b"b" * 12)), KEY) == OK
    length = c_ulong(64)
    assert p11.call("C_Encrypt", session, b"x", 1, (c_ubyte * 64)(), byref(length)) == ck.CKR_KEY_HANDLE_INVALID
    assert p11.call("C_EncryptInit", session, byref(gcm(b"c" * 12)), KEY) == ck.CKR_KEY_HANDLE_INVALID


def test_a_deferred_encryption_goes_on_in_parts(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    run(p11, session, gcm(b"a" * 12))
    module.answers[Call.ENCRYPT_UPDATE] = lambda *_: (b"part",)
    module.requests.clear()
    assert p11.call("C_EncryptInit", session, byref(gcm(b"b" * 12)), KEY) == OK
    out, length = (c_ubyte * 64)(), c_ulong(64)
    assert p11.call("C_EncryptUpdate", session, b"x", 1, out, byref(length)) == OK
    assert module.names() == ["ENCRYPT_INIT", "ENCRYPT_UPDATE"]
    assert module.requests[0].args[1][1][0] == b"b" * 12


# ---- modules of earlier releases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [0, 1000, FIRST])
def test_an_earlier_module_is_asked_as_before(tmp_path: Path, module: ScriptedModule, told: int) -> None:
    module.max_message = told
    p11 = Cryptoki()
    p11.initialize(module.address)
    session = p11.open_session()
    for _ in range(2):
        module.requests.clear()
        assert run(p11, session, gcm(b"i" * 12))[0] == OK
        assert module.names() == ["ENCRYPT_INIT", "ENCRYPT"]
    parts = []

    def update(module: ScriptedModule, application: Any, request: Any) -> Any:
        _, data, room = request.args
        if room is None or not data:
            return (Room(0),)
        parts.append(len(data))
        return (b"",)

    module.answers |= {Call.ENCRYPT_UPDATE: update, Call.ENCRYPT_FINAL: lambda *_: (TAG,)}
    assert run(p11, session, gcm(b"i" * 12), bytes(FIRST)) == (OK, TAG)
    assert sum(parts) == FIRST and max(parts) < FIRST, "in parts that it takes"
    assert p11.finalize() == OK


@pytest.mark.parametrize("told", [limits.MAX_MESSAGE, 1 << 24])
def test_a_mebibyte_with_its_tag_is_one_message(module: ScriptedModule, told: int) -> None:
    module.max_message = told
    p11 = Cryptoki()
    p11.initialize(module.address)
    session, data = p11.open_session(), bytes(FIRST + len(TAG))
    for what in ("Encrypt", "Decrypt"):
        module.requests.clear()
        assert run(p11, session, gcm(b"i" * 12), data, what) == (OK, sealed(data))
        assert module.names() == [f"{what.upper()}_INIT", what.upper()]
    assert p11.finalize() == OK


def test_a_request_that_the_module_does_not_take_is_not_sent(module: ScriptedModule) -> None:
    module.max_message = FIRST
    p11 = Cryptoki()
    p11.initialize(module.address)
    session = p11.open_session()
    module.requests.clear()
    value = bytes(FIRST)
    attribute = struct.pack("<QQQ", ck.CKA_VALUE, cast(c_char_p(value), c_void_p).value or 0, len(value))
    made = c_ulong()
    assert p11.call("C_CreateObject", session, attribute, 1, byref(made)) == ck.CKR_ARGUMENTS_BAD
    assert module.names() == []
    assert p11.finalize() == OK
