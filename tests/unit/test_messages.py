"""Message-based processes: many messages after one Init, in slot 1 and with delivered keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from hsmvisord import ck, limits
from hsmvisord.crypto.mechanisms import GUEST_TABLE, TABLE
from hsmvisord.face import face, journal
from hsmvisord.face.caller import Caller
from hsmvisord.token.policy import Policy
from hsmvisord.wire.calls import MORE_FOLLOWS, Attribute, Call, Mechanism, Needed
from hsmvisord.wire.frames import HEADER
from hsmvisord.wire.handshake import negotiate
from support.keystores import Bench
from support.own_keys import RW, SPOKEN, USER, OwnGuest, OwnToken
from support.p11kit_client import MAGIC, RELEASES, P11KitEncoding
from support.wire_client import Refused

P256, ED25519 = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06032b6570")
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
SIGNS, VERIFIES = {ck.CKA_SIGN: True}, {ck.CKA_VERIFY: True}
CRYPTS = {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True}
NONCE, TAG = bytes(range(12)), 16
END = ck.CKF_END_OF_MESSAGE


@contextmanager
def refused(rv: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv == rv, caught.value


@pytest.fixture
def own() -> OwnToken:
    return OwnToken()


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


def gcm(nonce: bytes = NONCE, tag: bytes = b"", fixed: int = 0, generator: int = ck.CKG_NO_GENERATE, bits: int = 128) -> Mechanism:
    return Mechanism(ck.CKM_AES_GCM, (nonce, fixed, generator, tag, bits))


def ccm(length: int, nonce: bytes = NONCE, tag: bytes = b"", fixed: int = 0, generator: int = ck.CKG_NO_GENERATE) -> Mechanism:
    return Mechanism(ck.CKM_AES_CCM, (length, nonce, fixed, generator, tag, TAG))


def chacha(nonce: bytes = NONCE, tag: bytes = b"") -> Mechanism:
    return Mechanism(ck.CKM_CHACHA20_POLY1305, (nonce, tag))


def init(guest: OwnGuest, kind: str, mechanism: Mechanism | None, key: int) -> None:
    guest.call(Call[f"MESSAGE_{kind}_INIT"], guest.session, mechanism, key)


def encrypt(guest: OwnGuest, mechanism: Mechanism, data: bytes, more: bytes = b"", room: int | None = 65536) -> tuple[Any, ...]:
    """Returns IV, tag and ciphertext."""
    return guest.call(Call.ENCRYPT_MESSAGE, guest.session, mechanism, more, data, room)


def decrypt(guest: OwnGuest, mechanism: Mechanism, data: bytes, more: bytes = b"", room: int | None = 65536) -> Any:
    return guest.call(Call.DECRYPT_MESSAGE, guest.session, mechanism, more, data, room)[0]


def aes(guest: OwnGuest) -> tuple[int, bytes]:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | OPEN)
    return key, guest.get(key, ck.CKA_VALUE)[0]


def chacha_key(guest: OwnGuest) -> tuple[int, bytes]:
    key = guest.generate(ck.CKM_CHACHA20_KEY_GEN, CRYPTS | OPEN)
    return key, guest.get(key, ck.CKA_VALUE)[0]


# ---- encryption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"one message", bytes(5000)])
def test_every_mechanism_makes_what_others_open(guest: OwnGuest, data: bytes) -> None:
    cases = [
        (aes, lambda tag=b"": gcm(tag=tag), lambda value: AESGCM(value)),
        (aes, lambda tag=b"": ccm(len(data), tag=tag), lambda value: AESCCM(value, TAG)),
        (chacha_key, lambda tag=b"": chacha(tag=tag), lambda value: ChaCha20Poly1305(value)),
    ]
    for make, mechanism, theirs in cases:
        key, value = make(guest)
        init(guest, "ENCRYPT", Mechanism(mechanism().type), key)
        init(guest, "DECRYPT", Mechanism(mechanism().type), key)
        for more in (b"", b"associated"):
            made, tag, sealed = encrypt(guest, mechanism(), data, more)
            assert made == b"" and sealed + tag == theirs(value).encrypt(NONCE, data, more)
            assert decrypt(guest, mechanism(tag), sealed, more) == data
            with refused(ck.CKR_AEAD_DECRYPT_FAILED):
                decrypt(guest, mechanism(bytes([tag[0] ^ 1]) + tag[1:]), sealed, more)
            with refused(ck.CKR_AEAD_DECRYPT_FAILED):
                decrypt(guest, mechanism(tag), sealed, more + b"x")
        assert decrypt(guest, mechanism(tag), sealed, more) == data, "a message that failed does not end the process"
        for kind in ("ENCRYPT", "DECRYPT"):
            guest.call(Call[f"MESSAGE_{kind}_FINAL"], guest.session)
        with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
            encrypt(guest, mechanism(), data)


def test_messages_in_parts(guest: OwnGuest) -> None:
    data, more = bytes(range(100)), b"associated"
    for make, mechanism, theirs, streams in (
        (aes, lambda tag=b"": gcm(tag=tag), AESGCM, True),
        (aes, lambda tag=b"": ccm(len(data), tag=tag), lambda value: AESCCM(value, TAG), False),
        (chacha_key, lambda tag=b"": chacha(tag=tag), ChaCha20Poly1305, False),
    ):
        key, value = make(guest)
        init(guest, "ENCRYPT", Mechanism(mechanism().type), key)
        init(guest, "DECRYPT", Mechanism(mechanism().type), key)
        for _ in range(2):
            guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, mechanism(), more)
            out = b""
            for at in (0, 30, 60):
                (tag, part) = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, mechanism(), data[at : at + 30], 64, 0)
                assert tag == b"" and len(part) == (30 if streams else 0)
                out += part
            needed = len(data) - len(out)
            for room in (None, needed - 1):
                asked = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, mechanism(), data[90:], room, END)
                assert asked == (b"", Needed(needed)), "nothing has happened"
            tag, part = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, mechanism(), data[90:], needed, END)
            assert out + part + tag == theirs(value).encrypt(NONCE, data, more)
            sealed = out + part
            guest.call(Call.DECRYPT_MESSAGE_BEGIN, guest.session, mechanism(), more)
            assert guest.call(Call.DECRYPT_MESSAGE_NEXT, guest.session, mechanism(), sealed[:70], 0, 0) == (b"",)
            assert guest.call(Call.DECRYPT_MESSAGE_NEXT, guest.session, mechanism(tag), sealed[70:], 99, END) == (Needed(100),)
            assert guest.call(Call.DECRYPT_MESSAGE_NEXT, guest.session, mechanism(tag), sealed[70:], 100, END) == (data,)
        for kind in ("ENCRYPT", "DECRYPT"):
            guest.call(Call[f"MESSAGE_{kind}_FINAL"], guest.session)


def test_the_order_of_calls(guest: OwnGuest) -> None:
    key, value = aes(guest)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    with refused(ck.CKR_OPERATION_ACTIVE):
        init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    _, sealed = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"first", 64, 0)
    for call, arguments in (
        (Call.ENCRYPT_MESSAGE, (gcm(), b"", b"x", 64)),
        (Call.ENCRYPT_MESSAGE_BEGIN, (gcm(), b"")),
        (Call.MESSAGE_ENCRYPT_FINAL, ()),
    ):
        with refused(ck.CKR_OPERATION_ACTIVE):
            guest.call(call, guest.session, *arguments)
    tag, last = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b" last", 64, END)
    assert sealed + last + tag == AESGCM(value).encrypt(NONCE, b"first last", b""), "none of them has changed the open message"
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(bits=96), b"x", 64, END)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):  # an error ends the message
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
    with refused(ck.CKR_ARGUMENTS_BAD):
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, 2)
    guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)


@pytest.mark.parametrize(
    "wrong",
    [
        Mechanism(ck.CKM_AES_GCM),
        Mechanism(ck.CKM_AES_GCM, b"raw"),
        Mechanism(ck.CKM_AES_GCM, (NONCE, 96, b"", 128)),
        Mechanism(ck.CKM_AES_CCM, (1, NONCE, 0, 0, b"", 16)),
        gcm(bits=120 + 1),
        gcm(bits=88),
        gcm(nonce=b""),
        gcm(nonce=bytes(limits.MAX_IV + 1)),
        gcm(generator=5),
        gcm(generator=ck.CKG_GENERATE, fixed=96),
        gcm(generator=ck.CKG_GENERATE, nonce=bytes(limits.MAX_MADE_IV + 1)),
    ],
)
def test_wrong_parameters_change_nothing(guest: OwnGuest, wrong: Mechanism) -> None:
    key, value = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    for call, arguments in ((Call.ENCRYPT_MESSAGE, (b"", b"data", 64)), (Call.ENCRYPT_MESSAGE_BEGIN, (b"",))):
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            guest.call(call, guest.session, wrong, *arguments)
    _, tag, sealed = encrypt(guest, gcm(), b"data")
    assert sealed + tag == AESGCM(value).encrypt(NONCE, b"data", b"")
    guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)
    if wrong.parameter is not None and wrong.type == ck.CKM_AES_GCM:
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            init(guest, "ENCRYPT", wrong, key)
        init(guest, "ENCRYPT", gcm(), key)


def test_associated_data_at_its_limit(guest: OwnGuest) -> None:
    key, value = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    init(guest, "DECRYPT", Mechanism(ck.CKM_AES_GCM), key)
    for call in (Call.ENCRYPT_MESSAGE_BEGIN, Call.DECRYPT_MESSAGE_BEGIN):
        with refused(ck.CKR_ARGUMENTS_BAD):
            guest.call(call, guest.session, gcm(), bytes(limits.MAX_MESSAGE_DATA + 1))
        guest.call(call, guest.session, gcm(), bytes(limits.MAX_MESSAGE_DATA))
    tag, sealed = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"data", 64, END)
    assert sealed + tag == AESGCM(value).encrypt(NONCE, b"data", bytes(limits.MAX_MESSAGE_DATA))
    longer = bytes(limits.MAX_MESSAGE_DATA + 1)
    made = encrypt(guest, gcm(), b"data", longer)
    assert made[2] + made[1] == AESGCM(value).encrypt(NONCE, b"data", longer), "in one part nothing is kept"


# ---- IVs that the token makes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generator", [ck.CKG_GENERATE, ck.CKG_GENERATE_COUNTER, ck.CKG_GENERATE_RANDOM, ck.CKG_GENERATE_COUNTER_XOR]
)
@pytest.mark.parametrize("mechanism", ["GCM", "CCM"])
def test_the_token_makes_ivs(guest: OwnGuest, generator: int, mechanism: str) -> None:
    key, value = aes(guest)
    fixed = 0 if generator == ck.CKG_GENERATE_RANDOM else 32
    base = b"fixd" + bytes(range(8))

    def parameter(nonce: bytes) -> Mechanism:
        return gcm(nonce, fixed=fixed, generator=generator) if mechanism == "GCM" else ccm(4, nonce, b"", fixed, generator)

    theirs = AESGCM(value) if mechanism == "GCM" else AESCCM(value, TAG)
    made = []
    for _ in range(2):
        init(guest, "ENCRYPT", Mechanism(parameter(base).type), key)
        nonce = base
        assert encrypt(guest, parameter(base), b"data", room=3) == (b"", b"", Needed(4)), "a question makes none"
        for at in range(3):
            if at == 1:
                (nonce,) = guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, parameter(nonce), b"")
                tag, sealed = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, parameter(nonce), b"data", 4, END)
            else:
                nonce, tag, sealed = encrypt(guest, parameter(nonce), b"data")
            assert theirs.decrypt(nonce, sealed + tag, b"") == b"data"
            assert not fixed or nonce[:4] == b"fixd"
            made.append(nonce)
        guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)
    if generator == ck.CKG_GENERATE_COUNTER_XOR:
        assert made[:3] == made[3:] == [base[:-1] + bytes([base[-1] ^ n]) for n in range(3)]
    else:
        assert len(set(made)) == len(made)
    if generator in (ck.CKG_GENERATE, ck.CKG_GENERATE_COUNTER):
        numbers = [int.from_bytes(nonce[4:]) for nonce in made]
        assert [(b - a) % 2**64 for a, b in pairwise(numbers)][:2] == [1, 1]


def test_short_counters(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    for generator, free in ((ck.CKG_GENERATE, 64), (ck.CKG_GENERATE_COUNTER, 64), (ck.CKG_GENERATE_RANDOM, 96)):
        init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            encrypt(guest, gcm(bytes(16), fixed=128 - free + 1, generator=generator), b"x")
        encrypt(guest, gcm(bytes(16), fixed=128 - free, generator=generator), b"x")
        guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)


def test_ivs_run_out(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    short = gcm(fixed=88, generator=ck.CKG_GENERATE_COUNTER_XOR)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    made = {encrypt(guest, short, b"x")[0] for _ in range(256)}
    assert len(made) == 256
    with refused(ck.CKR_KEY_EXHAUSTED):
        encrypt(guest, short, b"x")


def test_ivs_of_one_process_are_of_one_kind(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    counted = gcm(fixed=32, generator=ck.CKG_GENERATE_COUNTER)
    init(guest, "ENCRYPT", counted, key)  # the Init says of all messages how their IVs are made
    for other in (
        gcm(),
        gcm(fixed=32, generator=ck.CKG_GENERATE_COUNTER_XOR),
        gcm(fixed=24, generator=ck.CKG_GENERATE_COUNTER),
        gcm(bytes(16), fixed=32, generator=ck.CKG_GENERATE_COUNTER),
        gcm(b"\xff" * 12, fixed=32, generator=ck.CKG_GENERATE_COUNTER),
    ):
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            encrypt(guest, other, b"x")
    encrypt(guest, counted, b"x")


def test_made_ivs_at_their_limit(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    longest = gcm(bytes(limits.MAX_MADE_IV), generator=ck.CKG_GENERATE)
    assert len(encrypt(guest, longest, b"x")[0]) == limits.MAX_MADE_IV
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, longest, b"")
    operation = guest.caller.application.sessions[guest.session].operations["message encrypt"]
    assert 3 * limits.MAX_MADE_IV < len(operation.carried()) <= journal.MAX_CARRIED


# ---- signing ------------------------------------------------------------------------------------------------------------

KINDS: dict[int, tuple[int, dict[int, Any]]] = {
    ck.CKK_RSA: (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 2048}),
    ck.CKK_EC: (ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}),
    ck.CKK_EC_EDWARDS: (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: ED25519}),
    ck.CKK_ML_DSA: (ck.CKM_ML_DSA_KEY_PAIR_GEN, {ck.CKA_PARAMETER_SET: 1}),
}


def with_parameter(mechanism: int) -> Mechanism:
    """What a mechanism needs, with fields that any key takes."""
    name = ck.mechanism_name(mechanism)
    if name.endswith("_GENERAL"):
        return Mechanism(mechanism, (8,))
    if "PSS" not in name:
        return Mechanism(mechanism)
    word = "SHA256" if mechanism == ck.CKM_RSA_PKCS_PSS else name.removeprefix("CKM_").removesuffix("_RSA_PKCS_PSS")
    return Mechanism(mechanism, (getattr(ck, "CKM_" + word.replace("SHA1", "SHA_1")), getattr(ck, "CKG_MGF1_" + word), 20))


@pytest.fixture(scope="module")
def signers() -> Iterator[tuple[OwnGuest, dict[int, tuple[int, int]]]]:
    """A guest with a pair of keys, or twice one, of each type that signs."""
    guest = OwnToken(policy=Policy(legacy=True)).guest().begin()
    domain = guest.generate(ck.CKM_DSA_PARAMETER_GEN, {ck.CKA_PRIME_BITS: 1024})
    parameters = (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE)
    old = (ck.CKM_DSA_KEY_PAIR_GEN, dict(zip(parameters, guest.get(domain, *parameters), strict=True)))
    kinds = KINDS | {ck.CKK_DSA: old}
    pairs = {kind: guest.pair(how, values | VERIFIES, SIGNS) for kind, (how, values) in kinds.items()}
    for kind in (ck.CKK_AES, ck.CKK_GENERIC_SECRET):
        how = ck.CKM_AES_KEY_GEN if kind == ck.CKK_AES else ck.CKM_GENERIC_SECRET_KEY_GEN
        pairs[kind] = (guest.generate(how, AES | SIGNS | VERIFIES),) * 2
    yield guest, pairs


SIGNING = sorted(mechanism for mechanism, row in GUEST_TABLE.items() if row.flags & ck.CKF_SIGN)


@pytest.mark.parametrize("number", SIGNING, ids=ck.mechanism_name)
def test_the_flags_are_true(signers: tuple[OwnGuest, dict[int, tuple[int, int]]], number: int) -> None:
    """CKF_MESSAGE_SIGN, CKF_MESSAGE_VERIFY and CKF_MULTI_MESSAGE where it works, and nowhere else."""
    guest, pairs = signers
    guest.session = guest.open()
    row, mechanism = GUEST_TABLE[number], with_parameter(number)
    public, private = next(pairs[kind] for kind in row.key_types if kind in pairs)
    if not row.flags & ck.CKF_MESSAGE_SIGN:
        assert not row.flags & (ck.CKF_MESSAGE_VERIFY | ck.CKF_MULTI_MESSAGE)
        for kind, key in (("SIGN", private), ("VERIFY", public)):
            with refused(ck.CKR_MECHANISM_INVALID):
                init(guest, kind, mechanism, key)
        return
    init(guest, "SIGN", mechanism, private)
    init(guest, "VERIFY", mechanism, public)
    data = bytes(range(32))
    for _ in range(2):
        (signature,) = guest.call(Call.SIGN_MESSAGE, guest.session, None, data, 8192)
        guest.call(Call.VERIFY_MESSAGE, guest.session, b"", data, signature)
        with refused(ck.CKR_SIGNATURE_INVALID):
            guest.call(Call.VERIFY_MESSAGE, guest.session, b"", data[::-1], signature)
    if row.flags & ck.CKF_MULTI_MESSAGE:
        in_parts(guest, data, signature)
    else:
        for call in (Call.SIGN_MESSAGE_BEGIN, Call.VERIFY_MESSAGE_BEGIN):
            with refused(ck.CKR_FUNCTION_NOT_SUPPORTED):
                guest.call(call, guest.session, None)
    guest.call(Call.MESSAGE_SIGN_FINAL, guest.session)
    guest.call(Call.MESSAGE_VERIFY_FINAL, guest.session)


def in_parts(guest: OwnGuest, data: bytes, whole: bytes) -> None:
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    assert guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, data[:7], MORE_FOLLOWS) == (Needed(0),)
    assert guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, data[7:], None) == (Needed(len(whole)),)
    assert guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, data[7:], len(whole) - 1) == (Needed(len(whole)),)
    (signature,) = guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, data[7:], len(whole))
    guest.call(Call.VERIFY_MESSAGE, guest.session, None, data, signature)
    for right in (True, False):
        guest.call(Call.VERIFY_MESSAGE_BEGIN, guest.session, None)
        guest.call(Call.VERIFY_MESSAGE_NEXT, guest.session, None, data[:7], None)
        if right:
            guest.call(Call.VERIFY_MESSAGE_NEXT, guest.session, None, data[7:], signature)
        else:
            with refused(ck.CKR_SIGNATURE_INVALID):
                guest.call(Call.VERIFY_MESSAGE_NEXT, guest.session, None, data[8:], signature)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.VERIFY_MESSAGE_NEXT, guest.session, None, b"", signature)


@pytest.mark.parametrize("slot", [0, 1])
def test_encryption_flags_are_true(slot: int) -> None:
    works = {ck.CKM_AES_GCM, ck.CKM_AES_CCM, ck.CKM_CHACHA20_POLY1305} if slot else set()
    for mechanism, row in (TABLE, GUEST_TABLE)[slot].items():
        told = row.flags & (ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT)
        assert bool(told) == (mechanism in works), ck.mechanism_name(mechanism)


def test_a_parameter_of_a_message_that_has_none(guest: OwnGuest) -> None:
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, SIGNS)
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    init(guest, "VERIFY", Mechanism(ck.CKM_ECDSA_SHA256), public)
    for call, arguments in (
        (Call.SIGN_MESSAGE, (b"data", 64)),
        (Call.SIGN_MESSAGE_BEGIN, ()),
        (Call.VERIFY_MESSAGE, (b"data", b"s" * 64)),
        (Call.VERIFY_MESSAGE_BEGIN, ()),
    ):
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            guest.call(call, guest.session, b"x", *arguments)
    (signature,) = guest.call(Call.SIGN_MESSAGE, guest.session, None, b"data", 64)
    guest.call(Call.VERIFY_MESSAGE, guest.session, None, b"data", signature)


# ---- what holds for them as for other operations ------------------------------------------------------------------------


def test_what_a_key_may(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: False})
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        init(guest, "DECRYPT", Mechanism(ck.CKM_AES_GCM), key)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        init(guest, "SIGN", Mechanism(ck.CKM_AES_CMAC), key)
    encrypt(guest, gcm(), b"x")
    guest.set(key, {ck.CKA_ENCRYPT: False})
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):  # asked at each message
        encrypt(guest, gcm(), b"x")
    only = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_ALLOWED_MECHANISMS: (ck.CKM_AES_CCM,)})
    with refused(ck.CKR_MECHANISM_INVALID):
        init(guest, "DECRYPT", Mechanism(ck.CKM_AES_GCM), only)
    init(guest, "DECRYPT", Mechanism(ck.CKM_AES_CCM), only)


def test_a_key_that_is_gone(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    token = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_TOKEN: True})
    for gone in (key, token):
        init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), gone)
        guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
        guest.call(Call.DESTROY_OBJECT, guest.session, gone)
        if gone == token:
            with refused(ck.CKR_KEY_HANDLE_INVALID):
                guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
        else:  # what was begun with a session object goes on, as with other operations; the next message does not begin
            guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
        with refused(ck.CKR_KEY_HANDLE_INVALID):
            encrypt(guest, gcm(), b"x")
        guest.call(Call.MESSAGE_ENCRYPT_FINAL, guest.session)


def test_logout_ends_messages(guest: OwnGuest) -> None:
    key, _ = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    guest.call(Call.LOGOUT, guest.session)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        encrypt(guest, gcm(), b"x")


def test_a_key_that_asks_each_time_asks_for_each_message(guest: OwnGuest) -> None:
    asks = SIGNS | {ck.CKA_ALWAYS_AUTHENTICATE: True}
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, asks)
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    for call, arguments in ((Call.SIGN_MESSAGE, (None, b"x", 64)), (Call.SIGN_MESSAGE_BEGIN, (None,))):
        with refused(ck.CKR_USER_NOT_LOGGED_IN):
            guest.call(call, guest.session, *arguments)
    guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    assert guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", None) == (Needed(64),), "a question is no use"
    guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)
    guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"x", MORE_FOLLOWS)
    guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"x", 64)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)


def test_each_message_counts_for_the_rate() -> None:
    own = OwnToken(policy=Policy(rate=1, burst=3))
    guest = own.guest().begin()
    guest.call(Call.GENERATE_RANDOM, guest.session, 1)
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)  # one of the three
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)  # none
    encrypt(guest, gcm(), b"x", room=None)  # a question: none
    encrypt(guest, gcm(), b"x")
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
    for call, arguments in ((Call.ENCRYPT_MESSAGE, (b"", b"x", 64)), (Call.ENCRYPT_MESSAGE_BEGIN, (b"",))):
        with refused(ck.CKR_FUNCTION_REJECTED):
            guest.call(call, guest.session, gcm(), *arguments)
    own.bench.now += 1
    encrypt(guest, gcm(), b"x")


def test_a_policy_that_changes_holds_for_the_next_message(own: OwnToken, guest: OwnGuest) -> None:
    key, _ = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    encrypt(guest, gcm(), b"x")
    own.token.settings = replace(own.settings, policy=Policy(mechanisms=frozenset((ck.CKM_AES_CBC,))))
    with refused(ck.CKR_MECHANISM_INVALID):
        encrypt(guest, gcm(), b"x")


def test_old_mechanisms_are_there_for_messages_with_legacy_alone(own: OwnToken, guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | SIGNS)
    with refused(ck.CKR_MECHANISM_INVALID):
        init(guest, "SIGN", Mechanism(ck.CKM_AES_MAC), key)
    own.token.settings = replace(own.settings, policy=Policy(legacy=True))
    init(guest, "SIGN", Mechanism(ck.CKM_AES_MAC), key)
    assert len(guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)[0]) == 8
    own.token.settings = replace(own.settings, policy=Policy())
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)


def test_messages_are_counted_as_operations(own: OwnToken, guest: OwnGuest) -> None:
    key, _ = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    encrypt(guest, gcm(), b"x", room=None)
    for _ in range(2):
        encrypt(guest, gcm(), b"x")
    guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
    guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, 0)
    guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        encrypt(guest, chacha(), b"x")
    cell = own.token.statistics()["encrypt", ck.CKM_AES_GCM, None]
    assert (cell.count, cell.errors) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("ENCRYPT", ck.CKF_MESSAGE_ENCRYPT),
        ("DECRYPT", ck.CKF_MESSAGE_DECRYPT),
        ("SIGN", ck.CKF_MESSAGE_SIGN),
        ("VERIFY", ck.CKF_MESSAGE_VERIFY),
    ],
)
@pytest.mark.parametrize("how", ["C_SessionCancel", "NULL"])
def test_a_process_is_cancelled(guest: OwnGuest, kind: str, flag: int, how: str) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | SIGNS | VERIFIES)
    mechanism = Mechanism(ck.CKM_AES_GCM if "CRYPT" in kind else ck.CKM_AES_CMAC)
    begin = {"ENCRYPT": (gcm(), b""), "DECRYPT": (gcm(), b"")}.get(kind, (None,))
    init(guest, kind, mechanism, key)
    guest.call(Call[f"{kind}_MESSAGE_BEGIN"], guest.session, *begin)
    if how == "NULL":
        init(guest, kind, None, key)
    else:
        guest.call(Call.SESSION_CANCEL, guest.session, ck.CKF_MESSAGE_ENCRYPT * 0x1F & ~flag & 0x1E)  # the others
        with refused(ck.CKR_OPERATION_ACTIVE):
            guest.call(Call[f"MESSAGE_{kind}_FINAL"], guest.session)
        guest.call(Call.SESSION_CANCEL, guest.session, flag)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call[f"MESSAGE_{kind}_FINAL"], guest.session)
    init(guest, kind, mechanism, key)


def test_slot_0_has_no_secret_keys(own: OwnToken, guest: OwnGuest) -> None:
    session = guest.open(RW, 0)
    with pytest.raises(Refused):
        guest.call(Call.MESSAGE_ENCRYPT_INIT, session, Mechanism(ck.CKM_AES_GCM), 1)


# ---- a successor of the worker ------------------------------------------------------------------------------------------


class NotedGuest(OwnGuest):
    """Its requests are noted as a connection does it."""

    def call(self, call: Call, *arguments: Any) -> tuple[Any, ...]:
        message = SPOKEN.request(call, *arguments)
        request = self.caller.codec.decode(7, b"", message)
        try:
            return super().call(call, *arguments)
        finally:
            if request.call in journal.NOTED:
                journal.note(self.caller, request, (7, b"", message))

    def handed_over(self, name: str) -> OwnGuest:
        """Returns the guest with a successor, which has carried out again what made the operation."""
        operation = self.caller.application.sessions[self.session].operations[name]
        assert operation.journal is not None and operation.journal.whole
        assert operation.journal.size == sum(map(len, operation.journal.frames))
        successor = NotedGuest(self.token).begin()
        assert journal.replay(successor.caller, journal.saved(operation))
        return successor


def token_key(guest: OwnGuest) -> tuple[int, bytes]:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | OPEN | {ck.CKA_TOKEN: True})
    return key, guest.get(key, ck.CKA_VALUE)[0]


@pytest.mark.parametrize(
    "generator", [ck.CKG_NO_GENERATE, ck.CKG_GENERATE_COUNTER, ck.CKG_GENERATE_COUNTER_XOR, ck.CKG_GENERATE_RANDOM]
)
def test_an_open_message_goes_on_in_a_successor(own: OwnToken, generator: int) -> None:
    guest: OwnGuest = NotedGuest(own.token).begin()
    key, value = token_key(guest)
    parameter = gcm(generator=generator)
    init(guest, "ENCRYPT", parameter, key)
    made = [encrypt(guest, parameter, b"before")[0]]
    for _ in range(2):  # a successor has successors
        (nonce,) = guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, parameter, b"data")
        made.append(nonce)
        out = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, parameter, b"begun here, ", 64, 0)[1]
        assert isinstance(guest, NotedGuest)
        guest = guest.handed_over("message encrypt")
        tag, last = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, parameter, b"ended there", 64, END)
        assert AESGCM(value).decrypt(nonce or NONCE, out + last + tag, b"data") == b"begun here, ended there"
        assert isinstance(guest, NotedGuest)
        guest = guest.handed_over("message encrypt")
        made.append(encrypt(guest, parameter, b"after")[0])
    assert generator == ck.CKG_NO_GENERATE or len(set(made)) == len(made), "no IV twice"
    if generator == ck.CKG_GENERATE_COUNTER_XOR:
        assert [int.from_bytes(nonce) ^ int.from_bytes(NONCE) for nonce in made] == list(range(5))


def test_other_processes_go_on_in_a_successor(own: OwnToken) -> None:
    guest = NotedGuest(own.token).begin()
    key, value = token_key(guest)
    token = {ck.CKA_TOKEN: True}
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES | token, SIGNS | token)
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    guest.call(Call.SIGN_MESSAGE, guest.session, None, b"before", 64)
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"begun here, ", MORE_FOLLOWS)
    successor = guest.handed_over("message sign")
    (signature,) = successor.call(Call.SIGN_MESSAGE_NEXT, successor.session, None, b"ended there", 64)
    init(guest, "VERIFY", Mechanism(ck.CKM_ECDSA_SHA256), public)
    guest.call(Call.VERIFY_MESSAGE_BEGIN, guest.session, None)
    guest.call(Call.VERIFY_MESSAGE_NEXT, guest.session, None, b"begun here, ", None)
    successor = guest.handed_over("message verify")
    successor.call(Call.VERIFY_MESSAGE_NEXT, successor.session, None, b"ended there", signature)
    sealed = AESGCM(value).encrypt(NONCE, b"begun here, ended there", b"data")
    init(guest, "DECRYPT", Mechanism(ck.CKM_AES_GCM), key)
    guest.call(Call.DECRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"data")
    guest.call(Call.DECRYPT_MESSAGE_NEXT, guest.session, gcm(), sealed[:9], 64, 0)
    successor = guest.handed_over("message decrypt")
    last = successor.call(Call.DECRYPT_MESSAGE_NEXT, successor.session, gcm(tag=sealed[-16:]), sealed[9:-16], 64, END)
    assert last == (b"begun here, ended there",)


def test_journals_hold_one_message(own: OwnToken) -> None:
    """A message that is too long for a journal cannot be handed over; the next one can."""
    guest = NotedGuest(own.token).begin()
    key, _ = token_key(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    operation = guest.caller.application.sessions[guest.session].operations["message encrypt"]
    kept = operation.journal
    assert kept is not None and kept.whole
    first = kept.size
    for _ in range(3):
        guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, gcm(), b"")
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), bytes(limits.MAX_JOURNAL), 1 << 20, 0)
        assert not kept.whole and kept.size == first
        guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, gcm(), b"x", 64, END)
        assert kept.whole and kept.size == first
        encrypt(guest, gcm(), b"x")
        assert kept.whole and kept.size == first


def test_what_a_login_allowed_is_not_handed_over(own: OwnToken) -> None:
    guest = NotedGuest(own.token).begin()
    asks = SIGNS | {ck.CKA_ALWAYS_AUTHENTICATE: True, ck.CKA_TOKEN: True}
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, asks)
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    kept = guest.caller.application.sessions[guest.session].operations["message sign"].journal
    assert kept is not None and kept.whole
    guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", None)
    assert not kept.whole
    guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)
    assert kept.whole, "the next message needs another login"
    successor = guest.handed_over("message sign")
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        successor.call(Call.SIGN_MESSAGE, successor.session, None, b"x", 64)


@pytest.mark.parametrize("state", [b"\x21", b"\x0cshort", b"\0short", b"\0" + bytes(12), b"\0\1\x0c\0\0" + bytes(8 + 23)])
def test_what_no_predecessor_leaves_behind(guest: OwnGuest, state: bytes) -> None:
    key, _ = aes(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    operation = guest.caller.application.sessions[guest.session].operations["message encrypt"]
    with pytest.raises(ValueError, match=r"generator|leaves behind"):
        operation.carry(state)
    encrypt(guest, gcm(), b"x")


def test_options_of_an_earlier_release_are_passed_over(own: OwnToken) -> None:
    """It kept them as the client sent them: p11-kit's say \"client\"."""
    guest = NotedGuest(own.token).begin()
    key, _ = token_key(guest)
    init(guest, "ENCRYPT", Mechanism(ck.CKM_AES_GCM), key)
    kept = guest.caller.application.sessions[guest.session].operations["message encrypt"].journal
    assert kept is not None
    (frame,) = kept.frames
    ident, _, size = HEADER.unpack_from(frame)
    for options in (b"\0\1\0\4time", b"\xff\xff\0\5four"):
        successor = NotedGuest(own.token).begin()
        assert journal.replay(successor.caller, (journal.raw(ident, options, frame[-size:]),)) == options.startswith(b"\0")
        assert options.startswith(b"\xff") or encrypt(successor, gcm(), b"x")


@pytest.mark.parametrize("how", ["a state that cannot be", "a begin that is refused", "no request"])
def test_what_cannot_be_carried_out_again_makes_no_iv_twice(own: OwnToken, how: str) -> None:
    guest = NotedGuest(own.token).begin()
    key, _ = token_key(guest)
    parameter = gcm(generator=ck.CKG_GENERATE_COUNTER)
    init(guest, "ENCRYPT", parameter, key)
    (used,) = guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, parameter, b"")
    frames = list(journal.saved(guest.caller.application.sessions[guest.session].operations["message encrypt"]))
    successor = NotedGuest(own.token).begin()
    if how == "a begin that is refused":
        own.token.settings = replace(own.settings, policy=Policy(rate=1, burst=1))
        successor.generate(ck.CKM_AES_KEY_GEN, AES)
        assert journal.replay(successor.caller, tuple(frames)), "the process goes on, without the message"
        own.token.settings = own.settings
    else:
        if how == "no request":
            frames[1] = b"\0" * len(frames[1])
        else:
            frames[0] = frames[0].replace(used, used + b"x")
        assert not journal.replay(successor.caller, tuple(frames))
        with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
            successor.call(Call.MESSAGE_ENCRYPT_FINAL, successor.session)
        init(successor, "ENCRYPT", parameter, key)
    made = {encrypt(successor, parameter, b"x")[0] for _ in range(3)}
    assert used not in made and len(made) == 3


def test_what_two_operations_share_is_not_handed_over(own: OwnToken) -> None:
    guest = NotedGuest(own.token).begin()
    key, _ = token_key(guest)
    guest.call(Call.DIGEST_INIT, guest.session, Mechanism(ck.CKM_SHA256))
    guest.call(Call.ENCRYPT_INIT, guest.session, Mechanism(ck.CKM_AES_CTR, (128, bytes(16))), key)
    operations = guest.caller.application.sessions[guest.session].operations
    assert all(o.journal is not None and o.journal.whole for o in operations.values())
    guest.call(Call.DIGEST_ENCRYPT_UPDATE, guest.session, b"data", None)
    assert all(o.journal is not None and o.journal.whole for o in operations.values()), "a question changes nothing"
    guest.call(Call.DIGEST_ENCRYPT_UPDATE, guest.session, b"data", 64)
    assert not any(o.journal is not None and o.journal.whole for o in operations.values())


# ---- stock p11-kit clients ----------------------------------------------------------------------------------------------


def test_p11kit_signs_messages_and_does_not_encrypt_them(own: OwnToken) -> None:
    """Its protocol has no fields for the parameters of an encryption; those of signatures are empty."""
    codec, _ = negotiate(1)
    caller, spoken = Caller(own.token, codec, "test"), P11KitEncoding(RELEASES["0.25.5"])

    def call(call: Call, *arguments: Any) -> tuple[Any, ...]:
        reply = face.handle(caller, codec.decode(7, b"", spoken.request(call, *arguments)), lambda request, ready: None)
        assert reply is not None
        return spoken.reply(call, reply[HEADER.size :])

    call(Call.INITIALIZE, MAGIC, 0, b"\0")
    (session,) = call(Call.OPEN_SESSION, 1, RW)
    call(Call.LOGIN, session, ck.CKU_USER, USER)
    curve, yes = Attribute(ck.CKA_EC_PARAMS, P256), True
    template = ((curve, Attribute(ck.CKA_VERIFY, yes)), (Attribute(ck.CKA_SIGN, yes),))
    public, private = call(Call.GENERATE_KEY_PAIR, session, Mechanism(ck.CKM_EC_KEY_PAIR_GEN), *template)
    ecdsa = Mechanism(ck.CKM_ECDSA_SHA256)
    call(Call.MESSAGE_SIGN_INIT, session, ecdsa, private)
    call(Call.MESSAGE_VERIFY_INIT, session, ecdsa, public)
    (signature,) = call(Call.SIGN_MESSAGE, session, None, b"whole", 64)
    call(Call.VERIFY_MESSAGE, session, None, b"whole", signature)
    call(Call.SIGN_MESSAGE_BEGIN, session, None)
    assert call(Call.SIGN_MESSAGE_NEXT, session, None, b"in ", MORE_FOLLOWS) == (Needed(0),)
    (signature,) = call(Call.SIGN_MESSAGE_NEXT, session, None, b"parts", 64)
    call(Call.VERIFY_MESSAGE, session, None, b"in parts", signature)
    call(Call.MESSAGE_SIGN_FINAL, session)
    messages = ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT | ck.CKF_MULTI_MESSAGE
    own.token.settings = replace(own.settings, policy=Policy(legacy=True))
    for mechanism, row in GUEST_TABLE.items():
        flags = call(Call.GET_MECHANISM_INFO, 1, mechanism)[2]
        assert flags == (row.flags & ~messages if row.flags & ck.CKF_MESSAGE_ENCRYPT else row.flags), ck.mechanism_name(mechanism)


# ---- delivered keys -----------------------------------------------------------------------------------------------------


def delivered(bench: Bench, **changes: Any) -> tuple[OwnGuest, int, int]:
    """A guest with a session of slot 0, and the handles of a private and a public key there."""
    bench.push(1, **changes)
    guest = OwnGuest(bench.token())
    guest.session = guest.open(RW, 0)
    (private,) = guest.find({ck.CKA_CLASS: ck.CKO_PRIVATE_KEY})
    (public,) = guest.find({ck.CKA_CLASS: ck.CKO_PUBLIC_KEY})
    return guest, private, public


def test_delivered_keys_sign_messages() -> None:
    guest, private, public = delivered(Bench())
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    init(guest, "VERIFY", Mechanism(ck.CKM_ECDSA_SHA256), public)
    for message in (b"one", b"two"):
        (signature,) = guest.call(Call.SIGN_MESSAGE, guest.session, None, message, 64)
        guest.call(Call.VERIFY_MESSAGE, guest.session, None, message, signature)
    assert guest.token.statistics()["sign", ck.CKM_ECDSA_SHA256, ("tls", 1)].count == 2
    assert guest.token.usage()["tls", 1][0] == 2


def test_a_delivered_key_is_asked_for_at_each_message() -> None:
    """Its generation is destroyed: the open message ends too.  Its certificate expires: the next message does not begin."""
    bench = Bench()
    guest, private, _ = delivered(bench, chained=True, on_expiry="refuse")
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    bench.now += 400 * 86400
    guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"begun before", 64)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)
    bench = Bench()
    guest, private, _ = delivered(bench)
    init(guest, "SIGN", Mechanism(ck.CKM_ECDSA_SHA256), private)
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    bench.push(2)
    bench.execute("destroy", "tls", 1)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"x", 64)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.SIGN_MESSAGE, guest.session, None, b"x", 64)
