"""Slot 1: what a guest's program must not learn of a key by derivations, MACs and reading (control_domain/docs/wrapping.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.crypto import macs
from hsmvisord.crypto.mechanisms import GUEST_TABLE
from hsmvisord.wire.calls import Call, Mechanism
from support.own_keys import OwnGuest, OwnToken
from support.wrapping import AES, CBC_PAD, GENERIC, HKDF, KW, OAEP, OPEN, copy, keeper, readable, refused

X25519, RSA = bytes.fromhex("06032b656e"), {ck.CKA_MODULUS_BITS: 2048}


@pytest.fixture
def guest() -> OwnGuest:
    return OwnToken().guest().begin()


# ---- derivation and MACs --------------------------------------------------------------------------------------------------

DERIVES = {ck.CKA_DERIVE: True, ck.CKA_DERIVE_TEMPLATE: ((ck.CKA_SENSITIVE, True),)}


def agreement(guest: OwnGuest, more: dict[int, Any]) -> Callable[[dict[int, Any]], int]:
    _, private = guest.pair(ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: X25519}, more)
    peer, _ = guest.pair(ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: X25519}, {ck.CKA_DERIVE: True})
    (point,) = guest.get(peer, ck.CKA_EC_POINT)
    return lambda values: guest.derive(Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point)), private, values)


def test_attack_a_derived_key_byte_by_byte(guest: OwnGuest) -> None:
    """Parts of 1, 2, 3 ... bytes of one hidden secret would each be found by trying: by ECDH as by HKDF there are none below 16."""
    base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | DERIVES)
    for derive in (agreement(guest, DERIVES), lambda values: guest.derive(HKDF, base, values)):
        for length in (1, 2, 8, 15):
            with refused(ck.CKR_KEY_SIZE_RANGE):
                derive(GENERIC | {ck.CKA_VALUE_LEN: length})
        assert guest.get(derive(GENERIC | {ck.CKA_VALUE_LEN: 16}), ck.CKA_SENSITIVE) == [True]
    free = agreement(guest, {ck.CKA_DERIVE: True})
    assert len(guest.get(free(GENERIC | OPEN | {ck.CKA_VALUE_LEN: 1}), ck.CKA_VALUE)[0]) == 1, "where nothing is to be hidden"


def test_attack_mechanisms_that_take_keys_apart_are_not_there(guest: OwnGuest) -> None:
    """Clulow's: a part of a key, a key joined or XORed with what is known (PKCS#11 3.1, 6.43)."""
    base = guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES | {ck.CKA_DERIVE: True})
    apart = {"CONCATENATE_BASE_AND_KEY": 0x360, "CONCATENATE_BASE_AND_DATA": 0x362, "CONCATENATE_DATA_AND_BASE": 0x363}
    apart |= {"XOR_BASE_AND_DATA": 0x364, "EXTRACT_KEY_FROM_KEY": 0x365}
    for mechanism in apart.values():
        assert mechanism not in GUEST_TABLE
        for parameter in (None, (8).to_bytes(8, "little")):
            with refused(ck.CKR_MECHANISM_INVALID):
                guest.derive(Mechanism(mechanism, parameter), base, GENERIC | OPEN)


def test_attack_a_mac_by_a_salt(guest: OwnGuest) -> None:
    """HKDF's extraction is an HMAC by its salt: a salt is a key that may derive, by HKDF, and its template holds."""
    mac = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_SHA256_HMAC, ck.CKA_VALUE: b"k" * 32}
    message = guest.create(GENERIC | {ck.CKA_VALUE: b"message", ck.CKA_DERIVE: True})

    def extract(salt: int) -> int:
        parameter = (1, 0, ck.CKM_SHA256, ck.CKF_HKDF_SALT_KEY, b"", salt, b"")
        return guest.derive(Mechanism(ck.CKM_HKDF_DERIVE, parameter), message, GENERIC | OPEN)

    for salt in (guest.create(mac | {ck.CKA_VERIFY: True}), keeper(guest)):
        with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
            extract(salt)
    only = {ck.CKA_DERIVE: True, ck.CKA_ALLOWED_MECHANISMS: (ck.CKM_SP800_108_COUNTER_KDF,)}
    with refused(ck.CKR_MECHANISM_INVALID):
        extract(guest.create(mac | only))
    with refused(ck.CKR_TEMPLATE_INCONSISTENT):
        extract(guest.create(mac | DERIVES))
    assert readable(guest, extract(guest.create(mac | {ck.CKA_DERIVE: True})))


def test_attack_truncated_macs(guest: OwnGuest) -> None:
    """A MAC of one byte, then of two ... would be forged by asking a key that verifies alone: the shortest has 32 bits."""
    key = guest.create(GENERIC | {ck.CKA_VALUE: b"k" * 32, ck.CKA_VERIFY: True})
    for length in range(macs.SHORTEST):
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            guest.verify(Mechanism(ck.CKM_SHA256_HMAC_GENERAL, (length,)), key, b"message", bytes(length))
    assert macs.SHORTEST == 4


# ---- reading ---------------------------------------------------------------------------------------------------------------


def test_attack_reading(guest: OwnGuest) -> None:
    """By its value, by a search for it, by C_DigestKey, by a copy."""
    key = guest.create(GENERIC | {ck.CKA_VALUE: b"k" * 32})
    for handle in (key, copy(guest, key, {}), copy(guest, key, {ck.CKA_TOKEN: True})):
        assert not readable(guest, handle)
        guest.call(Call.DIGEST_INIT, guest.session, Mechanism(ck.CKM_SHA256))
        with refused(ck.CKR_KEY_INDIGESTIBLE):
            guest.call(Call.DIGEST_KEY, guest.session, handle)
    assert guest.find({ck.CKA_VALUE: b"k" * 32}) == []


def test_attack_check_values_of_short_keys(guest: OwnGuest) -> None:
    """Three bytes of a SHA-1 tell a key of few bytes: such a one has none."""
    for length in (1, 3, 7):
        assert guest.get(guest.create(GENERIC | {ck.CKA_VALUE: b"k" * length}), ck.CKA_CHECK_VALUE) == [b""]
    for length in (8, 32):
        expected = hashlib.sha1(b"k" * length).digest()[:3]
        assert guest.get(guest.create(GENERIC | {ck.CKA_VALUE: b"k" * length}), ck.CKA_CHECK_VALUE) == [expected]


def test_attack_unextractable_keys(guest: OwnGuest) -> None:
    """By no key and no mechanism."""
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES)
    public, _ = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, RSA | {ck.CKA_WRAP: True}, {ck.CKA_UNWRAP: True})
    for wrapper, mechanism in ((keeper(guest), KW), (keeper(guest, OPEN), CBC_PAD), (public, OAEP)):
        with refused(ck.CKR_KEY_UNEXTRACTABLE):
            guest.wrap(mechanism, wrapper, key)
