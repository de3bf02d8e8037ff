"""Rotation under a card in any order of events: no client is given a signature of another key than it holds a certificate of."""

from __future__ import annotations

from itertools import product

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hsmvisord import limits
from hsmvisord.face.card.generations import IN, OUT, STAY, Generations, Move
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.wire import tlv
from hypothesis import given, settings
from hypothesis import strategies as st
from support.keystores import Bench
from support.smart_card import DIGEST, P_256, CardRig, short

OUT_SECONDS = limits.CARD_OUT_SECONDS

WHAT = ("rotate", "renew", "roll back", "look", "wait", "read", "begin to read", "read on", "sign", "detach", "attach", "next card")
STEPS = st.lists(st.sampled_from(WHAT), min_size=25, max_size=50)


def new() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


class Client:
    """Holds one certificate, the newest that it has read to its end; a signature that it is given must be that one's.

    The token may have changed without the card's thread having looked: that is a step of its own.
    """

    def __init__(self, bench: Bench) -> None:
        self.rig = CardRig(bench)
        self.certificate: ec.EllipticCurvePublicKey | None = None
        self.coming: bytes | None = None
        self.signed = 0

    def exchange(self, command: bytes) -> bytes:
        """Returns b"" where there is no card."""
        if self.rig.reader.present and self.rig.ask(0x65)[7] == 1:
            self.rig.ask(0x62)
        return self.rig.ask(0x6F, command)[10:]

    def begin(self) -> None:
        self.coming = b""
        self.take(self.exchange(short(0, 0xCB, 0x3F, 0xFF, b"\x5c\x03\x5f\xc1\x05")))

    def go_on(self) -> None:
        self.take(self.exchange(short(0, 0xC0, 0, 0)))

    def take(self, answer: bytes) -> None:
        if self.coming is None or answer[-2:-1] not in (b"\x61", b"\x90"):
            self.coming = None
            return
        self.coming += answer[:-2]
        if answer[-2] == 0x90:
            ((_, value),) = tlv.decode(self.coming)
            public = x509.load_der_x509_certificate(dict(tlv.decode(value))[0x70]).public_key()
            assert isinstance(public, ec.EllipticCurvePublicKey)
            self.certificate, self.coming = public, None

    def read(self) -> None:
        self.begin()
        while self.coming is not None:
            self.go_on()

    def sign(self) -> None:
        answer = self.exchange(short(0, 0x87, P_256, 0x9A, b"\x7c\x24\x82\0\x81\x20" + DIGEST))
        if answer in (b"", b"\x69\x85"):
            return
        assert answer[-2:] == b"\x90\0" and self.certificate is not None
        self.certificate.verify(answer[4:-2], DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
        self.signed += 1


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_client_is_given_a_signature_of_another_key_than_it_holds(steps: list[str]) -> None:
    bench = Bench()
    client = Client(bench)
    client.rig.push("tls", key=new())
    client.rig.look()
    client.read()
    newest, keys = 1, [new()]
    for step in steps:
        rig = client.rig
        state = rig.bench.keystore.state.materials["tls"]
        match step:
            case "rotate" if newest < 12:
                newest += 1
                keys.append(rig.push("tls", generation=newest, key=new()))  # type: ignore[arg-type]
            case "renew" if newest < 12 and newest > 1:
                newest += 1
                rig.push("tls", generation=newest, key=keys[-1], renew=True)
            case "roll back":
                retiring = [g.number for g in state.generations if g.state == "retiring"]
                if retiring:
                    rig.bench.execute("roll-back", "tls", retiring[0])
            case "look":
                rig.look()
            case "wait":
                rig.bench.monotonic += OUT_SECONDS
                rig.look()
            case "read":
                client.read()
            case "begin to read":
                client.begin()
            case "read on":
                client.go_on()
            case "sign":
                client.sign()
            case "detach" | "attach":
                rig.bench.keystore.set_token_present(step == "attach")
            case "next card":
                client.rig = CardRig(bench, shown=rig.card.shown)
    client.rig.bench.keystore.set_token_present(True)
    for _ in range(2):
        client.rig.bench.monotonic += OUT_SECONDS
        client.rig.look()
    signed = client.signed
    client.read()
    client.sign()
    assert client.signed == signed + 1, "in the end whoever reads can sign"


def test_every_row_of_looks() -> None:
    """What is in or out and what the token has, with each clock around the limit."""
    rig = CardRig()
    rig.push("tls", key=new())
    contents = rig.card._holdings.contents(CardSettings())
    assert contents is not None
    other = {0x9C: contents[0x9A]}
    every = (contents, other, {}, None)
    for first, then, after in product(every, every, (0.0, OUT_SECONDS - 0.01, OUT_SECONDS)):
        generations = Generations()
        assert generations.look(10.0, first) == (Move(IN) if first is not None else Move(STAY))
        move = generations.look(10.0, then)
        if first is None:
            assert move.step == (STAY if then is None else IN)
            continue
        assert move.step == (STAY if then == first else OUT)
        if then == first:
            continue
        assert generations.contents == {} and not generations.inserted
        again = generations.look(10.0 + after, then)
        if then is None:
            assert again == Move(STAY)
        elif after < OUT_SECONDS:
            assert again.step == STAY and again.again == pytest.approx(OUT_SECONDS - after)
        else:
            assert again == Move(IN)
            assert generations.contents == then
