"""A module's USB device with its threads and sockets: what of it is bounded, how it ends, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hsmvisord import limits
from hsmvisord.face.card.generations import Move
from hsmvisord.transport.usb.device import UsbDevice
from support.usb_importers import Ccid, Importer, Lost, Socketed, Stalled, Usbip, Usbredir

USBREDIR, USBIP = "usbredir", "usbip"
SERIAL, WITHIN = "web-1", 10
GET_SLOT_STATUS, XFR_BLOCK = 0x65, 0x6F
READER_OUT, READER_IN, READER_INTERRUPT = 0x01, 0x81, 0x82
BULK = 101  #: of usbredir


class FakeCard:
    """Answers each command with itself, once `free` is set."""

    def __init__(self) -> None:
        self.present, self.shown, self.settings, self.serial = True, b"", None, SERIAL
        self.free = threading.Event()
        self.free.set()
        self.begun = threading.Event()
        self.commands: list[bytes] = []
        self.resets = 0
        self.closed = threading.Event()
        self.moves: list[Move] = []
        self.fault: Exception | None = None

    def look(self) -> Move:
        if self.fault is not None:
            raise self.fault
        move = self.moves.pop(0) if self.moves else Move("")
        self.present = {"in": True, "out": False}.get(move.step, self.present)
        return move

    def serial_number(self) -> str:
        return self.serial

    def power_up(self) -> bytes:
        return b"\x3b\x00"

    def power_down(self) -> None:
        self.resets += 1

    def transmit(self, raw: bytes) -> bytes:
        self.commands.append(raw)
        self.begun.set()
        assert self.free.wait(WITHIN)
        return raw + b"\x90\x00"

    def close(self) -> None:
        self.closed.set()


class Rig:
    """A device with its importer's socket; `ends` has the module's end of each channel that was opened."""

    def __init__(self, protocol: str) -> None:
        self.protocol, self.card = protocol, FakeCard()
        self.ends: list[socket.socket] = []
        self.whys: list[str] = []
        self.shown: list[bytes] = []
        self.over = threading.Event()
        self.before = descriptors()
        self.sock, self.theirs = socket.socketpair()
        self.sock.settimeout(WITHIN)
        self.device = UsbDevice(
            self.theirs, protocol, (0x1209, 1), self.card, self._take, self.shown.append, self._ended  # type: ignore[arg-type]
        )  # fmt: skip

    def _take(self, sock: socket.socket, peer: str) -> None:
        assert peer.startswith("usb channel ")
        sock.settimeout(WITHIN)
        self.ends.append(sock)

    def _ended(self, why: str) -> None:
        self.whys.append(why)
        self.over.set()

    def importer(self) -> Importer:
        self.device.start()
        importer: Importer = Usbip(self.sock, SERIAL) if self.protocol == USBIP else Usbredir(self.sock)
        importer.configure()
        return importer

    def ended(self) -> str:
        assert self.over.wait(WITHIN), "it goes on"
        return self.whys[0]

    def clean(self) -> None:
        self.card.free.set()
        self.device.close()
        assert self.card.closed.wait(WITHIN)
        for sock in (self.sock, *self.ends):
            sock.close()
        assert len(self.whys) <= 1, "it ended once"
        until(lambda: not [t for t in threading.enumerate() if t.name in ("usb", "card")], "the end of its threads")
        assert descriptors() == self.before, "it has given all back"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.002)


@pytest.fixture(params=[USBREDIR, USBIP])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.clean()


def powered(rig: Rig) -> Ccid:
    card = Ccid(rig.importer())
    assert card.power_on() == b"\x3b\x00"
    return card


def busy_seconds(thread: str, within: float) -> float:
    """How long a thread of ours ran in that time."""

    def ran() -> float:
        native = next(t.native_id for t in threading.enumerate() if t.name == thread)
        fields = Path(f"/proc/self/task/{native}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = ran()
    time.sleep(within)
    return ran() - before


# ---- how it ends --------------------------------------------------------------------------------------------------------


def test_it_is_closed(rig: Rig) -> None:
    importer = rig.importer()
    importer.set_interface(1, 1)
    importer.set_interface(12, 1)
    began = time.monotonic()
    rig.device.close()
    assert time.monotonic() - began < 2
    with pytest.raises(Lost):
        importer.exactly(1 << 20)
    assert [end.recv(9) for end in rig.ends] == [b"", b""]
    assert rig.whys == [], "whoever closes it knows"
    rig.device.close()


def test_the_importer_goes(rig: Rig) -> None:
    importer = rig.importer()
    importer.set_interface(3, 1)
    rig.sock.close()
    assert rig.ended() == "the importer is gone"
    assert rig.ends[0].recv(9) == b""
    rig.device.close()


def test_the_importer_goes_before_it_says_anything(rig: Rig) -> None:
    rig.device.start()
    rig.sock.close()
    why = rig.ended()
    assert why == "the importer is gone" or why.startswith("connection lost: ")  # it has not read our HELLO


def test_what_cannot_be_ends_it(rig: Rig) -> None:
    importer = rig.importer()
    importer.say(bytes([0xEE]) * 64)
    assert "fault" not in rig.ended()
    with pytest.raises(Lost):
        importer.exactly(1 << 20)


def test_a_fault_of_the_card_ends_it(rig: Rig) -> None:
    rig.importer()
    rig.card.fault = ValueError("with a guest's bytes")
    rig.device.look()
    assert rig.ended() == "fault: ValueError", "and no word of them"


def test_it_ends_while_the_card_is_at_work(rig: Rig) -> None:
    """What a hardware module is asked is not cut short; the connection ends all the same."""
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"command")
    assert rig.card.begun.wait(WITHIN)
    rig.sock.close()
    threading.Timer(0.3, rig.card.free.set).start()
    assert rig.ended() == "the importer is gone"


def test_nothing_is_imported(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "USB_IMPORT_SECONDS", 0.3)
    began = time.monotonic()
    rig.device.start()
    if rig.protocol == USBIP:
        rig.sock.sendall(struct.pack(">HHI", 0x0111, 0x8005, 0))  # a question is no import
    assert rig.ended() == "nothing was imported for 0.3 s"
    assert time.monotonic() - began >= 0.2  # it began when it was made


def test_what_is_imported_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "USB_IMPORT_SECONDS", 0.3)
    importer = rig.importer()
    time.sleep(0.5)
    assert importer.control(0x80, 8, 0, 0, 1) == b"\x01" and rig.whys == []


def test_a_protocol_that_nobody_speaks() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="nothing here speaks 'usb4'"):
        UsbDevice(theirs, "usb4", (1, 2), FakeCard(), lambda *_: None, lambda _: None, lambda _: None)  # type: ignore[arg-type]


def test_it_ends_when_it_is_to_have_another_serial_number(rig: Rig) -> None:
    importer = rig.importer()
    rig.device.look()
    assert importer.control(0x80, 8, 0, 0, 1) == b"\x01" and rig.whys == []
    rig.card.serial = f"{SERIAL}~01234567"
    rig.device.look()
    assert rig.ended() == "the card has other keys: it comes back under another serial number"


# ---- the card -----------------------------------------------------------------------------------------------------------


def test_the_card_comes_and_goes(rig: Rig) -> None:
    importer = rig.importer()
    if isinstance(importer, Usbredir):
        importer.watch(READER_INTERRUPT)
    for step, told in (("", b"\x50\x02"), ("out", b"\x50\x02"), ("in", b"\x50\x03")):
        rig.card.moves.append(Move(step))
        rig.device.look()
        heard = importer.interrupt() if isinstance(importer, Usbredir) else importer.read(READER_INTERRUPT, 8)
        assert heard == told


def test_what_it_has_shown_is_told(rig: Rig) -> None:
    rig.importer()
    rig.card.shown = b"a certificate"
    rig.device.look()
    until(lambda: rig.shown == [b"a certificate"], "the word")


def test_a_slow_card_asks_for_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARD_PATIENCE", 0.05)
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"command")
    for _ in range(3):
        told = card.importer.read(READER_IN, 512)
        assert (told[0], told[6], told[7] >> 6) == (0x80, card.sequence, 2)
    rig.card.free.set()
    answers = [card.importer.read(READER_IN, 512)]
    while answers[-1][7] >> 6 == 2:
        answers.append(card.importer.read(READER_IN, 512))
    assert answers[-1][10:] == b"command\x90\x00"
    assert busy_seconds("usb", 0.3) < 0.1, "it asks no more"


def test_a_second_message_while_it_is_at_work(rig: Rig) -> None:
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"first")
    assert rig.card.begun.wait(WITHIN)
    card.begin(GET_SLOT_STATUS)
    busy = card.importer.read(READER_IN, 512)
    assert (busy[6], busy[7] & 0x40, busy[8]) == (card.sequence, 0x40, 0xE0), "CMD_SLOT_BUSY"
    rig.card.free.set()
    assert card.importer.read(READER_IN, 512)[10:] == b"first\x90\x00"


def test_a_reset_forgets_what_is_under_way(rig: Rig) -> None:
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"first")
    assert rig.card.begun.wait(WITHIN)
    card.importer.configure()
    rig.card.free.set()
    assert card.power_on() == b"\x3b\x00", "no answer of before it"
    assert rig.card.resets == 1


def test_what_waits_for_a_slow_card_is_bounded(rig: Rig) -> None:
    """Who configures and asks without end while a command runs leaves nothing behind but the last one."""
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"slow")
    assert rig.card.begun.wait(WITHIN)
    for _ in range(500):
        card.importer.configure()
        card.begin(XFR_BLOCK, bytes(60_000))
    assert rig.device._card._tasks.qsize() <= 4
    card.importer.configure()
    rig.card.free.set()
    assert card.power_on() == b"\x3b\x00"
    assert rig.card.commands == [b"slow"], "nobody waits for the others"


def test_answers_that_nobody_reads_end_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARD_PATIENCE", 0.001)
    card = powered(rig)
    rig.card.free.clear()
    card.begin(XFR_BLOCK, b"command")
    with pytest.raises(Lost):
        card.importer.exactly(1 << 20)
    rig.card.free.set()
    assert rig.ended() == "nobody reads what the reader answers"


# ---- channels -----------------------------------------------------------------------------------------------------------


def test_bytes_go_both_ways(rig: Rig) -> None:
    channel = Socketed(rig.importer(), 2)
    (end,) = rig.ends
    channel.sendall(b"question")
    assert end.recv(99) == b"question"
    end.sendall(b"answer")
    assert channel.recv(99) == b"answer"
    channel.close()
    assert end.recv(99) == b""


def test_all_channels_at_once(rig: Rig) -> None:
    importer = rig.importer()
    channels = [Socketed(importer, number) for number in range(1, 1 + limits.USB_CHANNELS)]
    for number, (channel, end) in enumerate(zip(channels, rig.ends, strict=True)):
        end.sendall(bytes([number]))
        channel.sendall(bytes([100 + number]))
    for number, (channel, end) in enumerate(zip(channels, rig.ends, strict=True)):
        assert (channel.recv(9), end.recv(9)) == (bytes([number]), bytes([100 + number]))


def test_a_module_that_takes_nothing_holds_the_importer_up(rig: Rig) -> None:
    importer = rig.importer()
    channel = Socketed(importer, 1)
    data = os.urandom(3 << 20)
    waits = [importer.submit(0x03, len(piece), piece) for piece in pieces(data, limits.MAX_USB_TRANSFER)]
    assert importer.control(0x80, 8, 0, 0, 1) == b"\x01", "the rest goes on"
    took = b""
    while len(took) < len(data):
        took += rig.ends[0].recv(1 << 20)
    assert took == data
    assert [importer.finish(ident)[1] for ident in waits] == [len(piece) for piece in pieces(data, limits.MAX_USB_TRANSFER)]
    channel.close()


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_one_transfer_reads_no_more_than_it_may(rig: Rig) -> None:
    importer = rig.importer()
    channel = Socketed(importer, 1)
    data = os.urandom(500_000)
    thread = threading.Thread(target=rig.ends[0].sendall, args=(data,))
    thread.start()
    read = b""
    while len(read) < len(data):
        part = channel.recv(1 << 20)
        assert 0 < len(part) <= limits.MAX_USB_READ
        read += part
    thread.join()
    assert read == data


@pytest.mark.parametrize("how", [socket.socket.close, lambda end: end.shutdown(socket.SHUT_WR)], ids=["gone", "done"])
def test_the_module_ends_a_connection(rig: Rig, how: Callable[[socket.socket], None]) -> None:
    """Its last bytes come, then the endpoint halts; and nobody spins meanwhile, whether the importer asks or not."""
    importer = rig.importer()
    channel = Socketed(importer, 1)
    rig.ends[0].sendall(b"last")
    how(rig.ends[0])
    assert busy_seconds("usb", 0.4) < 0.1
    assert channel.recv(64) == b"last"
    with pytest.raises(Stalled):
        channel.recv(64)
    with pytest.raises(Stalled):
        channel.recv(64)
    importer.write(0x03, b"nobody hears it")
    assert busy_seconds("usb", 0.4) < 0.1
    importer.set_interface(1, 1)
    channel.sendall(b"anew")
    assert rig.ends[1].recv(9) == b"anew"


def test_channels_open_and_close_without_end(rig: Rig) -> None:
    """The next one has the descriptor of the last one, and hears nothing of its end."""
    importer = rig.importer()
    for number in range(200):
        channel = Socketed(importer, 1 + number % 3)
        end = rig.ends.pop()
        if number % 2:
            end.close()
        importer.set_interface(1 + number % 3, 1)
        again = rig.ends.pop()
        again.sendall(b"%d" % number)
        assert channel.recv(9) == b"%d" % number
        for sock in (end, again):
            sock.close()
        channel.close()


def test_no_descriptors_are_left(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    importer = rig.importer()

    def none_left(*_: object) -> tuple[socket.socket, socket.socket]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", none_left)
        with pytest.raises(Stalled):
            importer.set_interface(1, 1)
    Socketed(importer, 1).sendall(b"again")
    assert rig.ends[0].recv(9) == b"again"


# ---- who does not read ----------------------------------------------------------------------------------------------------


def reading(protocol: str, ident: int, endpoint: int, room: int) -> bytes:
    if protocol == USBREDIR:
        return struct.pack("<IIQBBHIH", BULK, 10, ident, endpoint, 0, room & 0xFFFF, 0, room >> 16)
    return struct.pack(">IIIIIIIIII8x", 1, ident, 0x00010001, 1, endpoint & 0x0F, 0, room, 0, 0, 0)


def test_what_waits_for_the_importer_is_bounded(rig: Rig) -> None:
    """However much a channel has: it is not read while the importer reads nothing; and all of it comes, in order, when he does."""
    importer = rig.importer()
    Socketed(importer, 1)
    sent = bytes(n % 251 for n in range(12 << 20))
    thread = threading.Thread(target=rig.ends[0].sendall, args=(sent,))
    thread.start()
    idents = range(1000, 1000 + limits.MAX_PARKED_URBS - 1)
    if isinstance(importer, Usbip):
        importer.reads.update(dict.fromkeys(idents, True))
    importer.say(b"".join(reading(rig.protocol, ident, 0x83, 1 << 20) for ident in idents))
    most, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        most = max(most, len(rig.device._unsent))
        time.sleep(0.005)
    assert limits.MAX_USB_UNSENT < most <= limits.MAX_USB_UNSENT + limits.MAX_USB_READ + 64 * limits.MAX_PARKED_URBS
    read = b""
    for ident in idents:
        read += importer.finish(ident)[0]
        if len(read) == len(sent):
            break
    while len(read) < len(sent):
        read += importer.read(0x83, 1 << 20)
    thread.join()
    assert read == sent


def test_it_answers_again_when_the_importer_reads(rig: Rig) -> None:
    importer = rig.importer()
    asked = 0
    rig.sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for ident in range(1000, 50_000):
            part = reading(rig.protocol, ident, 0x8E, 64)  # alternate setting 0: each is refused at once
            while part:
                part = part[rig.sock.send(part) :]
            asked += 1
    assert 1000 < asked < 49_000
    assert len(rig.device._unsent) <= limits.MAX_USB_UNSENT + (1 << 18)
    rig.sock.settimeout(WITHIN)
    heard = 0
    size = 48 if rig.protocol == USBIP else 26
    for _ in range(asked):
        heard += len(importer.exactly(size))
    assert heard == size * asked
