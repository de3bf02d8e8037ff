"""Attributes and C_GetAttributeValue as p11-kit's clients read and write them."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import INVALID, SENSITIVE, Attribute, BadMessage, Call, Request
from hsmvisord.wire.p11kit import P11KitCodec
from support.p11kit_client import RELEASES, P11KitEncoding

FIND = "0000001a 00000003 756141 0000000000000001"


def template(text: str, client_byte: int = 0) -> tuple[Attribute, ...]:
    request = P11KitCodec(client_byte).decode(0x10, b"", bytes.fromhex(FIND + text))
    assert request.call is Call.FIND_OBJECTS_INIT
    return request.args[1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("00000000 01 00000008 0000000000000003", ck.CKA_CLASS, ck.CKO_PRIVATE_KEY),
        ("00000000 01 00000004 0000000000000003", ck.CKA_CLASS, ck.CKO_PRIVATE_KEY),
        ("00000166 01 00000004 00000000ffffffff", ck.CKA_KEY_GEN_MECHANISM, ck.CK_UNAVAILABLE_INFORMATION),
        ("00000000 01 00000000 0000000000000000", ck.CKA_CLASS, b""),
        ("00000001 01 00000001 01", ck.CKA_TOKEN, True),
        ("00000001 01 00000001 00", ck.CKA_TOKEN, False),
        ("00000001 01 00000001 07", ck.CKA_TOKEN, True),
        ("00000001 01 00000000 00", ck.CKA_TOKEN, b""),
        ("00000003 01 00000003 00000003 776562", ck.CKA_LABEL, b"web"),
        ("00000003 01 00000000 ffffffff", ck.CKA_LABEL, b""),
        ("00000003 00", ck.CKA_LABEL, b""),
        ("00000110 01 00000008 00000008 3230323630313031", ck.CKA_START_DATE, b"20260101"),
        ("00000110 01 00000000 ffffffff", ck.CKA_START_DATE, b""),
        ("40000600 01 00000010 00000002 0000000000001041 0000000000000001", ck.CKA_ALLOWED_MECHANISMS, (0x1041, 1)),
        ("40000212 01 00000018 00000001 00000001 01 00000001 01", ck.CKA_UNWRAP_TEMPLATE, (Attribute(ck.CKA_TOKEN, True),)),
        # what p11-kit does not know travels as the client's memory
        ("0000061d 01 00000008 00000008 0200000000000000", ck.CKA_PARAMETER_SET, 2),
        ("0000061d 01 00000004 00000004 02000000", ck.CKA_PARAMETER_SET, 2),
        ("0000061d 01 00000003 00000003 020000", ck.CKA_PARAMETER_SET, b"\2\0\0"),
        ("00000172 01 00000001 00000001 00", ck.CKA_DESTROYABLE, False),
        ("0000008c 01 00000008 00000008 2002000000000000", ck.CKA_NAME_HASH_ALGORITHM, 0x220),
    ],
)
def test_attribute_of_a_request(text: str, attribute: int, value: Any) -> None:
    (read,) = template("00000001" + text)
    assert read == Attribute(attribute, value)
    assert type(read.value) is type(value), "True is not 1"


def asked(codec: P11KitCodec, *rooms: tuple[int, int]) -> Request:
    body = b"".join([kind.to_bytes(4, "big") + room.to_bytes(4, "big") for kind, room in rooms])
    head = bytes.fromhex("00000018 00000004 75756641 0000000000000001 0000000000000002") + len(rooms).to_bytes(4, "big")
    return codec.decode(0x10, b"", head + body)


REPLY = bytes.fromhex("00000018 00000003 614175")


def answer(client_byte: int, *items: tuple[int, int, Any]) -> str:
    """Items are (type, room, value); returns the answer's array and rv in hex."""
    codec = P11KitCodec(client_byte)
    reply = codec.reply(asked(codec, *[item[:2] for item in items]), [(kind, value) for kind, _, value in items])
    assert reply[12 : 12 + len(REPLY)] == REPLY
    return reply[12 + len(REPLY) :].hex()


def plain(text: str) -> str:
    return text.replace(" ", "")


def test_rooms() -> None:
    assert asked(P11KitCodec(0), (3, 0), (3, 10)).args == (1, 2, ((3, None), (3, 10)))


def test_values_and_their_lengths() -> None:
    assert answer(0, (0x3, 10, b"web"), (0x0, 8, 3), (0x1, 1, True), (0x110, 8, b"")) == plain(
        "00000004"
        "00000003 01 00000003 00000003 776562"
        "00000000 01 00000008 0000000000000003"
        "00000001 01 00000001 01"
        "00000110 01 00000000 00000000"
        "0000000000000000"
    )


def test_a_size_query_gets_the_value() -> None:
    assert answer(0, (0x3, 0, b"web")) == plain("00000001 00000003 01 00000003 00000003 776562 0000000000000000")


def test_too_small() -> None:
    assert answer(0, (0x3, 2, b"web")) == plain("00000001 00000003 01 00000003 00000003 776562 0000000000000150")


def test_unavailable() -> None:
    assert answer(0, (0x11, 10, SENSITIVE)) == plain("00000001 00000011 00 0000000000000011")
    assert answer(0, (0x11, 10, INVALID)) == plain("00000001 00000011 00 0000000000000012")


def test_sensitive_goes_before_invalid_before_too_small() -> None:
    assert answer(0, (0x3, 2, b"web"), (0x11, 1, INVALID), (0x123, 1, SENSITIVE))[-4:] == "0011"
    assert answer(0, (0x3, 2, b"web"), (0x11, 1, INVALID))[-4:] == "0012"


def test_a_32_bit_client_reads_ulongs_of_four_bytes() -> None:
    assert answer(1, (0x0, 4, 3)) == plain("00000001 00000000 01 00000004 0000000000000003 0000000000000000")
    assert answer(1, (0x61D, 4, 2)) == plain("00000001 0000061d 01 00000004 00000004 02000000 0000000000000000")


def test_a_32_bit_client_is_known_by_its_first_search() -> None:
    """It is told the sizes of its own CK_ULONG also where it asks for them; room 4 alone may be a mistake of a larger one."""
    codec = P11KitCodec(2)

    def told(*items: tuple[int, int, Any]) -> list[str]:
        reply = codec.reply(asked(codec, *[item[:2] for item in items]), [(kind, value) for kind, _, value in items])
        array = reply[12 + len(REPLY) + 4 :].hex()
        return [array[array.index(f"{kind:08x}") + 8 :][:10] for kind, _, _ in items]

    sized = ((ck.CKA_KEY_TYPE, 0, 3), (ck.CKA_ALLOWED_MECHANISMS, 0, (0x1041, 1)), (ck.CKA_PARAMETER_SET, 0, 2))
    told((ck.CKA_KEY_TYPE, 4, 3))
    assert told(*sized) == ["0100000008", "0100000010", "0100000008"]
    codec.decode(0x10, b"", bytes.fromhex(FIND + "00000001" + "00000000 01 00000004 0000000000000003"))
    assert told(*sized) == ["0100000004", "0100000008", "0100000004"]


def test_what_p11kit_does_not_know_is_memory() -> None:
    assert answer(2, (0x61D, 8, 2), (0x172, 1, False)) == plain(
        "00000002 0000061d 01 00000008 00000008 0200000000000000 00000172 01 00000001 00000001 00 0000000000000000"
    )


def test_mechanism_array() -> None:
    assert answer(0, (0x40000600, 16, (0x1041, 1))) == plain(
        "00000001 40000600 01 00000010 00000002 0000000000001041 0000000000000001 0000000000000000"
    )
    assert answer(0, (0x40000600, 8, (0x1041, 1)))[-4:] == "0150"


def test_template_for_the_newest_release() -> None:
    assert answer(2, (0x40000211, 0, ())) == plain("00000001 40000211 01 00000000 00000000 0000000000000000")
    assert answer(2, (0x40000211, 0, (Attribute(ck.CKA_TOKEN, True),))) == plain(
        "00000001 40000211 01 00000018 00000001 00000001 01 00000001 01 0000000000000000"
    )


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", [ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE])
@pytest.mark.parametrize("room", [None, 48])
def test_template_attributes_by_release(release: str, kind: int, room: int | None) -> None:
    """Releases up to 0.25.3 fail the whole call when one is in the answer; their byte does not tell them from 0.25.5."""
    said = RELEASES[release]
    message = P11KitEncoding(said).request(Call.GET_ATTRIBUTE_VALUE, 1, 2, [(ck.CKA_LABEL, 8), (kind, room), (ck.CKA_ID, 20)])
    codec = P11KitCodec(said.first)
    if said.first < 2:
        with pytest.raises(BadMessage) as caught:
            codec.decode(0x10, b"", message)
        assert caught.value.rv == ck.CKR_ATTRIBUTE_TYPE_INVALID
    else:
        assert codec.decode(0x10, b"", message).args[2] == ((ck.CKA_LABEL, 8), (kind, room), (ck.CKA_ID, 20))
