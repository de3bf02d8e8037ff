"""The bench of a module as a USB device: what stands beside what, what failed, and its program in the guest."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from support.guest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from benchlib import bench, usb, usb_calls
from benchlib.usb_ways import GUEST, HOST, PLAIN, QEMU, ROWS, TITLES, WAYS, turned
from support.usb_guest import USBIP, USBREDIR

Figures = dict[tuple[str, str, str], Sequence[float | str]]  #: microseconds of each round, or why it failed


def measured(changes: Figures | None = None) -> dict[str, Any]:
    """Three rounds, in which all calls took 20 µs."""
    at = [(where, call, way) for (where, call), ways in WAYS.items() for way in ways]
    figures: Figures = {**{one: [20.0, 20.0, 20.0] for one in at}, **(changes or {})}
    runs = {one: dict(enumerate(map(run, took))) for one, took in figures.items()}
    return {"rounds": 3, "rows": [usb._row(*one, runs) for one in at]}


def run(took: float | str) -> dict[str, Any]:
    return {"failed": took} if isinstance(took, str) else {"calls": 100, "p50_us": took, "p99_us": 2 * took}


def written(changes: Figures | None = None) -> str:
    lines, met = bench.written({"times": {"usb": "today"}, "usb": measured(changes)})
    assert met
    return "\n".join(lines)


def cells(text: str, where: str, call: str, way: str) -> list[str]:
    """What follows the names of a row."""
    first = (ROWS[where][call].title, TITLES[where][way])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if tuple(row[:2]) == first]
    return row[2:]


def test_every_call_has_a_row_for_each_way_and_something_to_be_set_beside() -> None:
    text = written()
    for (where, call), ways in WAYS.items():
        kind = ROWS[where][call]
        assert PLAIN in WAYS[where, kind.plain]
        assert not kind.qemu or QEMU in WAYS[where, kind.qemu]
        for way in ways:
            shown = cells(text, where, call, way)
            assert shown[:2] == ["20", "40"]
            assert "1.00x" in shown[2:] or way == PLAIN
    assert "Begun today" in text and "failed" not in text


def test_ratios_are_medians_of_the_rounds_own() -> None:
    changes: Figures = {
        (HOST, "small", PLAIN): [10.0, 20.0, 40.0],
        (HOST, "small", USBREDIR): [30.0, 50.0, 80.0],
        (HOST, "apdu", USBIP): [5000.0, 5000.0, 5000.0],
    }
    text = written(changes)
    assert cells(text, HOST, "small", PLAIN) == ["20", "40", ""]
    assert cells(text, HOST, "small", USBREDIR) == ["50", "100", "2.50x"]
    assert cells(text, HOST, "apdu", USBIP) == ["5,000", "10,000", "250x"]


def test_a_guest_is_set_beside_its_vsock_and_beside_qemus_card() -> None:
    changes: Figures = {
        (GUEST, "rsa2048", PLAIN): [1000.0] * 3,
        (GUEST, "card-rsa2048", USBREDIR): [40_000.0] * 3,
        (GUEST, "card-rsa2048", QEMU): [64_000.0] * 3,
    }
    text = written(changes)
    assert cells(text, GUEST, "card-rsa2048", USBREDIR) == ["40,000", "80,000", "40.00x", "0.62x"]
    assert cells(text, GUEST, "card-rsa2048", QEMU) == ["64,000", "128,000", "64.00x", ""]
    assert cells(text, GUEST, "rsa2048", PLAIN) == ["1,000", "2,000", "", "0.016x"]
    assert cells(text, GUEST, "p256", USBIP)[-1] == "", "QEMU's card has RSA alone"


def test_rounds_that_failed_are_left_out_and_named() -> None:
    hung: list[float | str] = ["no end within 92 s\nand more", 64_000.0, "another reason"]
    text = written({(GUEST, "card-rsa2048", QEMU): hung, (GUEST, "select", QEMU): ["SCardTransmit: 0x80100016"] * 3})
    assert cells(text, GUEST, "card-rsa2048", QEMU)[:2] == ["64,000", "128,000"]
    assert cells(text, GUEST, "select", QEMU) == ["-", "-", "", ""]
    assert cells(text, GUEST, "select", USBREDIR)[-1] == ""
    assert "- RSA-2048 signature, OpenSC's library, QEMU's card, 2 of 3: no end within 92 s\n" in text + "\n"
    assert "- APDU through pcscd: SELECT, QEMU's card, 3 of 3: SCardTransmit: 0x80100016" in text
    assert "and more" not in text and "another reason" not in text


def test_each_way_is_the_first_one_in_turn() -> None:
    ways = WAYS[GUEST, "p256"]
    assert {turned(GUEST, "p256", number)[0] for number in range(len(ways))} == set(ways)
    assert all(sorted(turned(GUEST, "p256", number)) == sorted(ways) for number in range(5))


# ---- the program in the guest -----------------------------------------------------------------------------------------------


def test_percentiles_are_of_what_comes_after_the_first_call() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    told = usb_calls.repeated(call, 0)
    assert told["calls"] == usb_calls.LEAST == count - 1 and 0 < told["p50_us"] <= told["p99_us"]


class Peer:
    """A module that answers with `replies`, a few bytes at a time."""

    def __init__(self, *replies: bytes, greeting: bytes = usb_calls.GREETING) -> None:
        self.heard: list[bytes] = []
        self._replies, self._coming = list(replies), greeting

    def write(self, data: bytes) -> None:
        self.heard.append(data)
        if len(self.heard) > 1 and self._replies:
            message = self._replies.pop(0)
            self._coming += struct.pack(">III", 1, 2, len(message)) + b"op" + message

    def read(self, wanted: int) -> bytes:
        given, self._coming = self._coming[:5], self._coming[5:]
        return given

    def stream(self) -> usb_calls.Stream:
        return usb_calls.Stream(self.write, self.read)


def test_a_conversation_of_the_native_dialect() -> None:
    peer = Peer(b"\0\0\0\x40" + b"one", b"\0\0\0\x40" + bytes(100), b"\0\0\0\0" + b"\0\0\0\0\0\0\0\x07")
    ask = usb_calls.conversation(peer.stream())
    assert ask(b"first") == b"\0\0\0\x40one"
    assert ask(b"second") == b"\0\0\0\x40" + bytes(100)
    with pytest.raises(usb_calls.Failed, match="CK_RV 0000000000000007"):
        ask(b"third")
    with pytest.raises(usb_calls.Failed, match="closed"):
        ask(b"fourth")
    assert peer.heard == [usb_calls.GREETING, b"first", b"second", b"third", b"fourth"]


def test_another_greeting() -> None:
    with pytest.raises(usb_calls.Failed, match="greets differently"):
        usb_calls.conversation(Peer(greeting=b"\0").stream())
