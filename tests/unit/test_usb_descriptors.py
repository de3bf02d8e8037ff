"""Descriptors in any order, and that both transports tell the same as they do."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hsmvisord import limits
from hsmvisord.wire import usb
from hsmvisord.wire.usb_descriptors import Descriptors, Identity, channel_of, endpoints_of
from support.usb_guests import DEVICE_CONNECT, EP_INFO, INTERFACE_INFO, Qemu, Vhci
from support.usb_rig import DESCRIPTORS, IDENTITY, Rig, usbip_rig, usbredir_rig

ENGLISH = 0x0409


def parts(data: bytes) -> Iterator[bytes]:
    while data:
        yield data[: data[0]]
        data = data[data[0] :]


def interfaces() -> dict[tuple[int, int], tuple[bytes, list[bytes]]]:
    """What the configuration says: each alternate setting, and its endpoints."""
    found: dict[tuple[int, int], tuple[bytes, list[bytes]]] = {}
    for part in parts(DESCRIPTORS.configuration):
        if part[1] == usb.INTERFACE:
            last = found[part[2], part[3]] = part, []
        elif part[1] == usb.ENDPOINT:
            last[1].append(part)
    return found


def test_the_device() -> None:
    told = struct.unpack("<BBHBBBBHHHBBBB", DESCRIPTORS.device)
    assert told == (18, 1, 0x0200, 0, 0, 0, 64, 0x1209, 0x0001, 0x0102, 1, 2, 3, 1)


def test_the_configuration() -> None:
    whole = DESCRIPTORS.configuration
    kind, total, count, value = struct.unpack_from("<xBHBB", whole)
    assert (kind, total, count, value) == (2, len(whole), 1 + limits.USB_CHANNELS, 1)
    assert b"".join(parts(whole)) == whole and all(len(part) == part[0] for part in parts(whole))
    found = interfaces()
    assert sorted(found) == sorted([(0, 0), *((n, a) for n in range(1, count) for a in (0, 1))])
    for interface, endpoints in found.values():
        assert interface[4] == len(endpoints)
    addresses = [endpoint[2] for _, endpoints in found.values() for endpoint in endpoints]
    assert len(set(addresses)) == len(addresses) == 3 + 2 * limits.USB_CHANNELS
    assert all(0 < address & 0x0F <= 15 and not address & 0x70 for address in addresses)
    for _, endpoints in found.values():
        for _, _, _, kind, size, interval in (struct.unpack("<BBBBHB", endpoint) for endpoint in endpoints):
            assert (kind, size) == (2, 512) or (kind == 3 and size == 8 and 1 <= interval <= 16)  # high speed: 5.7.4, 5.8.3, 9.6.6


def test_the_reader() -> None:
    reader, endpoints = interfaces()[0, 0]
    assert tuple(reader[5:8]) == (0x0B, 0, 0)
    assert [(e[2], e[3]) for e in endpoints] == [(0x01, 2), (0x81, 2), (0x82, 3)]
    functional = next(part for part in parts(DESCRIPTORS.configuration) if part[1] == 0x21)
    assert DESCRIPTORS.configuration.index(functional) == 9 + 9, "it follows its interface"
    assert len(functional) == 54
    release, most_slot, protocols = struct.unpack_from("<HBxI", functional, 2)
    assert (release, most_slot, protocols) == (0x0110, 0, 2)
    features, longest = struct.unpack_from("<II", functional, 40)
    assert (features, longest) == (0x000400BA, limits.MAX_CCID_MESSAGE)
    assert functional[53] == 1, "bMaxCCIDBusySlots"


def test_the_channels() -> None:
    found = interfaces()
    for channel in range(1, 1 + limits.USB_CHANNELS):
        for alternate in (0, 1):
            interface, endpoints = found[channel, alternate]
            assert tuple(interface[5:8]) == (0xFF, 0x48, 0x01)
            assert [endpoint[2] for endpoint in endpoints] == [[], [2 + channel, 0x80 | (2 + channel)]][alternate]
        assert endpoints_of(channel) == (2 + channel, 0x80 | (2 + channel))
        assert [channel_of(address) for address in endpoints_of(channel)] == [channel, channel]
    assert [channel_of(n) for n in (0, 0x80, 1, 0x81, 0x82, 2, 15, 0x8F, 0x13, 0x183, 0xFF03)] == [0] * 11


def test_the_strings() -> None:
    assert DESCRIPTORS.get(usb.STRING, 0, 0) == b"\x04\x03\x09\x04"
    texts = ["hsmvisor", "hsmvisor virtual smart card", "web-1"]
    for index, text in enumerate(texts, 1):
        told = DESCRIPTORS.get(usb.STRING, index, ENGLISH)
        assert told is not None
        assert (told[0], told[1], told[2:].decode("utf-16-le")) == (len(told), 3, text)
    assert tuple(DESCRIPTORS.device[14:17]) == (1, 2, 3)
    assert {interface[8] for interface, _ in interfaces().values()} == {0}, "a reader's name is the same each time"


@pytest.mark.parametrize(
    ("kind", "index", "language"),
    [
        (usb.DEVICE, 1, 0),
        (usb.CONFIGURATION, 1, 0),
        (usb.STRING, 1, 0),
        (usb.STRING, 1, 0x0407),
        (usb.STRING, 4, ENGLISH),
        (usb.STRING, 0xEE, ENGLISH),  # Microsoft's
        (usb.INTERFACE, 0, 0),
        (usb.ENDPOINT, 0, 0),
        (6, 0, 0),  # DEVICE_QUALIFIER: the same at every speed that it has
        (7, 0, 0),
        (0x0A, 0, 0),  # DEBUG
        (0x0F, 0, 0),  # BOS: of USB 2.1
        (0x21, 0, 0),
        (0xFF, 0xFF, 0xFFFF),
    ],
)
def test_what_there_is_not(kind: int, index: int, language: int) -> None:
    assert DESCRIPTORS.get(kind, index, language) is None


def test_all_that_can_be_asked() -> None:
    for kind in range(256):
        for index in range(256):
            told = DESCRIPTORS.get(kind, index, ENGLISH)
            assert told is None or (told[1] == kind and told[0] in (len(told), 9))


def test_the_longest_string() -> None:
    most = limits.MAX_USB_STRING // 2
    told = Descriptors(Identity(1, 2, "s" * most)).get(usb.STRING, 3, ENGLISH)
    assert told is not None and told[0] == len(told) == 2 + limits.MAX_USB_STRING <= 255
    for identity in (Identity(1, 2, "s" * (most + 1)), Identity(1, 2, "s", product_name="p" * (most + 1))):
        with pytest.raises(ValueError, match="at most 126 characters"):
            Descriptors(identity)


# ---- the transports ---------------------------------------------------------------------------------------------------


def told_by_usbredir(rig: Rig, guest: Qemu) -> tuple[bytes, bytes]:
    heard = {one.kind: one.body for one in guest.hears(rig.told())}
    return heard[INTERFACE_INFO], heard[EP_INFO]


def check_tables(interface_info: bytes, ep_info: bytes, alternates: dict[int, int]) -> None:
    """They are what the configuration says of these alternate settings."""
    count = 1 + limits.USB_CHANNELS
    now = [interfaces()[number, alternates.get(number, 0)] for number in range(count)]
    assert struct.unpack_from("<I", interface_info) == (count,)
    for field, column in enumerate((2, 5, 6, 7)):  # number, class, subclass, protocol
        row = interface_info[4 + 32 * field : 36 + 32 * field]
        assert row == bytes(interface[column] for interface, _ in now).ljust(32, b"\0")
    kinds, intervals, owners = (ep_info[at : at + 32] for at in (0, 32, 64))
    sizes = struct.unpack_from("<32H", ep_info, 96)
    expected = {(e[2] & 0x80) >> 3 | e[2] & 0x0F: (interface[2], e) for interface, endpoints in now for e in endpoints}
    for place in range(32):
        if place in expected:
            number, endpoint = expected[place]
            told = (kinds[place], intervals[place], owners[place], sizes[place])
            assert told == (endpoint[3], endpoint[6], number, int.from_bytes(endpoint[4:6], "little"))
        else:
            assert kinds[place] == (0 if place in (0, 16) else 255)


def test_usbredir_tells_the_same() -> None:
    rig, guest = usbredir_rig(), Qemu()
    rig.hear(guest.hello())
    heard = guest.hears(rig.told())
    assert [one.kind for one in heard[1:]] == [INTERFACE_INFO, EP_INFO, DEVICE_CONNECT]
    check_tables(heard[1].body, heard[2].body, {})
    connect = struct.unpack("<BBBBHHH", heard[3].body)
    assert connect == (2, *DESCRIPTORS.device[4:7], *struct.unpack_from("<HHH", DESCRIPTORS.device, 8))
    rig.hear(guest.message(6, 1, b"\x01"))
    check_tables(*told_by_usbredir(rig, guest), {})
    for number, alternate in ((3, 1), (12, 1), (3, 0)):
        rig.hear(guest.message(9, 2, bytes([number, alternate])))
        alternates = {12: 1} if alternate == 0 else {3: 1, number: 1}
        check_tables(*told_by_usbredir(rig, guest), alternates)


def test_usbip_tells_the_same() -> None:
    rig, guest = usbip_rig(), Vhci()
    rig.hear(guest.devlist())
    listed = rig.told()
    assert struct.unpack_from(">HHII", listed) == (0x0111, 0x0005, 0, 1)
    block, rows = listed[12 : 12 + 312], listed[12 + 312 :]
    bus_id = IDENTITY.serial.encode()
    assert block[256:288] == bus_id.ljust(32, b"\0") and bus_id in block[:256]
    bus, number, speed, *ids = struct.unpack_from(">IIIHHH", block, 288)
    assert (bus, number, speed) == (1, 1, 3), "high speed, and what makes up devid"
    assert ids == list(struct.unpack_from("<HHH", DESCRIPTORS.device, 8))
    classes, (value, configurations, count) = block[306:309], block[309:312]
    assert classes == DESCRIPTORS.device[4:7]
    assert (configurations, count) == (DESCRIPTORS.device[17], DESCRIPTORS.configuration[4])
    assert value in (0, DESCRIPTORS.configuration[5])
    assert rows == b"".join(interfaces()[number, 0][0][5:8] + b"\0" for number in range(count))
    rig.hear(guest.import_())
    assert rig.told() == struct.pack(">HHI", 0x0111, 0x0003, 0) + block
