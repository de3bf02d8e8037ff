"""Scripts of who says what: p11-kit's handshake, message head, fields and errors, byte for byte as its releases write them."""

from __future__ import annotations

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import MORE_FOLLOWS, BadMessage, Call, Needed, Request, WireError
from hsmvisord.wire.frames import FrameBuffer
from hsmvisord.wire.handshake import negotiate
from hsmvisord.wire.p11kit import P11KitCodec

LABEL = b"label".ljust(32)
MAGIC = b"PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


def decoded(client_byte: int, text: str) -> Request:
    return P11KitCodec(client_byte).decode(0x10, b"client", hexed(text))


def refused(client_byte: int, message: bytes) -> int:
    with pytest.raises(BadMessage) as caught:
        P11KitCodec(client_byte).decode(0x10, b"client", message)
    assert caught.value.request_id == 0x10
    return caught.value.rv


@pytest.mark.parametrize(("says", "answer"), [(0, 0), (1, 1), (2, 2), (3, 2), (0x7F, 2)])
def test_handshake(says: int, answer: int) -> None:
    codec, answered = negotiate(says)
    assert codec.dialect == "p11-kit"
    assert answered == bytes((answer,))
    assert isinstance(codec, P11KitCodec)
    assert codec.client_version == says


def test_a_frame_as_0_24_1_sends_it_and_its_answer() -> None:
    buffer = FrameBuffer()
    buffer.feed(hexed("00000010 00000006 00000011") + b"client" + hexed("0000000b 00000001 75 0000000000000007"))
    frame = buffer.next_frame()
    assert frame is not None
    assert not buffer.mid_frame
    codec = P11KitCodec(0)
    request = codec.decode(*frame)
    assert request == Request(0x10, Call.CLOSE_SESSION, (7,))
    assert codec.reply(request) == hexed("00000010 00000000 00000008 0000000b 00000000")
    assert codec.error(0x10, ck.CKR_SESSION_HANDLE_INVALID) == hexed(
        "00000010 00000000 00000011 00000000 00000001 75 00000000000000b3"
    )


def test_initialize() -> None:
    message = hexed("00000001 00000005") + b"ayyay" + hexed("01 00000029") + MAGIC + hexed("00 01 00000001 00")
    assert P11KitCodec(2).decode(0x10, b"client", message).args == (MAGIC, 0, b"\0")


def test_initialize_without_the_words() -> None:
    message = hexed("00000001 00000005") + b"ayyay" + hexed("01 00000003 41 42 43 00 01 00000001 00")
    assert refused(2, message) == ck.CKR_GENERAL_ERROR


def test_login_with_a_null_pin_an_empty_pin_and_a_pin() -> None:
    head = "00000012 00000004 75756179 0000000000000001 0000000000000001"
    assert decoded(0, head + "01 ffffffff").args == (1, 1, None)
    assert decoded(0, head + "01 00000000").args == (1, 1, b"")
    assert decoded(0, head + "01 00000004 31323334").args == (1, 1, b"1234")
    assert decoded(0, head + "00 00000004").args == (1, 1, None), "a NULL pointer with a length"


SIGN = "0000002b 00000005 7561796679 0000000000000001"


def test_sign_with_room_null_and_empty_pointer() -> None:
    assert decoded(0, SIGN + "01 00000002 abcd 00000040").args == (1, b"\xab\xcd", 64)
    assert decoded(0, SIGN + "01 00000002 abcd 00000000").args == (1, b"\xab\xcd", None)
    assert decoded(1, SIGN + "01 00000002 abcd ffffffff").args == (1, b"\xab\xcd", 0)
    assert decoded(1, SIGN + "01 ffffffff 00000040").args == (1, None, 64), "NULL data of length 0"
    assert decoded(1, SIGN + "01 00000000 00000040").args == (1, b"", 64)


def test_the_answers_to_a_buffer() -> None:
    codec = P11KitCodec(0)
    request = codec.decode(0x11, b"client", hexed(SIGN + "01 00000002 abcd 00000040"))
    head = "00000011 00000000 {size} 0000002b 00000002 6179"
    assert codec.reply(request, b"\x01\x02\x03") == hexed(head.format(size="00000012") + "01 00000003 010203")
    assert codec.reply(request, b"") == hexed(head.format(size="0000000f") + "01 00000000")
    assert codec.reply(request, Needed(64)) == hexed(head.format(size="0000000f") + "00 00000040")


def test_slot_list() -> None:
    codec = P11KitCodec(0)
    request = codec.decode(0x10, b"client", hexed("00000004 00000003 796675 01 00000000"))
    assert request.args == (1, None)
    assert codec.reply(request, Needed(2)).endswith(hexed("00000004 00000002 6175 00 00000002"))
    request = codec.decode(0x10, b"client", hexed("00000004 00000003 796675 01 00000002"))
    assert request.args == (1, 2)
    assert codec.reply(request, (0, 1)).endswith(hexed("6175 01 00000002 0000000000000000 0000000000000001"))


def test_count_of_all_ones_is_a_count() -> None:
    """Only `fy` tells an empty pointer by it."""
    assert decoded(2, "0000001b 00000003 756675 0000000000000001 ffffffff").args == (1, 0xFFFFFFFF)


def test_info_structures() -> None:
    codec = P11KitCodec(0)
    request = codec.decode(0x10, b"client", hexed("00000003 00000000"))
    assert request == Request(0x10, Call.GET_INFO, ())
    reply = codec.reply(request, (2, 40), b"m" * 32, 0, b"d" * 32, (1, 3))
    body = hexed("0228 00000020") + b"m" * 32 + hexed("0000000000000000 00000020") + b"d" * 32 + hexed("0103")
    assert reply[12:] == hexed("00000003 00000005") + b"vsusv" + body


def test_init_token_label_of_byte_0_is_its_first_32_bytes() -> None:
    """0.24.1 runs strlen over a label that has no end."""
    head = hexed("00000009 00000004") + b"uayz" + hexed("0000000000000000 01 00000002 3132 00000028")
    assert P11KitCodec(0).decode(0x10, b"client", head + LABEL + b"junk!!!!").args == (0, b"12", LABEL)


def test_init_token2_label_has_exactly_32_bytes() -> None:
    head = hexed("00000058 00000004") + b"uays" + hexed("0000000000000000 01 00000002 3132")
    assert P11KitCodec(1).decode(0x10, b"client", head + hexed("00000020") + LABEL).args == (0, b"12", LABEL)
    assert refused(1, head + hexed("0000001f") + LABEL[:31]) == ck.CKR_DEVICE_ERROR


def test_generate_random_login_user_session_cancel() -> None:
    assert decoded(0, "00000040 00000003 756679 0000000000000001 00000010").args == (1, 16)
    login_user = "00000042 00000006 757561796179 0000000000000001 0000000000000001 01 00000001 31 01 ffffffff"
    assert decoded(1, login_user).args == (1, 1, b"1", None)
    assert decoded(1, "00000043 00000002 7575 0000000000000001 0000000000000800").args == (1, 0x800)


@pytest.mark.parametrize(
    ("what", "message", "rv"),
    [
        ("nothing", b"", ck.CKR_DEVICE_ERROR),
        ("half a call", hexed("0000"), ck.CKR_DEVICE_ERROR),
        ("no signature", hexed("0000000b"), ck.CKR_DEVICE_ERROR),
        ("a NULL signature", hexed("0000000b ffffffff"), ck.CKR_DEVICE_ERROR),
        ("another call's signature", hexed("0000000b 00000002 7575 0000000000000001 0000000000000001"), ck.CKR_DEVICE_ERROR),
        ("a field that ends early", hexed("0000000b 00000001 75 000000000000"), ck.CKR_DEVICE_ERROR),
        ("a byte too many", hexed("0000000b 00000001 75 0000000000000001 00"), ck.CKR_DEVICE_ERROR),
        ("a length past the end", hexed("0000003f 00000003 756179 0000000000000001 01 7fffffff 31"), ck.CKR_DEVICE_ERROR),
        ("call 0, the error", hexed("00000000 00000001 75 0000000000000001"), ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("the message calls", hexed("00000044 00000003 754d75"), ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("a call that does not exist", hexed("0000ffff 00000000"), ck.CKR_FUNCTION_NOT_SUPPORTED),
        ("a call of the native dialect", hexed("00000107 00000001 75 0000000000000000"), ck.CKR_FUNCTION_NOT_SUPPORTED),
    ],
)
def test_broken_messages_are_answered(what: str, message: bytes, rv: int) -> None:
    assert refused(2, message) == rv, what


def test_a_frame_past_the_limit_ends_the_connection() -> None:
    buffer = FrameBuffer()
    buffer.feed(hexed("00000010 00000000 7fffffff"))
    with pytest.raises(WireError):
        buffer.next_frame()


@pytest.mark.parametrize(
    ("room", "reads"),
    [("00", MORE_FOLLOWS), ("01 00000040", 64), ("01 00000000", None)],
    ids=["more follows", "the last part", "a question for the length"],
)
def test_the_next_part_of_a_message_to_sign(room: str, reads: int | None) -> None:
    """p11-kit says before the room whether there is a pointer to the length at all, and calls both `fy`."""
    text = "00000051 00000007" + b"uayayfy".hex() + "0000000000000001 01 ffffffff 01 00000004 70617274" + room
    request = decoded(1, text)
    assert request == Request(0x10, Call.SIGN_MESSAGE_NEXT, (1, None, b"part", reads))
    codec = P11KitCodec(1)
    nothing = hexed("00000010 00000000 0000000f 00000051 00000002 6179 00 00000000")
    assert codec.reply(request, Needed(0)) == nothing


@pytest.mark.parametrize("call", [*range(68, 78)])
def test_message_based_encryption_is_refused(call: int) -> None:
    """Its parameters are structures with pointers in them, sent as they are in memory."""
    signatures = {68: b"uMu", 69: b"uayayayfy", 70: b"uayay", 71: b"uayayfyu", 72: b"u"}
    signature = signatures[call if call < 73 else call - 5]
    message = call.to_bytes(4, "big") + len(signature).to_bytes(4, "big") + signature + bytes(40)
    assert refused(1, message) == ck.CKR_FUNCTION_NOT_SUPPORTED
    hot = hexed("00000044 00000003") + b"uMu" + hexed("0000000000000001 00001087 ffffffff 0000000000000001")
    assert refused(1, hot) == ck.CKR_FUNCTION_NOT_SUPPORTED
