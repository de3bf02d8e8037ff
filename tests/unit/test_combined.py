"""Slot 1: two operations in one call, signatures that hold their data or come before it, encapsulated and authenticated keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM
from hsmvisord import ck, limits
from hsmvisord.face.caller import Parked
from hsmvisord.face.cryptography import derive_key2
from hsmvisord.face.encapsulation import encapsulate_key
from hsmvisord.token.policy import Policy
from hsmvisord.wire.calls import Call, Mechanism, Needed
from support.own_keys import RW, USER, OwnGuest, OwnToken, template
from support.wire_client import Refused

P256, ED25519 = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06032b6570")
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
SIGNS, VERIFIES = {ck.CKA_SIGN: True}, {ck.CKA_VERIFY: True}
CRYPTS = {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True}
WRAPS = {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True}
NONCE, IV, TAG = bytes(range(12)), bytes(16), 16
CBC, ECDSA, SHA256 = Mechanism(ck.CKM_AES_CBC_PAD, IV), Mechanism(ck.CKM_ECDSA_SHA256), Mechanism(ck.CKM_SHA256)
RSA = Mechanism(ck.CKM_RSA_PKCS)
DATA = bytes(range(50))


@contextmanager
def refused(*rvs: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv in rvs, caught.value


@pytest.fixture
def guest() -> OwnGuest:
    return OwnToken().guest().begin()


def pair(guest: OwnGuest) -> tuple[int, int]:
    return guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, SIGNS)


def rsa_pair(guest: OwnGuest, **private: Any) -> tuple[int, int]:
    recovers = {ck.CKA_MODULUS_BITS: 1024, ck.CKA_VERIFY_RECOVER: True}
    return guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, recovers, {ck.CKA_SIGN_RECOVER: True} | private)


# ---- dual functions -----------------------------------------------------------------------------------------------------


def parts(guest: OwnGuest, call: Call, data: bytes, final: Call) -> bytes:
    """In parts of 20 bytes, each asked for its room first; then the cipher's end."""
    out = b""
    for at in range(0, len(data), 20):
        part = data[at : at + 20]
        (needed,) = guest.call(call, guest.session, part, None)
        if needed.size > 1:
            assert guest.call(call, guest.session, part, needed.size - 1) == (needed,), "nothing has happened to either"
        out += guest.call(call, guest.session, part, needed.size)[0]
    return bytes(out + guest.call(final, guest.session, 64)[0])


def test_digest_while_encrypting_and_decrypting(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    for mechanism in (CBC, Mechanism(ck.CKM_AES_CTR, (128, IV))):
        sealed = guest.encrypt(mechanism, key, DATA)
        for init, call, final, source, result in (
            (Call.ENCRYPT_INIT, Call.DIGEST_ENCRYPT_UPDATE, Call.ENCRYPT_FINAL, DATA, sealed),
            (Call.DECRYPT_INIT, Call.DECRYPT_DIGEST_UPDATE, Call.DECRYPT_FINAL, sealed, DATA),
        ):
            guest.call(Call.DIGEST_INIT, guest.session, SHA256)
            guest.call(init, guest.session, mechanism, key)
            guest.call(Call.DIGEST_UPDATE, guest.session, b"before")
            out = parts(guest, call, source, final)
            if call is Call.DECRYPT_DIGEST_UPDATE and mechanism is CBC:
                guest.call(Call.DIGEST_UPDATE, guest.session, out[48:])  # C_DecryptFinal gave it, and no digest saw it (5.17.2)
            (digest,) = guest.call(Call.DIGEST_FINAL, guest.session, 32)
            assert (out, digest) == (result, hashlib.sha256(b"before" + DATA).digest())


def test_sign_while_encrypting_and_verify_while_decrypting(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    public, private = pair(guest)
    counter = Mechanism(ck.CKM_AES_CTR, (128, IV))
    guest.call(Call.SIGN_INIT, guest.session, ECDSA, private)
    guest.call(Call.ENCRYPT_INIT, guest.session, counter, key)
    sealed = parts(guest, Call.SIGN_ENCRYPT_UPDATE, DATA, Call.ENCRYPT_FINAL)
    (signature,) = guest.call(Call.SIGN_FINAL, guest.session, 64)
    guest.verify(ECDSA, public, DATA, signature)
    guest.call(Call.VERIFY_INIT, guest.session, ECDSA, public)
    guest.call(Call.DECRYPT_INIT, guest.session, counter, key)
    assert parts(guest, Call.DECRYPT_VERIFY_UPDATE, sealed, Call.DECRYPT_FINAL) == DATA
    guest.call(Call.VERIFY_FINAL, guest.session, signature)


def test_both_operations_must_be_open(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.DIGEST_ENCRYPT_UPDATE, guest.session, DATA, 64)
    guest.call(Call.ENCRYPT_INIT, guest.session, CBC, key)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.DIGEST_ENCRYPT_UPDATE, guest.session, DATA, 64)
    (sealed,) = guest.call(Call.ENCRYPT, guest.session, DATA, 64)
    assert guest.decrypt(CBC, key, sealed) == DATA, "the one that was open has not changed"


def test_an_error_ends_both(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    _, private = pair(guest)
    guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_ECDSA), private)  # works in one part only
    guest.call(Call.ENCRYPT_INIT, guest.session, CBC, key)
    with refused(ck.CKR_FUNCTION_NOT_SUPPORTED):
        guest.call(Call.SIGN_ENCRYPT_UPDATE, guest.session, DATA, 64)
    guest.call(Call.DIGEST_INIT, guest.session, SHA256)
    guest.call(Call.ENCRYPT_INIT, guest.session, Mechanism(ck.CKM_AES_CTR, (1, IV)), key)
    with refused(ck.CKR_DATA_LEN_RANGE):  # the counter has two blocks
        guest.call(Call.DIGEST_ENCRYPT_UPDATE, guest.session, bytes(33), 64)
    for call in (Call.SIGN_UPDATE, Call.DIGEST_UPDATE):
        with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
            guest.call(call, guest.session, b"x")
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.ENCRYPT_UPDATE, guest.session, b"x", 64)


# ---- recovery -----------------------------------------------------------------------------------------------------------


def test_data_is_recovered_from_signatures(guest: OwnGuest) -> None:
    public, private = rsa_pair(guest)
    for mechanism, data in ((RSA, b"data in it"), (RSA, b""), (Mechanism(ck.CKM_RSA_X_509), b"\0" + b"d" * 127)):
        guest.call(Call.SIGN_RECOVER_INIT, guest.session, mechanism, private)
        assert guest.call(Call.SIGN_RECOVER, guest.session, data, None) == (Needed(128),)
        assert guest.call(Call.SIGN_RECOVER, guest.session, data, 127) == (Needed(128),)
        (signature,) = guest.call(Call.SIGN_RECOVER, guest.session, data, 128)
        guest.call(Call.VERIFY_RECOVER_INIT, guest.session, mechanism, public)
        if len(data) > 1:
            assert guest.call(Call.VERIFY_RECOVER, guest.session, signature, len(data) - 1) == (Needed(len(data)),)
        assert guest.call(Call.VERIFY_RECOVER, guest.session, signature, 128) == (data,)
        for call in (Call.SIGN_RECOVER, Call.VERIFY_RECOVER):
            with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
                guest.call(call, guest.session, data, 128)


def test_recovery_refuses(guest: OwnGuest) -> None:
    public, private = rsa_pair(guest)
    for signature, room, rv in (
        (bytes(127), 128, ck.CKR_SIGNATURE_LEN_RANGE),
        (b"\1" * 128, 128, ck.CKR_SIGNATURE_INVALID),
        (b"\1" * 128, 1, ck.CKR_SIGNATURE_INVALID),  # before CKR_BUFFER_TOO_SMALL (5.15.6)
    ):
        guest.call(Call.VERIFY_RECOVER_INIT, guest.session, RSA, public)
        with refused(rv):
            guest.call(Call.VERIFY_RECOVER, guest.session, signature, room)
    guest.call(Call.VERIFY_RECOVER_INIT, guest.session, Mechanism(ck.CKM_RSA_X_509), public)
    with refused(ck.CKR_SIGNATURE_INVALID):
        guest.call(Call.VERIFY_RECOVER, guest.session, b"\xff" * 128, 128)
    guest.call(Call.SIGN_RECOVER_INIT, guest.session, RSA, private)
    with refused(ck.CKR_OPERATION_ACTIVE):
        guest.call(Call.SIGN_RECOVER_INIT, guest.session, RSA, private)
    with refused(ck.CKR_DATA_LEN_RANGE):
        guest.call(Call.SIGN_RECOVER, guest.session, bytes(118), 128)
    for init, key in ((Call.SIGN_RECOVER_INIT, private), (Call.VERIFY_RECOVER_INIT, public)):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.call(init, guest.session, Mechanism(ck.CKM_SHA256_RSA_PKCS), key)
        guest.call(init, guest.session, RSA, key)
        guest.call(init, guest.session, None, key)
    others = pair(guest)
    for init, key in ((Call.SIGN_RECOVER_INIT, others[1]), (Call.VERIFY_RECOVER_INIT, others[0])):
        with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
            guest.call(init, guest.session, RSA, key)
    for flag, init, key in (
        (ck.CKF_SIGN_RECOVER, Call.SIGN_RECOVER_INIT, private),
        (ck.CKF_VERIFY_RECOVER, Call.VERIFY_RECOVER_INIT, public),
    ):
        guest.call(init, guest.session, RSA, key)
        guest.call(Call.SESSION_CANCEL, guest.session, flag)
        guest.call(init, guest.session, RSA, key)


def test_recovery_asks_each_time(guest: OwnGuest) -> None:
    _, private = guest.pair(
        ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 1024}, {ck.CKA_SIGN_RECOVER: True, ck.CKA_ALWAYS_AUTHENTICATE: True}
    )
    guest.call(Call.SIGN_RECOVER_INIT, guest.session, RSA, private)
    with refused(ck.CKR_USER_NOT_LOGGED_IN):
        guest.call(Call.SIGN_RECOVER, guest.session, b"x", 128)
    guest.call(Call.SIGN_RECOVER_INIT, guest.session, RSA, private)
    guest.login(ck.CKU_CONTEXT_SPECIFIC, USER)
    guest.call(Call.SIGN_RECOVER, guest.session, b"x", 128)


# ---- the signature first ------------------------------------------------------------------------------------------------


def test_the_signature_comes_first(guest: OwnGuest) -> None:
    public, private = pair(guest)
    signature = guest.sign(ECDSA, private, DATA)
    for right in (True, False):
        data = DATA if right else DATA[::-1]
        guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, signature)
        with refused(ck.CKR_OPERATION_ACTIVE):
            guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, signature)
        with judged(right):
            guest.call(Call.VERIFY_SIGNATURE, guest.session, data)
        guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, signature)
        guest.call(Call.VERIFY_SIGNATURE_UPDATE, guest.session, data[:9])
        guest.call(Call.VERIFY_SIGNATURE_UPDATE, guest.session, data[9:])
        with judged(right):
            guest.call(Call.VERIFY_SIGNATURE_FINAL, guest.session)
        for call, arguments in (
            (Call.VERIFY_SIGNATURE, (data,)),
            (Call.VERIFY_SIGNATURE_UPDATE, (data,)),
            (Call.VERIFY_SIGNATURE_FINAL, ()),
            (Call.VERIFY, (data, signature)),
        ):
            with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
                guest.call(call, guest.session, *arguments)
    statistics = guest.token.statistics()["verify", ck.CKM_ECDSA_SHA256, None]
    assert (statistics.count, statistics.errors) == (2, 2)


@contextmanager
def judged(right: bool) -> Iterator[None]:
    if right:
        yield
        return
    with refused(ck.CKR_SIGNATURE_INVALID):
        yield


def test_one_verification_at_a_time(guest: OwnGuest) -> None:
    public, private = pair(guest)
    signature = guest.sign(ECDSA, private, DATA)
    inits = ((Call.VERIFY_INIT, ()), (Call.VERIFY_SIGNATURE_INIT, (signature,)))
    for init, arguments in inits:
        guest.call(init, guest.session, ECDSA, public, *arguments)
        for other, more in inits:
            with refused(ck.CKR_OPERATION_ACTIVE):
                guest.call(other, guest.session, ECDSA, public, *more)
        guest.call(Call.SESSION_CANCEL, guest.session, ck.CKF_VERIFY)
    guest.call(Call.VERIFY_INIT, guest.session, ECDSA, public)
    for call, data in (
        (Call.VERIFY_SIGNATURE, (DATA,)),
        (Call.VERIFY_SIGNATURE_UPDATE, (DATA,)),
        (Call.VERIFY_SIGNATURE_FINAL, ()),
    ):
        with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
            guest.call(call, guest.session, *data)
    guest.call(Call.VERIFY, guest.session, DATA, signature)
    guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, signature)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.VERIFY, guest.session, DATA, signature)
    guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, None, public, None)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        guest.call(Call.VERIFY_SIGNATURE, guest.session, DATA)


def test_a_signature_at_its_limit(guest: OwnGuest) -> None:
    public, _ = pair(guest)
    with refused(ck.CKR_SIGNATURE_LEN_RANGE):
        guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, bytes(limits.MAX_SIGNATURE + 1))
    guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ECDSA, public, bytes(limits.MAX_SIGNATURE))
    with refused(ck.CKR_SIGNATURE_LEN_RANGE):
        guest.call(Call.VERIFY_SIGNATURE, guest.session, DATA)


# ---- encapsulation ------------------------------------------------------------------------------------------------------

KEM = Mechanism(ck.CKM_ML_KEM)
AES_KEY = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES}


def kem_pair(guest: OwnGuest, set_: int = 2, **more: Any) -> tuple[int, int]:
    return guest.pair(ck.CKM_ML_KEM_KEY_PAIR_GEN, {ck.CKA_PARAMETER_SET: set_}, {ck.CKA_DECAPSULATE: True})


def encapsulate(guest: OwnGuest, key: int, values: dict[int, Any], room: int | None = 4096) -> tuple[Any, int]:
    ciphertext, handle = guest.call(Call.ENCAPSULATE_KEY, guest.session, KEM, key, template(values), room)
    return ciphertext, int(handle)


def decapsulate(guest: OwnGuest, key: int, ciphertext: bytes, values: dict[int, Any]) -> int:
    return int(guest.call(Call.DECAPSULATE_KEY, guest.session, KEM, key, ciphertext, template(values))[0])


@pytest.mark.parametrize(("set_", "size"), [(2, 1088), (3, 1568)])
def test_both_ends_have_one_key(guest: OwnGuest, set_: int, size: int) -> None:
    public, private = kem_pair(guest, set_)
    for values, length in ((AES_KEY, 32), (AES_KEY | {ck.CKA_VALUE_LEN: 16}, 16), ({ck.CKA_CLASS: ck.CKO_SECRET_KEY}, 32)):
        assert encapsulate(guest, public, values | OPEN, None) == (Needed(size), 0)
        assert encapsulate(guest, public, values | OPEN, size - 1) == (Needed(size), 0)
        before = guest.find({})
        ciphertext, ours = encapsulate(guest, public, values | OPEN, size)
        theirs = decapsulate(guest, private, ciphertext, values | OPEN)
        assert sorted(set(guest.find({})) - set(before)) == sorted((ours, theirs)), "a question makes no key"
        assert guest.get(ours, ck.CKA_VALUE) == guest.get(theirs, ck.CKA_VALUE)
        for key in (ours, theirs):
            told = guest.get(key, ck.CKA_VALUE_LEN, ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE)
            assert told == [length, False, False, False]
    changed = decapsulate(guest, private, bytes([ciphertext[0] ^ 1]) + ciphertext[1:], values | OPEN)
    assert guest.get(changed, ck.CKA_VALUE) != guest.get(ours, ck.CKA_VALUE), "implicit rejection (FIPS 203)"


def test_what_an_encapsulated_key_is(guest: OwnGuest) -> None:
    public, private = kem_pair(guest)
    ciphertext, ours = encapsulate(guest, public, AES_KEY)
    theirs = decapsulate(guest, private, ciphertext, AES_KEY | {ck.CKA_EXTRACTABLE: False})
    assert guest.get(ours, ck.CKA_EXTRACTABLE, ck.CKA_SENSITIVE) == [True, True]
    assert guest.get(theirs, ck.CKA_EXTRACTABLE, ck.CKA_SENSITIVE) == [False, True]
    for key in (ours, theirs):  # sensitive as it is, it may not leave with its value
        assert guest.get(key, ck.CKA_VALUE) == [None]


def test_an_encapsulated_key_is_nobody_elses_secret_and_wraps_none(guest: OwnGuest) -> None:
    """Whoever made the ciphertext knows the key: it may not take out what is sensitive."""
    public, private = kem_pair(guest)
    target = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_EXTRACTABLE: True})
    wraps = AES_KEY | WRAPS | {ck.CKA_EXTRACTABLE: False}
    ciphertext, ours = encapsulate(guest, public, wraps)
    for key in (ours, decapsulate(guest, private, ciphertext, wraps)):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(Mechanism(ck.CKM_AES_KEY_WRAP_KWP), key, target)


def test_encapsulation_refuses(guest: OwnGuest) -> None:
    public, private = kem_pair(guest)
    ciphertext, _ = encapsulate(guest, public, AES_KEY)
    ec = pair(guest)
    for key, rv in (
        (private, ck.CKR_KEY_TYPE_INCONSISTENT),
        (ec[0], ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (999, ck.CKR_KEY_HANDLE_INVALID),
    ):
        with refused(rv):
            encapsulate(guest, key, AES_KEY)
    for key, rv in (
        (public, ck.CKR_KEY_TYPE_INCONSISTENT),
        (ec[1], ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (999, ck.CKR_KEY_HANDLE_INVALID),
    ):
        with refused(rv):
            decapsulate(guest, key, ciphertext, AES_KEY)
    for wrong in (ciphertext[:-1], ciphertext + b"x", b""):
        with refused(ck.CKR_WRAPPED_KEY_LEN_RANGE):
            decapsulate(guest, private, wrong, AES_KEY)
    before = guest.find({})
    for values, rv in (
        (AES_KEY | {ck.CKA_VALUE_LEN: 33}, ck.CKR_KEY_SIZE_RANGE),
        (AES_KEY | {ck.CKA_VALUE: bytes(32)}, ck.CKR_TEMPLATE_INCONSISTENT),
        (AES_KEY | {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY}, ck.CKR_TEMPLATE_INCONSISTENT),
        (AES_KEY | {ck.CKA_LOCAL: True}, ck.CKR_ATTRIBUTE_READ_ONLY),
    ):
        with refused(rv):
            encapsulate(guest, public, values)
        with refused(rv):
            decapsulate(guest, private, ciphertext, values)
    for mechanism in (Mechanism(ck.CKM_ECDH1_DERIVE), Mechanism(ck.CKM_AES_GCM)):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.call(Call.ENCAPSULATE_KEY, guest.session, mechanism, public, (), 4096)
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        guest.call(Call.ENCAPSULATE_KEY, guest.session, Mechanism(ck.CKM_ML_KEM, b"x"), public, template(AES_KEY), 4096)
    assert guest.find({}) == before
    guest.set(private, {ck.CKA_DECAPSULATE: False})
    guest.set(public, {ck.CKA_ENCAPSULATE: False})
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        decapsulate(guest, private, ciphertext, AES_KEY)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        encapsulate(guest, public, AES_KEY)


def test_encapsulated_token_objects_are_stored_once_they_can_be() -> None:
    own = OwnToken()
    guest = own.guest().begin()
    public, _ = kem_pair(guest)
    _, ours = encapsulate(guest, public, AES_KEY | OPEN | {ck.CKA_TOKEN: True})
    value = guest.get(ours, ck.CKA_VALUE)
    own.restart()
    assert own.guest().begin().get(ours, ck.CKA_VALUE) == value


@pytest.mark.parametrize("call", ["encapsulate", "derive in p11-kit's newer form"])
def test_what_waits_for_storage_answers_in_full(call: str) -> None:
    """While the state is handed to a successor nothing is stored: the request waits, and its answer has all its fields."""
    own = OwnToken()
    guest = own.guest().begin()
    token = template(AES_KEY | {ck.CKA_TOKEN: True, ck.CKA_VALUE_LEN: 16})
    public, _ = kem_pair(guest)
    base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | {ck.CKA_DERIVE: True})
    hkdf = Mechanism(ck.CKM_HKDF_DERIVE, (1, 1, ck.CKM_SHA256, ck.CKF_HKDF_SALT_NULL, b"", 0, b""))
    own.bench.keystore.freeze()
    with pytest.raises(Parked) as parked:
        if call == "encapsulate":
            encapsulate_key(guest.caller, (guest.session, KEM, public, token, 4096))
        else:
            derive_key2(guest.caller, (guest.session, hkdf, base, token))
    assert parked.value.ready() is None
    own.bench.keystore.thaw()
    answer = parked.value.ready()
    assert answer is not None and len(answer) == (2 if call == "encapsulate" else 3)
    assert guest.get(answer[-1], ck.CKA_VALUE_LEN) == [16]


def test_encapsulation_counts_for_the_rate() -> None:
    own = OwnToken(policy=Policy(rate=1, burst=3))
    guest = own.guest().begin()
    public, private = kem_pair(guest)
    encapsulate(guest, public, AES_KEY, None)
    ciphertext, _ = encapsulate(guest, public, AES_KEY)
    decapsulate(guest, private, ciphertext, AES_KEY)
    with refused(ck.CKR_FUNCTION_REJECTED):
        encapsulate(guest, public, AES_KEY)
    with refused(ck.CKR_FUNCTION_REJECTED):
        decapsulate(guest, private, ciphertext, AES_KEY)


# ---- wrapping with associated data --------------------------------------------------------------------------------------


def gcm(nonce: bytes = NONCE, tag: bytes = b"", generator: int = ck.CKG_NO_GENERATE) -> Mechanism:
    return Mechanism(ck.CKM_AES_GCM, (nonce, 0, generator, tag, 128))


def ccm(length: int, tag: bytes = b"") -> Mechanism:
    return Mechanism(ck.CKM_AES_CCM, (length, NONCE, 0, 0, tag, TAG))


def wrap(
    guest: OwnGuest, mechanism: Mechanism, wrapping: int, key: int, more: bytes = b"", room: int | None = 64
) -> tuple[Any, ...]:
    """Returns IV, tag and the wrapped key."""
    return guest.call(Call.WRAP_KEY_AUTHENTICATED, guest.session, mechanism, wrapping, key, more, room)


def unwrap(guest: OwnGuest, mechanism: Mechanism, unwrapping: int, data: bytes, more: bytes, values: dict[int, Any]) -> int:
    arguments = (mechanism, unwrapping, data, template(values), more)
    return int(guest.call(Call.UNWRAP_KEY_AUTHENTICATED, guest.session, *arguments)[0])


def wrapping_key(guest: OwnGuest) -> tuple[int, bytes]:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | OPEN)
    return key, guest.get(key, ck.CKA_VALUE)[0]


@pytest.mark.parametrize("mechanism", ["GCM", "GCM, made here", "CCM"])
def test_keys_are_wrapped_with_associated_data(guest: OwnGuest, mechanism: str) -> None:
    wrapping, value = wrapping_key(guest)
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | OPEN)
    (secret,) = guest.get(key, ck.CKA_VALUE)
    generator = ck.CKG_GENERATE_RANDOM if "made" in mechanism else ck.CKG_NO_GENERATE

    def parameter(nonce: bytes = NONCE, tag: bytes = b"", how: int = ck.CKG_NO_GENERATE) -> Mechanism:
        return gcm(nonce, tag, how) if "GCM" in mechanism else ccm(32, tag)

    for room in (None, 31):
        assert wrap(guest, parameter(how=generator), wrapping, key, b"data", room) == (b"", b"", Needed(32))
    made, tag, wrapped = wrap(guest, parameter(how=generator), wrapping, key, b"data", 32)
    nonce = made or NONCE
    assert (len(made), len(tag), len(wrapped)) == (12 if "made" in mechanism else 0, TAG, 32)
    theirs = AESGCM(value) if "GCM" in mechanism else AESCCM(value, TAG)
    assert theirs.decrypt(nonce, wrapped + tag, b"data") == secret
    back = unwrap(guest, parameter(nonce, tag), wrapping, wrapped, b"data", AES_KEY | OPEN)
    assert guest.get(back, ck.CKA_VALUE, ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE) == [secret, False, False]
    for other in ((nonce, tag, b"date"), (nonce, bytes(TAG), b"data")):
        with refused(ck.CKR_WRAPPED_KEY_INVALID):
            unwrap(guest, parameter(*other[:2]), wrapping, wrapped, other[2], AES_KEY | OPEN)
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        unwrap(guest, parameter(nonce, tag[:-1]), wrapping, wrapped, b"data", AES_KEY | OPEN)


def test_private_keys_are_wrapped_too(guest: OwnGuest) -> None:
    wrapping, _ = wrapping_key(guest)
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256} | VERIFIES, SIGNS | OPEN)
    _, tag, wrapped = wrap(guest, gcm(), wrapping, private, b"data", 4096)
    values = {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC} | SIGNS
    back = unwrap(guest, gcm(tag=tag), wrapping, wrapped, b"data", values)
    guest.verify(ECDSA, public, DATA, guest.sign(ECDSA, back, DATA))


def test_authenticated_wrapping_refuses(guest: OwnGuest) -> None:
    """What C_WrapKey refuses, and for the same reasons: an IV that the caller chose, or can choose there, hides nothing."""
    wrapping, _ = wrapping_key(guest)
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | OPEN)
    closed = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS)
    sensitive = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | {ck.CKA_EXTRACTABLE: True})
    keeper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS)
    for with_, what, mechanism, rv in (
        (wrapping, closed, gcm(), ck.CKR_KEY_UNEXTRACTABLE),
        (wrapping, sensitive, gcm(), ck.CKR_KEY_NOT_WRAPPABLE),
        (keeper, sensitive, gcm(), ck.CKR_KEY_NOT_WRAPPABLE),
        (keeper, sensitive, gcm(generator=ck.CKG_GENERATE_RANDOM), ck.CKR_KEY_NOT_WRAPPABLE),
        (closed, key, gcm(), ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (999, key, gcm(), ck.CKR_WRAPPING_KEY_HANDLE_INVALID),
        (wrapping, 999, gcm(), ck.CKR_KEY_HANDLE_INVALID),
        (wrapping, key, Mechanism(ck.CKM_AES_KEY_WRAP_KWP), ck.CKR_MECHANISM_INVALID),
        (wrapping, key, Mechanism(ck.CKM_AES_GCM, (NONCE, 96, b"", 128)), ck.CKR_MECHANISM_PARAM_INVALID),
        (wrapping, key, Mechanism(ck.CKM_AES_GCM), ck.CKR_MECHANISM_PARAM_INVALID),
        (wrapping, key, ccm(31), ck.CKR_KEY_SIZE_RANGE),
    ):
        with refused(rv):
            wrap(guest, mechanism, with_, what)
    _, tag, wrapped = wrap(guest, gcm(), wrapping, key)
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        unwrap(guest, gcm(tag=tag), closed, wrapped, b"", AES_KEY)
    with refused(ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID):
        unwrap(guest, gcm(tag=tag), 999, wrapped, b"", AES_KEY)
    with refused(ck.CKR_TEMPLATE_INCOMPLETE):
        unwrap(guest, gcm(tag=tag), wrapping, wrapped, b"", {})


# ---- what else is new in 3.2 --------------------------------------------------------------------------------------------


def test_validation_flags(guest: OwnGuest) -> None:
    assert guest.call(Call.GET_SESSION_VALIDATION_FLAGS, guest.session, ck.CKS_LAST_VALIDATION_OK) == (0,)
    for kind in (0, 2):
        with refused(ck.CKR_ARGUMENTS_BAD):
            guest.call(Call.GET_SESSION_VALIDATION_FLAGS, guest.session, kind)
    with refused(ck.CKR_SESSION_HANDLE_INVALID):
        guest.call(Call.GET_SESSION_VALIDATION_FLAGS, 99, 1)


def test_no_asynchronous_sessions(guest: OwnGuest) -> None:
    with refused(ck.CKR_SESSION_ASYNC_NOT_SUPPORTED):
        guest.open(RW | ck.CKF_ASYNC_SESSION)


def test_slot_0_has_none_of_it(guest: OwnGuest) -> None:
    session = guest.open(RW, 0)
    for call, arguments in (
        (Call.ENCAPSULATE_KEY, (KEM, 1, (), 4096)),
        (Call.DECAPSULATE_KEY, (KEM, 1, b"", ())),
        (Call.WRAP_KEY_AUTHENTICATED, (gcm(), 1, 2, b"", 64)),
        (Call.UNWRAP_KEY_AUTHENTICATED, (gcm(), 1, b"", (), b"")),
    ):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.call(call, session, *arguments)
