"""An importer that does what it must not: told so at once, bounded, and never a fault."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hsmvisord import limits
from hsmvisord.transport.usb.engine import Overload
from hsmvisord.wire.usb import BrokenPeer
from support import usb_guests as q
from support.usb_guests import Qemu, Vhci
from support.usb_rig import DESCRIPTORS, Rig, usbip_rig, usbredir_rig

CHANNEL, OUT, IN = 4, 6, 0x86


def greeted() -> tuple[Rig, Qemu]:
    rig, qemu = usbredir_rig(), Qemu()
    rig.hear(qemu.hello())
    qemu.hears(rig.told())
    return rig, qemu


def imported() -> tuple[Rig, Vhci]:
    rig, vhci = usbip_rig(), Vhci()
    rig.hear(vhci.import_())
    rig.told()
    return rig, vhci


# ---- usbredir -----------------------------------------------------------------------------------------------------------

#: What may be said, and how long: least and most.
LENGTHS = {
    q.RESET: (0, 0), q.SET_CONFIGURATION: (1, 1), q.GET_CONFIGURATION: (0, 0), q.SET_ALT_SETTING: (2, 2), q.GET_ALT_SETTING: (1, 1),
    q.START_ISO: (3, 3), q.STOP_ISO: (1, 1), q.START_INTERRUPTS: (1, 1), q.STOP_INTERRUPTS: (1, 1), q.ALLOC_STREAMS: (8, 8),
    q.FREE_STREAMS: (4, 4), q.CANCEL: (0, 0), q.FILTER_REJECT: (0, 0), q.FILTER: (1, limits.MAX_USBREDIR_FILTER),
    q.DISCONNECT_ACK: (0, 0), q.START_BULK_RECEIVING: (10, 10), q.STOP_BULK_RECEIVING: (5, 5), q.CONTROL: (10, 10 + 0xFFFF),
    q.BULK: (10, 10 + limits.MAX_USB_TRANSFER), q.ISO: (4, 4 + 0xFFFF), q.INTERRUPT: (4, 4 + 0xFFFF),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*range(1, 30), *range(98, 106), 0x7FFFFFFF, 0xFFFFFFFF])
def test_heads_of_usbredir(kind: int) -> None:
    """By the head alone, before anything of the message is kept."""
    least, most = LENGTHS.get(kind, (1, 0))
    for length in {0, 1, least - 1, least, most, most + 1, 0x7FFFFFFF, 0xFFFFFFFF} - {-1}:
        rig, qemu = greeted()
        head = qemu.message(kind, 1, b"", length=length)
        if least <= length <= most and length:
            rig.hear(head)
            assert rig.told() == b""
        elif not least <= length <= most:
            with pytest.raises(BrokenPeer, match=f"of {length} bytes" if kind in LENGTHS else f"a message of type {kind}"):
                rig.hear(head)


def control(endpoint: int, kind: int, length: int, data: bytes) -> bytes:
    return struct.pack("<BBBBHHH", endpoint, 6, kind, 0, 0x0100, 0, length) + data


def bulk(endpoint: int, length: int, data: bytes) -> bytes:
    return struct.pack("<BBHIH", endpoint, 0, length & 0xFFFF, 0, length >> 16) + data


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        (q.CONTROL, control(0x81, 0x80, 8, b""), "do not fit together"),
        (q.CONTROL, control(0x01, 0x00, 0, b""), "do not fit together"),
        (q.CONTROL, control(0x00, 0x80, 0, b""), "do not fit together"),
        (q.CONTROL, control(0x80, 0x00, 0, b""), "do not fit together"),
        (q.CONTROL, control(0x80, 0x80, 8, b"8 bytes."), "do not fit together"),
        (q.CONTROL, control(0x00, 0x00, 8, b"7 bytes"), "do not fit together"),
        (q.CONTROL, control(0x00, 0x00, 6, b"7 bytes"), "do not fit together"),
        (q.BULK, bulk(OUT, 4, b"abc"), "a bulk packet of 4 bytes with 3"),
        (q.BULK, bulk(OUT, 2, b"abc"), "a bulk packet of 2 bytes with 3"),
        (q.BULK, bulk(OUT, 1 << 31, b""), "a bulk packet of 2147483648 bytes with 0"),
        (q.BULK, bulk(IN, 3, b"abc"), "a bulk packet of 3 bytes with 3"),
        (q.START_BULK_RECEIVING, bytes(10), "bulk receiving, which was not offered"),
        (q.STOP_BULK_RECEIVING, bytes(5), "bulk receiving, which was not offered"),
    ],
)
def test_messages_of_usbredir(kind: int, body: bytes, why: str) -> None:
    rig, qemu = greeted()
    with pytest.raises(BrokenPeer, match=why):
        rig.hear(qemu.message(kind, 1, body))
    assert rig.events == []


# ---- USB/IP ---------------------------------------------------------------------------------------------------------------


def command(
    number: int = 1, direction: int = 0, endpoint: int = OUT, length: int = 0, packets: int = 0, setup: bytes = bytes(8)
) -> bytes:
    return struct.pack(">IIIIIIiiii8s", number, 1, 0x10001, direction, endpoint, 0, length, 0, packets, 0, setup)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (command(0), "a command 0"),
        (command(3), "a command 3"),
        (command(4), "a command 4"),
        (command(0xFFFFFFFF), "a command 4294967295"),
        (command(direction=2), "endpoint 6, direction 2"),
        (command(endpoint=16), "endpoint 16, direction 0"),
        (command(endpoint=0x86), "endpoint 134, direction 0"),
        (command(endpoint=0xFFFFFFFF), "endpoint 4294967295"),
        (command(length=-1), "a transfer of -1 bytes"),
        (command(length=-1, direction=1), "a transfer of -1 bytes"),
        (command(length=-(1 << 31)), "a transfer of -2147483648 bytes"),
        (command(length=limits.MAX_USB_TRANSFER + 1), "a transfer of 1048577 bytes"),
        (command(length=0x7FFFFFFF), "a transfer of 2147483647 bytes"),
        (command(packets=1), "an isochronous transfer"),
        (command(packets=-2, direction=1), "an isochronous transfer"),
        (command(packets=0x7FFFFFFF), "an isochronous transfer"),
        (command(endpoint=0, setup=b"\x80\x06\x00\x01\x00\x00\x12\x00"), "do not fit together"),
        (command(endpoint=0, direction=1, length=4, setup=b"\x00\x09\x01\x00\x00\x00\x04\x00"), "do not fit together"),
    ],
)
def test_heads_of_usbip(said: bytes, why: str) -> None:
    rig, _ = imported()
    with pytest.raises(BrokenPeer, match=why):
        rig.hear(said)
    assert rig.events == [] and rig.told() == b""


def test_the_longest_transfer_of_usbip() -> None:
    rig, vhci = imported()
    rig.hear(vhci.control(1, 0, 9, 1) + vhci.control(2, 1, 11, 1, CHANNEL))
    rig.hear(vhci.submit(3, OUT, bytes(limits.MAX_USB_TRANSFER)))
    assert vhci.hears(rig.told())[-1].length == limits.MAX_USB_TRANSFER


def test_a_control_transfer_with_other_data_than_its_setup_says() -> None:
    rig, vhci = imported()
    rig.hear(vhci.submit(1, 0, bytes(3000), setup=b"\x21\x02\0\0\0\0\x05\0"))
    rig.hear(vhci.submit(2, 0x80, room=5, setup=b"\x80\x06\0\x02\0\0\xff\xff"))
    rig.hear(vhci.submit(3, 0x80, room=0x7FFFFFFF, setup=b"\x80\x06\0\x02\0\0\x05\0"))
    assert [one.data for one in vhci.hears(rig.told())] == [b"", DESCRIPTORS.configuration[:5], DESCRIPTORS.configuration[:5]]


# ---- what waits -------------------------------------------------------------------------------------------------------------


def test_more_than_may_wait() -> None:
    rig, vhci = imported()
    rig.hear(vhci.control(1, 0, 9, 1) + vhci.control(2, 1, 11, 1, CHANNEL))
    for seqnum in range(3, 3 + limits.MAX_PARKED_URBS):
        rig.hear(vhci.submit(seqnum, IN, room=64))
    rig.hear(vhci.control(9999, 0x80, 6, 0x0100, 0, 18))
    assert vhci.hears(rig.told())[-1].data == DESCRIPTORS.device
    with pytest.raises(Overload):
        rig.hear(vhci.submit(10000, IN, room=64))
    rig, qemu = greeted()
    rig.hear(qemu.message(q.SET_CONFIGURATION, 1, b"\x01") + qemu.message(q.START_INTERRUPTS, 0, b"\x82"))
    for ident in range(2, 1 + limits.MAX_PARKED_URBS):
        rig.hear(qemu.bulk(ident, 0x81, room=64))
    assert rig.engine.parked == (limits.MAX_PARKED_URBS, 0)
    with pytest.raises(Overload):
        rig.hear(qemu.bulk(9999, 0x81, room=64))


def test_more_bytes_than_may_wait() -> None:
    rig, qemu = greeted()
    rig.hear(qemu.message(q.SET_CONFIGURATION, 1, b"\x01") + qemu.message(q.SET_ALT_SETTING, 2, bytes([CHANNEL, 1])))
    rig.function.room[CHANNEL] = 0
    piece = bytes(limits.MAX_USB_TRANSFER // 2)
    for ident in range(limits.MAX_PARKED_URB_BYTES // len(piece)):
        rig.hear(qemu.bulk(ident, OUT, piece))
    with pytest.raises(Overload):
        rig.hear(qemu.bulk(9999, OUT, b"x"))


def test_floods_leave_nothing_behind() -> None:
    """Requests, cancellations, stops and resets without end: nothing is kept of them."""
    rig, vhci = imported()
    for seqnum in range(3000):
        rig.hear(vhci.control(2 * seqnum, 0x80, 6, 0x0300 | seqnum & 0xFF, 0x0409, 255))
        rig.hear(vhci.unlink(2 * seqnum + 1, 2 * seqnum))
        vhci.hears(rig.told())
    assert rig.engine.parked == (0, 0) and not vhci.waits and not vhci.unlinks
    rig, qemu = greeted()
    for ident in range(1000):
        rig.hear(qemu.message(q.SET_CONFIGURATION, ident, b"\x01") + qemu.bulk(ident, 0x81, room=64))
        rig.hear(qemu.message(q.START_INTERRUPTS, 0, b"\x82") + qemu.message(q.CANCEL, ident + ident % 2))
        rig.hear(qemu.message(q.RESET) + qemu.message(q.STOP_INTERRUPTS, 0, b"\x82"))
        qemu.hears(rig.told())
    assert rig.engine.parked == (0, 0) and qemu.waits == {}


STEPS: list[Callable[[Qemu], bytes]] = [
    lambda qemu: qemu.message(q.SET_CONFIGURATION, 1, b"\x01"),
    lambda qemu: qemu.message(q.SET_ALT_SETTING, 2, bytes([CHANNEL, 1])),
    lambda qemu: qemu.message(q.START_INTERRUPTS, 0, b"\x82"),
    lambda qemu: qemu.bulk(3, 0x81, room=512),
    lambda qemu: qemu.bulk(4, IN, room=512),
    lambda qemu: qemu.bulk(5, 0x01, b"\x6f\xf0\x03\0\0\0\0\0\0\0" + bytes(502)),
    lambda qemu: qemu.bulk(6, OUT, b"abc"),
    lambda qemu: qemu.control(7, 2, 3, 0, 0x81, 0),
    lambda qemu: qemu.message(q.CANCEL, 4),
    lambda qemu: qemu.message(q.STOP_INTERRUPTS, 0, b"\x82"),
]


@pytest.mark.parametrize("at", range(len(STEPS) + 1))
def test_resets_at_any_time(at: int) -> None:
    rig, qemu = greeted()
    rig.hear(b"".join(step(qemu) for step in STEPS[:at]))
    rig.hear(qemu.message(q.RESET) * 3)
    qemu.hears(rig.told())
    assert qemu.waits == {}, "each was answered"
    assert rig.engine.parked == (0, 0) and rig.engine.configuration == 0 and not rig.function.opened
    rig.hear(qemu.message(q.SET_CONFIGURATION, 1, b"\x01") + qemu.bulk(9, 0x01, b"\x62" + bytes(9)))
    assert rig.function.messages == [b"\x62" + bytes(9)], "it is as new"


# ---- by chance --------------------------------------------------------------------------------------------------------------


def valid_for_qemu(rng: random.Random, qemu: Qemu, ident: int) -> bytes:
    endpoint = rng.choice([0x01, 0x81, 0x03, 0x83, OUT, IN, 0x82])
    data = b"\x65" + bytes(9) if endpoint == 1 else rng.randbytes(rng.randrange(700))
    return rng.choice([
        lambda: qemu.message(q.SET_CONFIGURATION, ident, bytes([rng.randrange(2)])),
        lambda: qemu.message(q.SET_ALT_SETTING, ident, bytes([rng.randrange(14), rng.randrange(2)])),
        lambda: qemu.message(q.START_INTERRUPTS, ident, b"\x82"), lambda: qemu.message(q.STOP_INTERRUPTS, ident, b"\x82"),
        lambda: qemu.message(q.CANCEL, rng.randint(0, ident)), lambda: qemu.message(q.RESET),
        lambda: qemu.bulk(ident, endpoint, b"" if endpoint & 0x80 else data, room=rng.randrange(2000)),
        lambda: qemu.control(ident, rng.choice([0x80, 0x81, 0x82, 0xA1]), rng.randrange(13), rng.randrange(0x400), endpoint, 64),
        lambda: qemu.control(ident, rng.choice([0, 1, 2]), rng.choice([1, 3, 5, 9, 11]), rng.randrange(2), rng.randrange(0x90), 0),
    ])()  # fmt: skip


def valid_for_linux(rng: random.Random, vhci: Vhci, seqnum: int) -> bytes:
    endpoint = rng.choice([0x01, 0x81, 0x03, 0x83, OUT, IN, 0x82])
    data = b"\x65" + bytes(9) if endpoint == 1 else rng.randbytes(rng.randrange(700))
    return rng.choice([
        lambda: vhci.submit(seqnum, endpoint, b"" if endpoint & 0x80 else data, room=rng.randrange(2000), flags=rng.randrange(2)),
        lambda: vhci.control(seqnum, rng.choice([0x80, 0x81, 0x82, 0xA1]), rng.randrange(13), rng.randrange(0x400), endpoint, 64),
        lambda: vhci.control(seqnum, rng.choice([0, 1, 2]), rng.choice([1, 3, 5, 9, 11]), rng.randrange(2), rng.randrange(0x90)),
        lambda: vhci.unlink(seqnum, rng.randint(0, seqnum)),
    ])()  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_messages_by_chance(seed: int) -> None:
    """Valid ones in any order, some with a byte changed, and whatever happens behind: BrokenPeer or Overload, or it goes on."""
    rng = random.Random(seed)
    for _ in range(25):
        linux = rng.random() < 0.5
        rig, guest = imported() if linux else greeted()
        rig.function.answers_at_once = rng.random() < 0.5
        for number in range(120):
            number = rng.randrange(120) if rng.random() < 0.02 else number
            valid = valid_for_linux(rng, guest, number) if isinstance(guest, Vhci) else valid_for_qemu(rng, guest, number)
            said = bytearray(valid)
            if rng.random() < 0.02:
                said[rng.randrange(len(said))] = rng.randrange(256)
            try:
                rig.hear(bytes(said))
                happen(rng, rig)
            except (BrokenPeer, Overload):
                rig.engine.reset()  # as the device is closed
                assert rig.engine.parked == (0, 0) and not rig.function.opened
                break
            rig.told()
            count, size = rig.engine.parked
            assert 0 <= count <= limits.MAX_PARKED_URBS and 0 <= size <= limits.MAX_PARKED_URB_BYTES


def happen(rng: random.Random, rig: Rig) -> None:
    for channel in list(rig.function.opened):
        rng.choice([
            lambda c: rig.function.feed(c, rng.randbytes(rng.randrange(900))), lambda c: rig.function.make_room(c, 50),
            lambda c: rig.function.room.update({c: rng.randrange(100)}), rig.function.end, lambda _: None, lambda _: None,
        ])(channel)  # fmt: skip
    if rng.random() < 0.3:
        rig.engine.ccid_notify(b"\x50\x03")
    if rig.function.messages and not rig.function.answers_at_once:
        rig.engine.ccid_answer(rig.function.messages.pop(0) + bytes(rng.randrange(600)))
    rig.settle()
