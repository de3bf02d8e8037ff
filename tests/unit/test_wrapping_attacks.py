"""Slot 1: what a guest's program must not learn of a sensitive key (control_domain/docs/wrapping.md: an attack each).

Clulow: On the Security of PKCS #11, 2003.  Bortolozzo, Centenaro, Focardi, Steel: Attacking and Fixing PKCS#11 Security Tokens,
2010.  Those on derivation and reading are in test_reading_attacks.py.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap
from hsmvisord import ck
from hsmvisord.crypto.mechanisms import GUEST_TABLE
from hsmvisord.token.keepers import KEEPING
from hsmvisord.wire.calls import Call, Mechanism
from support.guest import REPOSITORY
from support.own_keys import OwnGuest, OwnToken, template
from support.wire_client import Refused
from support.wrapping import (
    AES,
    CBC_PAD,
    CRYPTS,
    GCM,
    GENERIC,
    HKDF,
    IV,
    KW,
    KWP,
    NONCE,
    OAEP,
    OPEN,
    SECRET,
    SHARED,
    WRAPS,
    copy,
    keeper,
    readable,
    refused,
    sensitive,
)

P256, X25519 = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06032b656e")
EXTRACTABLE = {ck.CKA_EXTRACTABLE: True}
RSA = {ck.CKA_MODULUS_BITS: 2048}
PRIVATE = {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC}
HIDDEN = ((ck.CKA_SENSITIVE, True),)
UNWRAPS, DECRYPTS = {ck.CKA_UNWRAP: True}, {ck.CKA_DECRYPT: True}


@pytest.fixture
def own() -> OwnToken:
    return OwnToken()


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


def test_the_table_of_attacks_names_tests_that_are_there() -> None:
    told = set(re.findall(r"`(test_[a-z0-9_]+)`", (REPOSITORY / "control_domain/docs/wrapping.md").read_text()))
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    there = {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    attacks = {name for name in there if name.startswith("test_attack")}
    assert told <= there and attacks <= told, (told - there, attacks - told)


# ---- one key with two roles -----------------------------------------------------------------------------------------------


def test_attack_wrap_and_decrypt(guest: OwnGuest) -> None:
    """A key that wraps and decrypts would open what it has wrapped."""
    both = guest.generate(ck.CKM_AES_KEY_GEN, AES | CRYPTS | WRAPS)
    for mechanism in (KW, KWP, CBC_PAD, GCM):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(mechanism, both, sensitive(guest))
    guest.wrap(KW, both, guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN))


def test_attack_encrypt_and_unwrap(guest: OwnGuest) -> None:
    """What its holder encrypts may be unwrapped as a key that is known: such a key wraps nothing that is sensitive."""
    both = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: True, ck.CKA_UNWRAP: True})
    known = guest.unwrap(KW, both, guest.encrypt(KW, both, bytes(32)), SECRET | WRAPS)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, known, sensitive(guest))


@pytest.mark.parametrize("change", [OwnGuest.set, copy])
def test_attack_wrap_first_and_decrypt_later(guest: OwnGuest, change: Callable[..., Any]) -> None:
    """Attribute changes, by changing and by copying, do not make one key both."""
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_WRAP: True})
    assert len(guest.wrap(KW, wrapper, sensitive(guest))) == 40
    for kind in (ck.CKA_DECRYPT, ck.CKA_ENCRYPT, ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_DERIVE):
        for off in ({}, {ck.CKA_WRAP: False}):
            with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
                change(guest, wrapper, off | {kind: True})
    guest.set(wrapper, {ck.CKA_WRAP: False})
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        change(guest, wrapper, {ck.CKA_DECRYPT: True})
    opener = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_DECRYPT: True})
    guest.set(opener, {ck.CKA_DECRYPT: False})
    for kind in WRAPS:
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            change(guest, opener, {kind: True})


def test_attack_two_copies_with_conflicting_roles(guest: OwnGuest) -> None:
    """Of a key without a role one copy would wrap and another decrypt: a key wraps from the start or never."""
    blank = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: False})
    for kind in WRAPS:
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            copy(guest, blank, {kind: True})
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(blank, {kind: True})
    opener = copy(guest, blank, {ck.CKA_DECRYPT: True})
    assert guest.get(opener, ck.CKA_DECRYPT, ck.CKA_WRAP) == [True, False]


def test_attack_a_race_of_two_changes(own: OwnToken, guest: OwnGuest) -> None:
    """A change that was made of what an object was before another change does not undo that: what goes one way stays."""
    for token in (True, False):
        for _ in range(40):
            key = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_TOKEN: token})
            threads = [
                threading.Thread(target=guest.set, args=(key, values))
                for values in ({ck.CKA_LABEL: b"a"}, {ck.CKA_SENSITIVE: True}, {ck.CKA_ID: b"b"}, {ck.CKA_EXTRACTABLE: False})
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            told = guest.get(key, ck.CKA_LABEL, ck.CKA_SENSITIVE, ck.CKA_ID, ck.CKA_EXTRACTABLE)
            assert told == [b"a", True, b"b", False]
            guest.call(Call.DESTROY_OBJECT, guest.session, key)


def test_a_change_that_comes_too_late_is_made_anew(own: OwnToken, guest: OwnGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with the other change between the look and the write."""
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_TOKEN: True})
    keystore, waiting = own.token.keystore, [{ck.CKA_SENSITIVE: True}]
    store = keystore.change_object

    def late(handle: int, attributes: Any, before: Any = None) -> bool:
        if waiting:
            there = keystore.state.objects[handle].attributes
            store(handle, {**there, **waiting.pop()})
        return store(handle, attributes, before)

    monkeypatch.setattr(keystore, "change_object", late)
    guest.set(key, {ck.CKA_LABEL: b"late"})
    assert guest.get(key, ck.CKA_LABEL, ck.CKA_SENSITIVE) == [b"late", True]


def test_attack_one_way_attributes(guest: OwnGuest) -> None:
    key = sensitive(guest)
    hidden = guest.generate(ck.CKM_AES_KEY_GEN, AES)
    careful = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_WRAP_WITH_TRUSTED: True})
    attempts = ((key, {ck.CKA_SENSITIVE: False}), (hidden, EXTRACTABLE), (careful, {ck.CKA_WRAP_WITH_TRUSTED: False}))
    for handle, values in attempts:
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(handle, values)
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            copy(guest, handle, values)
    told = (ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE, ck.CKA_KEY_GEN_MECHANISM)
    for kind in told:
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(key, {kind: guest.get(key, kind)[0]})


# ---- out and in again ----------------------------------------------------------------------------------------------------


def test_attack_re_import(guest: OwnGuest) -> None:
    """What was wrapped does not come back as a key that may be read."""
    wrapper = keeper(guest)
    wrapped = guest.wrap(KW, wrapper, sensitive(guest))
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KW, wrapper, wrapped, SECRET | OPEN)
    again = guest.unwrap(KW, wrapper, wrapped, SECRET | EXTRACTABLE)
    assert not readable(guest, again)
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.set(again, {ck.CKA_SENSITIVE: False})


def test_attack_a_template_that_opens_what_is_unwrapped(guest: OwnGuest) -> None:
    """CKA_UNWRAP_TEMPLATE says no other than what a key that keeps secrets demands."""
    wrapper = keeper(guest, {ck.CKA_UNWRAP_TEMPLATE: ((ck.CKA_SENSITIVE, False), (ck.CKA_EXTRACTABLE, True))})
    wrapped = guest.wrap(KW, wrapper, sensitive(guest))
    for values in (SECRET, SECRET | OPEN, SECRET | {ck.CKA_SENSITIVE: True}):
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.unwrap(KW, wrapper, wrapped, values)


def test_attack_a_wrapping_key_comes_back_as_another(guest: OwnGuest) -> None:
    """The wrapping key itself, wrapped and taken in again with other flags, wraps nothing that is sensitive."""
    wrapper, second = keeper(guest, EXTRACTABLE), keeper(guest)
    opener = guest.unwrap(KW, second, guest.wrap(KW, second, wrapper), SECRET | CRYPTS)
    assert opener
    for mechanism in (KW, KWP):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(mechanism, wrapper, sensitive(guest))
    guest.set(wrapper, {ck.CKA_EXTRACTABLE: False})
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, wrapper, sensitive(guest))


def test_attack_a_private_key_as_something_else(guest: OwnGuest) -> None:
    """A wrapped private key comes back as no data object, and as no secret key that may be read or is a part of it."""
    wrapper = keeper(guest)
    _, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256}, {ck.CKA_SIGN: True} | EXTRACTABLE)
    wrapped = guest.wrap(KWP, wrapper, private)
    for cls in (ck.CKO_DATA, ck.CKO_CERTIFICATE, ck.CKO_PUBLIC_KEY):
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.unwrap(KWP, wrapper, wrapped, {ck.CKA_CLASS: cls})
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KWP, wrapper, wrapped, GENERIC | OPEN)
    for part in (SECRET, {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_CHACHA20}):
        with refused(ck.CKR_WRAPPED_KEY_LEN_RANGE):
            guest.unwrap(KWP, wrapper, wrapped, part)
    whole = guest.unwrap(KWP, wrapper, wrapped, GENERIC | EXTRACTABLE)
    assert not readable(guest, whole)
    with refused(ck.CKR_WRAPPED_KEY_INVALID):
        guest.unwrap(
            KW, wrapper, guest.wrap(KW, wrapper, sensitive(guest)), {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC}
        )


def test_attack_a_shortened_key(guest: OwnGuest) -> None:
    """A part of a wrapped key is no key: neither by another type nor by CKA_VALUE_LEN."""
    wrapper = keeper(guest)
    long = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, {ck.CKA_VALUE_LEN: 40} | EXTRACTABLE)
    wrapped = guest.wrap(KW, wrapper, long)
    with refused(ck.CKR_WRAPPED_KEY_LEN_RANGE):
        guest.unwrap(KW, wrapper, wrapped, SECRET)
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KW, wrapper, wrapped, GENERIC | {ck.CKA_VALUE_LEN: 1})
    for cut in (wrapped[:-8], wrapped[8:], wrapped[:24]):
        with refused(ck.CKR_WRAPPED_KEY_INVALID):
            guest.unwrap(KW, wrapper, cut, GENERIC)


def test_attack_key_binding(guest: OwnGuest) -> None:
    """Halves of wrapped keys do not make a new one: KW and KWP authenticate the whole."""
    wrapper = keeper(guest)
    first, second = (guest.wrap(KW, wrapper, sensitive(guest)) for _ in range(2))
    for mixed in (first[:24] + second[24:], first[:8] + second[8:], first[:16] + first[:16] + first[32:]):
        with refused(ck.CKR_WRAPPED_KEY_INVALID):
            guest.unwrap(KW, wrapper, mixed, SECRET)


def test_attack_a_weak_wrapping_key(guest: OwnGuest) -> None:
    """No mechanism that wraps sensitive keys is of a cipher whose keys can be searched; short RSA keys do not, trusted or not."""
    assert {kind for mechanism in KEEPING for kind in GUEST_TABLE[mechanism].key_types} == {ck.CKK_AES, ck.CKK_RSA}
    assert min(GUEST_TABLE[m].smallest for m in KEEPING if ck.CKK_AES in GUEST_TABLE[m].key_types) == 16
    with refused(ck.CKR_KEY_SIZE_RANGE, ck.CKR_ATTRIBUTE_VALUE_INVALID):
        guest.generate(ck.CKM_AES_KEY_GEN, WRAPS | {ck.CKA_VALUE_LEN: 8})


# ---- what a wrapping key tells otherwise ----------------------------------------------------------------------------------


def test_attack_a_nonce_used_twice(guest: OwnGuest) -> None:
    """Wrapped under the same nonce or a chosen IV, a key that is known would tell the one that is not."""
    wrapper, known = keeper(guest), guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    for mechanism in (GCM, Mechanism(ck.CKM_AES_CCM, (32, NONCE, b"", 16)), CBC_PAD, Mechanism(ck.CKM_AES_CBC, IV)):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.wrap(mechanism, wrapper, known)
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(mechanism, wrapper, sensitive(guest))


@pytest.mark.parametrize("generator", [ck.CKG_NO_GENERATE, ck.CKG_GENERATE_COUNTER_XOR, ck.CKG_GENERATE_RANDOM])
def test_attack_a_nonce_used_twice_with_associated_data(guest: OwnGuest, generator: int) -> None:
    """C_WrapKeyAuthenticated, too; nor does a key that keeps secrets unwrap so."""
    wrapper, known = keeper(guest), guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    gcm = Mechanism(ck.CKM_AES_GCM, (NONCE, 0, generator, bytes(16), 128))
    for key, rv in ((known, ck.CKR_MECHANISM_INVALID), (sensitive(guest), ck.CKR_KEY_NOT_WRAPPABLE)):
        with refused(rv):
            guest.call(Call.WRAP_KEY_AUTHENTICATED, guest.session, gcm, wrapper, key, b"", 64)
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.call(Call.UNWRAP_KEY_AUTHENTICATED, guest.session, gcm, wrapper, bytes(32), template(SECRET), b"")


def padding_oracle(guest: OwnGuest, key: int, block: bytes) -> bytes | None:
    """Returns the block's decryption with the key (Vaudenay, 2002), by errors of unwrapping alone; None where they tell nothing."""

    def accepted(iv: bytes) -> bool:
        try:
            handle = guest.unwrap(Mechanism(ck.CKM_AES_CBC_PAD, iv), key, block, GENERIC)
        except Refused:
            return False
        guest.call(Call.DESTROY_OBJECT, guest.session, handle)
        return True

    found = bytearray(16)
    for pad in range(1, 16):
        iv = bytearray(found[n] ^ pad if n > 16 - pad else 0 for n in range(16))
        for guess in range(256):
            iv[16 - pad] = guess
            if accepted(bytes(iv)) and (pad > 1 or accepted(bytes([*iv[:14], iv[14] ^ 1, iv[15]]))):
                found[16 - pad] = guess ^ pad
                break
        else:
            return None
    return bytes(found)


def test_attack_padding_oracle_of_unwrapping(guest: OwnGuest) -> None:
    """Its errors decrypt any block, those of AES-KW's too: a key that may wrap sensitive ones does not unwrap by CBC, nor one whose
    CKA_UNWRAP_TEMPLATE hides what comes out.  That the search works is shown by a key that says nothing of it."""
    value = bytes(range(32))
    block = aes_key_wrap(value, bytes(16))[:16]
    loose = guest.create(SECRET | {ck.CKA_VALUE: value} | WRAPS)
    told = padding_oracle(guest, loose, block)
    assert told is not None and told[1:] == _decrypted(value, block)[1:]
    hides = [HIDDEN, ((ck.CKA_EXTRACTABLE, False),)]
    strict = [guest.create(SECRET | {ck.CKA_VALUE: value} | WRAPS | {ck.CKA_UNWRAP_TEMPLATE: one}) for one in hides]
    for key in (keeper(guest), *strict):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.unwrap(CBC_PAD, key, block, GENERIC)
        assert padding_oracle(guest, key, block) is None
    for mechanism in (Mechanism(ck.CKM_AES_CBC, IV), GCM):
        with refused(ck.CKR_MECHANISM_INVALID):
            guest.unwrap(mechanism, keeper(guest), bytes(64), GENERIC)


def _decrypted(value: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(value), modes.ECB()).decryptor().update(block)


@pytest.mark.parametrize("more", [ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_DERIVE])
def test_attack_a_wrapping_key_as_an_oracle(guest: OwnGuest, more: int) -> None:
    """GMAC of nothing is one block of the keystream: a key that does more than wrap wraps nothing that is sensitive."""
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | {more: True})
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, wrapper, sensitive(guest))
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.set(keeper(guest), {more: True})


def test_attack_bleichenbacher(guest: OwnGuest) -> None:
    """RSA PKCS #1 v1.5: each ciphertext decrypts and unwraps, an invalid one to other bytes, the same ones each time."""
    public, private = guest.pair(
        ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | {ck.CKA_ENCRYPT: True}, {ck.CKA_DECRYPT: True, ck.CKA_UNWRAP: True}
    )
    pkcs1, rng = Mechanism(ck.CKM_RSA_PKCS), random.Random(1)
    sealed = guest.encrypt(pkcs1, public, b"k" * 32)
    lengths = set()
    for _ in range(40):
        wrong = b"\0" + rng.randbytes(255)
        plain = guest.decrypt(pkcs1, private, wrong)
        assert plain == guest.decrypt(pkcs1, private, wrong)
        lengths.add(len(plain))
        if plain:
            handle = guest.unwrap(pkcs1, private, wrong, GENERIC)
            assert guest.get(handle, ck.CKA_VALUE_LEN) == [len(plain)]
            guest.call(Call.DESTROY_OBJECT, guest.session, handle)
    assert len(lengths) > 10, "an invalid one has no length of its own"
    assert guest.decrypt(pkcs1, private, sealed) == b"k" * 32


def test_attack_oaep_and_rsa_aes_say_one_thing(guest: OwnGuest) -> None:
    """Manger, 2001: whatever is wrong with a ciphertext, the answer is the same."""
    public, private = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | {ck.CKA_WRAP: True}, {ck.CKA_UNWRAP: True})
    both = Mechanism(ck.CKM_RSA_AES_KEY_WRAP, (256, *(OAEP.parameter or ())))  # type: ignore[misc]
    free = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    for mechanism in (OAEP, both):
        wrapped = guest.wrap(mechanism, public, free)
        for at in (1, 100, 255, len(wrapped) - 1):
            wrong = wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :]
            with refused(ck.CKR_WRAPPED_KEY_INVALID):
                guest.unwrap(mechanism, private, wrong, SECRET)


# ---- keys that the attacker knows or chooses ------------------------------------------------------------------------------


def test_attack_a_key_that_the_attacker_knows(guest: OwnGuest) -> None:
    """A wrapping key that was brought in, secret or public (a Trojan one), or that may be read or could once."""
    value = bytes(range(32))
    known = guest.create(SECRET | {ck.CKA_VALUE: value} | WRAPS)
    open_one, was_open = keeper(guest, OPEN), keeper(guest, {ck.CKA_SENSITIVE: False})
    guest.set(was_open, {ck.CKA_SENSITIVE: True})
    public, _ = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | {ck.CKA_WRAP: True}, {ck.CKA_DECRYPT: True})
    modulus, exponent = guest.get(public, ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT)
    trojan = {
        ck.CKA_CLASS: ck.CKO_PUBLIC_KEY,
        ck.CKA_KEY_TYPE: ck.CKK_RSA,
        ck.CKA_MODULUS: modulus,
        ck.CKA_PUBLIC_EXPONENT: exponent,
    }
    brought = guest.create(trojan | {ck.CKA_WRAP: True})
    for wrapper, mechanism in ((known, KW), (open_one, KW), (was_open, KW), (public, OAEP), (brought, OAEP)):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(mechanism, wrapper, sensitive(guest))
    free = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    assert aes_key_unwrap(value, guest.wrap(KW, known, free)) == guest.get(free, ck.CKA_VALUE)[0]


def test_attack_wrapping_with_derived_keys(guest: OwnGuest) -> None:
    """A derived key can be derived again with other flags: it wraps nothing that is sensitive, whatever it was derived from."""
    for more in (OPEN, {}):
        base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | more | {ck.CKA_DERIVE: True})
        derived = guest.derive(HKDF, base, SECRET | WRAPS | {ck.CKA_VALUE_LEN: 32})
        opener = guest.derive(HKDF, base, SECRET | CRYPTS | {ck.CKA_VALUE_LEN: 32})
        assert guest.get(derived, ck.CKA_CHECK_VALUE) == guest.get(opener, ck.CKA_CHECK_VALUE), "the same key twice"
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(KW, derived, sensitive(guest))


def test_attack_a_key_that_is_known_may_be_no_trusted_one(guest: OwnGuest) -> None:
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.create(SECRET | {ck.CKA_VALUE: bytes(32), ck.CKA_TRUSTED: True} | WRAPS)
    key = keeper(guest, {ck.CKA_UNWRAP_TEMPLATE: ((ck.CKA_TRUSTED, True),)})
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.unwrap(KW, key, guest.wrap(KW, key, sensitive(guest)), SECRET)


def test_attack_a_key_for_unwrapping_begins_to_decrypt(guest: OwnGuest) -> None:
    """What others wrapped for a key pair of this token, under a template that hides it, its private key does not decrypt later."""
    _, private = guest.pair(
        ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA, {ck.CKA_UNWRAP: True, ck.CKA_UNWRAP_TEMPLATE: ((ck.CKA_SENSITIVE, True),)}
    )
    for kind in (ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_SIGN_RECOVER):
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(private, {kind: True})
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            copy(guest, private, {kind: True})


def test_attacks_after_a_restart(own: OwnToken, guest: OwnGuest) -> None:
    """What a key ever could do is stored with it."""
    wrapper = keeper(guest, SHARED)
    wrapped = guest.wrap(KW, wrapper, sensitive(guest))
    guest.set(wrapper, {ck.CKA_WRAP: False})
    own.restart()
    again = own.guest().begin()
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        again.set(wrapper, {ck.CKA_DECRYPT: True})
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        again.unwrap(KW, wrapper, wrapped, SECRET | OPEN)
