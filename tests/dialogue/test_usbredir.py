"""usbredir, as a script of who says what: QEMU (the protocol's usb-guest) on one side, the device on the other."""

from __future__ import annotations

import struct

import pytest
from hsmvisord import limits
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Reset, Setup, Status, Submit, Urb
from hsmvisord.wire.usbredir import CAPABILITIES, UsbredirHost
from support import usb_guests as q
from support.usb_guests import Heard, Packet, Qemu
from support.usb_rig import DESCRIPTORS, usbredir_rig

READER_OUT, READER_IN, READER_INTERRUPT = 0x01, 0x81, 0x82
CHANNEL, OUT, IN = 4, 6, 0x86
TELLS = [q.INTERFACE_INFO, q.EP_INFO]  #: what there is now


class Script:
    """`say` is QEMU, and gives what it hears."""

    def __init__(self, offered: int = q.OFFERED) -> None:
        self.rig = usbredir_rig()
        self.qemu = Qemu(offered)
        self.function = self.rig.function

    def say(self, *messages: bytes) -> list[Heard]:
        self.rig.hear(b"".join(messages))
        return self.hears()

    def hears(self) -> list[Heard]:
        return self.qemu.hears(self.rig.told())

    def packets(self, *messages: bytes) -> list[Packet]:
        return [self.qemu.packet(heard) for heard in self.say(*messages)]


@pytest.fixture
def greeted() -> Script:
    script = Script()
    script.say(script.qemu.hello())
    return script


@pytest.fixture
def configured(greeted: Script) -> Script:
    say, qemu = greeted.say, greeted.qemu
    heard = say(qemu.message(q.SET_CONFIGURATION, 1, b"\x01"), qemu.message(q.SET_ALT_SETTING, 2, bytes([CHANNEL, 1])))
    assert [(one.kind, one.ident) for one in heard if one.kind not in TELLS] == [
        (q.CONFIGURATION_STATUS, 1),
        (q.ALT_SETTING_STATUS, 2),
    ]
    greeted.function.said.clear()
    return greeted


# ---- how it begins --------------------------------------------------------------------------------------------------------


def test_we_speak_first() -> None:
    script = Script()
    (hello,) = script.hears()
    assert hello == Heard(q.HELLO, 0, b"hsmvisor".ljust(64, b"\0") + struct.pack("<I", CAPABILITIES))
    assert CAPABILITIES == 0x7E
    heard = script.say(script.qemu.hello())
    assert [(one.kind, one.ident) for one in heard] == [(q.INTERFACE_INFO, 0), (q.EP_INFO, 0), (q.DEVICE_CONNECT, 0)]
    assert [len(one.body) for one in heard] == [132, 160, 10]


@pytest.mark.parametrize("offered", [0, 0x02, 0x10, 0x20, 0x40, 0x7E, 0xFF, 0xFFFFFFFF])
def test_what_qemu_offers_decides_the_forms(offered: int) -> None:
    """connect_device_version 2, ep_info_max_packet_size 0x10, 64bits_ids 0x20, 32bits_bulk_length 0x40."""
    script = Script(offered)
    heard = script.say(script.qemu.hello())[1:]
    assert [len(one.body) for one in heard] == [132, 160 if offered & 0x10 else 96, 10 if offered & 2 else 8]
    ident = 0x1122334455667788 if offered & 0x20 else 0x11223344
    (status, *_) = script.say(script.qemu.message(q.GET_CONFIGURATION, ident))
    assert status == Heard(q.CONFIGURATION_STATUS, ident, b"\0\0")
    (packet,) = script.packets(script.qemu.bulk(ident, READER_IN, room=64))
    assert packet == Packet(ident, q.INVAL, 0, b"")


@pytest.mark.parametrize("words", [0, 1, limits.MAX_USBREDIR_CAPABILITIES])
def test_a_hello_with_fewer_or_more_capabilities(words: int) -> None:
    script = Script(0)
    body = bytes(64) + bytes(4 * words)
    assert [one.kind for one in script.say(script.qemu.message(q.HELLO, 0, body))[1:]] == [*TELLS, q.DEVICE_CONNECT]


def test_a_hello_with_too_many_capabilities() -> None:
    script = Script(0)
    with pytest.raises(BrokenPeer, match="HELLO of 132 bytes"):
        script.say(script.qemu.message(q.HELLO, 0, b"", length=64 + 4 * (limits.MAX_USBREDIR_CAPABILITIES + 1)))


def test_hello_comes_first_and_once(greeted: Script) -> None:
    script = Script()
    with pytest.raises(BrokenPeer, match="RESET before HELLO"):
        script.say(Qemu(0).message(q.RESET))
    script = Script()
    with pytest.raises(BrokenPeer, match="BULK_PACKET before HELLO"):
        script.say(Qemu(0).message(q.BULK, 0, b"", length=1000))
    with pytest.raises(BrokenPeer, match="a second HELLO"):
        greeted.say(struct.pack("<IIQ", q.HELLO, 68, 0) + bytes(68))


# ---- configurations ---------------------------------------------------------------------------------------------------------


def test_qemu_boots(greeted: Script) -> None:
    say, qemu, packets = greeted.say, greeted.qemu, greeted.packets
    for _ in range(6):
        assert say(qemu.message(q.RESET)) == []
    assert greeted.rig.events == [Reset()] * 6 and greeted.function.said == []
    assert packets(qemu.control(7, 0x80, 6, 0x0100, 0, 64)) == [Packet(7, q.SUCCESS, 18, DESCRIPTORS.device)]
    assert packets(qemu.control(8, 0x80, 6, 0x0600, 0, 10)) == [Packet(8, q.STALL, 0, b"")]
    assert say(qemu.message(q.GET_CONFIGURATION, 9)) == [Heard(q.CONFIGURATION_STATUS, 9, b"\0\0")]
    heard = say(qemu.message(q.SET_CONFIGURATION, 10, b"\x01"))
    assert [one.kind for one in heard] == [*TELLS, q.CONFIGURATION_STATUS], "before the status: QEMU uses them at once"
    assert heard[-1] == Heard(q.CONFIGURATION_STATUS, 10, b"\0\x01")
    assert say(qemu.message(q.GET_CONFIGURATION, 11)) == [Heard(q.CONFIGURATION_STATUS, 11, b"\0\x01")]
    assert greeted.function.said == ["configured"]


def test_requests_in_messages_of_their_own(greeted: Script) -> None:
    say, qemu = greeted.say, greeted.qemu
    say(qemu.message(q.SET_CONFIGURATION, 1, b"\x01"), qemu.message(q.SET_ALT_SETTING, 2, b"\x04\x01"))
    say(qemu.message(q.GET_CONFIGURATION, 3), qemu.message(q.GET_ALT_SETTING, 4, b"\x04"))
    setups = [event.urb.setup for event in greeted.rig.events if isinstance(event, Submit)]
    assert setups == [Setup(0, 9, 1, 0, 0), Setup(1, 11, 1, 4, 0), Setup(0x80, 8, 0, 0, 1), Setup(0x81, 10, 0, 4, 1)]


def test_configurations_that_there_are_not(configured: Script) -> None:
    say, qemu = configured.say, configured.qemu
    assert say(qemu.message(q.SET_CONFIGURATION, 3, b"\x02")) == [Heard(q.CONFIGURATION_STATUS, 3, b"\x04\x01")]
    assert say(qemu.message(q.SET_ALT_SETTING, 4, b"\x04\x02")) == [Heard(q.ALT_SETTING_STATUS, 4, b"\x04\x04\x01")]
    assert say(qemu.message(q.SET_ALT_SETTING, 5, b"\x0d\x00")) == [Heard(q.ALT_SETTING_STATUS, 5, b"\x04\x0d\x00")]
    assert say(qemu.message(q.GET_ALT_SETTING, 6, b"\x0d")) == [Heard(q.ALT_SETTING_STATUS, 6, b"\x04\x0d\xff")]
    assert say(qemu.message(q.GET_ALT_SETTING, 7, b"\x04")) == [Heard(q.ALT_SETTING_STATUS, 7, b"\0\x04\x01")]


def test_alternate_settings(configured: Script) -> None:
    say, qemu = configured.say, configured.qemu
    heard = say(qemu.message(q.SET_ALT_SETTING, 3, bytes([CHANNEL, 0])))
    assert [one.kind for one in heard] == [*TELLS, q.ALT_SETTING_STATUS]
    assert heard[-1].body == bytes([q.SUCCESS, CHANNEL, 0])
    assert configured.function.said == ["close 4"]


def test_configuring_by_a_control_packet_changes_what_is_told(greeted: Script) -> None:
    say, qemu = greeted.say, greeted.qemu
    heard = say(qemu.control(3, 0x00, 9, 1, 0, 0), qemu.control(4, 0x01, 11, 1, CHANNEL, 0))
    assert [one.kind for one in heard] == [*TELLS, q.CONTROL, *TELLS, q.CONTROL]
    place = (IN & 0x80) >> 3 | IN & 0x0F
    assert [one.body[place] for one in heard if one.kind == q.EP_INFO] == [255, 2]
    assert say(qemu.message(q.SET_ALT_SETTING, 5, b"\x05\x07"))[-1].body == b"\x04\x05\x00"


# ---- data -------------------------------------------------------------------------------------------------------------------


def test_a_card_is_asked(configured: Script) -> None:
    packets, qemu, function = configured.packets, configured.qemu, configured.function
    question = b"\x6f\x03\0\0\0\0\0\0\0\0abc"
    assert packets(qemu.bulk(3, READER_IN, room=65556), qemu.bulk(4, READER_OUT, question)) == [Packet(4, q.SUCCESS, 13, b"")]
    assert function.messages == [question]
    function.engine.ccid_answer(b"a" * 70_000)
    (answer,) = qemu.packets(configured.rig.told())
    assert answer == Packet(3, q.SUCCESS, 65556, b"a" * 65556)


def test_bytes_of_a_channel(configured: Script) -> None:
    packets, qemu, function = configured.packets, configured.qemu, configured.function
    function.room[CHANNEL] = 2
    assert packets(qemu.bulk(3, OUT, b"abcd"), qemu.bulk(4, IN, room=4)) == []
    function.feed(CHANNEL, b"123456")
    assert qemu.packets(configured.rig.told()) == [Packet(4, q.SUCCESS, 4, b"1234")]
    function.make_room(CHANNEL, 2)
    assert qemu.packets(configured.rig.told()) == [Packet(3, q.SUCCESS, 4, b"")]
    function.end(CHANNEL)
    assert packets(qemu.bulk(5, IN, room=9), qemu.bulk(6, IN, room=9)) == [
        Packet(5, q.SUCCESS, 2, b"56"),
        Packet(6, q.STALL, 0, b""),
    ]
    assert packets(qemu.control(7, 0x02, 1, 0, IN, 0)) == [Packet(7, q.SUCCESS, 0, b"")]


def test_the_longest_packet_and_one_past_it(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    most = limits.MAX_USB_TRANSFER
    assert packets(qemu.bulk(3, OUT, bytes(most))) == [Packet(3, q.SUCCESS, most, b"")]
    assert packets(qemu.bulk(4, IN, room=0xFFFFFFFF)) == []
    assert configured.rig.events[-1] == Submit(Urb(4, IN, most)), "more room than it needs"
    with pytest.raises(BrokenPeer, match=f"BULK_PACKET of {10 + most + 1} bytes"):
        packets(qemu.message(q.BULK, 5, b"", length=10 + most + 1))


def test_short_lengths_where_qemu_knows_no_long_ones() -> None:
    script = Script(q.OFFERED & ~0x40)
    qemu, packets = script.qemu, script.packets
    script.say(qemu.hello(), qemu.message(q.SET_CONFIGURATION, 1, b"\x01"))
    script.function.engine.ccid_answer(bytes(65544))
    assert packets(qemu.bulk(2, READER_IN, room=0xFFFF)) == [Packet(2, q.SUCCESS, 0xFFFF, bytes(0xFFFF))]
    assert packets(qemu.bulk(3, READER_IN, room=0xFFFF)) == [Packet(3, q.SUCCESS, 9, bytes(9))]


def test_data_of_control_packets(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    assert packets(qemu.control(3, 0x21, 2, 0, 0, 3, b"abc")) == [Packet(3, q.SUCCESS, 3, b"")]
    assert packets(qemu.control(4, 0xA1, 2, 0, 0, 100)) == [Packet(4, q.SUCCESS, 6, b"clocks")]
    assert packets(qemu.control(5, 0xA1, 9, 0, 0, 100)) == [Packet(5, q.STALL, 0, b"")]


def test_endpoints_that_there_are_not(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    assert packets(qemu.bulk(3, 0x8F, room=9), qemu.bulk(4, 0x02, b"a")) == [Packet(3, q.INVAL, 0, b""), Packet(4, q.INVAL, 0, b"")]
    (answer,) = configured.say(qemu.message(q.INTERRUPT, 5, struct.pack("<BBH", 0x02, 0, 3) + b"abc"))
    assert qemu.packet(answer) == Packet(5, q.INVAL, 0, b"")


# ---- interrupts -------------------------------------------------------------------------------------------------------------


def status(heard: Heard) -> tuple[int, int, int]:
    """Kind, status, endpoint."""
    return heard.kind, heard.body[0], heard.body[1]


def test_a_stream_of_interrupts(configured: Script) -> None:
    say, qemu, function = configured.say, configured.qemu, configured.function
    start, stop = (qemu.message(kind, 0, b"\x82") for kind in (q.START_INTERRUPTS, q.STOP_INTERRUPTS))
    function.engine.ccid_notify(b"\x50\x03")
    heard = say(start)
    assert status(heard[0]) == (q.INTERRUPTS_STATUS, q.SUCCESS, 0x82)
    assert [qemu.packet(one) for one in heard[1:]] == [Packet(0, q.SUCCESS, 2, b"\x50\x03")]
    for number in (1, 2):
        function.engine.ccid_notify(b"\x50\x02")
        assert qemu.packets(configured.rig.told()) == [Packet(number, q.SUCCESS, 2, b"\x50\x02")]
    assert configured.rig.engine.parked == (1, 0)
    assert [status(one) for one in say(start)] == [(q.INTERRUPTS_STATUS, q.SUCCESS, 0x82)], "it goes on"
    assert configured.rig.engine.parked == (1, 0)
    for _ in range(3):
        assert [status(one) for one in say(stop)] == [(q.INTERRUPTS_STATUS, q.SUCCESS, 0x82)]
        assert configured.rig.engine.parked == (0, 0)
    function.engine.ccid_notify(b"\x50\x03")
    assert configured.hears() == []
    assert [one.kind for one in say(stop, start)] == [q.INTERRUPTS_STATUS, q.INTERRUPTS_STATUS, q.INTERRUPT]


def test_a_notice_that_comes_with_the_stop(configured: Script) -> None:
    """It is not lost: QEMU may start again before it hears of it."""
    say, qemu, function = configured.say, configured.qemu, configured.function
    start, stop = (qemu.message(kind, 0, b"\x82") for kind in (q.START_INTERRUPTS, q.STOP_INTERRUPTS))
    say(start)
    function.engine.ccid_notify(b"\x50\x03")  # answered, and not told yet
    heard = say(stop, start)
    assert [one.kind for one in heard if one.kind == q.INTERRUPT] == [q.INTERRUPT]
    assert configured.rig.engine.parked == (1, 0)
    function.engine.ccid_notify(b"\x50\x02")
    assert [one.kind for one in say(stop) if one.kind == q.INTERRUPT] == [q.INTERRUPT]
    assert configured.rig.engine.parked == (0, 0)


@pytest.mark.parametrize("how", ["reset", "configuration", "halt", "not configured"])
def test_a_stream_that_ends_otherwise(configured: Script, how: str) -> None:
    """Of whatever reason, QEMU is told STALL: it starts anew after that alone."""
    say, qemu = configured.say, configured.qemu
    start = qemu.message(q.START_INTERRUPTS, 0, b"\x82")
    if how == "not configured":
        say(qemu.message(q.SET_CONFIGURATION, 3, b"\0"))
        heard = say(start)
    else:
        say(start)
        ends = {
            "reset": qemu.message(q.RESET),
            "configuration": qemu.message(q.SET_CONFIGURATION, 3, b"\x01"),
            "halt": qemu.control(3, 0x02, 3, 0, 0x82, 0),
        }
        heard = say(ends[how])
    assert [status(one) for one in heard if one.kind == q.INTERRUPTS_STATUS][-1] == (q.INTERRUPTS_STATUS, q.STALL, 0x82)
    if how != "not configured":
        assert [one.kind for one in heard].count(q.INTERRUPTS_STATUS) == 1
    say(qemu.message(q.SET_CONFIGURATION, 4, b"\x01"))
    assert [status(one) for one in say(start)] == [(q.INTERRUPTS_STATUS, q.SUCCESS, 0x82)]
    assert configured.rig.engine.parked == (1, 0)


@pytest.mark.parametrize("endpoint", [0, 0x01, 0x02, 0x81, 0x83, 0xFF])
def test_interrupts_of_other_endpoints(configured: Script, endpoint: int) -> None:
    say, qemu = configured.say, configured.qemu
    heard = say(qemu.message(q.START_INTERRUPTS, 0, bytes([endpoint])), qemu.message(q.STOP_INTERRUPTS, 0, bytes([endpoint])))
    assert [status(one) for one in heard] == [(q.INTERRUPTS_STATUS, q.STALL, endpoint), (q.INTERRUPTS_STATUS, q.SUCCESS, endpoint)]


# ---- taken back -------------------------------------------------------------------------------------------------------------


def test_one_that_waits(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    assert packets(qemu.bulk(3, IN, room=64), qemu.bulk(4, IN, room=64)) == []
    assert packets(qemu.message(q.CANCEL, 3)) == [Packet(3, q.CANCELLED, 0, b"")]
    assert packets(qemu.message(q.CANCEL, 3)) == []
    configured.function.feed(CHANNEL, b"data")
    assert qemu.packets(configured.rig.told()) == [Packet(4, q.SUCCESS, 4, b"data")]


def test_one_that_was_answered(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    assert packets(qemu.bulk(3, OUT, b"abc"), qemu.message(q.CANCEL, 3)) == [Packet(3, q.SUCCESS, 3, b"")]
    assert packets(qemu.message(q.CANCEL, 3), qemu.message(q.CANCEL, 77)) == []
    assert packets(qemu.control(4, 0x80, 8, 0, 0, 1), qemu.message(q.CANCEL, 4)) == [Packet(4, q.SUCCESS, 1, b"\x01")]


def test_data_that_comes_while_it_is_taken_back(configured: Script) -> None:
    packets, qemu = configured.packets, configured.qemu
    packets(qemu.bulk(3, IN, room=64))
    configured.function.feed(CHANNEL, b"data")  # answered, and not told yet
    assert packets(qemu.message(q.CANCEL, 3)) == [Packet(3, q.SUCCESS, 4, b"data")]


def test_an_id_is_used_again_at_once(configured: Script) -> None:
    """QEMU's are addresses in its guest's rings, so they come back."""
    qemu, function = configured.qemu, configured.function
    for _ in range(3):
        configured.rig.hear(qemu.bulk(3, IN, room=64) + qemu.message(q.CANCEL, 3))
        assert qemu.packets(configured.rig.told()) == [Packet(3, q.CANCELLED, 0, b"")]
    codec, said = UsbredirHost(DESCRIPTORS), Qemu()
    told = said.hello(), said.bulk(3, IN, room=64), said.message(q.CANCEL, 3), said.bulk(3, IN, room=64)
    assert list(codec.receive(b"".join(told))) == [Submit(Urb(1, IN, 64)), Cancel(1), Submit(Urb(2, IN, 64))]
    codec.done(Done(1, IN, Status.OK, b"data"))  # it ended before it was taken back
    codec.cancelled(1, was_parked=False)
    assert said.packet(said.hears(codec.data_to_send())[-1]) == Packet(3, q.SUCCESS, 4, b"data")
    assert list(codec.receive(said.message(q.CANCEL, 3))) == [Cancel(2)]
    codec.cancelled(2, was_parked=True)
    said.waits[3] = q.BULK, IN
    assert said.packets(codec.data_to_send()) == [Packet(3, q.CANCELLED, 0, b"")]
    configured.rig.hear(qemu.bulk(3, IN, room=64))
    function.feed(CHANNEL, b"data")
    assert qemu.packets(configured.rig.told()) == [Packet(3, q.SUCCESS, 4, b"data")]


def test_an_id_twice(configured: Script) -> None:
    configured.packets(configured.qemu.bulk(3, IN, room=64))
    with pytest.raises(BrokenPeer, match="a second packet with the id 3"):
        configured.packets(configured.qemu.bulk(3, OUT, b"abc"))


def test_a_reset_answers_all_that_waits(configured: Script) -> None:
    """QEMU keeps the ids that it cancels until they are answered, and would take the next packet of that id for a cancelled one."""
    packets, qemu = configured.packets, configured.qemu
    packets(qemu.bulk(3, IN, room=64), qemu.bulk(4, READER_IN, room=64))
    assert set(packets(qemu.message(q.RESET))) == {Packet(3, q.CANCELLED, 0, b""), Packet(4, q.CANCELLED, 0, b"")}
    assert packets(qemu.message(q.CANCEL, 3)) == []
    assert configured.say(qemu.message(q.GET_CONFIGURATION, 5)) == [Heard(q.CONFIGURATION_STATUS, 5, b"\0\0")]
    assert configured.function.said == ["close 4", "card off"]


def test_a_setting_that_ends_what_waits(configured: Script) -> None:
    configured.packets(configured.qemu.bulk(3, IN, room=64))
    heard = configured.say(configured.qemu.message(q.SET_ALT_SETTING, 4, bytes([CHANNEL, 0])))
    assert [one.kind for one in heard] == [q.BULK, *TELLS, q.ALT_SETTING_STATUS]
    assert configured.qemu.packet(heard[0]) == Packet(3, q.CANCELLED, 0, b"")


# ---- the rest -----------------------------------------------------------------------------------------------------------------


def test_what_was_not_offered_is_refused(configured: Script) -> None:
    say, qemu = configured.say, configured.qemu
    assert say(qemu.message(q.ALLOC_STREAMS, 3, struct.pack("<II", 0x20000, 8))) == [
        Heard(q.STREAMS_STATUS, 3, struct.pack("<IIB", 0x20000, 8, q.INVAL))
    ]
    assert say(qemu.message(q.FREE_STREAMS, 4, struct.pack("<I", 0x20000))) == [
        Heard(q.STREAMS_STATUS, 4, struct.pack("<IIB", 0x20000, 0, q.INVAL))
    ]
    assert [status(one) for one in say(qemu.message(q.START_ISO, 5, b"\x83\x04\x04"))] == [(q.ISO_STATUS, q.STALL, 0x83)]
    assert [status(one) for one in say(qemu.message(q.STOP_ISO, 6, b"\x83"))] == [(q.ISO_STATUS, q.SUCCESS, 0x83)]
    assert say(qemu.message(q.ISO, 0, struct.pack("<BBH", 3, 0, 3) + b"abc")) == []
    assert configured.rig.events[2:] == []


def test_filters(configured: Script) -> None:
    say, qemu = configured.say, configured.qemu
    assert say(qemu.message(q.FILTER, 0, b"-1,-1,-1,-1,1\0"), qemu.message(q.DISCONNECT_ACK)) == []
    assert say(qemu.message(q.FILTER, 0, bytes(limits.MAX_USBREDIR_FILTER))) == []
    with pytest.raises(BrokenPeer, match="FILTER_FILTER of 4097 bytes"):
        say(qemu.message(q.FILTER, 0, b"", length=limits.MAX_USBREDIR_FILTER + 1))


def test_a_guest_that_rejects_the_device(greeted: Script) -> None:
    with pytest.raises(BrokenPeer, match="the guest's filter rejects the device"):
        greeted.say(greeted.qemu.message(q.FILTER_REJECT))
