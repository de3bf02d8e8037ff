"""What is old: triple DES, AES-MAC, DSA, Diffie-Hellman over primes, curves by their parameters, keys from encrypted data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import der, des, dh, domain, dsa, explicit, generation, legacy, parts
from hsmvisord.crypto.der import Elements
from hsmvisord.crypto.ec import CURVES, NAMED
from hsmvisord.crypto.interface import PrivateKey
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.crypto.secret import SecretKey
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism

PROVIDER = SoftwareProvider()
#: SP 800-67, appendix B: three keys, and a text.
KEYS = bytes.fromhex("0123456789abcdef23456789abcdef01456789abcdef0123")
TEXT = b"The qufck brown fox jump"
CIPHERTEXT = bytes.fromhex("a826fd8ce53b855fcce21c8112256fe668d5c05dd9b6b900")
IV8, IV16 = bytes(range(8)), bytes(range(16))
AES = SecretKey(ck.CKK_AES, bytes(range(32)))


def refused(rv: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments)
    assert caught.value.rv == rv, caught.value


# ---- triple DES ---------------------------------------------------------------------------------------------------------


def test_the_standards_example() -> None:
    key, ecb = SecretKey(ck.CKK_DES3, KEYS), Mechanism(ck.CKM_DES3_ECB)
    assert key.encrypter(ecb).run(TEXT) == CIPHERTEXT
    assert key.decrypter(ecb).run(CIPHERTEXT) == TEXT
    assert key.check_value == key.encrypter(ecb).run(bytes(8))[:3]


def test_chaining_and_two_keys() -> None:
    two, three = SecretKey(ck.CKK_DES2, KEYS[:16]), SecretKey(ck.CKK_DES3, KEYS[:16] + KEYS[:8])
    single, cbc = two.encrypter(Mechanism(ck.CKM_DES3_ECB)), Mechanism(ck.CKM_DES3_CBC, IV8)
    before, expected = IV8, b""
    for at in range(0, len(TEXT), 8):
        before = single.run(bytes(a ^ b for a, b in zip(TEXT[at : at + 8], before, strict=True)))
        expected += before
    assert two.encrypter(cbc).run(TEXT) == three.encrypter(cbc).run(TEXT) == expected
    assert two.decrypter(cbc).run(expected) == TEXT


@pytest.mark.parametrize("size", range(25))
def test_padding_in_parts(size: int) -> None:
    key, mechanism = SecretKey(ck.CKK_DES3, KEYS), Mechanism(ck.CKM_DES3_CBC_PAD, IV8)
    encrypter, decrypter = key.encrypter(mechanism), key.decrypter(mechanism)
    whole = encrypter.run(TEXT[:size])
    assert len(whole) == encrypter.bound(size) == (size // 8 + 1) * 8
    assert decrypter.run(whole) == TEXT[:size] and decrypter.bound(len(whole)) >= size
    for cipher, data, result in ((encrypter, TEXT[:size], whole), (decrypter, whole, TEXT[:size])):
        for step in (1, 5, 8, 11):
            assert cipher.begin is not None
            stream, out = cipher.begin(), b""
            for at in range(0, len(data), step):
                room = stream.room(len(data[at : at + step]))
                part = stream.update(data[at : at + step])
                assert len(part) == room
                out += part
            assert stream.last() == 8
            assert out + stream.finish() == result


def test_des_data_that_does_not_fit() -> None:
    key = SecretKey(ck.CKK_DES3, KEYS)
    for kind in (ck.CKM_DES3_ECB, ck.CKM_DES3_CBC):
        mechanism = Mechanism(kind, None if kind == ck.CKM_DES3_ECB else IV8)
        refused(ck.CKR_DATA_LEN_RANGE, key.encrypter(mechanism).run, b"seven..")
        refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, key.decrypter(mechanism).run, b"nine.....")
    padded = key.decrypter(Mechanism(ck.CKM_DES3_CBC_PAD, IV8))
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, padded.run, b"nine.....")
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, padded.run, key.encrypter(Mechanism(ck.CKM_DES3_CBC, IV8)).run(bytes(8)))
    for parameter in (None, b"", IV8[1:], IV16, (8,)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, key.encrypter, Mechanism(ck.CKM_DES3_CBC, parameter))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, key.encrypter, Mechanism(ck.CKM_DES3_ECB, IV8))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, key.encrypter, Mechanism(ck.CKM_AES_ECB))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, AES.encrypter, Mechanism(ck.CKM_DES3_ECB))


def test_des_keys_have_parity() -> None:
    for kind, size in des.SIZES.items():
        refused(ck.CKR_KEY_SIZE_RANGE, SecretKey, kind, KEYS[: size - 1])
        refused(ck.CKR_KEY_SIZE_RANGE, SecretKey, kind, KEYS[:size] + b"\1")
        for at in range(size):
            wrong = bytearray(KEYS[:size])
            wrong[at] ^= 1
            refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, SecretKey, kind, bytes(wrong))
            assert des.with_parity(bytes(wrong)) == KEYS[:size]
    assert all(byte.bit_count() & 1 for byte in des.with_parity(bytes(range(256))))
    for mechanism in (ck.CKM_DES2_KEY_GEN, ck.CKM_DES3_KEY_GEN):
        one, other = generation.secret(mechanism, 0), generation.secret(mechanism, 0)
        assert one.value != other.value and len(one.value) == des.SIZES[one.kind.key_type]
        refused(ck.CKR_KEY_SIZE_RANGE, generation.secret, mechanism, 8)


# ---- AES ----------------------------------------------------------------------------------------------------------------


def cbc_mac(data: bytes) -> bytes:
    """By ECB alone."""
    last = bytes(16)
    padded = data + bytes(-len(data) % 16) if data else bytes(16)
    for at in range(0, len(padded), 16):
        mixed = bytes(a ^ b for a, b in zip(last, padded[at : at + 16], strict=True))
        last = Cipher(algorithms.AES(AES.value), modes.ECB()).encryptor().update(mixed)
    return last


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 1000])
def test_aes_mac(size: int) -> None:
    data = os.urandom(size)
    signer, verifier = AES.signer(Mechanism(ck.CKM_AES_MAC)), AES.verifier(Mechanism(ck.CKM_AES_MAC))
    assert signer.sign(data) == cbc_mac(data)[:8] and signer.output_size == 8
    for step in (1, 7, 16, 100):
        assert signer.begin is not None
        operation = signer.begin()
        for at in range(0, size, step):
            operation.update(data[at : at + step])
        assert operation.finish() == cbc_mac(data)[:8]
    verifier.verify(data, cbc_mac(data)[:8])
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, data + b"!", cbc_mac(data)[:8])
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, data, cbc_mac(data))
    for length in (4, 16):
        assert AES.signer(Mechanism(ck.CKM_AES_MAC_GENERAL, (length,))).sign(data) == cbc_mac(data)[:length]


def test_aes_mac_parameters() -> None:
    for parameter in (None, (3,), (17,), (b"8",), (8, 8), b"8"):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.signer, Mechanism(ck.CKM_AES_MAC_GENERAL, parameter))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.signer, Mechanism(ck.CKM_AES_MAC, (8,)))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, SecretKey(ck.CKK_DES3, KEYS).signer, Mechanism(ck.CKM_AES_MAC))


@pytest.mark.parametrize("kind", [ck.CKM_AES_ECB_ENCRYPT_DATA, ck.CKM_AES_CBC_ENCRYPT_DATA])
def test_keys_from_encrypted_data(kind: int) -> None:
    chained = kind == ck.CKM_AES_CBC_ENCRYPT_DATA

    def mechanism(data: Any, iv: Any = IV16) -> Mechanism:
        return Mechanism(kind, (iv, data) if chained else (data,))

    data = os.urandom(64)
    mode = modes.CBC(IV16) if chained else modes.ECB()
    encrypted = Cipher(algorithms.AES(AES.value), mode).encryptor().update(data)
    assert AES.derive(mechanism(data)) == encrypted
    assert AES.derive(mechanism(data), 24) == encrypted[:24], "the first bytes"
    assert AES.derive(mechanism(data), 64) == encrypted
    whole = bytes(limits.MAX_SECRET)
    assert len(AES.derive(mechanism(whole))) == limits.MAX_SECRET
    for wrong in (b"", data[1:], whole + bytes(16), 5):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.derive, mechanism(wrong))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.derive, mechanism(data), 65)
    for parameter in (None, b"", (), data, (data, data, data), (data,) if chained else (IV16, data)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.derive, Mechanism(kind, parameter))
    if chained:
        for iv in (IV16[1:], IV16 + b"\0", b"", 0):
            refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.derive, mechanism(data, iv))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, SecretKey(ck.CKK_GENERIC_SECRET, b"k" * 16).derive, mechanism(data))


# ---- DSA ----------------------------------------------------------------------------------------------------------------

DSA_PARTS = domain.generate(ck.CKM_DSA_PARAMETER_GEN, 1024)
DSA_KEY = dsa.generate(DSA_PARTS)
DH_PARTS = domain.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, 2048)
DH_KEY = dh.generate(DH_PARTS)


def number(value: int) -> bytes:
    return big_endian(value)


@pytest.mark.parametrize("bits", dsa.SIZES)
def test_new_dsa_parameters(bits: int) -> None:
    made = domain.generate(ck.CKM_DSA_PARAMETER_GEN, bits)
    assert domain.check(ck.CKK_DSA, made) == bits
    p, q, g = (int.from_bytes(made[kind]) for kind in (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE))
    assert (p - 1) % q == 0 and pow(g, q, p) == 1 and g > 1
    key = dsa.generate(made)
    signature = key.signer(Mechanism(ck.CKM_DSA_SHA256)).sign(b"message")
    assert len(signature) == 2 * len(made[ck.CKA_SUBPRIME])
    key.public.verifier(Mechanism(ck.CKM_DSA)).verify(hashlib.sha256(b"message").digest(), signature)


@pytest.mark.parametrize("bits", [0, 512, 1023, 1025, 2049, 4096, 1 << 40])
def test_sizes_of_parameters_that_are_not_made(bits: int) -> None:
    refused(ck.CKR_KEY_SIZE_RANGE, domain.generate, ck.CKM_DSA_PARAMETER_GEN, bits)
    if bits not in dh.GENERATED:
        refused(ck.CKR_KEY_SIZE_RANGE, domain.generate, ck.CKM_DH_PKCS_PARAMETER_GEN, bits)


def test_one_long_computation_at_a_time() -> None:
    with generation.making_rsa():
        for mechanism in domain.PARAMETERS:
            refused(ck.CKR_FUNCTION_REJECTED, domain.generate, mechanism, 1024)
    domain.generate(ck.CKM_DSA_PARAMETER_GEN, 1024)


def test_dsa_parameters_that_are_none() -> None:
    p, q, g = (int.from_bytes(DSA_PARTS[kind]) for kind in (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE))
    wrong = [
        {ck.CKA_BASE: number(value)} for value in (0, 1, p, p + g, 2, p - 1)
    ] + [
        {ck.CKA_SUBPRIME: number(value)} for value in (0, q - 1, q + 2, q >> 1, q << 8)
    ] + [
        {ck.CKA_PRIME: number(value)} for value in (0, p - 1, p + 2, p << 1, (1 << 4096) - 1)
    ] + [{kind: b""} for kind in DSA_PARTS]  # fmt: skip
    for change in wrong:
        refused(ck.CKR_DOMAIN_PARAMS_INVALID, domain.check, ck.CKK_DSA, DSA_PARTS | change)
        refused(ck.CKR_DOMAIN_PARAMS_INVALID, dsa.generate, DSA_PARTS | change)
        whole = DSA_KEY.attributes() | parts.secret_parts(DSA_KEY) | change
        refused(ck.CKR_DOMAIN_PARAMS_INVALID, parts.private_key, ck.CKK_DSA, whole)


def test_a_subprime_that_is_a_product() -> None:
    """All else is right: its group is there, but not the inverse of each of its numbers."""
    q = ((1 << 79) + 9) * ((1 << 81) - 51)
    p, step = (1 << 1023) // (2 * q) * 2 * q + 2 * q + 1, 2 * q
    while pow(2, p - 1, p) != 1:
        p += step
    made = {ck.CKA_PRIME: number(p), ck.CKA_SUBPRIME: number(q), ck.CKA_BASE: number(pow(2, (p - 1) // q, p))}
    assert (p.bit_length(), q.bit_length()) == (1024, 160) and pow(pow(2, (p - 1) // q, p), q, p) == 1
    refused(ck.CKR_DOMAIN_PARAMS_INVALID, domain.check, ck.CKK_DSA, made)


def test_dsa_values_that_are_none() -> None:
    public, private = DSA_KEY.public.attributes(), DSA_KEY.attributes() | parts.secret_parts(DSA_KEY)
    p, q = int.from_bytes(DSA_PARTS[ck.CKA_PRIME]), int.from_bytes(DSA_PARTS[ck.CKA_SUBPRIME])
    for value in (0, 1, p - 1, p, p + 1, 2):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, ck.CKK_DSA, public | {ck.CKA_VALUE: number(value)})
    for value in (0, q, q + 1, p):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.private_key, ck.CKK_DSA, private | {ck.CKA_VALUE: number(value)})


def test_dsa_signs_what_it_is_given() -> None:
    plain, verifier = DSA_KEY.signer(Mechanism(ck.CKM_DSA)), DSA_KEY.public.verifier(Mechanism(ck.CKM_DSA))
    for size in (1, 19, 20, 21, 32, 64):
        verifier.verify(b"d" * size, plain.sign(b"d" * size))
    verifier.verify(b"d" * 20 + b"other", plain.sign(b"d" * 32))  # the leftmost bits count
    refused(ck.CKR_DATA_LEN_RANGE, plain.sign, b"")
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, b"d" * 20, bytes(39))
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, b"d" * 20, bytes(40))
    for mechanism in (Mechanism(ck.CKM_DSA, b"p"), Mechanism(ck.CKM_DSA_SHA1, (1,))):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, DSA_KEY.signer, mechanism)
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, DSA_KEY.signer, Mechanism(ck.CKM_ECDSA))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, DSA_KEY.decrypter, Mechanism(ck.CKM_RSA_PKCS))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, DSA_KEY.derive, Mechanism(ck.CKM_DH_PKCS_DERIVE, b"\2"))


# ---- Diffie-Hellman -----------------------------------------------------------------------------------------------------


def test_the_groups_of_rfc_7919() -> None:
    """Their beginning, their end, and that they are safe primes; OpenSSL takes short exponents for groups that it knows."""
    for bits in dh.GENERATED[1:]:
        p = int.from_bytes(domain.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, bits)[ck.CKA_PRIME])
        assert (
            p.bit_length() == bits and p >> bits - 128 == 0xFFFFFFFFFFFFFFFFADF85458A2BB4A9A and p & (1 << 64) - 1 == (1 << 64) - 1
        )
        assert pow(2, (p - 1) // 2, p) == 1
        assert dh.generate(domain.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, bits)).attributes()[ck.CKA_VALUE_BITS] < 512


def test_a_new_group() -> None:
    made = domain.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, 1024)
    p = int.from_bytes(made[ck.CKA_PRIME])
    assert p.bit_length() == 1024 and domain.check(ck.CKK_DH, made) == 1024
    assert pow(3, p - 1, p) == 1 and pow(3, (p - 1) // 2 - 1, (p - 1) // 2) == 1, "a safe prime"
    assert made != domain.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, 1024)


def test_both_agree() -> None:
    other = dh.generate(DH_PARTS)
    value, p = other.public.attributes()[ck.CKA_VALUE], int.from_bytes(DH_PARTS[ck.CKA_PRIME])
    x = int.from_bytes(parts.secret_parts(DH_KEY)[ck.CKA_VALUE])
    expected = pow(int.from_bytes(value), x, p).to_bytes(256)
    assert DH_KEY.derive(Mechanism(ck.CKM_DH_PKCS_DERIVE, value)) == expected
    assert other.derive(Mechanism(ck.CKM_DH_PKCS_DERIVE, DH_KEY.public.attributes()[ck.CKA_VALUE])) == expected
    assert DH_KEY.derive(Mechanism(ck.CKM_DH_PKCS_DERIVE, b"\0" + value)) == expected


def test_public_values_that_are_none() -> None:
    p = int.from_bytes(DH_PARTS[ck.CKA_PRIME])
    for value in (0, 1, p - 1, p, p + 1, 1 << 4100):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, DH_KEY.derive, Mechanism(ck.CKM_DH_PKCS_DERIVE, number(value)))
        if value < 1 << 4096:
            public = {**DH_PARTS, ck.CKA_VALUE: number(value)}
            refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.public_key, ck.CKK_DH, public)
    for parameter in (None, b"", (b"\5",), 5, bytes(514)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, DH_KEY.derive, Mechanism(ck.CKM_DH_PKCS_DERIVE, parameter))  # type: ignore[arg-type]
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, DH_KEY.derive, Mechanism(ck.CKM_ECDH1_DERIVE, (1, b"", b"\4")))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, DH_KEY.signer, Mechanism(ck.CKM_DSA))


@pytest.mark.parametrize("bits", [dh.LEAST - 1, dh.MOST + 1])
def test_sizes_of_primes(bits: int) -> None:
    refused(ck.CKR_DOMAIN_PARAMS_INVALID, dh.generate, {ck.CKA_PRIME: number((1 << bits) - 1), ck.CKA_BASE: b"\2"})


def test_primes_and_bases_that_are_none() -> None:
    p = int.from_bytes(DH_PARTS[ck.CKA_PRIME])
    for change in (
        {ck.CKA_PRIME: b""},
        {ck.CKA_PRIME: number(p - 1)},
        *({ck.CKA_BASE: number(g)} for g in (0, 1, p - 1, p, p + 2)),
    ):
        refused(ck.CKR_DOMAIN_PARAMS_INVALID, domain.check, ck.CKK_DH, DH_PARTS | change)
        refused(ck.CKR_DOMAIN_PARAMS_INVALID, dh.generate, DH_PARTS | change)
    private = DH_KEY.attributes() | parts.secret_parts(DH_KEY)
    for x in (0, 1, p - 1, p):
        refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, parts.private_key, ck.CKK_DH, private | {ck.CKA_VALUE: number(x)})


@pytest.mark.parametrize("key", [DSA_KEY, DH_KEY], ids=lambda key: key.kind.name)
def test_there_and_back(key: PrivateKey) -> None:
    kind = key.kind.key_type
    again = parts.private_key(kind, key.attributes() | parts.secret_parts(key))
    assert again.public.attributes() == key.public.attributes() and again.kind == key.kind
    assert parts.secret_parts(again) == parts.secret_parts(key)
    assert parts.public_key(kind, key.public.attributes()).attributes() == key.public.attributes()
    for loaded in (PROVIDER.load_private_key(key.pkcs8()), PROVIDER.load_private_key(again.pkcs8())):
        assert loaded.public.attributes() == key.public.attributes()
    assert PROVIDER.load_public_key(key.public.spki).attributes() == key.public.attributes()
    assert parts.secret_parts(key)[ck.CKA_VALUE].hex() not in repr(key)


# ---- curves by their parameters -----------------------------------------------------------------------------------------

_FIELD = bytes.fromhex("06072a8648ce3d0101")


def described(name: str, **change: Any) -> bytes:
    """ECParameters of a named curve (SEC 1, C.2), with changes."""
    p, a = explicit._FIELDS[name]
    size = (p.bit_length() + 7) // 8
    base = ec.derive_private_key(1, NAMED[name]).public_key().public_numbers()
    b = (base.y**2 - base.x**3 - a * base.x) % p
    values = {"version": 1, "p": p, "a": a % p, "b": b, "x": base.x, "y": base.y, "order": NAMED[name].group_order, "cofactor": 1}
    values |= change
    point = change.get("point") or b"\4" + values["x"].to_bytes(size) + values["y"].to_bytes(size)
    curve = [der.element(der.OCTET_STRING, values[kind].to_bytes(size)) for kind in "ab"]
    curve += [der.element(3, b"\0seed")] if change.get("seed") else []
    cofactor = [der.integer(values["cofactor"])] if values["cofactor"] else []
    return der.sequence(
        der.integer(values["version"]),
        der.sequence(change.get("field", _FIELD), der.integer(values["p"])),
        der.sequence(*curve),
        der.element(der.OCTET_STRING, point),
        der.integer(values["order"]),
        *cofactor,
    )


@pytest.mark.parametrize("name", CURVES)
def test_parameters_of_named_curves(name: str) -> None:
    oid, size = CURVES[name][2], (explicit._FIELDS[name][0].bit_length() + 7) // 8
    base = ec.derive_private_key(1, NAMED[name]).public_key().public_numbers()
    compressed = bytes((2 + (base.y & 1),)) + base.x.to_bytes(size)
    assert explicit.oid(oid) == oid
    for change in ({}, {"cofactor": 0}, {"seed": True}, {"version": 2}, {"version": 3}, {"point": compressed}):
        assert explicit.oid(described(name, **change)) == oid
    other = bytes((2 + (~base.y & 1),)) + base.x.to_bytes(size)
    wrong: list[dict[str, Any]] = [{"point": other}, {"point": b"\4"}, {"point": b""}, {"point": b"\5" + compressed[1:]}]
    wrong += [{"x": base.x ^ 1}, {"y": explicit._FIELDS[name][0] - base.y}, {"order": NAMED[name].group_order - 2}]
    wrong += [{"cofactor": 2}, {"version": 4}, {"version": 0}, {"a": 5}, {"b": 5}, {"p": explicit._FIELDS[name][0] - 2}]
    wrong += [{"field": bytes.fromhex("06072a8648ce3d0102")}]
    for change in wrong:
        if change != {"point": b""}:  # means the usual one to `described`
            with pytest.raises(ValueError, match=r".+"):
                explicit.oid(described(name, **change))


def test_a_generator_of_somebodys_choice() -> None:
    """CVE-2020-0601: the key's own point as the curve's base."""
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    mine = described("secp256r1", x=point.x, y=point.y)
    parts_of = {ck.CKA_EC_PARAMS: mine, ck.CKA_EC_POINT: b"\4\x41\4" + point.x.to_bytes(32) + point.y.to_bytes(32)}
    refused(ck.CKR_CURVE_NOT_SUPPORTED, parts.public_key, ck.CKK_EC, parts_of)


def test_parameters_cut_and_changed_anywhere() -> None:
    whole = described("secp521r1")
    for at in range(len(whole)):
        for wrong in (whole[:at], whole[:at] + bytes((whole[at] ^ 0x81,)) + whole[at + 1 :]):
            try:
                assert explicit.oid(wrong) == wrong and wrong[0] == der.OBJECT_IDENTIFIER
            except ValueError:
                continue
    with pytest.raises(ValueError, match="bytes too many"):
        explicit.oid(whole + b"\0")


def test_der_reads_what_it_writes() -> None:
    for size in (0, 1, 127, 128, 255, 256, 70000):
        elements = Elements(der.element(der.OCTET_STRING, bytes(size)) + der.integer(size))
        assert elements.next(der.OCTET_STRING) == bytes(size) and elements.number() == size
        elements.end()
    for wrong in ("0204", "02820001", "0281050000000000", "028000", "020100ff", "0285000000000100", "02", ""):
        with pytest.raises(ValueError, match="DER"):
            elements = Elements(bytes.fromhex(wrong))
            elements.next(der.INTEGER)
            elements.end()
    for wrong in ("020180", "02020001", "0200"):
        with pytest.raises(ValueError, match="INTEGER"):
            Elements(bytes.fromhex(wrong)).number()


# ---- what counts as old -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key_type", "bits", "old"),
    [
        (ck.CKK_RSA, 1023, True), (ck.CKK_RSA, 0, False), (ck.CKK_RSA, 1024, False), (ck.CKK_EC, 192, True),
        (ck.CKK_EC, 224, False),
        (ck.CKK_DSA, 3072, True), (ck.CKK_DH, 4096, True), (ck.CKK_DES2, 128, True), (ck.CKK_DES3, 192, True),
        (ck.CKK_AES, 128, False), (ck.CKK_EC_EDWARDS, 255, False), (ck.CKK_ML_DSA, 44, False), (ck.CKK_GENERIC_SECRET, 8, False),
    ],
)  # fmt: skip
def test_what_is_old(key_type: int, bits: int, old: bool) -> None:
    assert legacy.is_legacy(key_type, bits) is old
