"""A card over a token in this process, in its reader; and a client that says to it what pcscd and programs say."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisord.face.card.card import Card
from hsmvisord.face.card.generations import IN, OUT, Move
from hsmvisord.face.card.reader import Reader
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.keystore.keystore import Cause
from hsmvisord.wire import ccid, tlv
from support.certificates import PrivateKey, new_key
from support.keystores import Bench

SERIAL = "web-1"
PIV = bytes.fromhex("A000000308")
OBJECTS = {0x9A: 0x5FC105, 0x9C: 0x5FC10A, 0x9D: 0x5FC10B, 0x9E: 0x5FC101} | {0x82 + n: 0x5FC10D + n for n in range(20)}
CHUID, CCC, DISCOVERY, KEY_HISTORY = 0x5FC102, 0x5FC107, 0x7E, 0x5FC10C
RSA_2048, RSA_3072, P_256, P_384, ED25519, X25519 = 0x07, 0x05, 0x11, 0x14, 0xE0, 0xE1
PIN = b"123456"

#: A key of each kind that tests share: RSA keys take long to make.
shared_key = functools.cache(new_key)


MESSAGE = b"what is to be signed"
DIGEST = hashlib.sha256(MESSAGE).digest()


def message(kind: int, data: bytes = b"", own: bytes = bytes(3), slot: int = 0, sequence: int = 7) -> bytes:
    """PC_to_RDR_*"""
    return bytes([kind]) + len(data).to_bytes(4, "little") + bytes([slot, sequence]) + own + data


def short(cla: int, ins: int, p1: int, p2: int, data: bytes = b"", le: int | None = 256) -> bytes:
    """A command of at most 255 bytes of data; `le` None: absent."""
    lc = bytes([len(data)]) + data if data else b""
    return bytes([cla, ins, p1, p2]) + lc + (b"" if le is None else bytes([le % 256]))


def extended(cla: int, ins: int, p1: int, p2: int, data: bytes = b"", le: int | None = 65536) -> bytes:
    lc = len(data).to_bytes(2, "big") + data if data else b""
    return bytes([cla, ins, p1, p2]) + b"\0" + lc + (b"" if le is None else (le % 65536).to_bytes(2, "big"))


def template(tag: int, value: bytes) -> bytes:
    """What GENERAL AUTHENTICATE is given."""
    return tlv.encode(0x7C, tlv.encode(0x82, b"") + tlv.encode(tag, value))


class Refused(Exception):
    """A status word other than 9000."""

    def __init__(self, sw: int) -> None:
        super().__init__(f"{sw:04X}")
        self.sw = sw


def refused(sw: int, act: Any, *arguments: Any) -> None:
    with pytest.raises(Refused) as caught:
        act(*arguments)
    assert caught.value.sw == sw, caught.value


class CardRig:
    """`told` has what the importer was told: the messages of the interrupt endpoint."""

    def __init__(
        self, bench: Bench | None = None, settings: CardSettings | None = None, shown: bytes = b"", serial: str = SERIAL
    ) -> None:
        self.bench = bench or Bench()
        self.token = self.bench.token()
        self.faults: list[Exception] = []
        self.token.on_fault = lambda what, error: self.faults.append(error)
        self.card = Card(self.token, settings or CardSettings(), serial, lambda: self.bench.monotonic, shown)
        self.reader = Reader(self.card)
        self.told: list[bytes] = []
        self.keys: list[PrivateKey] = []  #: that were pushed

    # ---- the module's side ------------------------------------------------------------------------------------------

    def push(self, material: str, kind: str = "p256", generation: int = 1, profile: str = "card", **more: Any) -> PrivateKey:
        """A generation that is current, with a certificate, of the shared key of its kind."""
        key = more.pop("key", None) or shared_key(kind)
        self.keys.append(key)
        return self.bench.push(generation, key, material, chained=more.pop("chained", True), profile=profile, **more)

    def set_pin(self, value: bytes = PIN) -> None:
        self.bench.keystore.set_pin(value, Cause())

    def look(self) -> Move:
        """One turn of the card's thread."""
        move = self.card.look()
        if move.step == OUT:
            self.told.append(self.reader.remove())
        elif move.step == IN:
            self.told.append(self.reader.insert())
        return move

    # ---- the reader's importer --------------------------------------------------------------------------------------

    def ask(self, *words: Any, **more: Any) -> bytes:
        return self.reader.answer(message(*words, **more))

    def connect(self) -> bytes:
        """Has the card in and under power; returns its ATR."""
        self.look()
        answer = self.ask(ccid.Command.ICC_POWER_ON)
        assert answer[:1] == b"\x80" and answer[7:10] == bytes(3), answer.hex()
        return answer[10:]

    def exchange(self, command: bytes) -> bytes:
        """One APDU in one block; returns the response."""
        self.look()
        answer = self.ask(ccid.Command.XFR_BLOCK, command)
        if answer[7]:
            raise ConnectionError(f"the reader says {answer[7:9].hex()}")
        assert answer[9] == 0 and ccid.is_whole(answer)
        return answer[10:]

    # ---- the client -------------------------------------------------------------------------------------------------

    def send(self, command: bytes) -> bytes:
        """One command; returns all of its answer.  Raises Refused."""
        answer = self.exchange(command)
        data = answer[:-2]
        while answer[-2] == 0x61:
            answer = self.exchange(short(0, 0xC0, 0, 0, b"", answer[-1] or 256))
            data += answer[:-2]
        sw = int.from_bytes(answer[-2:], "big")
        if sw != 0x9000:
            raise Refused(sw)
        return data

    def select(self, aid: bytes = PIV) -> bytes:
        return self.send(short(0, 0xA4, 4, 0, aid))

    def get(self, tag: int) -> bytes:
        """GET DATA, in short APDUs."""
        return self.send(short(0, 0xCB, 0x3F, 0xFF, tlv.encode(0x5C, tag.to_bytes((tag.bit_length() + 7) // 8, "big"))))

    def object(self, tag: int) -> dict[int, bytes]:
        """The fields of an object."""
        ((outer, value),) = tlv.decode(self.get(tag))
        assert outer == (0x7E if tag == DISCOVERY else 0x53)
        return dict(tlv.decode(value))

    def certificate(self, slot: int) -> x509.Certificate:
        fields = self.object(OBJECTS[slot])
        assert fields[0x71] == b"\0" and fields[0xFE] == b""
        return x509.load_der_x509_certificate(fields[0x70])

    def read(self, *slots: int) -> None:
        """The certificates, as clients do before they use the keys."""
        for slot in slots:
            self.certificate(slot)

    def guid(self) -> bytes:
        return self.object(CHUID)[0x34]

    def verify(self, value: bytes = PIN) -> None:
        self.send(short(0, 0x20, 0, 0x80, value.ljust(8, b"\xff"), None))

    def verified(self) -> None:
        """VERIFY without data: raises Refused unless no PIN is needed."""
        self.send(short(0, 0x20, 0, 0x80, b"", None))

    def use(self, slot: int, algorithm: int, value: bytes, tag: int = 0x81) -> bytes:
        """GENERAL AUTHENTICATE in one extended APDU."""
        answer = self.send(extended(0, 0x87, algorithm, slot, template(tag, value)))
        ((outer, inside),) = tlv.decode(answer)
        ((inner, result),) = tlv.decode(inside)
        assert (outer, inner) == (0x7C, 0x82)
        return result


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def one_key(kind: str = "p256", **more: Any) -> CardRig:
    """One key in 9A, whose certificate was read."""
    rig = CardRig()
    rig.push("tls", kind, **more)
    rig.connect()
    rig.read(0x9A)
    return rig


def is_of(key: PrivateKey, signature: bytes) -> bool:
    """Whether a signature of DIGEST is an EC key's."""
    public = key.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        public.verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
    except InvalidSignature:
        return False
    return True
