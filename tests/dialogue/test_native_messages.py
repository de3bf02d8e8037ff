"""Scripts of who says what in the native dialect (NATIVE.md), byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.wire.calls import INVALID, SENSITIVE, Attribute, BadMessage, Call, Mechanism, Needed, Request, WireError
from hsmvisord.wire.handshake import negotiate
from hsmvisord.wire.native import NativeCodec


def decoded(text: str, options: str = "") -> Request:
    return NativeCodec().decode(7, bytes.fromhex(options), bytes.fromhex(text))


def refused(text: str, options: str = "") -> int:
    with pytest.raises(BadMessage) as caught:
        decoded(text, options)
    assert caught.value.request_id == 7
    return caught.value.rv


def replied(request: Request, *values: Any) -> str:
    """Returns the message of a reply; checks its frame."""
    frame = NativeCodec().reply(request, *values)
    assert frame[:8] == bytes.fromhex("00000007 00000000")
    assert frame[8:12] == len(frame[12:]).to_bytes(4, "big")
    return frame[12:].hex()


def plain(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize(("says", "answer"), [(0x81, 0x81), (0x82, 0x81), (0xFF, 0x81)])
def test_handshake(says: int, answer: int) -> None:
    codec, answered = negotiate(says)
    assert codec.dialect == "native"
    assert answered == bytes((answer,))


def test_version_0_does_not_exist() -> None:
    with pytest.raises(WireError):
        negotiate(0x80)


def test_hello() -> None:
    request = decoded("00000100 08 00 00 00000000 0000000000000000 00000005 6e67696e78 00000000000004d2")
    assert request == Request(7, Call.HELLO, (8, 0, None, 0, b"nginx", 1234))
    assert replied(request, b"t" * 16, 0, 5, 9, 1 << 20, 8) == plain(
        "00000100 01 00000010" + "74" * 16 + "00 0000000000000005 0000000000000009 0000000000100000 0000000000000008"
    )


def test_hello_with_a_nul_in_the_programs_name() -> None:
    assert refused("00000100 08 00 00 00000000 0000000000000000 00000003 6e0078 00000000000004d2") == ck.CKR_DEVICE_ERROR


SESSION, KEY = "0000000000000001", "0000000000000005"


@pytest.mark.parametrize(
    ("call", "text"), [(Call.SIGN_ONCE, "00000102"), (Call.DECRYPT_ONCE, "00000103"), (Call.ENCRYPT_ONCE, "00000117")]
)
def test_once(call: Call, text: str) -> None:
    head = text + SESSION + "0000000000001041 00" + KEY
    request = decoded(head + "01 00000002 abcd 00000040")
    assert request == Request(7, call, (1, Mechanism(ck.CKM_ECDSA), 5, b"\xab\xcd", 64))
    assert decoded(head + "01 00000000 00000000").args[3:] == (b"", None)
    assert decoded(head + "01 00000000 ffffffff").args[3:] == (b"", 0)
    assert decoded(head + "00 00000000 00000040").args[3:] == (None, 64)
    assert replied(request, b"\1\2") == plain(text + "01 00000002 0102")
    assert replied(request, b"") == plain(text + "01 00000000")
    assert replied(request, Needed(64)) == plain(text + "00 00000040")


def test_once_with_a_structured_and_a_raw_parameter() -> None:
    fields = "75 0000000000000250 75 0000000000000002 75 0000000000000020"
    request = decoded("00000102" + SESSION + "000000000000000d 02 03" + fields + KEY + "01 00000001 aa 00000100")
    assert request.args == (1, Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32)), 5, b"\xaa", 256)
    request = decoded("00000103" + SESSION + "0000000000001082 01 00000002 0102" + KEY + "01 00000001 aa 00000100")
    assert request.args == (1, Mechanism(ck.CKM_AES_CBC, b"\1\2"), 5, b"\xaa", 256)


def test_the_other_once_calls() -> None:
    verify = decoded("00000105" + SESSION + "0000000000001041 00" + KEY + "01 00000001 aa 01 00000001 bb")
    assert verify == Request(7, Call.VERIFY_ONCE, (1, Mechanism(ck.CKM_ECDSA), 5, b"\xaa", b"\xbb"))
    assert replied(verify) == "00000105"
    digest = decoded("00000106" + SESSION + "0000000000000250 00 01 00000001 aa 00000020")
    assert digest == Request(7, Call.DIGEST_ONCE, (1, Mechanism(ck.CKM_SHA256), b"\xaa", 32))
    find = decoded("00000104" + SESSION + "00000001 0000000000000003 01 00000003 776562 0000000000000010")
    assert find == Request(7, Call.FIND_ONCE, (1, (Attribute(ck.CKA_LABEL, b"web"),), 16))
    assert replied(find, (5, 6), 1, 9) == plain("00000104 01 00000002 0000000000000005 0000000000000006 01 0000000000000009")


def test_restore_sessions_and_rotation_wait() -> None:
    restore = decoded("00000101 01 00000003 0000000000000001 0000000000000000 0000000000000004")
    assert restore.args == ((1, 0, 4),)
    assert replied(restore, (0,)) == plain("00000101 01 00000001 0000000000000000")
    wait = decoded("00000107 0000000000000009")
    assert wait == Request(7, Call.ROTATION_WAIT, (9,))
    assert replied(wait, 10) == plain("00000107 000000000000000a")


def test_deadline_and_unknown_options() -> None:
    wait = "00000107 0000000000000009"
    assert decoded(wait, "0001 0004 000003e8").deadline_ms == 1000
    assert decoded(wait, "00ff 0003 616263 0001 0004 000003e8").deadline_ms == 1000
    assert decoded(wait, "0001 0002 03e8").deadline_ms == 0, "another length is an unknown option"
    assert decoded("0000002b" + SESSION + "01 00000001 aa 00000040", "0001 0004 000003e8").deadline_ms == 1000
    for broken in ("00", "0001", "000100", "0001 0004 0000", "0001 0004 000003e8 00"):
        assert refused(wait, broken) == ck.CKR_DEVICE_ERROR
    assert refused(wait, "00ff 00ff" + "00" * 255) == ck.CKR_DEVICE_ERROR
    assert decoded(wait, "00ff 00fc" + "00" * (limits.MAX_NATIVE_OPTIONS - 4)).args == (9,)


def test_init_and_cancel() -> None:
    assert decoded("0000002a" + SESSION + "0000000000001041 00" + KEY).args == (1, Mechanism(ck.CKM_ECDSA), 5)
    assert decoded("0000002a" + SESSION + "0000000000000000 ff" + KEY).args == (1, None, 5)
    assert decoded("00000025" + SESSION + "0000000000000000 ff").args == (1, None)
    assert refused("00000102" + SESSION + "0000000000000000 ff" + KEY + "01 00000001 aa 00000100") == ck.CKR_ARGUMENTS_BAD


def test_mechanism_items() -> None:
    head = "0000002a" + SESSION + "0000000000004021 02"
    assert decoded(head + "00" + KEY).args[1] == Mechanism(0x4021, ())
    assert decoded(head + "02 62 00000001 aa 75" + KEY + KEY).args[1] == Mechanism(0x4021, (b"\xaa", 5))
    most, count = "75 0000000000000001" * limits.MAX_MECHANISM_ITEMS, limits.MAX_MECHANISM_ITEMS
    assert decoded(head + f"{count:02x}" + most + KEY).args[1] == Mechanism(0x4021, (1,) * count)
    assert refused(head + f"{count + 1:02x}" + most + "75 0000000000000001" + KEY) == ck.CKR_DEVICE_ERROR
    assert refused(head + "01 78 0000000000000001" + KEY) == ck.CKR_DEVICE_ERROR
    assert refused("0000002a" + SESSION + "0000000000001041 03" + KEY) == ck.CKR_DEVICE_ERROR


def test_error() -> None:
    assert NativeCodec().error(7, 0xB3) == bytes.fromhex("00000007 00000000 0000000c 00000000 00000000000000b3")


@pytest.mark.parametrize(
    ("text", "rv"),
    [
        ("", ck.CKR_DEVICE_ERROR),
        ("000000", ck.CKR_DEVICE_ERROR),
        ("0000000b", ck.CKR_DEVICE_ERROR),
        ("0000000b 00000000000000", ck.CKR_DEVICE_ERROR),
        ("0000000b 0000000000000001 00", ck.CKR_DEVICE_ERROR),
        ("0000002b" + SESSION + "01 00000003 abcd 00000040", ck.CKR_DEVICE_ERROR),
        ("0000002b" + SESSION + "01 00000001 abcd 00000040", ck.CKR_DEVICE_ERROR),
        ("0000002b" + SESSION + "01 ffffffff 00000040", ck.CKR_DEVICE_ERROR),
        ("00000000 0000000000000001", ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("00000001", ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("00000058", ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("00000059", ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("00000045", ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("7fffffff", ck.CKR_FUNCTION_NOT_SUPPORTED),
    ],
)
def test_broken_messages_are_answered(text: str, rv: int) -> None:
    assert refused(text) == rv


def template(text: str, ulong_size: int = 8) -> Attribute:
    codec = NativeCodec()
    codec.ulong_size = ulong_size
    request = codec.decode(7, b"", bytes.fromhex("0000001a" + SESSION + "00000001" + text))
    (attribute,) = request.args[1]
    return attribute  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("0000000000000000 01 00000008 0300000000000000", ck.CKA_CLASS, 3),
        ("0000000000000000 01 00000004 03000000", ck.CKA_CLASS, b"\3\0\0\0"),
        ("0000000000000000 01 00000000", ck.CKA_CLASS, b""),
        ("0000000000000001 01 00000001 01", ck.CKA_TOKEN, True),
        ("0000000000000001 01 00000001 05", ck.CKA_TOKEN, True),
        ("0000000000000001 01 00000001 00", ck.CKA_TOKEN, False),
        ("0000000000000001 01 00000002 0100", ck.CKA_TOKEN, b"\1\0"),
        ("000000000000061d 01 00000008 0200000000000000", ck.CKA_PARAMETER_SET, 2),
        ("0000000000000003 01 00000003 776562", ck.CKA_LABEL, b"web"),
        ("0000000040000600 01 00000010 41100000000000000100000000000000", ck.CKA_ALLOWED_MECHANISMS, (0x1041, 1)),
        ("0000000040000600 01 00000009 411000000000000001", ck.CKA_ALLOWED_MECHANISMS, b"\x41\x10\0\0\0\0\0\0\1"),
        ("0000000040000211 02 00000000", ck.CKA_WRAP_TEMPLATE, ()),
        (
            "0000000040000211 02 00000001 0000000000000001 01 00000001 01",
            ck.CKA_WRAP_TEMPLATE,
            (Attribute(ck.CKA_TOKEN, True),),
        ),
    ],
)
def test_attribute_of_a_request(text: str, attribute: int, value: Any) -> None:
    read = template(text)
    assert read == Attribute(attribute, value)
    assert type(read.value) is type(value)


def test_attributes_of_a_32_bit_client() -> None:
    assert template("0000000000000000 01 00000004 03000000", 4).value == 3
    assert template("0000000000000166 01 00000004 ffffffff", 4).value == ck.CK_UNAVAILABLE_INFORMATION
    assert template("0000000040000600 01 00000008 4110000001000000", 4).value == (0x1041, 1)


@pytest.mark.parametrize("text", ["0000000000000003 00", "0000000000000003 03 00000001", "0000000000000003 02 00000000"])
def test_attribute_forms_that_a_request_does_not_have(text: str) -> None:
    with pytest.raises(BadMessage):
        template(text)


def answer(*items: tuple[int, int | None, Any], ulong_size: int = 8) -> str:
    """Items are (type, room, value); returns the answer's array and rv in hex."""
    codec = NativeCodec()
    codec.ulong_size = ulong_size
    rooms = [0 if room is None else room or 0xFFFFFFFF for _, room, _ in items]
    asked = b"".join([item[0].to_bytes(8, "big") + room.to_bytes(4, "big") for item, room in zip(items, rooms, strict=True)])
    head = bytes.fromhex("00000018" + SESSION + KEY) + len(items).to_bytes(4, "big")
    request = codec.decode(7, b"", head + asked)
    assert request.args[2] == tuple([item[:2] for item in items])
    reply = codec.reply(request, [(kind, value) for kind, _, value in items])
    assert reply[12:16].hex() == "00000018"
    return reply[16:].hex()


def test_get_attribute_value() -> None:
    assert answer((0x3, 10, b"web"), (0x0, 8, 3), (0x1, 1, True), (0x11, 8, SENSITIVE), (0x180, 8, INVALID)) == plain(
        "00000005"
        "0000000000000003 01 00000003 776562"
        "0000000000000000 01 00000008 0300000000000000"
        "0000000000000001 01 00000001 01"
        "0000000000000011 00"
        "0000000000000180 00"
        "0000000000000011"
    )


def test_get_attribute_value_without_room() -> None:
    assert answer((0x3, None, b"web")) == plain("00000001 0000000000000003 03 00000003 0000000000000000")
    assert answer((0x3, 2, b"web")) == plain("00000001 0000000000000003 03 00000003 0000000000000150")
    assert answer((0x3, 0, b"web")) == plain("00000001 0000000000000003 03 00000003 0000000000000150")
    assert answer((0x3, 0, b"")) == plain("00000001 0000000000000003 01 00000000 0000000000000000")
    assert answer((0x180, None, INVALID), (0x3, 2, b"web"))[-4:] == "0012"


def test_get_attribute_value_of_a_32_bit_client() -> None:
    assert answer((0x0, 4, 3), (0x166, 4, ck.CK_UNAVAILABLE_INFORMATION), ulong_size=4) == plain(
        "00000002 0000000000000000 01 00000004 03000000 0000000000000166 01 00000004 ffffffff 0000000000000000"
    )


def test_get_a_template_attribute() -> None:
    assert answer((0x40000211, 0, ())) == plain("00000001 0000000040000211 02 00000000 0000000000000000")
    assert answer((0x40000211, 24, (Attribute(ck.CKA_TOKEN, True),))) == plain(
        "00000001 0000000040000211 02 00000001 0000000000000001 01 00000001 01 0000000000000000"
    )
