"""Agreement, derivation, encapsulation and new keys.  Peers: vectors of the RFCs, and `cryptography` used plainly."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import cmac, hashes
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x448, x25519
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import generation
from hsmvisord.crypto.derivation import KDFS
from hsmvisord.crypto.ec import CURVES, octet_string
from hsmvisord.crypto.interface import Wanted
from hsmvisord.crypto.operations import HASHES
from hsmvisord.crypto.secret import SecretKey
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism
from support.certificates import pkcs8

PROVIDER = SoftwareProvider()
KEY = bytes(range(32))
GENERIC = SecretKey(ck.CKK_GENERIC_SECRET, KEY)
AES = SecretKey(ck.CKK_AES, KEY)


def refused(rv: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments)
    assert caught.value.rv == rv, caught.value


def no_key(handle: int) -> bytes:
    raise CkError(ck.CKR_KEY_HANDLE_INVALID)


def ecdh(peer: bytes, kdf: int = ck.CKD_NULL, shared: bytes = b"") -> Mechanism:
    return Mechanism(ck.CKM_ECDH1_DERIVE, (kdf, shared, peer))


# ---- agreement ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "size"), [(x25519.X25519PrivateKey, 32), (x448.X448PrivateKey, 56)])
def test_montgomery_keys_agree(cls: Any, size: int) -> None:
    one, other = cls.generate(), cls.generate()
    loaded = PROVIDER.load_private_key(pkcs8(one))
    point = other.public_key().public_bytes_raw()
    expected = one.exchange(other.public_key())
    for form in (point, octet_string(point)):
        assert loaded.derive(ecdh(form)) == expected and len(expected) == size
    assert loaded.derive(ecdh(point, ck.CKD_SHA256_KDF, b"info"), 40) == X963KDF(hashes.SHA256(), 40, b"info").derive(expected)
    for bad in (bytes(size), point[1:], b"", point + b"x"):  # zeros: a point of small order
        refused(ck.CKR_MECHANISM_PARAM_INVALID, loaded.derive, ecdh(bad))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, loaded.signer, Mechanism(ck.CKM_EDDSA))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, loaded.derive, Mechanism(ck.CKM_ECDH1_COFACTOR_DERIVE, (1, b"", point)))


@pytest.mark.parametrize("kdf", KDFS)
def test_ec_keys_agree_with_each_kdf(kdf: int) -> None:
    one, other = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    point = PROVIDER.load_public_key(PROVIDER.load_private_key(pkcs8(other)).public.spki).attributes()[ck.CKA_EC_POINT]
    loaded, shared = PROVIDER.load_private_key(pkcs8(one)), one.exchange(ec.ECDH(), other.public_key())
    for size in (1, 32, 200):
        expected = X963KDF(HASHES[KDFS[kdf]], size, b"shared").derive(shared)
        assert loaded.derive(ecdh(point, kdf, b"shared"), size) == expected
    refused(ck.CKR_TEMPLATE_INCOMPLETE, loaded.derive, ecdh(point, kdf))
    refused(ck.CKR_KEY_SIZE_RANGE, loaded.derive, ecdh(point, kdf), limits.MAX_SECRET + 1)
    assert len(loaded.derive(ecdh(point, kdf), limits.MAX_SECRET)) == limits.MAX_SECRET


def test_agreement_refuses_other_parameters() -> None:
    one = PROVIDER.load_private_key(pkcs8(ec.generate_private_key(ec.SECP256R1())))
    point = one.public.attributes()[ck.CKA_EC_POINT]
    for parameter in ((ck.CKD_NULL, b"shared", point), (99, b"", point), (ck.CKD_NULL, b""), point, None):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, one.derive, Mechanism(ck.CKM_ECDH1_DERIVE, parameter), 32)


# ---- HKDF ---------------------------------------------------------------------------------------------------------------


def hkdf(extract: bool, expand: bool, salt: bytes = b"", info: bytes = b"", kind: int = 2, handle: int = 0) -> Mechanism:
    return Mechanism(ck.CKM_HKDF_DERIVE, (int(extract), int(expand), ck.CKM_SHA256, kind, salt, handle, info))


def test_hkdf_as_in_rfc_5869() -> None:
    """A.1"""
    key, salt, info = b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA))
    prk = bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    okm = bytes.fromhex("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    secret = SecretKey(ck.CKK_GENERIC_SECRET, key)
    assert secret.derive(hkdf(True, False, salt), 0, no_key) == prk
    assert SecretKey(ck.CKK_GENERIC_SECRET, prk).derive(hkdf(False, True, info=info), 42, no_key) == okm
    assert secret.derive(hkdf(True, True, salt, info), 42, no_key) == okm
    by_key = hkdf(True, True, b"", info, ck.CKF_HKDF_SALT_KEY, 7)
    assert secret.derive(by_key, 42, lambda handle: {7: salt}[handle]) == okm


def test_hkdf_without_salt_as_in_rfc_5869() -> None:
    """A.3"""
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    secret = SecretKey(ck.CKK_GENERIC_SECRET, b"\x0b" * 22)
    assert secret.derive(hkdf(True, True, kind=ck.CKF_HKDF_SALT_NULL), 42, no_key).hex() == okm


def test_hkdf_refuses() -> None:
    for mechanism in (hkdf(False, False), hkdf(True, True, kind=3), hkdf(True, True, kind=0), Mechanism(ck.CKM_HKDF_DERIVE)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, GENERIC.derive, mechanism, 32, no_key)
    refused(ck.CKR_TEMPLATE_INCOMPLETE, GENERIC.derive, hkdf(True, True), 0, no_key)
    refused(ck.CKR_KEY_SIZE_RANGE, GENERIC.derive, hkdf(True, True), limits.MAX_SECRET + 1, no_key)
    refused(ck.CKR_KEY_SIZE_RANGE, GENERIC.derive, hkdf(True, False), 31, no_key)
    refused(ck.CKR_KEY_HANDLE_INVALID, GENERIC.derive, hkdf(True, True, kind=ck.CKF_HKDF_SALT_KEY), 32, no_key)


# ---- SP 800-108 ---------------------------------------------------------------------------------------------------------

COUNTER = (ck.CK_SP800_108_ITERATION_VARIABLE, 0, 32)
LABEL = (ck.CK_SP800_108_BYTE_ARRAY, b"label")
ZERO = (ck.CK_SP800_108_BYTE_ARRAY, b"\0")
CONTEXT = (ck.CK_SP800_108_BYTE_ARRAY, b"context")
LENGTH = (ck.CK_SP800_108_DKM_LENGTH, ck.CK_SP800_108_DKM_LENGTH_SUM_OF_KEYS, 0, 32)


def counter_kdf(prf: int, *parts: tuple[Any, ...]) -> Mechanism:
    return Mechanism(ck.CKM_SP800_108_COUNTER_KDF, (prf, *(field for part in parts for field in part)))


@pytest.mark.parametrize("size", [1, 16, 64, 100])
def test_counter_mode_as_cryptography_has_it(size: int) -> None:
    peer = KBKDFHMAC(hashes.SHA384(), Mode.CounterMode, size, 4, 4, CounterLocation.BeforeFixed, b"label", b"context", None)
    mechanism = counter_kdf(ck.CKM_SHA384_HMAC, COUNTER, LABEL, ZERO, CONTEXT, LENGTH)
    assert GENERIC.derive(mechanism, size, no_key) == peer.derive(KEY)


def test_counter_mode_with_other_parts() -> None:
    by_cmac = cmac.CMAC(algorithms.AES(KEY))
    by_cmac.update(b"label" + b"\x01\x00" + (256).to_bytes(3, "little"))
    segments = (ck.CK_SP800_108_DKM_LENGTH, ck.CK_SP800_108_DKM_LENGTH_SUM_OF_SEGMENTS, 1, 24)
    mechanism = counter_kdf(ck.CKM_AES_CMAC, LABEL, (ck.CK_SP800_108_ITERATION_VARIABLE, 1, 16), segments)
    assert AES.derive(mechanism, 20, no_key)[:16] == by_cmac.finalize()
    alone = counter_kdf(ck.CKM_SHA256_HMAC, (ck.CK_SP800_108_ITERATION_VARIABLE, 0, 8))
    assert GENERIC.derive(alone, 40, no_key) == (hmac.digest(KEY, b"\1", "sha256") + hmac.digest(KEY, b"\2", "sha256"))[:40]


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (LABEL,),
        (COUNTER, COUNTER),
        ((ck.CK_SP800_108_ITERATION_VARIABLE, 0, 12),),
        ((ck.CK_SP800_108_ITERATION_VARIABLE, 2, 32),),
        ((ck.CK_SP800_108_ITERATION_VARIABLE,),),
        (COUNTER, (ck.CK_SP800_108_BYTE_ARRAY, b"")),
        (COUNTER, (ck.CK_SP800_108_BYTE_ARRAY,)),
        (COUNTER, (ck.CK_SP800_108_COUNTER, 0, 8)),
        (COUNTER, (9,)),
        (COUNTER, (ck.CK_SP800_108_DKM_LENGTH, 3, 0, 32)),
        (COUNTER, (ck.CK_SP800_108_DKM_LENGTH, 1, 0, 72)),
        (COUNTER, (ck.CK_SP800_108_DKM_LENGTH, 1, 0, 8)),
    ],
)
def test_counter_mode_refuses_other_parts(parts: tuple[tuple[Any, ...], ...]) -> None:
    refused(ck.CKR_MECHANISM_PARAM_INVALID, GENERIC.derive, counter_kdf(ck.CKM_SHA256_HMAC, *parts), 32, no_key)


def test_counter_mode_refuses_other_prfs_and_lengths() -> None:
    for prf in (ck.CKM_AES_CMAC, ck.CKM_SHA256, ck.CKM_SHA256_HMAC_GENERAL):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, GENERIC.derive, counter_kdf(prf, COUNTER), 32, no_key)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, GENERIC.derive, Mechanism(ck.CKM_SP800_108_COUNTER_KDF), 32, no_key)
    refused(ck.CKR_TEMPLATE_INCOMPLETE, GENERIC.derive, counter_kdf(ck.CKM_SHA256_HMAC, COUNTER), 0, no_key)
    refused(ck.CKR_KEY_SIZE_RANGE, GENERIC.derive, counter_kdf(ck.CKM_SHA256_HMAC, COUNTER), limits.MAX_SECRET + 1, no_key)
    short = counter_kdf(ck.CKM_AES_CMAC, (ck.CK_SP800_108_ITERATION_VARIABLE, 0, 8))
    assert len(AES.derive(short, 255 * 16, no_key)) == 255 * 16
    refused(ck.CKR_KEY_SIZE_RANGE, AES.derive, short, 255 * 16 + 1, no_key)


def test_a_key_derives_by_its_own_mechanisms() -> None:
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, GENERIC.derive, ecdh(b"point"), 32, no_key)


# ---- ML-KEM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [mlkem.MLKEM768PrivateKey, mlkem.MLKEM1024PrivateKey])
def test_encapsulation(cls: Any) -> None:
    key = cls.generate()
    private = PROVIDER.load_private_key(pkcs8(key))
    public = PROVIDER.load_public_key(private.public.spki)
    kem = Mechanism(ck.CKM_ML_KEM)
    ciphertext, secret = public.encapsulate(kem)
    assert private.decapsulate(kem, ciphertext) == secret == key.decapsulate(ciphertext) and len(secret) == 32
    other = private.decapsulate(kem, ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]))
    assert other != secret and len(other) == 32, "implicit rejection"
    refused(ck.CKR_WRAPPED_KEY_LEN_RANGE, private.decapsulate, kem, ciphertext[1:])
    refused(ck.CKR_MECHANISM_PARAM_INVALID, public.encapsulate, Mechanism(ck.CKM_ML_KEM, b"x"))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, private.decapsulate, Mechanism(ck.CKM_RSA_PKCS), ciphertext)
    rsa_like = PROVIDER.load_private_key(pkcs8(ec.generate_private_key(ec.SECP256R1())))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, rsa_like.decapsulate, kem, ciphertext)
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, rsa_like.public.encapsulate, kem)


# ---- new keys -----------------------------------------------------------------------------------------------------------


PAIRS: list[tuple[int, Wanted, str]] = [
    (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048), "RSA 2048"),
    (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2056, exponent=65537), "RSA 2056"),
    *((ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=oid), name) for name, _, oid in CURVES.values()),
    (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b6570")), "Ed25519"),
    (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b6571")), "Ed448"),
    (ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b656e")), "X25519"),
    (ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b656f")), "X448"),
    (ck.CKM_ML_DSA_KEY_PAIR_GEN, Wanted(parameter_set=1), "ML-DSA-44"),
    (ck.CKM_ML_DSA_KEY_PAIR_GEN, Wanted(parameter_set=2), "ML-DSA-65"),
    (ck.CKM_ML_DSA_KEY_PAIR_GEN, Wanted(parameter_set=3), "ML-DSA-87"),
    (ck.CKM_ML_KEM_KEY_PAIR_GEN, Wanted(parameter_set=2), "ML-KEM-768"),
    (ck.CKM_ML_KEM_KEY_PAIR_GEN, Wanted(parameter_set=3), "ML-KEM-1024"),
]


@pytest.mark.parametrize(("mechanism", "wanted", "name"), PAIRS)
def test_new_key_pairs(mechanism: int, wanted: Wanted, name: str) -> None:
    one, other = generation.key_pair(mechanism, wanted), generation.key_pair(mechanism, wanted)
    assert one.kind.name == name and one.public.spki != other.public.spki
    again = PROVIDER.load_private_key(one.pkcs8())
    assert again.public.spki == one.public.spki and again.kind == one.kind
    assert PROVIDER.load_public_key(one.public.spki).attributes() == one.public.attributes()


@pytest.mark.parametrize(
    ("mechanism", "wanted", "rv"),
    [
        (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(), ck.CKR_KEY_SIZE_RANGE),
        (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=1016), ck.CKR_KEY_SIZE_RANGE),
        (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=8200), ck.CKR_KEY_SIZE_RANGE),
        (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2049), ck.CKR_KEY_SIZE_RANGE),
        (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048, exponent=3), ck.CKR_ATTRIBUTE_VALUE_INVALID),
        (ck.CKM_EC_KEY_PAIR_GEN, Wanted(), ck.CKR_TEMPLATE_INCOMPLETE),
        (ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b6570")), ck.CKR_CURVE_NOT_SUPPORTED),
        (ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex("06032b6570")), ck.CKR_CURVE_NOT_SUPPORTED),
        (ck.CKM_ML_KEM_KEY_PAIR_GEN, Wanted(), ck.CKR_TEMPLATE_INCOMPLETE),
        (ck.CKM_ML_KEM_KEY_PAIR_GEN, Wanted(parameter_set=1), ck.CKR_ATTRIBUTE_VALUE_INVALID),
    ],
)
def test_key_pairs_that_are_not_made(mechanism: int, wanted: Wanted, rv: int) -> None:
    refused(rv, generation.key_pair, mechanism, wanted)


def test_one_rsa_key_at_a_time() -> None:
    with generation.making_rsa():
        refused(ck.CKR_FUNCTION_REJECTED, generation.key_pair, ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048))
    generation.key_pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048))


def test_new_secrets() -> None:
    for mechanism, length, bits in [
        (ck.CKM_AES_KEY_GEN, 16, 128),
        (ck.CKM_CHACHA20_KEY_GEN, 0, 256),
        (ck.CKM_GENERIC_SECRET_KEY_GEN, 7, 56),
    ]:
        one, other = generation.secret(mechanism, length), generation.secret(mechanism, length)
        assert one.kind.bits == bits and one.value != other.value
    for mechanism, length in [(ck.CKM_AES_KEY_GEN, 17), (ck.CKM_CHACHA20_KEY_GEN, 16), (ck.CKM_GENERIC_SECRET_KEY_GEN, 5000)]:
        refused(ck.CKR_KEY_SIZE_RANGE, generation.secret, mechanism, length)
    refused(ck.CKR_TEMPLATE_INCOMPLETE, generation.secret, ck.CKM_AES_KEY_GEN, 0)
