"""Rotation under a card: renewed in silence, taken out and put in, and never a signature that a client takes for another key's."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor_rpc.sealed.commands import Retire
from hsmvisord import limits
from hsmvisord.face.card.generations import IN, OUT, STAY, Generations, Move
from hsmvisord.face.card.slots import CardSettings, card_settings
from support.certificates import PrivateKey
from support.smart_card import DIGEST, OBJECTS, P_256, CardRig, der, is_of, refused, short

OUT_SECONDS = limits.CARD_OUT_SECONDS
INSERTED, REMOVED = b"\x50\x03", b"\x50\x02"


def new() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def rig() -> CardRig:
    """Key 1 in 9A, read and used."""
    rig = CardRig()
    rig.push("tls", key=new())
    rig.connect()
    rig.read(0x9A)
    return rig


def rotate(rig: CardRig, generation: int, material: str = "tls") -> PrivateKey:
    """Another key; it has come to the card's notice."""
    key = rig.push(material, generation=generation, key=new())
    rig.look()
    return key


def come_back(rig: CardRig) -> None:
    rig.bench.monotonic += OUT_SECONDS
    rig.connect()


# ---- renewal in silence -------------------------------------------------------------------------------------------------


def test_a_certificate_is_renewed_in_silence(rig: CardRig) -> None:
    rig.set_pin()
    rig.verify()
    before, guid = der(rig.certificate(0x9A)), rig.guid()
    (key,) = rig.keys
    rig.push("tls", generation=2, key=key, renew=True)
    assert rig.look() == Move(STAY)
    assert rig.told == [INSERTED]
    assert der(rig.certificate(0x9A)) != before
    assert rig.guid() == guid
    rig.verified()
    assert is_of(key, rig.use(0x9A, P_256, DIGEST))
    assert set(rig.token.usage()) == {("tls", 2)}, "the new generation is what is used"


def test_a_renewal_that_is_rolled_back(rig: CardRig) -> None:
    before = der(rig.certificate(0x9A))
    (key,) = rig.keys
    rig.push("tls", generation=2, key=key, renew=True)
    rig.bench.execute("roll-back", "tls", 1)
    assert rig.look() == Move(STAY)
    assert der(rig.certificate(0x9A)) == before
    assert is_of(key, rig.use(0x9A, P_256, DIGEST))


def test_what_a_card_does_not_show_does_not_move_it(rig: CardRig) -> None:
    rig.bench.stage(2, new(), "tls", chained=True)
    rig.bench.push(1, new_p521(), "other", chained=True)
    rig.set_pin()
    rig.bench.execute("stage", "later", 1, rig.bench.body(new(), (), "later", 1))
    assert rig.look() == Move(STAY)
    assert rig.told == [INSERTED]


def new_p521() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP521R1())


# ---- another key --------------------------------------------------------------------------------------------------------


def test_another_key_takes_the_card_out_for_a_while(rig: CardRig) -> None:
    guid = rig.guid()
    rig.push("tls", generation=2, key=new())
    assert rig.look() == Move(OUT, OUT_SECONDS)
    assert rig.told == [INSERTED, REMOVED]
    for left in (OUT_SECONDS, 1.0, 0.25):
        rig.bench.monotonic = OUT_SECONDS - left
        assert rig.look() == Move(STAY, left)
        assert not rig.reader.present
        assert rig.ask(0x65)[7] == 2, "no card"
    rig.bench.monotonic = OUT_SECONDS
    assert rig.look() == Move(IN)
    assert rig.told == [INSERTED, REMOVED, INSERTED]
    rig.connect()
    assert rig.guid() != guid


def test_another_key_resets_the_pin(rig: CardRig) -> None:
    rig.set_pin()
    rig.verify()
    rotate(rig, 2)
    come_back(rig)
    refused(0x63C3, rig.verified)


def test_the_card_has_no_power_after_it(rig: CardRig) -> None:
    rotate(rig, 2)
    rig.bench.monotonic += OUT_SECONDS
    rig.look()
    assert rig.ask(0x65)[7] == 1
    assert rig.ask(0x6F, short(0, 0xCB, 0x3F, 0xFF, b"\x5c\x01\x7e"))[7:9] == b"\x41\xfe"


def test_until_it_is_out_the_old_key_signs(rig: CardRig) -> None:
    """The token has changed and the card's thread has not looked: the old key, which retires, or nothing; never the new one."""
    (old,) = rig.keys
    rig.push("tls", generation=2, key=new())
    asked = short(0, 0x87, P_256, 0x9A, b"\x7c\x24\x82\0\x81\x20" + DIGEST)
    answer = rig.ask(0x6F, asked)[10:]
    assert answer[-2:] == b"\x90\0" and is_of(old, answer[4:-2])
    rig.bench.execute("destroy", "tls", 1)
    assert rig.ask(0x6F, asked)[10:] == b"\x69\x85"
    assert rig.look().step == OUT


def test_who_holds_the_old_certificate_is_refused(rig: CardRig) -> None:
    """An idle client that does not see the gap: its first signature is refused until somebody has read the certificate anew."""
    key = rotate(rig, 2)
    come_back(rig)
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.guid()
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.read(0x9A)
    assert is_of(key, rig.use(0x9A, P_256, DIGEST))


def test_a_certificate_counts_when_it_was_read_to_its_end(rig: CardRig) -> None:
    rotate(rig, 2)
    come_back(rig)
    begin, go_on = short(0, 0xCB, 0x3F, 0xFF, b"\x5c\x03\x5f\xc1\x05"), short(0, 0xC0, 0, 0, b"", 100)
    assert rig.exchange(begin)[-2] == 0x61
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.exchange(begin)
    rig.exchange(go_on)
    rig.guid()
    refused(0x6985, rig.send, go_on)
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.exchange(begin)
    while rig.exchange(go_on)[-2] == 0x61:
        assert not rig.card._generations.may_use(0x9A)
    rig.use(0x9A, P_256, DIGEST)


def test_each_slot_has_to_be_read(rig: CardRig) -> None:
    rig.push("web", key=new())
    rig.look()
    come_back(rig)
    rig.use(0x9A, P_256, DIGEST)
    refused(0x6985, rig.use, 0x82, P_256, DIGEST)
    rig.read(0x9A)
    refused(0x6985, rig.use, 0x82, P_256, DIGEST)
    rig.read(0x82)
    rig.use(0x82, P_256, DIGEST)


def test_a_key_that_nobody_read_stays_refused_over_another_insertion(rig: CardRig) -> None:
    """Its certificate was shown, but who holds the one before it has not read it."""
    rotate(rig, 2)
    come_back(rig)
    detach_and_attach(rig)
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)


def detach_and_attach(rig: CardRig) -> None:
    rig.bench.keystore.set_token_present(False)
    assert rig.look() == Move(OUT)
    rig.bench.keystore.set_token_present(True)
    assert rig.look() == Move(STAY, OUT_SECONDS)
    come_back(rig)


def test_the_same_keys_after_an_insertion_are_used_at_once(rig: CardRig) -> None:
    guid = rig.guid()
    detach_and_attach(rig)
    assert rig.guid() == guid
    assert is_of(rig.keys[0], rig.use(0x9A, P_256, DIGEST))


def test_a_roll_back_brings_the_old_id(rig: CardRig) -> None:
    guid = rig.guid()
    rotate(rig, 2)
    come_back(rig)
    rig.read(0x9A)
    rig.bench.execute("roll-back", "tls", 1)
    assert rig.look().step == OUT
    come_back(rig)
    assert rig.guid() == guid
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.read(0x9A)
    assert is_of(rig.keys[0], rig.use(0x9A, P_256, DIGEST))


def test_keys_that_change_while_the_card_is_out(rig: CardRig) -> None:
    rotate(rig, 2)
    rig.bench.monotonic += OUT_SECONDS / 2
    third = rig.push("tls", generation=3, key=new())
    assert rig.look() == Move(STAY, OUT_SECONDS / 2)
    rig.bench.monotonic += OUT_SECONDS / 2
    rig.connect()
    rig.read(0x9A)
    assert is_of(third, rig.use(0x9A, P_256, DIGEST))
    assert rig.told == [INSERTED, REMOVED, INSERTED]


def test_a_slot_more_or_less(rig: CardRig) -> None:
    rig.push("web", key=new())
    assert rig.look().step == OUT
    come_back(rig)
    rig.bench.execute("retire", "tls", 1, retirement())
    assert rig.look().step == OUT
    come_back(rig)
    rig.read(0x9A)
    assert rig.card._generations.contents[0x9A].material == "web"


def retirement() -> bytes:
    return Retire(3600, "extend").encode()


def test_another_map_takes_the_card_out(rig: CardRig) -> None:
    rig.card.settings = card_settings({"slots": {"9e": "tls"}})
    assert rig.look().step == OUT
    come_back(rig)
    refused(0x6A82, rig.get, OBJECTS[0x9A])
    refused(0x6985, rig.use, 0x9E, P_256, DIGEST)
    rig.read(0x9E)
    rig.use(0x9E, P_256, DIGEST)


def test_other_settings_alone_leave_it_in(rig: CardRig) -> None:
    rig.card.settings = CardSettings(yubikey=True)
    assert rig.look() == Move(STAY)
    assert rig.send(short(0, 0xFD, 0, 0)) == b"\5\4\3"


def test_a_token_that_is_detached_is_a_card_that_is_out(rig: CardRig) -> None:
    rig.bench.keystore.set_token_present(False)
    assert rig.look() == Move(OUT)
    rig.bench.monotonic += 100
    assert rig.look() == Move(STAY)
    rig.bench.keystore.set_token_present(True)
    assert rig.look() == Move(IN)


def test_a_card_without_keys_is_in() -> None:
    rig = CardRig()
    assert rig.look() == Move(IN)
    rig.connect()
    guid = rig.guid()
    rig.push("tls", key=new())
    assert rig.look() == Move(OUT, OUT_SECONDS)
    come_back(rig)
    assert rig.guid() != guid


def test_nobody_uses_a_key_of_an_earlier_insertion(rig: CardRig) -> None:
    rig.use(0x9A, P_256, DIGEST)
    assert list(rig.token.holders()) == [("tls", 1)]
    rotate(rig, 2)
    come_back(rig)
    assert list(rig.token.holders()) == []
    assert rig.token.usage()["tls", 1][0] == 1


def test_a_following_key_is_bound_to_what_was_shown() -> None:
    """Its one handle means another key after a rotation; the card's slot does not."""
    rig = CardRig()
    old = rig.push("ssh", key=new(), chained=False, mode="follow", profile="ssh")
    rig.connect()
    refused(0x6A82, rig.get, OBJECTS[0x9A])
    rig.use(0x9A, P_256, DIGEST)
    young = rig.push("ssh", generation=2, key=new(), chained=False, mode="follow", profile="ssh")
    asked = short(0, 0x87, P_256, 0x9A, b"\x7c\x24\x82\0\x81\x20" + DIGEST)
    answer = rig.ask(0x6F, asked)[10:]
    assert answer[-2:] == b"\x90\0" and is_of(old, answer[4:-2])
    rig.look()
    come_back(rig)
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    refused(0x6A82, rig.get, OBJECTS[0x9A])
    assert is_of(young, rig.use(0x9A, P_256, DIGEST))


# ---- the next card of the module ----------------------------------------------------------------------------------------


def next_card(rig: CardRig, shown: bytes | None = None) -> CardRig:
    """Another worker, or another importer, with the same keys."""
    after = CardRig(rig.bench, rig.card.settings, rig.card.shown if shown is None else shown)
    after.connect()
    return after


def test_the_next_card_has_the_same_id_and_knows_what_was_read(rig: CardRig) -> None:
    guid = rig.guid()
    after = next_card(rig)
    assert after.guid() == guid
    assert is_of(rig.keys[0], after.use(0x9A, P_256, DIGEST))


def test_another_module_has_another_id(rig: CardRig) -> None:
    other = CardRig(rig.bench, serial="web-2")
    other.connect()
    assert other.guid() != rig.guid()


def test_a_key_that_came_between_two_cards_is_refused(rig: CardRig) -> None:
    shown = rig.card.shown
    key = rig.push("tls", generation=2, key=new())
    after = next_card(rig, shown)
    assert after.told == [INSERTED], "at once: the device itself has been away"
    refused(0x6985, after.use, 0x9A, P_256, DIGEST)
    after.read(0x9A)
    assert is_of(key, after.use(0x9A, P_256, DIGEST))


@pytest.mark.parametrize(
    "shown",
    [b"", b"{", b"[]", b"1", b"null", b'{"9a": 1}', b'{"9z": "x"}', b'{"00": "x"}', b"\xff", b"[" * 4000, b'{"9a":{"9a":1}}'],
)
def test_what_cannot_have_been_shown_counts_for_nothing(rig: CardRig, shown: bytes) -> None:
    after = next_card(rig, shown)
    refused(0x6985, after.use, 0x9A, P_256, DIGEST)
    after.read(0x9A)
    after.use(0x9A, P_256, DIGEST)


def test_what_was_shown_is_bounded() -> None:
    """All slots there are fit in; what is longer is nobody's."""
    names = ["9a", "9c", "9d", "9e", *(f"{slot:02x}" for slot in range(0x82, 0x96))]
    rig = CardRig(settings=card_settings({"slots": {name: f"m{name}" for name in names}}))
    for name in names:
        rig.push(f"m{name}", key=new())
    rig.connect()
    rig.read(*(int(name, 16) for name in names))
    shown = rig.card.shown
    assert 24 * 64 < len(shown) <= limits.MAX_CARD_SHOWN
    full = shown.ljust(limits.MAX_CARD_SHOWN)
    assert Generations(full).shown == shown
    assert Generations(full + b" ").shown == b"{}"
    after = next_card(rig)
    for name in names:
        after.use(int(name, 16), P_256, DIGEST)


@pytest.mark.parametrize(
    "shown",
    [
        ('{"9a": "' + "\u00e9" * 1900 + '"}').encode(),  # six times as long when it is written again
        ('{"9a": "' + "d" * 64 + '"}').encode("utf-16-le"),  # a worker has no such codec
        ('{"9a": "' + "D" * 64 + '"}').encode(),
        ('{"9a": "' + "d" * 65 + '"}').encode(),
        ('{"9A\\u0000": "' + "d" * 64 + '"}').encode(),
        ('{"9b": "' + "d" * 64 + '", "-5": "' + "d" * 64 + '"}').encode(),
        b'{"9a": ' + b"1" * 4000 + b"}",
    ],
)
def test_of_garbage_nothing_is_handed_on(shown: bytes) -> None:
    """The host keeps what it is told, so that the next worker would have it too."""
    assert len(shown) <= limits.MAX_CARD_SHOWN
    assert Generations(shown).shown == b"{}"
