"""Slot 1: CKA_TRUSTED, CKA_WRAP_WITH_TRUSTED and the templates of wrapping, unwrapping and deriving keys, sentence by sentence
(PKCS#11 3.1, 4.8-4.10, 5.18.3-5.18.5), and what else it takes before a sensitive key is wrapped."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.own_keys import OwnGuest, OwnToken
from support.wrapping import (
    AES,
    CBC_PAD,
    CRYPTS,
    GENERIC,
    HKDF,
    KW,
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

TRUSTED, CAREFUL = {ck.CKA_TRUSTED: True}, {ck.CKA_EXTRACTABLE: True, ck.CKA_WRAP_WITH_TRUSTED: True}
KEK, RSA = bytes(range(32)), {ck.CKA_MODULUS_BITS: 2048}
IMPORTED = SECRET | {ck.CKA_VALUE: KEK} | WRAPS | SHARED


@pytest.fixture
def own() -> OwnToken:
    return OwnToken()


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


@pytest.fixture
def officer(own: OwnToken) -> OwnGuest:
    return own.guest().begin(ck.CKU_SO)


def careful(guest: OwnGuest) -> int:
    return guest.generate(ck.CKM_AES_KEY_GEN, AES | CAREFUL)


def peer(more: dict[int, Any], bits: int = 2048) -> tuple[rsa.RSAPrivateKey, dict[int, Any]]:
    """A key of another module, and the template of its public half here."""
    key = rsa.generate_private_key(65537, bits)
    modulus = key.public_key().public_numbers().n.to_bytes(bits // 8)
    public = {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_KEY_TYPE: ck.CKK_RSA, ck.CKA_WRAP: True}
    return key, public | SHARED | {ck.CKA_MODULUS: modulus, ck.CKA_PUBLIC_EXPONENT: b"\1\0\1"} | more


# ---- CKA_TRUSTED: "Can only be set to CK_TRUE by the SO user" (4.2, footnote 10) --------------------------------------------


def test_nobody_but_the_officer_trusts(own: OwnToken, guest: OwnGuest, officer: OwnGuest) -> None:
    key, public = keeper(guest, SHARED), guest.create(peer({})[1])
    for handle in (key, public):
        for attempt in (lambda h=handle: guest.set(h, TRUSTED), lambda h=handle: copy(guest, h, TRUSTED)):  # type: ignore[misc]
            with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
                attempt()
    for make in (
        lambda: guest.create(IMPORTED | TRUSTED),
        lambda: guest.create(peer(TRUSTED)[1]),
        lambda: guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | TRUSTED),
        lambda: guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | TRUSTED, {}),
        lambda: guest.unwrap(KW, key, guest.wrap(KW, key, sensitive(guest)), SECRET | TRUSTED),
    ):
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            make()
    public_session = own.guest().begin(None)
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        public_session.set(key, TRUSTED)
    for handle in (key, public):
        assert guest.get(handle, ck.CKA_TRUSTED) == [False]
        officer.set(handle, TRUSTED)
        assert guest.get(handle, ck.CKA_TRUSTED) == [True]


def test_trust_may_be_taken_away_by_anybody_and_given_by_the_officer(guest: OwnGuest, officer: OwnGuest) -> None:
    key = keeper(guest, SHARED)
    officer.set(key, TRUSTED)
    guest.set(key, {ck.CKA_TRUSTED: False})
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, key, careful(guest))
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.set(key, TRUSTED)
    officer.set(key, TRUSTED)
    assert guest.wrap(KW, key, careful(guest))


def test_trust_is_no_attribute_of_a_private_key(guest: OwnGuest, officer: OwnGuest) -> None:
    with refused(ck.CKR_ATTRIBUTE_TYPE_INVALID):
        officer.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | SHARED, TRUSTED | {ck.CKA_PRIVATE: False})


# ---- CKA_WRAP_WITH_TRUSTED: "CK_TRUE if the key can only be wrapped with a wrapping key that has CKA_TRUSTED set to CK_TRUE" -----


def test_a_careful_key_is_wrapped_by_a_trusted_one_alone(guest: OwnGuest, officer: OwnGuest) -> None:
    wrapper, secret = keeper(guest, SHARED), careful(guest)
    _, private = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA, CAREFUL)
    readable_too = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | CAREFUL)
    kwp = Mechanism(ck.CKM_AES_KEY_WRAP_KWP)
    for key in (secret, private, readable_too):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(kwp, wrapper, key)
    officer.set(wrapper, TRUSTED)
    for key in (secret, private, readable_too):
        assert guest.wrap(kwp, wrapper, key)


def test_care_is_for_ever(guest: OwnGuest) -> None:
    """ "Once set to CK_TRUE it cannot be changed back" (4.2, footnote 11)."""
    key = sensitive(guest)
    guest.set(key, {ck.CKA_WRAP_WITH_TRUSTED: True})
    for handle in (key, careful(guest), copy(guest, key, {})):
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(handle, {ck.CKA_WRAP_WITH_TRUSTED: False})
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            copy(guest, handle, {ck.CKA_WRAP_WITH_TRUSTED: False})


def test_a_careful_key_comes_back_careful(guest: OwnGuest, officer: OwnGuest) -> None:
    wrapper, other = keeper(guest, SHARED), keeper(guest)
    officer.set(wrapper, TRUSTED)
    wrapped = guest.wrap(KW, wrapper, careful(guest))
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KW, wrapper, wrapped, SECRET | {ck.CKA_WRAP_WITH_TRUSTED: False})
    again = guest.unwrap(KW, wrapper, wrapped, SECRET | {ck.CKA_EXTRACTABLE: True})
    assert guest.get(again, ck.CKA_SENSITIVE, ck.CKA_WRAP_WITH_TRUSTED) == [True, True]
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, other, again)


# ---- trust and what else it takes ---------------------------------------------------------------------------------------------


def test_a_trusted_key_that_opens_keeps_no_secret(guest: OwnGuest, officer: OwnGuest) -> None:
    """The officer vouches for a key's value, not for what its user does with it."""
    for more in (CRYPTS, {ck.CKA_SIGN: True}, {ck.CKA_DERIVE: True}, OPEN, {ck.CKA_EXTRACTABLE: True}):
        key = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | SHARED | more)
        officer.set(key, TRUSTED)
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(KW, key, sensitive(guest))
    decrypted = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | SHARED | CRYPTS)
    guest.set(decrypted, dict.fromkeys(CRYPTS, False))  # that is all that the officer sees
    officer.set(decrypted, TRUSTED)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, decrypted, careful(guest))


def test_a_trusted_key_that_could_leave_keeps_no_secret(guest: OwnGuest, officer: OwnGuest) -> None:
    """It may have left, and come back as another."""
    for more in ({ck.CKA_EXTRACTABLE: True}, OPEN):
        key = officer.create(IMPORTED | TRUSTED | more)
        for _ in range(2):
            with refused(ck.CKR_KEY_NOT_WRAPPABLE):
                guest.wrap(KW, key, sensitive(guest))
            guest.set(key, {ck.CKA_SENSITIVE: True, ck.CKA_EXTRACTABLE: False})


def test_a_key_that_the_officer_brings_in(guest: OwnGuest, officer: OwnGuest) -> None:
    """It is shared with another module: there what is wrapped comes in, and from there it comes here."""
    key = officer.create(IMPORTED | TRUSTED)
    wrapped = guest.wrap(KW, key, careful(guest))
    for template in (SECRET | OPEN, SECRET | {ck.CKA_WRAP_WITH_TRUSTED: False}):
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.unwrap(KW, key, wrapped, template)
    assert not readable(guest, guest.unwrap(KW, key, wrapped, SECRET))
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.unwrap(CBC_PAD, key, wrapped, GENERIC)


def test_a_key_that_a_user_brought_in_may_have_copies(guest: OwnGuest, officer: OwnGuest) -> None:
    """A copy from before is not trusted and would unwrap what the trusted one wrapped; without copies it can be trusted."""
    key = guest.create(IMPORTED)
    copied = copy(guest, key, {})
    officer.set(key, TRUSTED)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, key, sensitive(guest))
    assert copied
    alone = guest.create(IMPORTED | {ck.CKA_COPYABLE: False})
    officer.set(alone, TRUSTED)
    assert guest.wrap(KW, alone, careful(guest))


@pytest.mark.parametrize("how", ["changed", "copied"])
def test_trust_that_is_taken_away_opens_nothing(guest: OwnGuest, officer: OwnGuest, how: str) -> None:
    key = officer.create(IMPORTED | TRUSTED)
    wrapped = guest.wrap(KW, key, sensitive(guest))
    untrusted = key
    if how == "copied":
        untrusted = copy(guest, key, {ck.CKA_TRUSTED: False})
    else:
        guest.set(key, {ck.CKA_TRUSTED: False})
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.unwrap(KW, untrusted, wrapped, SECRET | OPEN)
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.unwrap(CBC_PAD, untrusted, wrapped, GENERIC)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KW, untrusted, sensitive(guest))


def test_a_trusted_public_key_of_another_module(guest: OwnGuest, officer: OwnGuest) -> None:
    key, template = peer({})
    public = guest.create(template)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(OAEP, public, careful(guest))
    officer.set(public, TRUSTED)
    wrapped = guest.wrap(OAEP, public, careful(guest))
    assert len(key.decrypt(wrapped, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))) == 32
    short = officer.create(peer(TRUSTED, bits=1024)[1])
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(Mechanism(ck.CKM_RSA_PKCS), short, sensitive(guest))


def test_a_trusted_public_key_whose_private_half_is_here(guest: OwnGuest, officer: OwnGuest) -> None:
    """It would be unwrapped into the clear: by the pair that was generated here, or by a private half that was brought in."""
    public, private = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | {ck.CKA_WRAP: True} | SHARED, {ck.CKA_UNWRAP: True})
    modulus, exponent = guest.get(public, ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT)
    again = peer({})[1] | {ck.CKA_MODULUS: modulus, ck.CKA_PUBLIC_EXPONENT: exponent}
    for handle in (public, guest.create(again)):
        officer.set(handle, TRUSTED)
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(OAEP, handle, sensitive(guest))
        free = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
        assert readable(guest, guest.unwrap(OAEP, private, guest.wrap(OAEP, handle, free), SECRET | OPEN))
    guest.call(Call.DESTROY_OBJECT, guest.session, private)  # or another application has it, as a session object
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(OAEP, public, sensitive(guest))


# ---- CKA_WRAP_TEMPLATE: "compared against the attributes of the key to be wrapped" (5.18.3) --------------------------------------


def test_the_wrap_template_partitions(guest: OwnGuest) -> None:
    """ "If any attribute mismatch occurs [...] the function SHALL return CKR_KEY_HANDLE_INVALID." """
    demands = ((ck.CKA_LABEL, b"payment"), (ck.CKA_SIGN, True))
    wrapper = keeper(guest, {ck.CKA_WRAP_TEMPLATE: demands})
    fits = {ck.CKA_LABEL: b"payment", ck.CKA_SIGN: True, ck.CKA_EXTRACTABLE: True}
    assert guest.wrap(KW, wrapper, guest.generate(ck.CKM_AES_KEY_GEN, AES | fits))
    for wrong in ({ck.CKA_LABEL: b"other"}, {ck.CKA_SIGN: False, ck.CKA_VERIFY: True}):
        with refused(ck.CKR_KEY_HANDLE_INVALID):
            guest.wrap(KW, wrapper, guest.generate(ck.CKM_AES_KEY_GEN, AES | fits | wrong))
    public = guest.create(peer({ck.CKA_WRAP_TEMPLATE: demands})[1])
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        guest.wrap(OAEP, public, guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN))


def test_a_wrap_template_guesses_nothing(guest: OwnGuest) -> None:
    """A value that may not be read matches no template, right or wrong."""
    key = guest.create(SECRET | {ck.CKA_VALUE: KEK, ck.CKA_EXTRACTABLE: True})
    for guess in (KEK, bytes(32)):
        with refused(ck.CKR_KEY_HANDLE_INVALID):
            guest.wrap(KW, keeper(guest, {ck.CKA_WRAP_TEMPLATE: ((ck.CKA_VALUE, guess),)}), key)


# ---- CKA_UNWRAP_TEMPLATE: "an attribute set that will be added to attributes of the key to be unwrapped" (5.18.4) ----------------


def test_the_unwrap_template_is_added(guest: OwnGuest) -> None:
    """ "If any attribute conflict occurs [...] then the function SHALL return CKR_TEMPLATE_INCONSISTENT." """
    demands = ((ck.CKA_EXTRACTABLE, False), (ck.CKA_LABEL, b"in"), (ck.CKA_KEY_TYPE, ck.CKK_AES))
    wrapper = keeper(guest, {ck.CKA_UNWRAP_TEMPLATE: demands})
    wrapped = guest.wrap(KW, wrapper, sensitive(guest))
    again = guest.unwrap(KW, wrapper, wrapped, {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_ID: b"7"})
    assert guest.get(again, ck.CKA_EXTRACTABLE, ck.CKA_LABEL, ck.CKA_KEY_TYPE, ck.CKA_ID) == [False, b"in", ck.CKK_AES, b"7"]
    guest.unwrap(KW, wrapper, wrapped, SECRET | {ck.CKA_LABEL: b"in"})
    for wrong in ({ck.CKA_EXTRACTABLE: True}, {ck.CKA_LABEL: b"out"}, GENERIC):
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.unwrap(KW, wrapper, wrapped, SECRET | wrong)


# ---- CKA_DERIVE_TEMPLATE ----------------------------------------------------------------------------------------------------


def test_the_derive_template_is_added(guest: OwnGuest) -> None:
    demands = ((ck.CKA_SENSITIVE, True), (ck.CKA_VALUE_LEN, 32), (ck.CKA_SIGN, True))
    base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | {ck.CKA_DERIVE: True, ck.CKA_DERIVE_TEMPLATE: demands})
    derived = guest.derive(HKDF, base, GENERIC)
    assert guest.get(derived, ck.CKA_SENSITIVE, ck.CKA_VALUE_LEN, ck.CKA_SIGN) == [True, 32, True] and not readable(guest, derived)
    for wrong in (OPEN, {ck.CKA_VALUE_LEN: 16}, {ck.CKA_SIGN: False}):
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.derive(HKDF, base, GENERIC | wrong)


def test_the_derive_template_of_a_private_key(guest: OwnGuest) -> None:
    curve = {ck.CKA_EC_PARAMS: bytes.fromhex("06032b656e")}
    derives = {ck.CKA_DERIVE: True, ck.CKA_DERIVE_TEMPLATE: ((ck.CKA_EXTRACTABLE, False),)}
    public, private = guest.pair(ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, curve, derives)
    ecdh = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", guest.get(public, ck.CKA_EC_POINT)[0]))
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.derive(ecdh, private, GENERIC | OPEN)
    assert not readable(guest, guest.derive(ecdh, private, GENERIC | {ck.CKA_SENSITIVE: False}))


# ---- all three --------------------------------------------------------------------------------------------------------------

TEMPLATES = (ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_stay_as_they_are(guest: OwnGuest, kind: int) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {kind: ((ck.CKA_LABEL, b"x"),)})
    for values in ({kind: ()}, {kind: ((ck.CKA_LABEL, b"y"),)}):
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(key, values)
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            copy(guest, key, values)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_says_one_thing(guest: OwnGuest, kind: int) -> None:
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        guest.generate(ck.CKM_AES_KEY_GEN, AES | {kind: ((ck.CKA_SENSITIVE, True), (ck.CKA_SENSITIVE, False))})
