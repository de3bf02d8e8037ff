"""The card's thread: in turn, without bound for nobody, and with every change of the token between two commands."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hsmvisord import limits
from hsmvisord.face.card.card import Card
from hsmvisord.transport.usb.card_thread import CardThread
from hsmvisord.wire import tlv
from hsmvisord.wire.ccid import Command
from support.smart_card import OBJECTS, P_256, PIN, CardRig, extended, message, shared_key, short, template

DIGEST = hashlib.sha256(b"what is to be signed").digest()
SIGN = extended(0, 0x87, P_256, 0x9A, template(0x81, DIGEST))
READ = extended(0, 0xCB, 0x3F, 0xFF, tlv.encode(0x5C, OBJECTS[0x9A].to_bytes(3, "big")))
SECONDS = 20  #: that a test waits for what comes at once


class Rig:
    """A thread with its card, and what a device has of it.  `happened` has the order of what it told."""

    def __init__(self) -> None:
        self.cards = CardRig()
        self.cards.push("tls")
        self.card = Card(self.cards.token, self.cards.card.settings, "web-1", time.monotonic)
        self.woken = threading.Event()
        self.happened: list[str] = []
        self.shown, self.faults, self.notices = b"", list[Exception](), list[bytes]()
        self.thread = CardThread(self.card, self._wake, self._shown, self.faults.append)
        self.cards.token.on_change = self.thread.look
        self.turn = 0
        self.answers: dict[int, bytes] = {}

    def _wake(self) -> None:
        self.happened.append("woken")
        self.woken.set()

    def _shown(self, shown: bytes) -> None:
        self.happened.append("shown")
        self.shown = shown

    def ask(self, asked: bytes) -> int:
        self.turn += 1
        self.thread.ask(self.turn, asked)
        return self.turn

    def until(self, done: Callable[[], Any]) -> None:
        end = time.monotonic() + SECONDS
        while True:
            for answer in self.thread.take():
                if answer.notify:
                    self.notices.append(answer.message)
                else:
                    self.answers[answer.turn] = answer.message
            if done():
                return
            assert time.monotonic() < end, "it does not come"
            self.woken.wait(0.05)
            self.woken.clear()

    def say(self, asked: bytes) -> bytes:
        """One message and its answer."""
        turn = self.ask(asked)
        self.until(lambda: turn in self.answers)
        return self.answers.pop(turn)

    def transmit(self, command: bytes) -> bytes:
        """One command of a card that is in; it is given power where it has none, as often as that is so."""
        while True:
            answer = self.say(message(Command.XFR_BLOCK, command))
            if answer[7] == 0:
                return answer[10:]
            assert answer[7] in (0x41, 0x42) and answer[8] == 0xFE
            if answer[7] == 0x42:
                time.sleep(0.001)
            self.say(message(Command.ICC_POWER_ON))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.thread.start()
    yield rig
    rig.thread.stop()
    assert not rig.faults


def test_what_is_asked_is_answered_in_turn(rig: Rig) -> None:
    rig.until(lambda: rig.notices == [b"\x50\x03"])
    turns = [rig.ask(message(Command.GET_SLOT_STATUS, sequence=number)) for number in range(20)]
    rig.until(lambda: len(rig.answers) == 20)
    assert list(rig.answers) == turns
    assert [answer[6] for answer in rig.answers.values()] == list(range(20))


def test_a_change_of_the_token_moves_the_card_by_itself(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARD_OUT_SECONDS", 0.1)
    rig.until(lambda: rig.notices == [b"\x50\x03"])
    rig.cards.push("tls", generation=2, key=ec.generate_private_key(ec.SECP256R1()))
    rig.until(lambda: rig.notices == [b"\x50\x03", b"\x50\x02", b"\x50\x03"])
    rig.cards.bench.keystore.set_token_present(False)
    rig.until(lambda: rig.notices[-1] == b"\x50\x02")
    rig.thread.tell_presence()
    rig.until(lambda: rig.notices[-2:] == [b"\x50\x02"] * 2)


def test_an_importer_sees_the_card_come_a_moment_after_it_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARD_HIDDEN_SECONDS", 0.3)
    empty, full = b"\x50\x02", b"\x50\x03"
    rig.until(lambda: rig.notices == [full])
    for times in (1, 2):  # an importer, and one after it
        rig.thread.tell_presence()
        rig.until(lambda times=times: rig.notices == [full, *[empty, full] * (times - 1), empty])  # type: ignore[misc]
        time.sleep(0.4)
        rig.until(lambda: True)
        assert rig.notices[-1] == empty, "it has not asked"
        began = time.monotonic()
        assert rig.say(message(Command.GET_SLOT_STATUS))[7] == 2
        assert rig.say(message(Command.GET_SLOT_STATUS))[7] == 2
        rig.until(lambda times=times: rig.notices == [full, *[empty, full] * times])  # type: ignore[misc]
        assert time.monotonic() - began >= 0.3
        assert rig.say(message(Command.GET_SLOT_STATUS))[7] == 1


def test_an_importer_that_asks_for_power_at_once_has_the_card(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARD_HIDDEN_SECONDS", 0.1)
    rig.thread.tell_presence()
    assert rig.say(message(Command.ICC_POWER_ON))[7] == 0
    time.sleep(0.2)
    rig.say(message(Command.GET_SLOT_STATUS))
    assert rig.notices == [b"\x50\x03", b"\x50\x02"]


def test_a_detached_token_is_used_no_more_once_that_is_done(rig: Rig) -> None:
    """Whatever is asked after the operator was told that it is detached."""
    rig.transmit(READ)
    for _ in range(50):
        assert rig.transmit(SIGN)[-2:] == b"\x90\0"
        rig.cards.bench.keystore.set_token_present(False)
        assert rig.say(message(Command.XFR_BLOCK, SIGN))[7:9] == b"\x42\xfe"
        rig.cards.bench.keystore.set_token_present(True)
        rig.card._generations._out_since = None  # at once


def at_work(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[bytes]]:
    """The card is at a command that takes until the event is set; what it is asked afterwards."""
    begun, over, seen = threading.Event(), threading.Event(), list[bytes]()
    transmit = rig.card.transmit

    def slow(raw: bytes) -> bytes:
        begun.set()
        over.wait(SECONDS)
        seen.append(raw)
        return transmit(raw)

    rig.say(message(Command.ICC_POWER_ON))
    monkeypatch.setattr(rig.card, "transmit", slow)
    rig.ask(message(Command.XFR_BLOCK, SIGN))
    assert begun.wait(SECONDS)
    return over, seen


def test_resets_while_it_is_at_work_pile_nothing_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is reset and asked again and again, by a guest that waits for no answer."""
    over, seen = at_work(rig, monkeypatch)
    for _ in range(1000):
        rig.thread.power_down()
        rig.thread.tell_presence()
        last = rig.ask(message(Command.GET_SLOT_STATUS, bytes(60000)))
        assert rig.thread._tasks.qsize() <= 3
    over.set()
    rig.until(lambda: last in rig.answers)
    assert len(rig.answers) <= 3 and len(seen) == 1


def test_a_reset_while_it_is_at_work_ends_power_and_pin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.cards.set_pin()
    over, _ = at_work(rig, monkeypatch)
    rig.thread.power_down()
    over.set()
    assert rig.say(message(Command.GET_SLOT_STATUS))[7] == 1
    assert rig.transmit(short(0, 0x20, 0, 0x80, b"", None)) == b"\x63\xc3"


def test_what_was_read_is_kept_before_it_is_told(rig: Rig) -> None:
    """Else a worker that ends between the two would leave a memory of an older certificate than clients have."""
    rig.transmit(short(0, 0xA4, 4, 0, bytes.fromhex("A000000308")))
    rig.happened.clear()
    assert rig.transmit(READ)[-2:] == b"\x90\0"
    assert rig.happened == ["shown", "woken"]
    assert rig.shown == rig.card.shown and b"9a" in rig.shown
    rig.happened.clear()
    rig.transmit(READ)
    assert "shown" not in rig.happened, "once is enough"


class Told(bytes):
    """A message that says when nobody holds it any more."""

    gone = threading.Event()

    def __del__(self) -> None:
        self.gone.set()


def test_no_pin_is_kept_by_an_idle_thread(rig: Rig) -> None:
    rig.cards.set_pin()
    rig.say(message(Command.ICC_POWER_ON))
    asked = Told(message(Command.XFR_BLOCK, short(0, 0x20, 0, 0x80, PIN.ljust(8, b"\xff"), None)))
    turn = rig.ask(asked)
    del asked
    rig.until(lambda: turn in rig.answers)
    assert rig.answers[turn][10:] == b"\x90\0"
    assert Told.gone.wait(SECONDS), "it waits for the next message with the last one in its hands"


def test_answers_do_not_show_what_they_hold(rig: Rig) -> None:
    rig.transmit(READ)
    turn = rig.ask(message(Command.XFR_BLOCK, SIGN, sequence=9))
    end = time.monotonic() + SECONDS
    while not (taken := rig.thread.take()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert taken[0].turn == turn and repr(taken[0].message) not in repr(taken[0])


def test_an_operation_that_does_not_end_is_not_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    over, _ = at_work(rig, monkeypatch)
    began = time.monotonic()
    rig.thread.stop(0.1)
    assert time.monotonic() - began < SECONDS / 2
    assert rig.cards.token._counters, "it is a user still"
    over.set()
    rig.thread.stop()
    assert rig.card._holdings._counters not in rig.cards.token._counters, "and when it ends it is none"


def test_a_fault_of_ours_ends_it_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken(message: bytes) -> bytes:
        raise RuntimeError("a guest's data")

    monkeypatch.setattr(rig.thread._reader, "answer", broken)
    rig.thread.start()
    rig.ask(message(Command.GET_SLOT_STATUS))
    rig.until(lambda: rig.faults)
    assert isinstance(rig.faults[0], RuntimeError)
    rig.thread.stop()
    assert rig.card._holdings._counters not in rig.cards.token._counters


# ---- a token that changes meanwhile -------------------------------------------------------------------------------------


class Stubborn:
    """Signs with what it holds as long as it is let, whatever happens to the card; reads a certificate only when it is refused."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.held: ec.EllipticCurvePublicKey | None = None
        self.signed = self.refused = 0

    def turn(self) -> None:
        answer = self.rig.transmit(SIGN)
        if answer[-2:] == b"\x90\0":
            assert self.held is not None
            ((_, inside),) = tlv.decode(answer[:-2])
            ((_, signature),) = tlv.decode(inside)
            self.held.verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))  # of the certificate that it holds
            self.signed += 1
            return
        assert answer == b"\x69\x85", answer.hex()
        self.refused += 1
        read = self.rig.transmit(READ)
        assert read[-2:] == b"\x90\0"
        ((_, fields),) = tlv.decode(read[:-2])
        public = x509.load_der_x509_certificate(dict(tlv.decode(fields))[0x70]).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        self.held = public


def test_keys_that_change_under_a_client_that_signs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys, roll backs, renewals and destructions by another thread; each signature is of the certificate that the client
    holds, and a renewal costs it none."""
    monkeypatch.setattr(limits, "CARD_OUT_SECONDS", 0.01)
    client, bench = Stubborn(rig), rig.cards.bench
    key: Any = shared_key("p256")
    errors: list[BaseException] = []

    def signed(count: int) -> None:
        before = client.signed
        while client.signed < before + count and not over.is_set():
            time.sleep(0.001)

    def rotate() -> None:
        nonlocal key
        try:
            for number in range(2, 14, 3):
                key = rig.cards.push("tls", generation=number, key=ec.generate_private_key(ec.SECP256R1()))
                signed(5)
                refused = client.refused
                rig.cards.push("tls", generation=number + 1, key=key, renew=True)
                signed(5)
                bench.execute("destroy", "tls", number)
                bench.execute("destroy", "tls", number - 1)
                signed(5)
                assert client.refused == refused, "a renewal is silent"
                rig.cards.push("tls", generation=number + 2, key=ec.generate_private_key(ec.SECP256R1()))
                bench.execute("roll-back", "tls", number + 1)
                signed(5)
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    over = threading.Event()
    other = threading.Thread(target=rotate)
    other.start()
    try:
        while not over.is_set():
            client.turn()
    finally:
        over.set()
        other.join()
    assert not errors, errors
    assert client.signed >= 60 and client.refused >= 4


def test_a_following_key_that_changes_under_a_client_that_signs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one handle means another key after each activation; it has no certificate to hold, so the client holds what was shown."""
    monkeypatch.setattr(limits, "CARD_OUT_SECONDS", 0.01)
    keys: dict[int, ec.EllipticCurvePrivateKey] = {}

    def push(number: int) -> None:
        keys[number] = ec.generate_private_key(ec.SECP256R1())
        rig.cards.push("ssh", generation=number, key=keys[number], chained=False, mode="follow", profile="ssh")

    def shown() -> int:
        key = rig.card._generations.contents.get(0x82)
        return key.generation if key is not None else 0

    asked = extended(0, 0x87, P_256, 0x82, template(0x81, DIGEST))
    read = extended(0, 0xCB, 0x3F, 0xFF, tlv.encode(0x5C, OBJECTS[0x82].to_bytes(3, "big")))
    signed = 0
    for number in range(1, 12):
        other = threading.Thread(target=push, args=(number,))
        other.start()
        while other.is_alive() and number > 1:
            answer = rig.transmit(asked)
            if answer[-2:] == b"\x90\0":
                ((_, inside),) = tlv.decode(answer[:-2])
                ((_, signature),) = tlv.decode(inside)
                keys[number - 1].public_key().verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
                signed += 1
        other.join()
        rig.until(lambda number=number: shown() == number)  # type: ignore[misc]
        assert rig.transmit(asked) == b"\x69\x85"
        assert rig.transmit(read) == b"\x6a\x82"
        assert rig.transmit(asked)[-2:] == b"\x90\0"
    assert signed
