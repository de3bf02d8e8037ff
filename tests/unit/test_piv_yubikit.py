"""Yubico's own client (yubikit, ykman is made of it) on the card, without pcscd: by its SmartCardConnection, through the reader."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, x25519
from hsmvisord.face.card import objects, yubikey
from hsmvisord.face.card.slots import CardSettings, card_settings
from support.keystores import Bench
from support.smart_card import SERIAL, CardRig, der, shared_key
from yubikit.core import TRANSPORT, ApplicationNotAvailableError, InvalidPinError, NotSupportedError
from yubikit.core.smartcard import AID, SW, ApduError, SmartCardConnection, SmartCardProtocol
from yubikit.piv import (
    KEY_TYPE,
    MANAGEMENT_KEY_TYPE,
    OBJECT_ID,
    PIN_POLICY,
    SLOT,
    TOUCH_POLICY,
    Chuid,
    FascN,
    PivSession,
)

MESSAGE = b"what is to be signed"
SLOTS = {"9a": "web", "9c": "mail", "9d": "seal", "9e": "door", "82": "old", "83": "agree"}
KINDS = {"web": "p256", "mail": "rsa2048", "seal": "rsa3072", "door": "p384", "old": "ed25519"}
AGREES = x25519.X25519PrivateKey.generate()
PINS = {"right": "123456", "wrong": "000000"}


class Connection(SmartCardConnection):
    """To the card in a rig's reader; `sizes` has the lengths of the commands that were sent."""

    def __init__(self, rig: CardRig, transport: TRANSPORT = TRANSPORT.USB) -> None:
        self.rig, self._transport = rig, transport
        self.sizes: list[int] = []
        rig.connect()

    @property
    def transport(self) -> TRANSPORT:
        return self._transport

    def send_and_receive(self, apdu: bytes) -> tuple[bytes, int]:
        self.sizes.append(len(apdu))
        answer = self.rig.exchange(bytes(apdu))
        return answer[:-2], int.from_bytes(answer[-2:], "big")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def bench() -> Bench:
    rig = CardRig()
    for name, kind in KINDS.items():
        rig.push(name, kind, profile="any")
    rig.push("agree", key=AGREES, profile="decrypt")
    return rig.bench


@pytest.fixture
def rig(bench: Bench) -> CardRig:
    bench.now += 1000
    rig = CardRig(bench, CardSettings(card_settings({"slots": SLOTS}).slots, yubikey=True))
    rig.set_pin(b"")
    return rig


@pytest.fixture(params=[TRANSPORT.USB, TRANSPORT.NFC], ids=["extended", "short"])
def piv(rig: CardRig, request: pytest.FixtureRequest) -> PivSession:
    """By USB yubikit sends extended APDUs, by NFC short ones in chains."""
    return PivSession(Connection(rig, request.param))


def test_what_a_session_asks_first(piv: PivSession) -> None:
    assert str(piv.version) == "5.4.3"
    assert piv.management_key_type == MANAGEMENT_KEY_TYPE.TDES
    assert not piv.get_management_key_metadata().default_value
    assert piv.get_serial() == int.from_bytes(yubikey.serial_number(SERIAL), "big") < 1 << 31
    with pytest.raises(NotSupportedError):
        piv.get_bio_metadata()


def test_certificates(piv: PivSession, rig: CardRig) -> None:
    for name, material in SLOTS.items():
        certificate = piv.get_certificate(SLOT(int(name, 16)))
        key = AGREES if material == "agree" else shared_key(KINDS[material])
        assert certificate.public_key() == key.public_key()
    with pytest.raises(ApduError) as caught:
        piv.get_certificate(SLOT.RETIRED3)
    assert caught.value.sw == SW.FILE_NOT_FOUND


def test_objects(piv: PivSession) -> None:
    chuid = Chuid.from_bytes(piv.get_object(OBJECT_ID.CHUID))
    assert chuid.fasc_n == FascN(9999, 9999, 999999, 0, 1, 0, 3, 0, 1)
    assert bytes(chuid.fasc_n) == objects._FASC_N
    assert len(chuid.guid) == 16
    assert chuid.expiration_date == datetime.date(2099, 12, 31)
    assert chuid.asymmetric_signature == b""
    assert piv.get_object(OBJECT_ID.DISCOVERY).hex() == "4f0ba0000003080000100001005f2f024000"
    assert piv.get_object(OBJECT_ID.CAPABILITY)[0] == 0xF0
    assert piv.get_object(OBJECT_ID.KEY_HISTORY).hex() == "c10102c20100fe00"


def verify(key: Any, signature: bytes, hash_: hashes.HashAlgorithm) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, MESSAGE, ec.ECDSA(hash_))
    elif isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, MESSAGE)
    else:
        assert isinstance(key, rsa.RSAPublicKey)
        key.verify(signature, MESSAGE, padding.PKCS1v15(), hash_)


@pytest.mark.parametrize(
    ("slot", "kind"),
    [
        (SLOT.AUTHENTICATION, KEY_TYPE.ECCP256),
        (SLOT.SIGNATURE, KEY_TYPE.RSA2048),
        (SLOT.KEY_MANAGEMENT, KEY_TYPE.RSA3072),
        (SLOT.CARD_AUTH, KEY_TYPE.ECCP384),
        (SLOT.RETIRED1, KEY_TYPE.ED25519),
    ],
)
def test_signatures(piv: PivSession, slot: SLOT, kind: KEY_TYPE) -> None:
    key = piv.get_certificate(slot).public_key()
    hash_ = hashes.SHA384() if kind == KEY_TYPE.ECCP384 else hashes.SHA256()
    verify(key, piv.sign(slot, kind, MESSAGE, hash_, padding.PKCS1v15()), hash_)


def test_pss(piv: PivSession) -> None:
    """The client pads, the card does the raw operation."""
    key = piv.get_certificate(SLOT.SIGNATURE).public_key()
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    signature = piv.sign(SLOT.SIGNATURE, KEY_TYPE.RSA2048, MESSAGE, hashes.SHA256(), scheme)
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(signature, MESSAGE, scheme, hashes.SHA256())


@pytest.mark.parametrize(("slot", "kind"), [(SLOT.SIGNATURE, "rsa2048"), (SLOT.KEY_MANAGEMENT, "rsa3072")])
def test_decryption(piv: PivSession, slot: SLOT, kind: str) -> None:
    key = piv.get_certificate(slot).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    for scheme in (padding.PKCS1v15(), padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)):
        assert piv.decrypt(slot, key.encrypt(MESSAGE, scheme), scheme) == MESSAGE


@pytest.mark.parametrize(("slot", "curve"), [(SLOT.AUTHENTICATION, ec.SECP256R1()), (SLOT.CARD_AUTH, ec.SECP384R1())])
def test_agreement(piv: PivSession, slot: SLOT, curve: ec.EllipticCurve) -> None:
    peer = ec.generate_private_key(curve)
    key = piv.get_certificate(slot).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert piv.calculate_secret(slot, peer.public_key()) == peer.exchange(ec.ECDH(), key)


def test_agreement_with_x25519(piv: PivSession) -> None:
    peer = x25519.X25519PrivateKey.generate()
    assert piv.get_certificate(SLOT.RETIRED2).public_key() == AGREES.public_key()
    assert piv.calculate_secret(SLOT.RETIRED2, peer.public_key()) == peer.exchange(AGREES.public_key())
    told = piv.get_slot_metadata(SLOT.RETIRED2)
    assert (told.key_type, told.public_key) == (KEY_TYPE.X25519, AGREES.public_key())


def test_the_form_of_commands(rig: CardRig) -> None:
    for transport, longest in ((TRANSPORT.USB, 4 + 3 + 266), (TRANSPORT.NFC, 4 + 1 + 255)):
        connection = Connection(rig, transport)
        session = PivSession(connection)
        session.get_certificate(SLOT.SIGNATURE)
        session.sign(SLOT.SIGNATURE, KEY_TYPE.RSA2048, MESSAGE, hashes.SHA256(), padding.PKCS1v15())
        assert max(connection.sizes) == longest


def test_the_pin(piv: PivSession, rig: CardRig) -> None:
    rig.set_pin()
    piv.get_certificate(SLOT.AUTHENTICATION)
    with pytest.raises(ApduError) as caught:
        piv.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256())
    assert caught.value.sw == SW.SECURITY_CONDITION_NOT_SATISFIED
    metadata = piv.get_pin_metadata()
    assert (metadata.total_attempts, metadata.attempts_remaining, metadata.default_value) == (3, 3, False)
    piv.verify_pin(PINS["right"])
    piv.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256())
    for left in (2, 1, 0):
        with pytest.raises(InvalidPinError) as wrong:
            piv.verify_pin(PINS["wrong"])
        assert wrong.value.attempts_remaining == piv.get_pin_attempts() == left
    with pytest.raises(InvalidPinError) as locked:
        piv.verify_pin(PINS["right"])
    assert locked.value.attempts_remaining == 0
    rig.bench.now += 5
    piv.verify_pin(PINS["right"])
    assert piv.get_pin_attempts() == 3


def test_metadata(piv: PivSession) -> None:
    for name, (kind, policy) in {
        "9a": (KEY_TYPE.ECCP256, PIN_POLICY.ONCE),
        "9c": (KEY_TYPE.RSA2048, PIN_POLICY.ALWAYS),
        "9d": (KEY_TYPE.RSA3072, PIN_POLICY.ONCE),
        "9e": (KEY_TYPE.ECCP384, PIN_POLICY.NEVER),
        "82": (KEY_TYPE.ED25519, PIN_POLICY.ONCE),
    }.items():
        told = piv.get_slot_metadata(SLOT(int(name, 16)))
        assert (told.key_type, told.pin_policy, told.touch_policy) == (kind, policy, TOUCH_POLICY.NEVER)
        assert told.public_key == shared_key(KINDS[SLOTS[name]]).public_key()
        assert not told.generated
    with pytest.raises(ApduError) as caught:
        piv.get_slot_metadata(SLOT.RETIRED20)
    assert caught.value.sw == SW.REFERENCE_DATA_NOT_FOUND
    assert piv.get_puk_metadata().attempts_remaining == 0


def test_metadata_is_no_certificate() -> None:
    """Whoever was told of the new key in another way may still hold an older key's certificate."""
    rig = CardRig(settings=CardSettings(yubikey=True))
    rig.push("tls", key=ec.generate_private_key(ec.SECP256R1()))
    session = PivSession(Connection(rig))
    key = session.get_slot_metadata(SLOT.AUTHENTICATION).public_key
    with pytest.raises(ApduError) as caught:
        session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256())
    assert caught.value.sw == SW.CONDITIONS_NOT_SATISFIED
    session.get_certificate(SLOT.AUTHENTICATION)
    verify(key, session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256()), hashes.SHA256())


def test_a_key_that_the_module_made_was_generated() -> None:
    rig = CardRig(settings=CardSettings(yubikey=True))
    rig.bench.generate(1, "own", profile="card")
    rig.bench.execute("certify", "own", 1, rig.bench.to_certify(1, "own"))
    rig.bench.execute("activate", "own", 1)
    session = PivSession(Connection(rig))
    assert session.get_slot_metadata(SLOT.AUTHENTICATION).generated
    key = session.get_certificate(SLOT.AUTHENTICATION).public_key()
    verify(key, session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256()), hashes.SHA256())


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda p: p.authenticate(bytes(24)), 0x6A86),
        (lambda p: p.set_management_key(MANAGEMENT_KEY_TYPE.AES192, bytes(24)), SW.INVALID_INSTRUCTION),
        (lambda p: p.change_pin("123456", "654321"), SW.INVALID_INSTRUCTION),
        (lambda p: p.change_puk("12345678", "87654321"), NotSupportedError),
        (lambda p: p.unblock_pin("12345678", "654321"), NotSupportedError),
        (lambda p: p.set_pin_attempts(5, 5), NotSupportedError),
        (lambda p: p.generate_key(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256), SW.SECURITY_CONDITION_NOT_SATISFIED),
        (lambda p: p.put_key(SLOT.AUTHENTICATION, shared_key("p256")), SW.INVALID_INSTRUCTION),
        (lambda p: p.put_certificate(SLOT.AUTHENTICATION, p.get_certificate(SLOT.SIGNATURE)), SW.SECURITY_CONDITION_NOT_SATISFIED),
        (lambda p: p.delete_certificate(SLOT.AUTHENTICATION), SW.SECURITY_CONDITION_NOT_SATISFIED),
        (lambda p: p.attest_key(SLOT.AUTHENTICATION), SW.INVALID_INSTRUCTION),
    ],
)
def test_what_would_change_the_card_is_refused(piv: PivSession, rig: CardRig, act: Any, expected: Any) -> None:
    rig.set_pin()
    piv.verify_pin(PINS["right"])
    before = rig.bench.keystore.state
    if isinstance(expected, int):
        with pytest.raises(ApduError) as caught:
            act(piv)
        assert caught.value.sw == expected
    else:
        with pytest.raises(expected):
            act(piv)
    assert rig.bench.keystore.state is before


def test_a_reset_in_vain(piv: PivSession, rig: CardRig) -> None:
    """ykman piv reset tries wrong PINs until none is left: ones that no PIN can be, so that these count for nothing."""
    rig.set_pin()
    with pytest.raises(ApduError) as caught:
        piv.reset()
    assert caught.value.sw == SW.INCORRECT_PARAMETERS
    assert rig.bench.keystore.state.pin.failures == 0


def test_other_applications(rig: CardRig) -> None:
    protocol = SmartCardProtocol(Connection(rig))
    for aid in (AID.MANAGEMENT, AID.OATH, AID.FIDO, AID.OPENPGP, AID.OTP, AID.SECURE_DOMAIN):
        with pytest.raises(ApplicationNotAvailableError):
            protocol.select(aid)
    protocol.select(AID.PIV)


def test_rotation_as_yubikit_meets_it(rig: CardRig) -> None:
    """The card goes out and in; a session that lives over it is refused until it has read the certificate again."""
    own = CardRig(settings=CardSettings(yubikey=True))
    own.push("tls", key=ec.generate_private_key(ec.SECP256R1()))
    session = PivSession(Connection(own))
    old = session.get_certificate(SLOT.AUTHENTICATION)
    before = Chuid.from_bytes(session.get_object(OBJECT_ID.CHUID)).guid
    own.push("tls", generation=2, key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConnectionError):
        session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256())
    own.bench.monotonic += 2
    own.connect()
    with pytest.raises(ApduError) as caught:
        session.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256())
    assert caught.value.sw == SW.CONDITIONS_NOT_SATISFIED
    again = PivSession(Connection(own))
    assert Chuid.from_bytes(again.get_object(OBJECT_ID.CHUID)).guid != before
    young = again.get_certificate(SLOT.AUTHENTICATION)
    assert der(young) != der(old)
    verify(young.public_key(), again.sign(SLOT.AUTHENTICATION, KEY_TYPE.ECCP256, MESSAGE, hashes.SHA256()), hashes.SHA256())
