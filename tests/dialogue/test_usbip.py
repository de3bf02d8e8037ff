"""USB/IP, as a script of who says what: a guest's kernel on one side, the device on the other."""

from __future__ import annotations

import struct

import pytest
from hsmvisord import limits
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Setup, Status, Submit, Urb
from hsmvisord.wire.usb_descriptors import Descriptors, Identity
from hsmvisord.wire.usbip import UsbipServer
from support.usb_guests import ECONNRESET, EPIPE, EPROTO, EREMOTEIO, ESHUTDOWN, Returned, Vhci
from support.usb_rig import DESCRIPTORS, Rig, usbip_rig

READER_OUT, READER_IN, READER_INTERRUPT = 0x01, 0x81, 0x82
CHANNEL, OUT, IN = 4, 6, 0x86
SET_CONFIGURATION, SET_INTERFACE, GET_DESCRIPTOR, CLEAR_FEATURE = 9, 11, 6, 1
SHORT_NOT_OK = 1


class Script:
    """`say` is the guest's kernel, and gives what it hears."""

    def __init__(self) -> None:
        self.rig: Rig = usbip_rig()
        self.guest = Vhci()
        self.function = self.rig.function

    def say(self, *messages: bytes) -> list[Returned]:
        self.rig.hear(b"".join(messages))
        return self.hears()

    def hears(self) -> list[Returned]:
        return self.guest.hears(self.rig.told())


@pytest.fixture
def imported() -> Script:
    script = Script()
    script.rig.hear(script.guest.import_())
    assert script.rig.told()[:8] == struct.pack(">HHI", 0x0111, 0x0003, 0)
    return script


@pytest.fixture
def configured(imported: Script) -> Script:
    said = imported.guest.control(1, 0x00, SET_CONFIGURATION, 1), imported.guest.control(2, 0x01, SET_INTERFACE, 1, CHANNEL)
    assert imported.say(*said) == [Returned(1, 0, 0), Returned(2, 0, 0)]
    return imported


# ---- before the import --------------------------------------------------------------------------------------------------


def test_who_lists_and_then_imports() -> None:
    codec, guest = UsbipServer(DESCRIPTORS), Vhci()
    assert list(codec.receive(guest.devlist())) == []
    listed = codec.data_to_send()
    assert len(listed) == 12 + 312 + 4 * (1 + limits.USB_CHANNELS)
    assert not codec.imported
    assert list(codec.receive(guest.import_())) == []
    assert codec.data_to_send() == struct.pack(">HHI", 0x0111, 0x0003, 0) + listed[12 : 12 + 312]
    assert codec.imported


@pytest.mark.parametrize("bus_id", [b"", b"1-1", b"web-2", b"web-1x", b"web", b"\xff" * 32])
def test_another_bus_id(bus_id: bytes) -> None:
    script = Script()
    script.rig.hear(script.guest.import_(bus_id))
    assert script.rig.told() == struct.pack(">HHI", 0x0111, 0x0003, 4), "Linux says: Device not found"
    script.rig.hear(script.guest.import_(b"web-1\0and what lies behind the end"))
    assert len(script.rig.told()) == 8 + 312


def test_a_long_serial_number_is_a_shorter_bus_id() -> None:
    serial = "m" * 60
    rig = Rig(UsbipServer(Descriptors(Identity(1, 2, serial))))
    rig.hear(Vhci(b"m" * 31).import_())
    assert rig.told()[8 + 256 : 8 + 288] == b"m" * 31 + b"\0"


def test_questions_before_the_import() -> None:
    script = Script()
    for number in range(limits.MAX_USBIP_OPERATIONS - 1):
        script.rig.hear(script.guest.devlist() if number % 2 else script.guest.import_(b"other"))
    script.rig.hear(script.guest.import_())
    assert script.rig.told()
    script = Script()
    for _ in range(limits.MAX_USBIP_OPERATIONS):
        script.rig.hear(script.guest.devlist())
    with pytest.raises(BrokenPeer, match="more than 16 questions"):
        script.rig.hear(script.guest.import_())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (struct.pack(">HHI", 0x0106, 0x8005, 0), "USB/IP of version 0x0106"),
        (struct.pack(">HHI", 0x0111, 0x8004, 0), "an operation 0x8004"),
        (struct.pack(">HHI", 0x0111, 0x0005, 0), "an operation 0x0005"),
        (b"GET / HTTP/1.1\r\n", "version 0x4745"),
        (bytes(8), "version 0x0000"),
    ],
)
def test_what_is_no_question(said: bytes, why: str) -> None:
    script = Script()
    with pytest.raises(BrokenPeer, match=why):
        script.rig.hear(said)
    assert script.rig.told() == b"", "a stranger is told nothing"


# ---- transfers ----------------------------------------------------------------------------------------------------------


def test_as_linux_enumerates(imported: Script) -> None:
    say, guest = imported.say, imported.guest
    assert say(guest.control(1, 0x80, GET_DESCRIPTOR, 0x0100, 0, 64)) == [Returned(1, 0, 18, DESCRIPTORS.device)]
    assert say(guest.control(2, 0x80, GET_DESCRIPTOR, 0x0600, 0, 10)) == [Returned(2, EPIPE, 0)]
    assert say(guest.control(3, 0x80, GET_DESCRIPTOR, 0x0200, 0, 9)) == [Returned(3, 0, 9, DESCRIPTORS.configuration[:9])]
    assert say(guest.control(4, 0x80, GET_DESCRIPTOR, 0x0200, 0, 477)) == [Returned(4, 0, 477, DESCRIPTORS.configuration)]
    assert say(guest.control(5, 0x80, GET_DESCRIPTOR, 0x0303, 0x0409, 255))[0].data[2:].decode("utf-16-le") == "web-1"
    assert say(guest.control(6, 0x00, SET_CONFIGURATION, 1)) == [Returned(6, 0, 0)]
    assert imported.function.said == ["configured"]


def test_a_card_is_asked(configured: Script) -> None:
    say, guest, function = configured.say, configured.guest, configured.function
    assert say(guest.submit(3, READER_INTERRUPT, room=8)) == []
    function.engine.ccid_notify(b"\x50\x03")
    assert configured.hears() == [Returned(3, 0, 2, b"\x50\x03")]
    question = b"\x6f\x03\0\0\0\0\0\0\0\0abc"
    assert say(guest.submit(4, READER_IN, room=65556), guest.submit(5, READER_OUT, question)) == [Returned(5, 0, 13)]
    assert function.messages == [question]
    function.engine.ccid_answer(b"an answer")
    assert configured.hears() == [Returned(4, 0, 9, b"an answer")]


def test_bytes_of_a_channel(configured: Script) -> None:
    say, guest, function = configured.say, configured.guest, configured.function
    function.room[CHANNEL] = 2
    assert say(guest.submit(3, IN, room=4), guest.submit(4, OUT, b"abcd")) == []
    function.feed(CHANNEL, b"123456")
    assert configured.hears() == [Returned(3, 0, 4, b"1234")]
    function.make_room(CHANNEL, 2)
    assert configured.hears() == [Returned(4, 0, 4)]
    function.end(CHANNEL)
    assert say(guest.submit(5, IN, room=9), guest.submit(6, IN, room=9)) == [Returned(5, 0, 2, b"56"), Returned(6, EPIPE, 0)]
    assert say(guest.control(7, 0x02, CLEAR_FEATURE, 0, IN)) == [Returned(7, 0, 0)]


def test_how_transfers_fail(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    assert say(guest.submit(3, IN, room=9)) == []
    assert say(guest.control(4, 0x01, SET_INTERFACE, 0, CHANNEL)) == [Returned(3, ESHUTDOWN, 0), Returned(4, 0, 0)]
    assert say(guest.submit(5, IN, room=9)) == [Returned(5, EPROTO, 0)]
    assert say(guest.submit(6, OUT, b"abc")) == [Returned(6, EPROTO, 0)]


def test_less_than_there_is_room_for(configured: Script) -> None:
    say, guest, function = configured.say, configured.guest, configured.function
    say(
        *(guest.submit(seqnum, IN, room=4, flags=SHORT_NOT_OK) for seqnum in (3, 4)), guest.submit(5, OUT, b"a", flags=SHORT_NOT_OK)
    )
    function.feed(CHANNEL, b"123456")
    assert configured.hears() == [Returned(3, 0, 4, b"1234"), Returned(4, EREMOTEIO, 2, b"56")]


def test_more_room_than_a_transfer_has_bytes(configured: Script) -> None:
    """There may be; no more than a transfer's bytes come."""
    say, guest, function = configured.say, configured.guest, configured.function
    assert say(guest.submit(3, IN, room=0x7FFFFFFF)) == []
    assert configured.rig.events[-1] == Submit(Urb(3, IN, limits.MAX_USB_TRANSFER))
    function.feed(CHANNEL, b"data")
    assert configured.hears() == [Returned(3, 0, 4, b"data")]


def test_linux_says_out_of_a_control_transfer_without_data(imported: Script) -> None:
    """Its bmRequestType may say IN all the same: any process may ask for that."""
    guest = imported.guest
    assert imported.say(guest.control(1, 0x80, GET_DESCRIPTOR, 0x0100, 0, 0)) == [Returned(1, 0, 0)]
    said = guest.submit(2, 0, b"", setup=Setup(0x80, GET_DESCRIPTOR, 0x0100, 0, 18).encode())
    with pytest.raises(BrokenPeer, match="do not fit together"):
        imported.say(said)


@pytest.mark.parametrize("packets", [0, -1])
def test_both_ways_to_say_not_isochronous(configured: Script, packets: int) -> None:
    say, guest = configured.say, configured.guest
    assert say(guest.submit(3, OUT, b"abc", packets=packets)) == [Returned(3, 0, 3)]


# ---- taken back ---------------------------------------------------------------------------------------------------------


def test_one_that_waits(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    assert say(guest.submit(3, IN, room=64), guest.submit(4, IN, room=64)) == []
    assert say(guest.unlink(5, 3)) == [Returned(5, ECONNRESET)]
    configured.function.feed(CHANNEL, b"data")
    assert configured.hears() == [Returned(4, 0, 4, b"data")]
    assert guest.waits == {}


def test_one_that_was_answered(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    say(guest.submit(3, OUT, b"abc"))
    assert say(guest.unlink(4, 3)) == [Returned(4, 0)]
    assert say(guest.unlink(5, 777)) == [Returned(5, 0)], "or was never asked for"
    assert say(guest.unlink(6, 3)) == [Returned(6, 0)]


def test_one_that_is_answered_in_the_same_breath(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    assert say(guest.submit(3, OUT, b"abc"), guest.unlink(4, 3)) == [Returned(3, 0, 3), Returned(4, 0)]
    assert say(guest.submit(5, IN, room=9), guest.unlink(6, 5), guest.submit(7, OUT, b"a")) == [
        Returned(6, ECONNRESET),
        Returned(7, 0, 1),
    ]


def test_data_that_comes_while_it_is_taken_back(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    say(guest.submit(3, IN, room=64))
    configured.function.feed(CHANNEL, b"data")  # answered, and not told yet
    assert say(guest.unlink(4, 3)) == [Returned(3, 0, 4, b"data"), Returned(4, 0)]


def test_the_transfers_answer_goes_first_whatever_the_order_behind() -> None:
    """Linux drops a device that answers a transfer whose UNLINK was answered."""
    codec, guest = UsbipServer(DESCRIPTORS), Vhci()
    list(codec.receive(guest.import_()))
    codec.data_to_send()
    assert list(codec.receive(guest.submit(1, IN, room=9) + guest.unlink(2, 1))) == [Submit(Urb(1, IN, 9)), Cancel(1)]
    codec.cancelled(1, was_parked=False)
    assert codec.data_to_send() == b""
    codec.done(Done(1, IN, Status.OK, b"data"))
    assert guest.hears(codec.data_to_send()) == [Returned(1, 0, 4, b"data"), Returned(2, 0)]
    assert list(codec.receive(guest.submit(3, IN, room=9) + guest.unlink(4, 3))) == [Submit(Urb(3, IN, 9)), Cancel(3)]
    codec.done(Done(3, IN, Status.STALL))
    codec.cancelled(3, was_parked=False)
    assert guest.hears(codec.data_to_send()) == [Returned(3, EPIPE, 0), Returned(4, 0)]
    assert not guest.waits and not guest.unlinks


def test_taken_back_twice(configured: Script) -> None:
    codec, guest = UsbipServer(DESCRIPTORS), Vhci()
    list(codec.receive(guest.import_() + guest.submit(1, IN, room=9) + guest.unlink(2, 1)))
    with pytest.raises(BrokenPeer, match="a second UNLINK of 1"):
        list(codec.receive(guest.unlink(3, 1)))
    say, guest = configured.say, configured.guest
    say(guest.submit(3, IN, room=9))
    assert say(guest.unlink(4, 3), guest.unlink(5, 3)) == [Returned(4, ECONNRESET), Returned(5, 0)], "the first one was answered"


def test_a_seqnum_may_be_used_again_when_it_was_answered(configured: Script) -> None:
    say, guest = configured.say, configured.guest
    for _ in range(2):
        assert say(guest.submit(3, OUT, b"abc")) == [Returned(3, 0, 3)]
        assert say(guest.submit(4, IN, room=3), guest.unlink(5, 4)) == [Returned(5, ECONNRESET)]
    say(guest.submit(4, IN, room=3))
    with pytest.raises(BrokenPeer, match="a second transfer 4"):
        say(guest.submit(4, IN, room=3))
