"""Keys from their parts and back; parts of no key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import generation, parts
from hsmvisord.crypto.ec import CURVES
from hsmvisord.crypto.interface import PrivateKey, Wanted
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.crypto.software import SoftwareProvider

KEYS: dict[str, PrivateKey] = {
    key.kind.name: key
    for key in (
        generation.key_pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048)),
        *(generation.key_pair(ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=oid)) for _, _, oid in CURVES.values()),
        *(
            generation.key_pair(ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex(oid)))
            for oid in ("06032b6570", "06032b6571")
        ),
        *(
            generation.key_pair(ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex(oid)))
            for oid in ("06032b656e", "06032b656f")
        ),
        *(generation.key_pair(ck.CKM_ML_DSA_KEY_PAIR_GEN, Wanted(parameter_set=n)) for n in (1, 2, 3)),
        *(generation.key_pair(ck.CKM_ML_KEM_KEY_PAIR_GEN, Wanted(parameter_set=n)) for n in (2, 3)),
    )
}
RSA = KEYS["RSA 2048"]
CURVED = [name for name, key in KEYS.items() if ck.CKA_EC_PARAMS in key.attributes()]
LATTICES = [name for name, key in KEYS.items() if ck.CKA_PARAMETER_SET in key.attributes()]


#: The same curves in words (PKCS#11 3.1, 6.3.5-6.3.8).
NAMES = {"Ed25519": "edwards25519", "Ed448": "edwards448", "X25519": "curve25519", "X448": "curve448"}
GENERATE = {ck.CKK_EC_EDWARDS: ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, ck.CKK_EC_MONTGOMERY: ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN}


def refused(rv: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments)
    assert caught.value.rv == rv, caught.value


def all_parts(key: PrivateKey) -> dict[int, Any]:
    return key.attributes() | parts.secret_parts(key)


@pytest.mark.parametrize("name", NAMES)
def test_a_curve_that_is_named_in_words(name: str) -> None:
    key, parameters = KEYS[name], b"\x13" + bytes((len(NAMES[name]),)) + NAMES[name].encode()
    kind, words = key.kind.key_type, {ck.CKA_EC_PARAMS: parameters}
    assert parts.private_key(kind, all_parts(key) | words).pkcs8() == key.pkcs8()
    assert parts.public_key(kind, key.public.attributes() | words).attributes() == key.public.attributes()
    assert generation.key_pair(GENERATE[kind], Wanted(parameters=parameters)).kind == key.kind
    other = next(k for k in GENERATE if k != kind)
    refused(ck.CKR_CURVE_NOT_SUPPORTED, generation.key_pair, GENERATE[other], Wanted(parameters=parameters))
    refused(ck.CKR_CURVE_NOT_SUPPORTED, generation.key_pair, ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=parameters))
    refused(ck.CKR_CURVE_NOT_SUPPORTED, generation.key_pair, GENERATE[kind], Wanted(parameters=parameters + b" "))


@pytest.mark.parametrize("name", KEYS)
def test_there_and_back(name: str) -> None:
    key = KEYS[name]
    again = parts.private_key(key.kind.key_type, all_parts(key))
    assert again.pkcs8() == key.pkcs8() and again.kind == key.kind
    public = parts.public_key(key.kind.key_type, key.public.attributes())
    assert public.spki == key.public.spki
    assert SoftwareProvider().load_private_key(key.pkcs8()).public.spki == public.spki


def test_rsa_without_its_primes() -> None:
    whole = all_parts(RSA)
    short = {kind: whole[kind] for kind in (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT, ck.CKA_PRIVATE_EXPONENT)}
    again = parts.private_key(ck.CKK_RSA, short)
    assert again.public.spki == RSA.public.spki
    assert parts.secret_parts(again)[ck.CKA_PRIVATE_EXPONENT] == whole[ck.CKA_PRIVATE_EXPONENT]


@pytest.mark.parametrize("kind", [*parts.secret_parts(RSA), ck.CKA_MODULUS])
def test_rsa_parts_that_do_not_fit(kind: int) -> None:
    whole = all_parts(RSA)
    for value in (bytes([whole[kind][0] ^ 1]) + whole[kind][1:], b"", b"\0", b"\1", bytes(2000), (1 << 2047).to_bytes(256)):
        with pytest.raises(CkError) as caught:
            parts.private_key(ck.CKK_RSA, whole | {kind: value})
        assert caught.value.rv in (ck.CKR_ATTRIBUTE_VALUE_INVALID, ck.CKR_KEY_SIZE_RANGE)


def test_rsa_sizes() -> None:
    small = rsa.generate_private_key(65537, 1024)
    key = {ck.CKA_MODULUS: big_endian(small.public_key().public_numbers().n), ck.CKA_PUBLIC_EXPONENT: b"\1\0\1"}
    assert parts.public_key(ck.CKK_RSA, key).kind.bits == 1024
    d = big_endian(small.private_numbers().d)
    assert parts.private_key(ck.CKK_RSA, key | {ck.CKA_PRIVATE_EXPONENT: d}).kind.bits == 1024
    for n in ((1 << 510) + 1, (1 << 8192) + 1):
        refused(ck.CKR_KEY_SIZE_RANGE, parts.public_key, ck.CKK_RSA, key | {ck.CKA_MODULUS: big_endian(n)})
    for n in ((1 << 511) + 1, (1 << 1022) + 1):  # legacy: to verify with
        short = key | {ck.CKA_MODULUS: big_endian(n)}
        assert parts.public_key(ck.CKK_RSA, short).kind.bits == n.bit_length()
        refused(ck.CKR_KEY_SIZE_RANGE, parts.private_key, ck.CKK_RSA, short | {ck.CKA_PRIVATE_EXPONENT: d})
    refused(ck.CKR_KEY_SIZE_RANGE, parts.public_key, ck.CKK_RSA, key | {ck.CKA_PUBLIC_EXPONENT: b"\1" + bytes(8)})
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, ck.CKK_RSA, key | {ck.CKA_PUBLIC_EXPONENT: b"\2"})


@pytest.mark.parametrize("name", CURVED)
def test_curve_parts_that_do_not_fit(name: str) -> None:
    key = KEYS[name]
    kind, public, private = key.kind.key_type, key.public.attributes(), all_parts(key)
    refused(ck.CKR_CURVE_NOT_SUPPORTED, parts.public_key, kind, public | {ck.CKA_EC_PARAMS: b"\6\1\1"})
    refused(ck.CKR_CURVE_NOT_SUPPORTED, parts.private_key, kind, private | {ck.CKA_EC_PARAMS: b""})
    point = public[ck.CKA_EC_POINT]
    for wrong in (b"", b"\4", point[:-1], point + b"\0", bytes(20)):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, kind, public | {ck.CKA_EC_POINT: wrong})
    for wrong in (b"", bytes(200)):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.private_key, kind, private | {ck.CKA_VALUE: wrong})
    if kind == ck.CKK_EC:
        for wrong in (b"\0", b"\xff" * len(private[ck.CKA_VALUE])):
            refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.private_key, kind, private | {ck.CKA_VALUE: wrong})
        off = point[:-1] + bytes([point[-1] ^ 1])
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, kind, public | {ck.CKA_EC_POINT: off})


def test_points_are_taken_raw_too() -> None:
    for name in CURVED:
        public = KEYS[name].public.attributes()
        wrapped = public[ck.CKA_EC_POINT]
        raw = wrapped[3 if wrapped[1] == 0x81 else 2 :]
        assert parts.public_key(KEYS[name].kind.key_type, public | {ck.CKA_EC_POINT: raw}).spki == KEYS[name].public.spki


@pytest.mark.parametrize("name", LATTICES)
def test_lattice_parts_that_do_not_fit(name: str) -> None:
    key = KEYS[name]
    kind, public, private = key.kind.key_type, key.public.attributes(), all_parts(key)
    assert len(private[ck.CKA_SEED]) == parts.SEED[kind]
    for table, call in ((public, parts.public_key), (private, parts.private_key)):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, call, kind, table | {ck.CKA_PARAMETER_SET: 9})
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, kind, public | {ck.CKA_VALUE: public[ck.CKA_VALUE][1:]})
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.private_key, kind, private | {ck.CKA_SEED: b"short"})
    refused(ck.CKR_TEMPLATE_INCONSISTENT, parts.private_key, kind, private | {ck.CKA_VALUE: b"expanded"})
    del private[ck.CKA_SEED]
    refused(ck.CKR_TEMPLATE_INCOMPLETE, parts.private_key, kind, private | {ck.CKA_VALUE: b"expanded"})


def test_a_refusal_shows_nothing() -> None:
    secret = b"\x5a" * 32
    with pytest.raises(CkError) as caught:
        parts.private_key(ck.CKK_EC, {ck.CKA_EC_PARAMS: next(iter(CURVES.values()))[2], ck.CKA_VALUE: secret * 2})
    assert secret.hex() not in str(caught.value) and caught.value.__suppress_context__
