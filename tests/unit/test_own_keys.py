"""Slot 1: keys of every type made, used, derived and wrapped.  The attacks on wrapping are in test_wrapping_attacks.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hsmvisord import ck
from hsmvisord.crypto.mechanisms import GUEST_TABLE
from hsmvisord.token.policy import Policy
from hsmvisord.wire.calls import Call, Mechanism, Needed
from support.own_keys import RW, USER, OwnGuest, OwnToken, template
from support.wire_client import Refused

P256 = bytes.fromhex("06082a8648ce3d030107")
ED25519, X25519 = bytes.fromhex("06032b6570"), bytes.fromhex("06032b656e")
IV, NONCE = bytes(16), bytes(12)
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
SIGNS, VERIFIES = {ck.CKA_SIGN: True}, {ck.CKA_VERIFY: True}
CRYPTS = {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True}
WRAPS = {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True}
SECRET = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES}
KW, KWP = Mechanism(ck.CKM_AES_KEY_WRAP), Mechanism(ck.CKM_AES_KEY_WRAP_KWP)
OAEP = Mechanism(ck.CKM_RSA_PKCS_OAEP, (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, ck.CKZ_DATA_SPECIFIED, b""))


@contextmanager
def refused(*rvs: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv in rvs, caught.value


@pytest.fixture
def own() -> OwnToken:
    return OwnToken()


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


def gcm(tag: int = 128) -> Mechanism:
    return Mechanism(ck.CKM_AES_GCM, (NONCE, 96, b"", tag))


def sensitive(guest: OwnGuest) -> int:
    return guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_EXTRACTABLE: True})


# ---- use ----------------------------------------------------------------------------------------------------------------

SIGNERS: list[tuple[int, dict[int, Any], Mechanism]] = [
    (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 2048}, Mechanism(ck.CKM_SHA256_RSA_PKCS)),
    (ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, Mechanism(ck.CKM_ECDSA_SHA256)),
    (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: ED25519}, Mechanism(ck.CKM_EDDSA)),
    (ck.CKM_ML_DSA_KEY_PAIR_GEN, {ck.CKA_PARAMETER_SET: 1}, Mechanism(ck.CKM_ML_DSA)),
]


@pytest.mark.parametrize(("generation", "parameters", "mechanism"), SIGNERS)
def test_new_pairs_sign(own: OwnToken, guest: OwnGuest, generation: int, parameters: dict[int, Any], mechanism: Mechanism) -> None:
    token = {ck.CKA_TOKEN: True, ck.CKA_ID: b"\1"}
    public, private = guest.pair(generation, parameters | VERIFIES | token, SIGNS | token)
    signature = guest.sign(mechanism, private, b"message")
    guest.verify(mechanism, public, b"message", signature)
    with refused(ck.CKR_SIGNATURE_INVALID):
        guest.verify(mechanism, public, b"massage", signature)
    told = guest.get(private, ck.CKA_LOCAL, ck.CKA_KEY_GEN_MECHANISM, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE)
    assert told == [True, generation, True, True]
    assert guest.get(public, ck.CKA_PUBLIC_KEY_INFO) == guest.get(private, ck.CKA_PUBLIC_KEY_INFO)
    own.restart()
    again = own.guest().begin()
    assert sorted(again.find({ck.CKA_ID: b"\1"})) == [public, private], "with the same handles"
    again.verify(mechanism, public, b"message", again.sign(mechanism, private, b"message"))


def test_a_key_does_what_it_may(guest: OwnGuest) -> None:
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256, ck.CKA_VERIFY: False}, {ck.CKA_SIGN: True})
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.verify(Mechanism(ck.CKM_ECDSA), public, b"d" * 32, b"s" * 64)
    guest.set(public, VERIFIES)
    guest.verify(Mechanism(ck.CKM_ECDSA), public, b"d" * 32, guest.sign(Mechanism(ck.CKM_ECDSA), private, b"d" * 32))
    for key, call in [(public, Call.SIGN_INIT), (private, Call.VERIFY_INIT)]:
        with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
            guest.call(call, guest.session, Mechanism(ck.CKM_ECDSA), key)
    with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
        guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_SHA256_RSA_PKCS), private)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.call(Call.DECRYPT_INIT, guest.session, Mechanism(ck.CKM_RSA_PKCS), private)
    data = guest.create({ck.CKA_CLASS: ck.CKO_DATA})
    for call in (Call.SIGN_INIT, Call.VERIFY_INIT, Call.ENCRYPT_INIT, Call.DECRYPT_INIT):
        with refused(ck.CKR_KEY_HANDLE_INVALID):
            guest.call(call, guest.session, Mechanism(ck.CKM_ECDSA), data)


def test_allowed_mechanisms_are_allowed_alone(guest: OwnGuest) -> None:
    only = {ck.CKA_ALLOWED_MECHANISMS: (ck.CKM_ECDSA_SHA384,)}
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, SIGNS | only)
    guest.sign(Mechanism(ck.CKM_ECDSA_SHA384), private, b"message")
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.sign(Mechanism(ck.CKM_ECDSA_SHA256), private, b"message")


def test_secret_keys_encrypt_and_authenticate(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | SIGNS | VERIFIES | OPEN)
    (value,) = guest.get(key, ck.CKA_VALUE)
    sealed = guest.encrypt(gcm(), key, b"plain")
    assert sealed == AESGCM(value).encrypt(NONCE, b"plain", b"") and guest.decrypt(gcm(), key, sealed) == b"plain"
    with refused(ck.CKR_ENCRYPTED_DATA_INVALID):
        guest.decrypt(gcm(), key, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    mac = guest.sign(Mechanism(ck.CKM_AES_CMAC), key, b"message")
    guest.verify(Mechanism(ck.CKM_AES_CMAC), key, b"message", mac)
    with refused(ck.CKR_SIGNATURE_INVALID):
        guest.verify(Mechanism(ck.CKM_AES_CMAC), key, b"massage", mac)
    check = guest.get(key, ck.CKA_CHECK_VALUE)[0]
    assert check == guest.encrypt(Mechanism(ck.CKM_AES_ECB), key, bytes(16))[:3]


@pytest.mark.parametrize("mechanism", [gcm(), Mechanism(ck.CKM_AES_CBC_PAD, IV), Mechanism(ck.CKM_AES_CTR, (128, IV))])
def test_encryption_in_parts(guest: OwnGuest, mechanism: Mechanism) -> None:
    key, data = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS), bytes(range(100))
    whole = guest.encrypt(mechanism, key, data)
    results = {}
    for kind, source in (("ENCRYPT", data), ("DECRYPT", whole)):
        guest.call(Call[f"{kind}_INIT"], guest.session, mechanism, key)
        out = b""
        for at in range(0, len(source), 33):
            part = source[at : at + 33]
            (needed,) = guest.call(Call[f"{kind}_UPDATE"], guest.session, part, None)
            if needed.size > 1:
                assert guest.call(Call[f"{kind}_UPDATE"], guest.session, part, needed.size - 1) == (needed,), "nothing has happened"
            out += guest.call(Call[f"{kind}_UPDATE"], guest.session, part, needed.size)[0]
        (needed,) = guest.call(Call[f"{kind}_FINAL"], guest.session, None)
        out += guest.call(Call[f"{kind}_FINAL"], guest.session, needed.size)[0]
        results[kind] = out
        with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
            guest.call(Call[f"{kind}_UPDATE"], guest.session, b"x", 64)
    assert results == {"ENCRYPT": whole, "DECRYPT": data}


def test_a_question_for_the_length_begins_nothing(guest: OwnGuest) -> None:
    key, mechanism = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS), Mechanism(ck.CKM_AES_CBC_PAD, IV)
    guest.call(Call.ENCRYPT_INIT, guest.session, mechanism, key)
    assert guest.call(Call.ENCRYPT_UPDATE, guest.session, bytes(40), None) == (Needed(32),)
    (sealed,) = guest.call(Call.ENCRYPT, guest.session, b"whole", 64)
    assert guest.decrypt(mechanism, key, sealed) == b"whole"


def test_digest_of_a_key(guest: OwnGuest) -> None:
    readable, hidden = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN), guest.generate(ck.CKM_AES_KEY_GEN, AES)
    guest.call(Call.DIGEST_INIT, guest.session, Mechanism(ck.CKM_SHA256))
    guest.call(Call.DIGEST_UPDATE, guest.session, b"before")
    guest.call(Call.DIGEST_KEY, guest.session, readable)
    (digest,) = guest.call(Call.DIGEST_FINAL, guest.session, 64)
    assert digest == hashlib.sha256(b"before" + guest.get(readable, ck.CKA_VALUE)[0]).digest()
    guest.call(Call.DIGEST_INIT, guest.session, Mechanism(ck.CKM_SHA256))
    with refused(ck.CKR_KEY_INDIGESTIBLE):
        guest.call(Call.DIGEST_KEY, guest.session, hidden)


def test_derivation(guest: OwnGuest) -> None:
    ours = [guest.pair(ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: X25519}, {ck.CKA_DERIVE: True}) for _ in range(2)]
    points = [guest.get(public, ck.CKA_EC_POINT)[0] for public, _ in ours]
    made = [
        guest.derive(
            Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_SHA256_KDF, b"", points[1 - n])),
            ours[n][1],
            SECRET | OPEN | {ck.CKA_VALUE_LEN: 32},
        )
        for n in range(2)
    ]
    assert guest.get(made[0], ck.CKA_VALUE) == guest.get(made[1], ck.CKA_VALUE)
    base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | {ck.CKA_DERIVE: True})
    info = (1, 1, ck.CKM_SHA256, ck.CKF_HKDF_SALT_KEY, b"", made[0], b"info")
    key = guest.derive(Mechanism(ck.CKM_HKDF_DERIVE, info), base, SECRET | CRYPTS | {ck.CKA_VALUE_LEN: 16})
    assert guest.get(key, ck.CKA_VALUE_LEN, ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE) == [16, False, True]
    assert guest.decrypt(gcm(), key, guest.encrypt(gcm(), key, b"x")) == b"x"
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.derive(Mechanism(ck.CKM_HKDF_DERIVE, info), key, SECRET)


def test_a_key_that_asks_each_time(guest: OwnGuest) -> None:
    asks = SIGNS | {ck.CKA_ALWAYS_AUTHENTICATE: True}
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, asks)
    ecdsa, data = Mechanism(ck.CKM_ECDSA), b"d" * 32
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.sign(ecdsa, private, data)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    guest.call(Call.SIGN_INIT, guest.session, ecdsa, private)
    with refused(ck.CKR_PIN_INCORRECT):
        guest.login(ck.CKU_CONTEXT_SPECIFIC, b"wrong")
    guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    (signature,) = guest.call(Call.SIGN, guest.session, data, 64)
    guest.verify(ecdsa, public, data, signature)
    guest.call(Call.SIGN_INIT, guest.session, ecdsa, private)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.SIGN, guest.session, data, 64)


def test_an_operation_ends_with_its_key_and_with_the_login(own: OwnToken, guest: OwnGuest) -> None:
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, SIGNS | {ck.CKA_TOKEN: True})
    guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_ECDSA), private)
    other = own.guest().begin()
    other.call(Call.DESTROY_OBJECT, other.session, private)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.SIGN, guest.session, b"d" * 32, 64)
    _, passing = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, SIGNS)
    guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_ECDSA), passing)
    guest.call(Call.LOGOUT, guest.session)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.call(Call.SIGN, guest.session, b"d" * 32, 64)


def test_the_operators_policy_holds_for_own_keys(own: OwnToken) -> None:
    own.settings = own.settings.__class__(
        guest_token=True, policy=Policy(mechanisms=frozenset({ck.CKM_ECDSA, ck.CKM_EC_KEY_PAIR_GEN}), min_ec_bits=384)
    )
    own.token.settings = own.settings
    guest = own.guest().begin()
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.generate(ck.CKM_AES_KEY_GEN, AES)
    with refused(ck.CKR_KEY_SIZE_RANGE):
        guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, SIGNS)
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: bytes.fromhex("06052b81040022")}, SIGNS)
    guest.sign(Mechanism(ck.CKM_ECDSA), private, b"d" * 48)
    assert (
        set(guest.call(Call.GET_MECHANISM_LIST, 1, 256)[0]) >= {ck.CKM_ECDSA}
        and ck.CKM_AES_GCM not in guest.call(Call.GET_MECHANISM_LIST, 1, 256)[0]
    )


def test_generation_that_is_refused(guest: OwnGuest) -> None:
    cases: list[tuple[int, int, dict[int, Any]]] = [
        (ck.CKR_MECHANISM_INVALID, ck.CKM_AES_GCM, AES),
        (ck.CKR_MECHANISM_INVALID, ck.CKM_EC_KEY_PAIR_GEN, AES),
        (ck.CKR_TEMPLATE_INCOMPLETE, ck.CKM_AES_KEY_GEN, {}),
        (ck.CKR_KEY_SIZE_RANGE, ck.CKM_AES_KEY_GEN, {ck.CKA_VALUE_LEN: 17}),
        (ck.CKR_TEMPLATE_INCONSISTENT, ck.CKM_AES_KEY_GEN, AES | {ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET}),
        (ck.CKR_TEMPLATE_INCONSISTENT, ck.CKM_AES_KEY_GEN, AES | {ck.CKA_VALUE: bytes(32)}),
        (ck.CKR_ATTRIBUTE_READ_ONLY, ck.CKM_AES_KEY_GEN, AES | {ck.CKA_TRUSTED: True}),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKM_AES_KEY_GEN, AES | {ck.CKA_MODULUS: b"1"}),
    ]
    for rv, mechanism, values in cases:
        with refused(rv):
            guest.generate(mechanism, values)
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        guest.call(Call.GENERATE_KEY, guest.session, Mechanism(ck.CKM_AES_KEY_GEN, IV), template(AES))
    with refused(ck.CKR_KEY_SIZE_RANGE):
        guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 1016}, SIGNS)
    with refused(ck.CKR_TEMPLATE_INCOMPLETE):
        guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {}, SIGNS)


def test_every_mechanism_is_of_a_function() -> None:
    functions = ck.CKF_ENCRYPT | ck.CKF_SIGN | ck.CKF_DIGEST | ck.CKF_DERIVE | ck.CKF_WRAP | ck.CKF_GENERATE
    functions |= ck.CKF_GENERATE_KEY_PAIR | ck.CKF_ENCAPSULATE
    assert [ck.mechanism_name(m) for m, row in GUEST_TABLE.items() if not row.flags & functions] == []
    assert [m for m in GUEST_TABLE if ck.mechanism_name(m).startswith("CKM_0x")] == []


def test_a_key_without_named_uses_has_all_of_its_type(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES)
    uses = (ck.CKA_ENCRYPT, ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_WRAP, ck.CKA_UNWRAP, ck.CKA_DERIVE)
    assert guest.get(key, *uses) == [True] * 7
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, key, sensitive(guest))
    public, private = guest.pair(ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: ED25519}, {})
    assert guest.get(private, ck.CKA_SIGN, ck.CKA_DECRYPT, ck.CKA_DERIVE) == [True, False, False]
    assert guest.get(public, ck.CKA_VERIFY, ck.CKA_ENCRYPT, ck.CKA_WRAP) == [True, False, False]
    one = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_WRAP: True})
    assert guest.get(one, *uses) == [False, False, False, False, True, False, False]


# ---- wrapping -----------------------------------------------------------------------------------------------------------


def test_keys_are_wrapped_and_unwrapped(guest: OwnGuest) -> None:
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS)
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_EXTRACTABLE: True})
    sealed = guest.encrypt(gcm(), key, b"plain")
    for mechanism in (KW, KWP):
        again = guest.unwrap(mechanism, wrapper, guest.wrap(mechanism, wrapper, key), SECRET | CRYPTS)
        assert guest.decrypt(gcm(), again, sealed) == b"plain"
        assert guest.get(again, ck.CKA_LOCAL, ck.CKA_SENSITIVE, ck.CKA_ALWAYS_SENSITIVE) == [False, True, False]
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, SIGNS | {ck.CKA_EXTRACTABLE: True})
    wrapped = guest.wrap(KWP, wrapper, private)
    of_type = {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC}
    again = guest.unwrap(KWP, wrapper, wrapped, of_type | SIGNS)
    guest.verify(Mechanism(ck.CKM_ECDSA), public, b"d" * 32, guest.sign(Mechanism(ck.CKM_ECDSA), again, b"d" * 32))
    with refused(ck.CKR_WRAPPED_KEY_INVALID):
        guest.unwrap(KWP, wrapper, wrapped, of_type | {ck.CKA_KEY_TYPE: ck.CKK_RSA})
    with refused(ck.CKR_WRAPPED_KEY_INVALID):
        guest.unwrap(KWP, wrapper, wrapped[:-1] + bytes([wrapped[-1] ^ 1]), of_type)
    with refused(ck.CKR_WRAPPED_KEY_LEN_RANGE, ck.CKR_WRAPPED_KEY_INVALID):
        guest.unwrap(KWP, wrapper, wrapped[:-3], of_type)
    with refused(ck.CKR_TEMPLATE_INCOMPLETE):
        guest.unwrap(KWP, wrapper, wrapped, {})


def test_open_keys_are_wrapped_by_any_key(guest: OwnGuest) -> None:
    public, private = guest.pair(
        ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 2048, ck.CKA_WRAP: True}, {ck.CKA_UNWRAP: True}
    )
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    (value,) = guest.get(key, ck.CKA_VALUE)
    for mechanism in (OAEP, Mechanism(ck.CKM_RSA_PKCS), Mechanism(ck.CKM_RSA_AES_KEY_WRAP, (256, *(OAEP.parameter or ())))):
        wrapped = guest.wrap(mechanism, public, key)
        again = guest.unwrap(mechanism, private, wrapped, SECRET | OPEN)
        assert guest.get(again, ck.CKA_VALUE) == [value]
    both = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | CRYPTS)
    for mechanism in (KW, KWP, Mechanism(ck.CKM_AES_CBC, IV), Mechanism(ck.CKM_AES_CBC_PAD, IV), gcm()):
        again = guest.unwrap(mechanism, both, guest.wrap(mechanism, both, key), SECRET | OPEN)
        assert guest.get(again, ck.CKA_VALUE) == [value]


def test_what_is_not_wrapped(guest: OwnGuest) -> None:
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS)
    with refused(ck.CKR_KEY_UNEXTRACTABLE):
        guest.wrap(KW, wrapper, guest.generate(ck.CKM_AES_KEY_GEN, AES))
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, SIGNS | {ck.CKA_EXTRACTABLE: True})
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KWP, wrapper, public)
    readable, short = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | OPEN), {ck.CKA_VALUE_LEN: 7} | OPEN
    with refused(ck.CKR_KEY_SIZE_RANGE):
        guest.wrap(Mechanism(ck.CKM_AES_CBC, IV), readable, guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, short))
    with refused(ck.CKR_WRAPPING_KEY_TYPE_INCONSISTENT):
        guest.wrap(KWP, private, wrapper)
    with refused(ck.CKR_WRAPPING_KEY_HANDLE_INVALID):
        guest.wrap(KWP, 5, wrapper)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.wrap(KWP, wrapper, 5)
    with refused(ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID):
        guest.unwrap(KWP, 5, bytes(24), SECRET)
    with refused(ck.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT):
        guest.unwrap(KWP, public, bytes(24), SECRET)
    plain = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.wrap(KWP, plain, guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN))
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.unwrap(KWP, plain, bytes(24), SECRET)


def test_wrap_and_unwrap_templates(guest: OwnGuest) -> None:
    demands = {
        ck.CKA_WRAP_TEMPLATE: ((ck.CKA_ENCRYPT, True),),
        ck.CKA_UNWRAP_TEMPLATE: ((ck.CKA_EXTRACTABLE, False), (ck.CKA_LABEL, b"in")),
    }
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | demands)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.wrap(KW, wrapper, guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_DECRYPT: True, ck.CKA_EXTRACTABLE: True}))
    wrapped = guest.wrap(KW, wrapper, guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_EXTRACTABLE: True}))
    again = guest.unwrap(KW, wrapper, wrapped, SECRET)
    assert guest.get(again, ck.CKA_EXTRACTABLE, ck.CKA_LABEL) == [False, b"in"]
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KW, wrapper, wrapped, SECRET | {ck.CKA_EXTRACTABLE: True})


def test_read_only_sessions_make_session_keys(guest: OwnGuest) -> None:
    guest.session = guest.open(RW & ~ck.CKF_RW_SESSION)
    guest.generate(ck.CKM_AES_KEY_GEN, AES)
    with refused(ck.CKR_SESSION_READ_ONLY):
        guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_TOKEN: True})
