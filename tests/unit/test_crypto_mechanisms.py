"""Each mechanism against an independent implementation of it: the same library's other interface, hashlib, or arithmetic."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import mechanisms, profiles
from hsmvisord.crypto.edwards import EdwardsPublicKey
from hsmvisord.crypto.interface import PrivateKey
from hsmvisord.crypto.operations import HASH_MECHANISMS, HASHES, MASKS
from hsmvisord.crypto.rsa import HASHED_PKCS1, HASHED_PSS
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.limits import MAX_CONTEXT, MAX_MULTIPART
from hsmvisord.wire.calls import Mechanism
from support.certificates import new_key, pkcs8, public_pem

PROVIDER = SoftwareProvider()
RSA = new_key("rsa2048")
assert isinstance(RSA, rsa.RSAPrivateKey)
LOADED_RSA = PROVIDER.load_private_key(pkcs8(RSA))
CURVES = {name: new_key(name) for name in ("p256", "p384", "p521")}
HASH_IDS = {name: mechanism for mechanism, name in HASH_MECHANISMS.items()}
MASK_IDS = {name: mask for mask, name in MASKS.items()}
DIGEST_INFO_SHA256 = bytes.fromhex("3031300d060960864801650304020105000420")


def loaded(key: Any) -> PrivateKey:
    return PROVIDER.load_private_key(pkcs8(key))


def refused(rv: int, act: Any, *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        act(*arguments)
    assert caught.value.rv == rv, caught.value


def in_parts(key: PrivateKey, mechanism: Mechanism, data: bytes) -> bytes:
    begin = key.signer(mechanism).begin
    assert begin is not None
    parts = begin()
    for start in range(0, len(data), 5):
        parts.update(data[start : start + 5])
    return parts.finish()


def verify_in_parts(key: PrivateKey, mechanism: Mechanism, data: bytes, signature: bytes) -> None:
    begin = key.public.verifier(mechanism).begin
    assert begin is not None
    parts = begin()
    for start in range(0, len(data), 7):
        parts.update(data[start : start + 7])
    parts.finish(signature)


# ---- RSA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", HASHED_PKCS1)
def test_rsa_pkcs1_with_each_hash(mechanism: int) -> None:
    name, data = HASHED_PKCS1[mechanism], b"a message in several parts"
    signature = LOADED_RSA.signer(Mechanism(mechanism)).sign(data)
    RSA.public_key().verify(signature, data, padding.PKCS1v15(), HASHES[name])
    assert in_parts(LOADED_RSA, Mechanism(mechanism), data) == signature
    LOADED_RSA.public.verifier(Mechanism(mechanism)).verify(data, signature)
    verify_in_parts(LOADED_RSA, Mechanism(mechanism), data, signature)
    refused(ck.CKR_SIGNATURE_INVALID, verify_in_parts, LOADED_RSA, Mechanism(mechanism), data + b"x", signature)


def test_rsa_pkcs1_signs_the_callers_digest_info() -> None:
    data = b"message"
    signature = LOADED_RSA.signer(Mechanism(ck.CKM_RSA_PKCS)).sign(DIGEST_INFO_SHA256 + hashlib.sha256(data).digest())
    RSA.public_key().verify(signature, data, padding.PKCS1v15(), hashes.SHA256())


def test_rsa_pkcs1_length_limits() -> None:
    signer = LOADED_RSA.signer(Mechanism(ck.CKM_RSA_PKCS))
    signer.sign(b"x" * (256 - 11))
    refused(ck.CKR_DATA_LEN_RANGE, signer.sign, b"x" * (256 - 10))
    assert signer.begin is None


@pytest.mark.parametrize("mask", MASK_IDS)
@pytest.mark.parametrize("mechanism", HASHED_PSS)
def test_rsa_pss_with_each_hash_and_mask(mechanism: int, mask: str) -> None:
    name, data = HASHED_PSS[mechanism], b"a message"
    salt = 11
    parameter = (HASH_IDS[name], MASK_IDS[mask], salt)
    signature = LOADED_RSA.signer(Mechanism(mechanism, parameter)).sign(data)
    pss = padding.PSS(padding.MGF1(HASHES[mask]), salt)
    RSA.public_key().verify(signature, data, pss, HASHES[name])
    raw = LOADED_RSA.signer(Mechanism(ck.CKM_RSA_PKCS_PSS, parameter)).sign(hashlib.new(name, data).digest())
    RSA.public_key().verify(raw, data, pss, HASHES[name])
    RSA.public_key().verify(in_parts(LOADED_RSA, Mechanism(mechanism, parameter), data), data, pss, HASHES[name])


@pytest.mark.parametrize(
    "parameter",
    [
        None,
        b"raw",
        (),
        (ck.CKM_SHA256, ck.CKG_MGF1_SHA256),
        (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 256 - 2 - 32 + 1),
        (ck.CKM_SHA256, 99, 32),
        (99, ck.CKG_MGF1_SHA256, 32),
        (ck.CKM_SHA384, ck.CKG_MGF1_SHA384, 48),
    ],
)
def test_rsa_pss_parameters_that_cannot_be(parameter: Any) -> None:
    refused(ck.CKR_MECHANISM_PARAM_INVALID, LOADED_RSA.signer, Mechanism(ck.CKM_SHA256_RSA_PKCS_PSS, parameter))


def test_rsa_pss_data_is_a_digest() -> None:
    signer = LOADED_RSA.signer(Mechanism(ck.CKM_RSA_PKCS_PSS, (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 256 - 2 - 32)))
    signer.sign(b"d" * 32)
    refused(ck.CKR_DATA_LEN_RANGE, signer.sign, b"d" * 31)
    refused(ck.CKR_DATA_LEN_RANGE, signer.sign, b"d" * 33)


def test_raw_rsa_is_the_private_power() -> None:
    numbers = RSA.private_numbers()
    n, d = numbers.public_numbers.n, numbers.d
    signer = LOADED_RSA.signer(Mechanism(ck.CKM_RSA_X_509))
    for data in (b"\x02", b"short", b"\x00" * 256, (n - 1).to_bytes(256, "big")):
        assert int.from_bytes(signer.sign(data), "big") == pow(int.from_bytes(data, "big"), d, n)
    refused(ck.CKR_DATA_INVALID, signer.sign, n.to_bytes(256, "big"))
    refused(ck.CKR_DATA_LEN_RANGE, signer.sign, b"\x00" * 257)
    decrypter = LOADED_RSA.decrypter(Mechanism(ck.CKM_RSA_X_509))
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, decrypter.run, b"\xff" * 256)
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, decrypter.run, b"\x01" * 255)


def oaep_by_openssl(name: str, mask: str, label: bytes, plain: bytes, tmp_path: Path) -> bytes:
    """openssl pkeyutl, since cryptography has no OAEP with SHA-3."""
    (tmp_path / "public.pem").write_bytes(public_pem(RSA))
    command = ["openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", str(tmp_path / "public.pem")]
    options = ["rsa_padding_mode:oaep", f"rsa_oaep_md:{name.replace('_', '-')}", f"rsa_mgf1_md:{mask.replace('_', '-')}"]
    options += [f"rsa_oaep_label:{label.hex()}"] if label else []
    for option in options:
        command += ["-pkeyopt", option]
    return subprocess.run(command, input=plain, capture_output=True, check=True).stdout


@pytest.mark.parametrize("label", [b"", b"label"])
@pytest.mark.parametrize("name", HASH_IDS)
def test_rsa_oaep_with_each_hash(name: str, label: bytes, tmp_path: Path) -> None:
    for mask in (name, "sha1"):
        parameter = (HASH_IDS[name], MASK_IDS[mask], 1, label)
        sealed = oaep_by_openssl(name, mask, label, b"for the key alone", tmp_path)
        decrypter = LOADED_RSA.decrypter(Mechanism(ck.CKM_RSA_PKCS_OAEP, parameter))
        assert decrypter.run(sealed) == b"for the key alone"
        assert len(b"for the key alone") <= decrypter.bound(256)
        other = LOADED_RSA.decrypter(Mechanism(ck.CKM_RSA_PKCS_OAEP, (*parameter[:3], b"other")))
        refused(ck.CKR_ENCRYPTED_DATA_INVALID, other.run, sealed)
        refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, decrypter.run, sealed[1:])


def test_rsa_oaep_encryption() -> None:
    parameter = (ck.CKM_SHA256, ck.CKG_MGF1_SHA1, 1, b"label")
    sealed = LOADED_RSA.public.encrypter(Mechanism(ck.CKM_RSA_PKCS_OAEP, parameter)).run(b"there and back")
    assert LOADED_RSA.decrypter(Mechanism(ck.CKM_RSA_PKCS_OAEP, parameter)).run(sealed) == b"there and back"
    sha3 = (ck.CKM_SHA3_256, ck.CKG_MGF1_SHA3_256, 1, b"")
    refused(ck.CKR_MECHANISM_PARAM_INVALID, LOADED_RSA.public.encrypter, Mechanism(ck.CKM_RSA_PKCS_OAEP, sha3))


def test_rsa_pkcs1_decryption() -> None:
    decrypter = LOADED_RSA.decrypter(Mechanism(ck.CKM_RSA_PKCS))
    assert decrypter.run(RSA.public_key().encrypt(b"hello", padding.PKCS1v15())) == b"hello"
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, decrypter.run, b"x" * 255)


# ---- EC ---------------------------------------------------------------------------------------------------------------


def der(signature: bytes) -> bytes:
    half = len(signature) // 2
    return encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))


@pytest.mark.parametrize("size", [1, 16, 19, 20, 21, 28, 31, 32, 33, 47, 48, 49, 64])
@pytest.mark.parametrize("curve", CURVES)
def test_ecdsa_of_any_length_is_bits2int(curve: str, size: int) -> None:
    """The value that is signed is the leftmost bits of the data (FIPS 186-5, 6.4.1): checked with the definition itself."""
    key = CURVES[curve]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    data = bytes(range(7, 7 + size))
    signature = loaded(key).signer(Mechanism(ck.CKM_ECDSA)).sign(data)
    width = (key.curve.key_size + 7) // 8
    assert len(signature) == 2 * width
    padded = data.rjust(min(width, 64), b"\0") if size <= width else data[:width]
    algorithm = {32: hashes.SHA256(), 48: hashes.SHA384(), 64: hashes.SHA512()}[len(padded)]
    key.public_key().verify(der(signature), padded, ec.ECDSA(Prehashed(algorithm)))
    loaded(key).public.verifier(Mechanism(ck.CKM_ECDSA)).verify(data, signature)


def test_ecdsa_limits() -> None:
    refused(ck.CKR_DATA_LEN_RANGE, loaded(CURVES["p256"]).signer(Mechanism(ck.CKM_ECDSA)).sign, b"")
    refused(ck.CKR_DATA_LEN_RANGE, loaded(CURVES["p521"]).signer(Mechanism(ck.CKM_ECDSA)).sign, b"x" * 65)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, loaded(CURVES["p256"]).signer, Mechanism(ck.CKM_ECDSA, b"x"))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("mechanism", sorted(m for m in mechanisms.TABLE if ck.mechanism_name(m).startswith("CKM_ECDSA_")))
def test_ecdsa_with_each_hash(curve: str, mechanism: int) -> None:
    key, data = CURVES[curve], b"a message in several parts"
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = ck.mechanism_name(mechanism).removeprefix("CKM_ECDSA_").lower()
    for signature in (loaded(key).signer(Mechanism(mechanism)).sign(data), in_parts(loaded(key), Mechanism(mechanism), data)):
        key.public_key().verify(der(signature), data, ec.ECDSA(HASHES[name]))
        verify_in_parts(loaded(key), Mechanism(mechanism), data, signature)


def test_ecdsa_verifies_a_signature_without_its_leading_zeros() -> None:
    """6.3.1: a shorter one, with halves alike, is verified.  On P-521 every fourth can be made so."""
    key, data, width = loaded(CURVES["p521"]), b"d" * 32, 66
    verifier, sign = key.public.verifier(Mechanism(ck.CKM_ECDSA)), key.signer(Mechanism(ck.CKM_ECDSA)).sign
    signature = next(s for s in (sign(data) for _ in range(1000)) if not s[0] and not s[width])
    verifier.verify(data, signature)
    verifier.verify(data, signature[1:width] + signature[width + 1 :])
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, data, signature[1:])
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, data, signature[1:-1])


def test_signatures_that_are_no_signatures() -> None:
    verifier = loaded(CURVES["p256"]).public.verifier(Mechanism(ck.CKM_ECDSA))
    for length in (0, 1, 54, 63, 65, 66):
        refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, b"d" * 32, b"s" * length)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, b"d" * 32, b"s" * 56)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, b"d" * 32, b"\0" * 64)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, b"d" * 32, b"\xff" * 64)


@pytest.mark.parametrize("curve", CURVES)
def test_ecdh_with_the_point_raw_and_wrapped(curve: str) -> None:
    from cryptography.hazmat.primitives import serialization

    mine, peer = CURVES[curve], new_key(curve)
    assert isinstance(mine, ec.EllipticCurvePrivateKey) and isinstance(peer, ec.EllipticCurvePrivateKey)
    point = peer.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    wrapped = loaded(peer).public.attributes()[ck.CKA_EC_POINT]
    expected = peer.exchange(ec.ECDH(), mine.public_key())
    for form in (point, wrapped):
        assert loaded(mine).derive(Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", form))) == expected
    off = point[:-1] + bytes((point[-1] ^ 1,))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, loaded(mine).derive, Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", off)))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, loaded(mine).derive, Mechanism(ck.CKM_ECDH1_DERIVE, (99, b"", point)))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, loaded(mine).derive, Mechanism(ck.CKM_ECDH1_DERIVE))


# ---- Edwards, ML-DSA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "ed448"])
def test_eddsa(kind: str) -> None:
    key: Any = new_key(kind)
    signature = loaded(key).signer(Mechanism(ck.CKM_EDDSA)).sign(b"message")
    key.public_key().verify(signature, b"message")
    assert in_parts(loaded(key), Mechanism(ck.CKM_EDDSA, (0, b"")), b"message") == signature
    for wrong in ((2, b""), (0, b"c" * (MAX_CONTEXT + 1)), (1, b"c" * (MAX_CONTEXT + 1)), (0,), (0, b"c", 1), b"c" * 24, (b"c", 0)):
        for make in (loaded(key).signer, loaded(key).public.verifier):
            refused(ck.CKR_MECHANISM_PARAM_INVALID, make, Mechanism(ck.CKM_EDDSA, wrong))
    begin = loaded(key).signer(Mechanism(ck.CKM_EDDSA)).begin
    assert begin is not None
    parts = begin()
    parts.update(b"x" * MAX_MULTIPART)
    refused(ck.CKR_DATA_LEN_RANGE, parts.update, b"x")


@pytest.mark.parametrize("kind", ["ed25519", "ed448"])
@pytest.mark.parametrize("prehash", [0, 1])
def test_eddsa_with_a_context(kind: str, prehash: int) -> None:
    """What the vectors of RFC 8032 show is in tests/conformance/test_rfc8032.py."""
    key: Any = new_key(kind)
    own, signed = loaded(key), set()
    for context in (b"c", b"c" * MAX_CONTEXT, b"\0"):
        mechanism = Mechanism(ck.CKM_EDDSA, (prehash, context))
        signature = own.signer(mechanism).sign(b"message")
        own.public.verifier(mechanism).verify(b"message", signature)
        assert in_parts(own, mechanism, b"message") == signature
        signed.add(signature)
        pure = own.public.verifier(Mechanism(ck.CKM_EDDSA)).verify
        refused(ck.CKR_SIGNATURE_INVALID, pure, b"message", signature)
        assert own.lane_key(mechanism) is None
    assert len(signed) == 3
    assert own.signer(Mechanism(ck.CKM_EDDSA, (0, b""))).sign(b"message") == own.signer(Mechanism(ck.CKM_EDDSA)).sign(b"message")


@pytest.mark.parametrize("kind", ["ed25519", "ed448"])
def test_what_is_prehashed_is_not_kept(kind: str) -> None:
    own, mechanism = loaded(new_key(kind)), Mechanism(ck.CKM_EDDSA, (1, b""))
    begin, part = own.signer(mechanism).begin, b"x" * (MAX_MULTIPART // 2)
    assert begin is not None
    parts = begin()
    for _ in range(5):
        parts.update(part)
    assert parts.finish() == own.signer(mechanism).sign(part * 5)


def test_a_public_key_that_is_no_point() -> None:
    """`cryptography` takes the bytes as they are; nothing verifies with them."""
    public = EdwardsPublicKey(ed25519.Ed25519PublicKey.from_public_bytes(b"\2" + bytes(31)))
    refused(ck.CKR_SIGNATURE_INVALID, public.verifier(Mechanism(ck.CKM_EDDSA)).verify, b"message", bytes(64))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, public.verifier, Mechanism(ck.CKM_EDDSA, (0, b"c")))


@pytest.mark.parametrize("kind", [mldsa.MLDSA44PrivateKey, mldsa.MLDSA65PrivateKey, mldsa.MLDSA87PrivateKey])
def test_ml_dsa(kind: Any) -> None:
    key = kind.generate()
    private = loaded(key)
    signer = private.signer(Mechanism(ck.CKM_ML_DSA))
    signature = signer.sign(b"message")
    assert len(signature) == signer.output_size
    key.public_key().verify(signature, b"message")
    with_context = private.signer(Mechanism(ck.CKM_ML_DSA, (0, b"context"))).sign(b"message")
    key.public_key().verify(with_context, b"message", b"context")
    private.signer(Mechanism(ck.CKM_ML_DSA, (0, b"c" * 255)))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, private.signer, Mechanism(ck.CKM_ML_DSA, (0, b"c" * 256)))


# ---- tables -------------------------------------------------------------------------------------------------------------


def test_mechanisms_are_symmetric() -> None:
    for mechanism, row in mechanisms.TABLE.items():
        assert bool(row.flags & ck.CKF_SIGN) == bool(row.flags & ck.CKF_VERIFY), ck.mechanism_name(mechanism)
        assert bool(row.flags & ck.CKF_DECRYPT) == bool(row.flags & ck.CKF_ENCRYPT), ck.mechanism_name(mechanism)


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_profiles_allow_only_what_the_key_can(profile: str) -> None:
    for key in (LOADED_RSA, loaded(CURVES["p256"]), loaded(new_key("ed25519"))):
        usage = profiles.usage(profile, key.kind)
        for mechanism in profiles.allowed_mechanisms(profile, key.kind):
            row = mechanisms.TABLE[mechanism]
            assert key.kind.key_type in row.key_types
            assert usage.raw or mechanism != ck.CKM_RSA_X_509
            assert (
                (usage.sign and row.flags & ck.CKF_SIGN)
                or (usage.decrypt and row.flags & ck.CKF_DECRYPT)
                or (usage.derive and row.flags & ck.CKF_DERIVE)
            )


def test_digests() -> None:
    for mechanism in (m for m, row in mechanisms.TABLE.items() if row.flags & ck.CKF_DIGEST):
        size, begin = PROVIDER.digest(Mechanism(mechanism))
        made = begin()
        made.update(b"abc")
        assert len(made.digest()) == size
    refused(ck.CKR_MECHANISM_INVALID, PROVIDER.digest, Mechanism(ck.CKM_ECDSA))


def test_keys_show_nothing() -> None:
    for key in (LOADED_RSA, loaded(CURVES["p256"]), loaded(new_key("ed25519"))):
        assert repr(key) == f"<private key, {key.kind.name}>"


@pytest.mark.parametrize("data", [b"", b"\x30\x00", b"x" * 100])
def test_bytes_that_are_no_key(data: bytes) -> None:
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, PROVIDER.load_private_key, data)
