"""What a USB device tells its importer, as strictly as QEMU's parser and Linux's vhci-hcd read it, whatever it was asked."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hsmvisord.wire.usb import Cancel, Event, Submit, Urb

#: usbredir's control messages to a guest, and how long they are.
SIZES = {0: (68,), 1: (8, 10), 4: (132,), 5: (96, 160), 8: (2,), 11: (3,), 14: (2,), 17: (2,), 20: (9,)}
CONTROL, BULK, INTERRUPT = 100, 101, 103


def check_usbredir(told: bytes, offered: int | None) -> None:
    """All messages are whole, with the lengths that they say.  `offered`: QEMU's capabilities; None: it has said no hello."""
    wide = bool(offered and offered & 1 << 6)
    first = True
    while told:
        head = struct.Struct("<IIQ" if offered and offered & 1 << 5 and not first else "<III")
        kind, length, _ = head.unpack_from(told)
        body, told = told[head.size : head.size + length], told[head.size + length :]
        assert len(body) == length and (kind == 0) == first
        first = False
        if kind in SIZES:
            assert length in SIZES[kind]
            continue
        size, data = int.from_bytes(body[2:4], "little"), body[4:]
        if kind == CONTROL:
            size, data = int.from_bytes(body[8:10], "little"), body[10:]
        elif kind == BULK:
            size, data = size | (int.from_bytes(body[8:10], "little") << 16) * wide, body[8 + 2 * wide :]
        else:
            assert kind == INTERRUPT, f"a message of type {kind}"
        assert len(data) == (size if body[0] & 0x80 else 0)


def after_import(told: bytes) -> bytes:
    """What a USB/IP server has told after it was asked for its devices, and its device was imported."""
    while told:
        version, code, status = struct.unpack_from(">HHI", told)
        assert version == 0x0111 and code in (0x0003, 0x0005)
        if code == 0x0005:
            assert (status, int.from_bytes(told[8:12], "big")) == (0, 1)
            told = told[12 + 312 + 4 * told[12 + 311] :]
        elif status:
            told = told[8:]
        else:
            assert len(told) >= 8 + 312
            return told[8 + 312 :]
    return b""


def check_usbip(told: bytes, events: Sequence[Event], under_way: int) -> None:
    """Of what follows the import: each transfer is given back once or taken back once, and with no more than it asked for; each
    UNLINK is answered once.  `under_way`: how many transfers have not ended."""
    transfers: dict[int, list[Urb]] = {}  #: a seqnum may come again
    for event in events:
        if isinstance(event, Submit):
            transfers.setdefault(event.urb.ident, []).append(event.urb)
    victims = [event.ident for event in events if isinstance(event, Cancel)]
    while told:
        command, seqnum, _, _, _, status, length = struct.unpack_from(">IIIIIii", told)
        told = told[48:]
        if command == 4:
            assert status in (0, -104) and length == 0
            victim = victims.pop(0)
            if status:
                transfers[victim].pop(0)
            continue
        assert command == 3 and status in (0, -32, -71, -108, -121)
        urb = transfers[seqnum].pop(0)
        assert 0 <= length <= urb.length
        reads = urb.endpoint & 0x80 if urb.setup is None else urb.setup.to_host
        assert len(told) >= (length if reads else 0)
        told = told[length if reads else 0 :]
    assert not victims
    assert sum(map(len, transfers.values())) == under_way
