"""Every mechanism on a real worker through the library: one-shot and in parts, sizes asked for, buffers too small; checked by
`cryptography`, hashlib, arithmetic and OpenSSL."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from ctypes import Structure, byref, c_char_p, c_ubyte, c_ulong, c_void_p, cast, sizeof, string_at
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, padding, x25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from hsmvisord import ck
from hsmvisord.crypto.derivation import KDFS
from hsmvisord.crypto.digests import DIGESTS
from hsmvisord.crypto.ec import HASHED as ECDSA_HASHED
from hsmvisord.crypto.operations import HASH_MECHANISMS, HASHES, MASKS
from hsmvisord.crypto.rsa import HASHED_PKCS1, HASHED_PSS
from support.bare_worker import BareWorker
from support.certificates import new_key, pkcs8, public_pem, spki
from support.cryptoki import CkAttribute, CkMechanism, Cryptoki, mechanism

KEYS: dict[str, Any] = {name: new_key(name) for name in ("p256", "p384", "p521", "rsa2048", "ed25519", "ed448")} | {
    "mldsa44": mldsa.MLDSA44PrivateKey.generate(),
    "mldsa65": mldsa.MLDSA65PrivateKey.generate(),
    "mldsa87": mldsa.MLDSA87PrivateKey.generate(),
    "x25519": x25519.X25519PrivateKey.generate(),
}
RSA = KEYS["rsa2048"]
HASH_IDS = {name: kind for kind, name in HASH_MECHANISMS.items()}
MASK_IDS = {name: mask for mask, name in MASKS.items()}
WHOLE = {ck.CKM_RSA_PKCS, ck.CKM_RSA_X_509, ck.CKM_RSA_PKCS_PSS, ck.CKM_ECDSA}  #: in one part only
CASES = [
    *(("rsa2048", m) for m in (ck.CKM_RSA_PKCS, ck.CKM_RSA_X_509, ck.CKM_RSA_PKCS_PSS, *HASHED_PKCS1, *HASHED_PSS)),
    *((curve, m) for curve in ("p256", "p384", "p521") for m in (ck.CKM_ECDSA, *ECDSA_HASHED)),
    *((kind, ck.CKM_EDDSA) for kind in ("ed25519", "ed448")),
    *((kind, ck.CKM_ML_DSA) for kind in ("mldsa44", "mldsa65", "mldsa87")),
]  # fmt: skip
MESSAGE = bytes(range(256)) * 5


class OaepParams(Structure):
    _fields_ = (("hash", c_ulong), ("mgf", c_ulong), ("source", c_ulong), ("data", c_void_p), ("length", c_ulong))


class Ecdh1Params(Structure):
    _fields_ = (("kdf", c_ulong), ("shared_length", c_ulong), ("shared", c_void_p), ("length", c_ulong), ("public", c_void_p))


def structured(kind: int, parameter: Structure) -> CkMechanism:
    return CkMechanism(kind, cast(byref(parameter), c_void_p), sizeof(parameter))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path_factory.mktemp("worker"))
    for name, key in KEYS.items():
        worker.push(name, 1, pkcs8(key), spki(key))
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def p11(worker: BareWorker) -> Iterator[Cryptoki]:
    library = Cryptoki()
    library.initialize(f"unix:path={worker.guest_path}")
    yield library
    library.finalize()


@pytest.fixture
def session(p11: Cryptoki) -> Iterator[int]:
    session = p11.open_session()
    yield session
    p11.good("C_CloseSession", session)


def handle(p11: Cryptoki, session: int, label: str, kind: int = ck.CKO_PRIVATE_KEY) -> int:
    (found,) = p11.find(session, template=[(ck.CKA_CLASS, bytes(c_ulong(kind))), (ck.CKA_LABEL, label.encode())])
    return found


def hash_of(kind: int) -> str:
    return (HASHED_PKCS1 | HASHED_PSS | ECDSA_HASHED).get(kind, "sha256")


def made(kind: int) -> CkMechanism:
    if kind in HASHED_PSS or kind == ck.CKM_RSA_PKCS_PSS:
        name = hash_of(kind)
        return mechanism(kind, b"".join(bytes(c_ulong(n)) for n in (HASH_IDS[name], MASK_IDS[name], 20)))
    return mechanism(kind)


def check(label: str, kind: int, data: bytes, signature: bytes) -> None:
    """Fails unless `signature` is the key's, by an implementation that is not the module's."""
    public, algorithm = KEYS[label].public_key(), HASHES[hash_of(kind)]
    if label.startswith("p"):
        half = len(signature) // 2
        der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
        public.verify(der, data, ec.ECDSA(Prehashed(algorithm) if kind in WHOLE else algorithm))
    elif kind == ck.CKM_RSA_X_509:
        numbers = public.public_numbers()
        assert pow(int.from_bytes(signature, "big"), numbers.e, numbers.n) == int.from_bytes(data, "big")
    elif kind == ck.CKM_RSA_PKCS:
        assert public.recover_data_from_signature(signature, padding.PKCS1v15(), None) == data
    elif kind in HASHED_PKCS1:
        public.verify(signature, data, padding.PKCS1v15(), algorithm)
    elif label == "rsa2048":
        pss = padding.PSS(padding.MGF1(algorithm), 20)
        public.verify(signature, data, pss, Prehashed(algorithm) if kind in WHOLE else algorithm)
    else:
        public.verify(signature, data)


def verify_rv(p11: Cryptoki, session: int, key: int, kind: int, data: bytes, signature: bytes, step: int = 0) -> int:
    p11.good("C_VerifyInit", session, byref(made(kind)), key)
    if not step:
        return p11.call("C_Verify", session, data, len(data), signature, len(signature))
    for start in range(0, len(data), step):
        p11.good("C_VerifyUpdate", session, data[start : start + step], len(data[start : start + step]))
    return p11.call("C_VerifyFinal", session, signature, len(signature))


@pytest.mark.parametrize(("label", "kind"), CASES, ids=[f"{label}-{ck.mechanism_name(m)}" for label, m in CASES])
def test_signs_and_verifies(p11: Cryptoki, session: int, label: str, kind: int) -> None:
    key, public = handle(p11, session, label), handle(p11, session, label, ck.CKO_PUBLIC_KEY)
    data = hashlib.sha256(MESSAGE).digest() if kind in WHOLE else MESSAGE
    for _ in range(2):  # the second Init is put off by the library
        assert p11.sign_init(session, key, made(kind)) == ck.CKR_OK
        rv, size = p11.sign(session, data, None)
        assert rv == ck.CKR_OK
        assert p11.sign(session, data, size - 1) == (ck.CKR_BUFFER_TOO_SMALL, size)
        rv, signature = p11.sign(session, data, 8192)
        assert (rv, len(signature)) == (ck.CKR_OK, size)
        check(label, kind, data, signature)
        assert p11.sign(session, data)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    assert verify_rv(p11, session, public, kind, data, signature) == ck.CKR_OK
    other = bytes((data[0] ^ 1,)) + data[1:]
    assert verify_rv(p11, session, public, kind, other, signature) == ck.CKR_SIGNATURE_INVALID
    assert verify_rv(p11, session, public, kind, data, signature[:-1]) == ck.CKR_SIGNATURE_LEN_RANGE
    assert p11.sign_init(session, key, made(kind)) == ck.CKR_OK
    if kind in WHOLE:
        assert p11.call("C_SignUpdate", session, data, len(data)) == ck.CKR_FUNCTION_NOT_SUPPORTED
        assert p11.sign(session, data)[0] == ck.CKR_OPERATION_NOT_INITIALIZED, "the error has ended it"
        return
    for start in range(0, len(data), 700):
        p11.good("C_SignUpdate", session, data[start : start + 700], len(data[start : start + 700]))
    assert p11.sign(session, b"", None, "C_SignFinal") == (ck.CKR_OK, size)
    assert p11.sign(session, b"", size - 1, "C_SignFinal") == (ck.CKR_BUFFER_TOO_SMALL, size)
    rv, signature = p11.sign(session, b"", 8192, "C_SignFinal")
    check(label, kind, data, signature)
    assert verify_rv(p11, session, public, kind, data, signature, step=300) == ck.CKR_OK
    assert verify_rv(p11, session, public, kind, other, signature, step=300) == ck.CKR_SIGNATURE_INVALID


def test_every_allowed_mechanism_is_tried_here(p11: Cryptoki, session: int) -> None:
    tried = set(CASES) | {("rsa2048", ck.CKM_RSA_PKCS_OAEP)}
    tried |= {(c, m) for c in ("p256", "p384", "p521") for m in (ck.CKM_ECDH1_DERIVE, ck.CKM_ECDH1_COFACTOR_DERIVE)}
    tried |= {("x25519", ck.CKM_ECDH1_DERIVE)}
    for label in KEYS:
        _, (raw,) = p11.attributes(session, handle(p11, session, label), [(ck.CKA_ALLOWED_MECHANISMS, 1024)])
        assert isinstance(raw, bytes)
        allowed = {int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)}
        assert allowed == {m for name, m in tried if name == label}, label


def decrypts(p11: Cryptoki, session: int, how: CkMechanism, sealed: bytes) -> bytes:
    p11.good("C_DecryptInit", session, byref(how), handle(p11, session, "rsa2048"))
    out, length = (c_ubyte * 256)(), c_ulong()
    p11.good("C_Decrypt", session, sealed, len(sealed), None, byref(length))
    assert length.value <= 256
    length.value = 1
    assert p11.call("C_Decrypt", session, sealed, len(sealed), out, byref(length)) == ck.CKR_BUFFER_TOO_SMALL
    length.value = 256
    p11.good("C_Decrypt", session, sealed, len(sealed), out, byref(length))
    assert p11.call("C_Decrypt", session, sealed, len(sealed), out, byref(length)) == ck.CKR_OPERATION_NOT_INITIALIZED
    return bytes(out[: length.value])


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.parametrize("label", [b"", b"a label"], ids=["", "labelled"])
def test_decrypts_oaep_with_every_hash(p11: Cryptoki, session: int, tmp_path: Path, name: str, label: bytes) -> None:
    (tmp_path / "public.pem").write_bytes(public_pem(RSA))
    digest = name.replace("_", "-")
    options = ["rsa_padding_mode:oaep", f"rsa_oaep_md:{digest}", f"rsa_mgf1_md:{digest}"]
    options += [f"rsa_oaep_label:{label.hex()}"] if label else []
    command = ["openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", str(tmp_path / "public.pem")]
    command += [word for option in options for word in ("-pkeyopt", option)]
    sealed = subprocess.run(command, input=b"secret", capture_output=True, check=True).stdout
    source = cast(c_char_p(label), c_void_p)
    parameter = OaepParams(HASH_IDS[name], MASK_IDS[name], ck.CKZ_DATA_SPECIFIED, source if label else None, len(label))
    how = structured(ck.CKM_RSA_PKCS_OAEP, parameter)
    assert decrypts(p11, session, how, sealed) == b"secret"
    broken = bytes((sealed[0] ^ 1,)) + sealed[1:]
    p11.good("C_DecryptInit", session, byref(how), handle(p11, session, "rsa2048"))
    rv = p11.call("C_Decrypt", session, broken, len(broken), (c_ubyte * 256)(), byref(c_ulong(256)))
    assert rv == ck.CKR_ENCRYPTED_DATA_INVALID


def test_decrypts_pkcs1_and_raw(p11: Cryptoki, session: int) -> None:
    sealed = RSA.public_key().encrypt(b"secret", padding.PKCS1v15())
    assert decrypts(p11, session, mechanism(ck.CKM_RSA_PKCS), sealed) == b"secret"
    numbers = RSA.public_key().public_numbers()
    sealed = pow(5, numbers.e, numbers.n).to_bytes(256, "big")
    assert decrypts(p11, session, mechanism(ck.CKM_RSA_X_509), sealed) == (5).to_bytes(256, "big")


def agreed(label: str) -> tuple[bytes, bytes]:
    """Returns a peer's point, and the secret that comes of it."""
    key = KEYS[label]
    if label == "x25519":
        other = x25519.X25519PrivateKey.generate().public_key()
        return other.public_bytes_raw(), key.exchange(other)
    peer = ec.generate_private_key(key.curve).public_key()
    point = peer.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return point, key.exchange(ec.ECDH(), peer)


@pytest.mark.parametrize(
    ("curve", "kind"),
    [
        *((curve, kind) for curve in ("p256", "p384", "p521") for kind in (ck.CKM_ECDH1_DERIVE, ck.CKM_ECDH1_COFACTOR_DERIVE)),
        ("x25519", ck.CKM_ECDH1_DERIVE),
    ],
)
def test_derives(p11: Cryptoki, session: int, curve: str, kind: int) -> None:
    point, expected = agreed(curve)
    parameter = Ecdh1Params(ck.CKD_NULL, 0, None, len(point), cast(c_char_p(point), c_void_p))
    true, false = b"\1", b"\0"
    rows = [(ck.CKA_SENSITIVE, false), (ck.CKA_EXTRACTABLE, true), (ck.CKA_TOKEN, false)]
    template = (CkAttribute * len(rows))(*(CkAttribute(k, cast(c_char_p(v), c_void_p), 1) for k, v in rows))
    secret = c_ulong()
    key = handle(p11, session, curve)
    p11.good("C_DeriveKey", session, byref(structured(kind, parameter)), key, template, len(rows), byref(secret))
    rv, (value,) = p11.attributes(session, secret.value, [(ck.CKA_VALUE, 128)])
    assert (rv, value) == (ck.CKR_OK, expected)
    p11.good("C_DestroyObject", session, secret.value)


@pytest.mark.parametrize("kdf", KDFS)
def test_derives_with_a_kdf(p11: Cryptoki, session: int, kdf: int) -> None:
    peer = ec.generate_private_key(ec.SECP256R1())
    point = peer.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    shared = b"known to both"
    parameter = Ecdh1Params(kdf, len(shared), cast(c_char_p(shared), c_void_p), len(point), cast(c_char_p(point), c_void_p))
    size, true, false = (48).to_bytes(8, "little"), b"\1", b"\0"
    rows = [(ck.CKA_SENSITIVE, false), (ck.CKA_EXTRACTABLE, true), (ck.CKA_VALUE_LEN, size)]
    template = (CkAttribute * len(rows))(*(CkAttribute(k, cast(c_char_p(v), c_void_p), len(v)) for k, v in rows))
    secret, key, how = c_ulong(), handle(p11, session, "p256"), byref(structured(ck.CKM_ECDH1_DERIVE, parameter))
    p11.good("C_DeriveKey", session, how, key, template, len(rows), byref(secret))
    rv, (value,) = p11.attributes(session, secret.value, [(ck.CKA_VALUE, 128)])
    expected = X963KDF(HASHES[KDFS[kdf]], 48, shared).derive(KEYS["p256"].exchange(ec.ECDH(), peer.public_key()))
    assert (rv, value) == (ck.CKR_OK, expected)
    p11.good("C_DestroyObject", session, secret.value)
    assert p11.call("C_DeriveKey", session, how, key, template, 2, byref(secret)) == ck.CKR_TEMPLATE_INCOMPLETE


@pytest.mark.parametrize("kind", DIGESTS)
def test_digests(p11: Cryptoki, session: int, kind: int) -> None:
    expected = hashlib.new(DIGESTS[kind], MESSAGE).digest()
    out, length = (c_ubyte * 64)(), c_ulong(0)
    for parts in (False, True):
        p11.good("C_DigestInit", session, byref(mechanism(kind)))
        if parts:
            for start in range(0, len(MESSAGE), 512):
                p11.good("C_DigestUpdate", session, MESSAGE[start : start + 512], len(MESSAGE[start : start + 512]))
        inputs = () if parts else (MESSAGE, len(MESSAGE))
        name = "C_DigestFinal" if parts else "C_Digest"
        p11.good(name, session, *inputs, None, byref(length))
        assert length.value == len(expected)
        length.value -= 1
        assert p11.call(name, session, *inputs, out, byref(length)) == ck.CKR_BUFFER_TOO_SMALL
        length.value = 64
        p11.good(name, session, *inputs, out, byref(length))
        assert string_at(out, length.value) == expected
        assert p11.call(name, session, *inputs, out, byref(length)) == ck.CKR_OPERATION_NOT_INITIALIZED


LARGE = MESSAGE * 2500  #: more than a message of the wire holds


@pytest.mark.parametrize(("label", "kind"), [("rsa2048", ck.CKM_SHA256_RSA_PKCS), ("p256", ck.CKM_ECDSA_SHA256)])
def test_signs_and_verifies_more_than_a_message_holds(p11: Cryptoki, session: int, label: str, kind: int) -> None:
    key, public = handle(p11, session, label), handle(p11, session, label, ck.CKO_PUBLIC_KEY)
    for _ in range(2):
        assert p11.sign_init(session, key, made(kind)) == ck.CKR_OK
        rv, size = p11.sign(session, LARGE, None)
        assert rv == ck.CKR_OK
        assert p11.sign(session, LARGE, size - 1) == (ck.CKR_BUFFER_TOO_SMALL, size)
        rv, signature = p11.sign(session, LARGE)
        assert rv == ck.CKR_OK
        check(label, kind, LARGE, signature)
        assert p11.sign(session, LARGE)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    assert verify_rv(p11, session, public, kind, LARGE, signature) == ck.CKR_OK
    assert verify_rv(p11, session, public, kind, LARGE[1:], signature) == ck.CKR_SIGNATURE_INVALID
    assert p11.sign_init(session, key, made(kind)) == ck.CKR_OK
    p11.good("C_SignUpdate", session, LARGE, len(LARGE))
    assert p11.sign(session, LARGE)[0] == ck.CKR_OPERATION_ACTIVE, "a one-shot call after a part"
    assert p11.sign(session, b"", 256, "C_SignFinal")[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_more_than_any_key_takes_ends_the_operation(p11: Cryptoki, session: int) -> None:
    key = handle(p11, session, "rsa2048")
    for _ in range(2):
        assert p11.sign_init(session, key, mechanism(ck.CKM_RSA_PKCS)) == ck.CKR_OK
        assert p11.sign(session, LARGE)[0] == ck.CKR_DATA_LEN_RANGE
        assert p11.sign(session, b"small")[0] == ck.CKR_OPERATION_NOT_INITIALIZED
        p11.good("C_DecryptInit", session, byref(mechanism(ck.CKM_RSA_PKCS)), key)
        out, length = (c_ubyte * 256)(), c_ulong(256)
        rv = p11.call("C_Decrypt", session, LARGE, len(LARGE), out, byref(length))
        assert rv == ck.CKR_ENCRYPTED_DATA_LEN_RANGE
        assert p11.call("C_Decrypt", session, bytes(256), 256, out, byref(length)) == ck.CKR_OPERATION_NOT_INITIALIZED
        assert p11.call("C_Decrypt", session, LARGE, len(LARGE), out, byref(length)) == ck.CKR_OPERATION_NOT_INITIALIZED


def test_digests_more_than_a_message_holds(p11: Cryptoki, session: int) -> None:
    out, length = (c_ubyte * 64)(), c_ulong(64)
    for _ in range(2):
        p11.good("C_DigestInit", session, byref(mechanism(ck.CKM_SHA512)))
        p11.good("C_Digest", session, LARGE, len(LARGE), out, byref(length))
        assert string_at(out, 64) == hashlib.sha512(LARGE).digest()
