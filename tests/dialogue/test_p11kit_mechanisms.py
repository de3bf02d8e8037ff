"""How each release of p11-kit's client writes a mechanism, byte for byte."""

from __future__ import annotations

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import BadMessage, Call, Mechanism, Request
from hsmvisord.wire.p11kit import P11KitCodec
from support.p11kit_client import RELEASES, P11KitEncoding

INIT = "0000002a 00000003 754d75 0000000000000001"  # C_SignInit, session 1
KEY = "0000000000000005"
PSS_FIELDS = "0000000000000250 0000000000000002 0000000000000020"


def mechanism(client_byte: int, text: str) -> Mechanism | None:
    request = P11KitCodec(client_byte).decode(0x10, b"client", bytes.fromhex(INIT + text + KEY))
    assert request.call is Call.SIGN_INIT
    session, read, key = request.args
    assert (session, key) == (1, 5)
    return read


@pytest.mark.parametrize("client_byte", [0, 1])
def test_no_parameter_old_form(client_byte: int) -> None:
    assert mechanism(client_byte, "00001041 ffffffff") == Mechanism(ck.CKM_ECDSA)


def test_no_parameter_new_form() -> None:
    assert mechanism(2, "00001041") == Mechanism(ck.CKM_ECDSA)


@pytest.mark.parametrize("client_byte", [0, 1])
def test_parameter_old_form(client_byte: int) -> None:
    assert mechanism(client_byte, "0000000d" + PSS_FIELDS) == Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32))


def test_parameter_new_form() -> None:
    assert mechanism(2, "0000000d 01" + PSS_FIELDS) == Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32))
    assert mechanism(2, "0000000d 00") == Mechanism(ck.CKM_RSA_PKCS_PSS)


@pytest.mark.parametrize("client_byte", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00001041 ffffffff", Mechanism(ck.CKM_ECDSA)),
        ("00001041", Mechanism(ck.CKM_ECDSA)),
        ("0000000d" + PSS_FIELDS, Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32))),
        ("0000000d 01" + PSS_FIELDS, Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32))),
    ],
)
def test_the_other_form_is_understood_too(client_byte: int, text: str, expected: Mechanism) -> None:
    """A proxy may have made the handshake: the form that consumes the whole message counts."""
    assert mechanism(client_byte, text) == expected


def test_cancel() -> None:
    assert mechanism(1, "00000000") is None, "0.25.0-0.25.2"
    assert mechanism(1, "ffffffff") is None, "0.25.3-0.25.5"
    assert mechanism(2, "ffffffff") is None, "0.25.6 on"


def test_cancel_of_a_digest_where_nothing_follows() -> None:
    head = "00000025 00000002 754d 0000000000000001"
    for client_byte, text in ((1, "00000000"), (1, "ffffffff"), (2, "ffffffff")):
        request = P11KitCodec(client_byte).decode(0x10, b"", bytes.fromhex(head + text))
        assert request == Request(0x10, Call.DIGEST_INIT, (1, None))


@pytest.mark.parametrize(("client_byte", "text"), [(0, "00000000 ffffffff"), (1, "00000000 ffffffff"), (2, "00000000")])
def test_rsa_key_pair_generation_is_no_cancel(client_byte: int, text: str) -> None:
    message = bytes.fromhex("0000003b 00000006 754d61416141 0000000000000001" + text + "00000000 00000000")
    assert P11KitCodec(client_byte).decode(0x10, b"", message).args == (1, Mechanism(0), (), ())


@pytest.mark.parametrize("release", ["0.25.3", "0.25.5", "0.26.4"])
def test_a_null_mechanism_elsewhere_is_a_bad_argument(release: str) -> None:
    encoding = P11KitEncoding(RELEASES[release])
    message = encoding.request(Call.WRAP_KEY, 1, None, 2, 3, 100)
    with pytest.raises(BadMessage) as caught:
        P11KitCodec(RELEASES[release].first).decode(0x10, b"", message)
    assert caught.value.rv == ck.CKR_ARGUMENTS_BAD


@pytest.mark.parametrize(
    ("kind", "fields", "parameter"),
    [
        (0x9, "0000000000000220 0000000000000001 0000000000000001 00000003 010203", (0x220, 1, 1, b"\1\2\3")),
        (0x9, "0000000000000220 0000000000000001 0000000000000001 ffffffff", (0x220, 1, 1, b"")),
        (0x43, PSS_FIELDS, (0x250, 2, 32)),
        (0x1050, "0000000000000001 ffffffff 00000002 0405", (1, b"", b"\4\5")),
        (0x1082, "00000010" + "07" * 16, b"\7" * 16),
        (0x1086, "0000000000000080 00000010" + "07" * 16, (128, b"\7" * 16)),
        (0x1087, "0000000c" + "09" * 12 + "0000000000000060 ffffffff 0000000000000080", (b"\t" * 12, 96, b"", 128)),
        (0x252, "0000000000000010", (16,)),
        (0x21, "00000002 0102", b"\1\2"),
        (0x133, "00000008" + "07" * 8, b"\7" * 8),
        (0x136, "ffffffff", b""),
        (0x1084, "0000000000000008", (8,)),
        (0x1057, "00 ffffffff", (0, b"")),
        (0x1D, "0000000000000000 00000001 63", (0, b"c")),
    ],
)
def test_parameters(kind: int, fields: str, parameter: object) -> None:
    assert mechanism(1, f"{kind:08x}" + fields) == Mechanism(kind, parameter)  # type: ignore[arg-type]
    assert mechanism(2, f"{kind:08x}01" + fields) == Mechanism(kind, parameter)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0000000d", "0000000d 01", "00001041 00000000", "00001041 01", "0000000d 02" + "00" * 22])
def test_neither_form(text: str) -> None:
    for client_byte in (0, 1, 2):
        with pytest.raises(BadMessage) as caught:
            mechanism(client_byte, text)
        assert caught.value.rv == ck.CKR_DEVICE_ERROR


def test_derive_key2_and_its_answer() -> None:
    codec = P11KitCodec(2)
    fields = "0000000000000001 ffffffff 00000002 0405"
    message = bytes.fromhex("00000059 00000005 754d756141 0000000000000001 00001050 01" + fields + "0000000000000005 00000000")
    request = codec.decode(0x10, b"", message)
    derive = Mechanism(ck.CKM_ECDH1_DERIVE, (1, b"", b"\4\5"))
    assert request == Request(0x10, Call.DERIVE_KEY2, (1, derive, 5, ()))
    head = bytes.fromhex("00000059 00000003 755075")
    assert codec.reply(request, 0, derive, 9)[12:] == head + bytes.fromhex("0000000000000000 01 0000000000000009")
    assert codec.reply(request, 0, Mechanism(0x1050), 9)[12:] == head + bytes.fromhex("0000000000000000 00 0000000000000009")
    assert codec.reply(request, 0, Mechanism(0x393), 9)[12:] == head + bytes.fromhex("0000000000000000 0000000000000009")


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_writes_what_is_read(release: str) -> None:
    encoding, codec = P11KitEncoding(RELEASES[release]), P11KitCodec(RELEASES[release].first)
    for written in (Mechanism(ck.CKM_RSA_PKCS), Mechanism(ck.CKM_ECDSA), Mechanism(ck.CKM_RSA_PKCS_PSS, (0x250, 2, 32))):
        for call in (Call.SIGN_INIT, Call.VERIFY_INIT, Call.DECRYPT_INIT):
            assert codec.decode(1, b"client", encoding.request(call, 1, written, 5)).args == (1, written, 5)
