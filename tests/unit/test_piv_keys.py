"""The keys on a card: what each algorithm does; profile, policy, rate and statistics are those of all ways into the token."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisord import ck
from hsmvisord.face.card.holdings import digest_info
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.token.policy import Policy
from hsmvisord.token.token import Settings
from hsmvisord.wire import tlv
from hsmvisord.wire.calls import Mechanism
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import key_id, spki
from support.smart_card import (
    DIGEST,
    ED25519,
    MESSAGE,
    OBJECTS,
    P_256,
    P_384,
    RSA_2048,
    RSA_3072,
    X25519,
    CardRig,
    is_of,
    one_key,
    refused,
    shared_key,
    short,
    template,
)

SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420") + DIGEST


def padded(info: bytes, size: int) -> bytes:
    """EMSA-PKCS1-v1_5."""
    return b"\0\1" + b"\xff" * (size - 3 - len(info)) + b"\0" + info


@pytest.mark.parametrize(("kind", "algorithm"), [("p256", P_256), ("p384", P_384)])
@pytest.mark.parametrize("profile", ["tls", "ssh", "request-signing", "card", "any"])
def test_ecdsa(kind: str, algorithm: int, profile: str) -> None:
    rig = one_key(kind, profile=profile)
    key = rig.certificate(0x9A).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    for hash_ in (hashes.SHA1(), hashes.SHA256(), hashes.SHA384()):
        digest = hashlib.new(hash_.name, MESSAGE).digest()
        signature = rig.use(0x9A, algorithm, digest)
        key.verify(signature, digest, ec.ECDSA(Prehashed(hash_)))


def test_ecdsa_signatures_are_der() -> None:
    """Numbers that begin with a set bit or with zeros: enough of them come in 200 signatures."""
    rig = one_key()
    key = rig.certificate(0x9A).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    sizes = set()
    for _ in range(200):
        signature = rig.use(0x9A, P_256, DIGEST)
        key.verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
        sizes.add(len(signature))
    assert len(sizes) >= 3


def test_ed25519() -> None:
    rig = one_key("ed25519", profile="any")
    key = rig.certificate(0x9A).public_key()
    assert isinstance(key, ed25519.Ed25519PublicKey)
    for message in (b"m", MESSAGE * 200):
        key.verify(rig.use(0x9A, ED25519, message), message)


@pytest.mark.parametrize(("kind", "algorithm", "size"), [("rsa2048", RSA_2048, 256), ("rsa3072", RSA_3072, 384)])
def test_rsa(kind: str, algorithm: int, size: int) -> None:
    rig = one_key(kind)
    key = shared_key(kind)
    assert isinstance(key, rsa.RSAPrivateKey)
    public = key.public_key()
    signature = rig.use(0x9A, algorithm, padded(SHA256_INFO, size))
    public.verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    numbers = public.public_numbers()
    block = b"\0\2" + b"r" * (size - 30) + b"\0" + b"the shared secret".ljust(27)
    sealed = pow(int.from_bytes(block, "big"), numbers.e, numbers.n).to_bytes(size, "big")
    assert rig.use(0x9A, algorithm, sealed) == block


def test_an_rsa_key_that_may_not_do_raw_operations_signs_all_the_same() -> None:
    """What is padded for a signature goes the way of CKM_RSA_PKCS."""
    rig = one_key("rsa2048", profile="tls")
    signature = rig.use(0x9A, RSA_2048, padded(SHA256_INFO, 256))
    shared_key("rsa2048").public_key().verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr, call-arg, arg-type]
    refused(0x6985, rig.use, 0x9A, RSA_2048, b"\0\2" + b"r" * 254)
    refused(0x6985, rig.use, 0x9A, RSA_2048, b"\0\1" + b"\xff" * 7 + b"\0" + bytes(246))
    used = {(name, mechanism): cell.count for (name, mechanism, _), cell in rig.token.statistics().items()}
    assert used == {("sign", ck.CKM_RSA_PKCS): 1}


def test_an_rsa_key_that_may_decrypt_alone() -> None:
    rig = one_key("rsa2048", profile="decrypt")
    key = shared_key("rsa2048")
    assert isinstance(key, rsa.RSAPrivateKey)
    sealed = key.public_key().encrypt(b"secret", padding.PKCS1v15())
    assert rig.use(0x9A, RSA_2048, sealed).endswith(b"\0secret")
    used = {(name, mechanism) for name, mechanism, _ in rig.token.statistics()}
    assert used == {("decrypt", ck.CKM_RSA_X_509)}


def test_a_raw_operation_counts_as_a_signature_where_it_may_be_one() -> None:
    told: list[Any] = []
    rig = one_key("rsa2048", profile="any")
    rig.token.on_signature = lambda application, *what: told.append((application.program, *what))
    rig.use(0x9A, RSA_2048, b"\0" + b"x" * 255)
    assert told == [("smart card", "sign", ck.CKM_RSA_X_509, ("tls", 1))]


def test_a_number_beyond_the_modulus() -> None:
    rig = one_key("rsa2048")
    refused(0x6A80, rig.use, 0x9A, RSA_2048, b"\xff" * 256)


@given(st.binary(max_size=40), st.integers(0, 12))
def test_what_is_padded_as_pkcs1(info: bytes, filling: int) -> None:
    block = b"\0\1" + b"\xff" * filling + b"\0" + info
    assert digest_info(block) == (info if filling >= 8 else None)
    for wrong in (b"\0\2" + block[2:], b"\1" + block[1:], b"\0\1" + b"\xff" * 5 + b"\xfe" + b"\xff" * 20 + b"\0" + info, b"\0\1"):
        assert digest_info(wrong) is None


@pytest.mark.parametrize(("kind", "algorithm"), [("p256", P_256), ("p384", P_384)])
def test_ecdh(kind: str, algorithm: int) -> None:
    rig = one_key(kind)
    key = shared_key(kind)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    peer = ec.generate_private_key(key.curve)
    point = peer.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    secret = rig.use(0x9A, algorithm, point, 0x85)
    assert secret == peer.exchange(ec.ECDH(), key.public_key())
    off = bytearray(point)
    off[-1] ^= 1
    for wrong in (bytes(off), point[:-1], point + b"\0", b"\4" + bytes(len(point) - 1), b"\6" + point[1:], b""):
        refused(0x6A80, rig.use, 0x9A, algorithm, wrong, 0x85)
    compressed = peer.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    refused(0x6A80, rig.use, 0x9A, algorithm, compressed, 0x85)
    assert {name for name, _, _ in rig.token.statistics()} == {"derive"}


def test_keys_that_may_not_derive() -> None:
    rig = one_key("p256", profile="tls")
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    refused(0x6985, rig.use, 0x9A, P_256, point, 0x85)


def test_a_key_for_decryption_does_not_sign() -> None:
    rig = one_key("p256", profile="decrypt")
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)


def test_x25519() -> None:
    key, peer = x25519.X25519PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    rig = CardRig(settings=CardSettings(((0x9D, "agree"),), yubikey=True))
    rig.push("agree", key=key, profile="decrypt")
    rig.connect()
    point = peer.public_key().public_bytes_raw()
    refused(0x6985, rig.use, 0x9D, X25519, point, 0x85)  # its certificate was not read
    assert rig.certificate(0x9D).public_key() == key.public_key()
    assert rig.use(0x9D, X25519, point, 0x85) == peer.exchange(key.public_key())
    refused(0x6A80, rig.use, 0x9D, X25519, point[1:], 0x85)
    refused(0x6A80, rig.use, 0x9D, X25519, bytes(32), 0x85)
    refused(0x6A80, rig.use, 0x9D, X25519, DIGEST)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("p256", ""),
        ("p256", "7C00"),
        ("p256", "7C028200"),
        ("p256", "7C0281 00"),
        ("p256", "7C0481008200"),
        ("p256", "7C0482008000"),
        ("p256", "7C058200810141" + "00"),
        ("p256", "7C0882008101418101 42"),
        ("p256", "7C0682014281 0141"),
        ("p256", "7C0382 00 8101"),
        ("p256", "7C80820081014100 00"),
        ("p256", "30058200810141"),
        ("rsa2048", "7C058200810141"),
        ("rsa2048", "7C058200850141"),
    ],
)
def test_templates_that_cannot_be(kind: str, data: str) -> None:
    rig = one_key(kind)
    algorithm = P_256 if kind == "p256" else RSA_2048
    refused(0x6A80, rig.send, short(0, 0x87, algorithm, 0x9A, bytes.fromhex(data)))
    assert rig.token.statistics() == {}


def test_the_order_of_a_template_does_not_matter() -> None:
    rig = one_key()
    rig.send(short(0, 0x87, P_256, 0x9A, tlv.encode(0x7C, tlv.encode(0x81, DIGEST) + b"\x82\0")))


@pytest.mark.parametrize(
    ("algorithm", "slot"),
    [(P_384, 0x9A), (RSA_2048, 0x9A), (0, 0x9A), (P_256, 0x9C), (P_256, 0x83), (P_256, 0x96), (0, 0x9B), (3, 0x9B)],
)
def test_another_algorithm_or_slot(algorithm: int, slot: int) -> None:
    """Also the management key's (9B): there is none, and OpenSC asks it for random numbers."""
    rig = one_key()
    refused(0x6A86, rig.send, short(0, 0x87, algorithm, slot, template(0x81, DIGEST)))


def test_an_rsa_block_in_a_chain_and_its_answer_in_parts() -> None:
    """As OpenSC sends it."""
    rig = one_key("rsa2048")
    whole = template(0x81, padded(SHA256_INFO, 256))
    assert rig.exchange(short(0x10, 0x87, RSA_2048, 0x9A, whole[:255], None)) == b"\x90\0"
    first = rig.exchange(short(0, 0x87, RSA_2048, 0x9A, whole[255:]))
    assert len(first) == 258 and first[-2:] == b"\x61\x08"
    rest = rig.exchange(short(0, 0xC0, 0, 0, b"", 8))
    assert len(rest) == 10 and rest[-2:] == b"\x90\0"
    ((_, inside),) = tlv.decode(first[:-2] + rest[:-2])
    ((_, signature),) = tlv.decode(inside)
    shared_key("rsa2048").public_key().verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr, call-arg, arg-type]


# ---- what the operator said ---------------------------------------------------------------------------------------------


def test_the_modules_policy_holds_on_the_card() -> None:
    rig = one_key("rsa2048")
    rig.token.settings = Settings(policy=Policy(mechanisms=frozenset({ck.CKM_RSA_PKCS})))
    rig.use(0x9A, RSA_2048, padded(SHA256_INFO, 256))
    refused(0x6985, rig.use, 0x9A, RSA_2048, b"\0\2" + b"r" * 254)
    rig.token.settings = Settings(policy=Policy(min_rsa_bits=3072))
    refused(0x6985, rig.use, 0x9A, RSA_2048, padded(SHA256_INFO, 256))


def test_the_modules_rate_holds_on_the_card() -> None:
    rig = one_key()
    rig.token.settings = Settings(policy=Policy(rate=1, burst=2))
    rig.use(0x9A, P_256, DIGEST)
    rig.use(0x9A, P_256, DIGEST)
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    rig.bench.monotonic += 1
    rig.use(0x9A, P_256, DIGEST)


def test_signatures_are_told_and_counted() -> None:
    told: list[Any] = []
    rig = one_key()
    rig.token.on_signature = lambda application, *what: told.append((application.program, *what))
    rig.use(0x9A, P_256, DIGEST)
    assert told == [("smart card", "sign", ck.CKM_ECDSA, ("tls", 1))]
    assert rig.token.usage() == {("tls", 1): (1, int(rig.bench.now))}
    assert list(rig.token.holders()) == [("tls", 1)]
    rig.card.close()
    assert list(rig.token.holders()) == []
    assert rig.token.usage() == {("tls", 1): (1, int(rig.bench.now))}


def test_a_material_that_refuses_after_its_certificates_expiry() -> None:
    rig = CardRig()
    key = shared_key("p256")
    certificate = rig.bench.authority.issue(key, lifetime=timedelta(seconds=3600))
    rig.bench.execute(
        "stage", "tls", 1, rig.bench.body(key, (certificate, rig.bench.authority.intermediate), "tls", 1, on_expiry="refuse")
    )
    rig.bench.execute("activate", "tls", 1)
    rig.connect()
    rig.read(0x9A)
    rig.use(0x9A, P_256, DIGEST)
    rig.bench.now = certificate.not_valid_after_utc.timestamp() + 100
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)


def test_a_fault_of_ours_is_the_commands_error() -> None:
    rig = one_key()
    material = rig.token.index.state.materials["tls"]
    current = material.current
    assert current is not None
    use = rig.token.index.objects_of(material, current)[0].use
    assert use is not None

    def broken(mechanism: Mechanism) -> Any:
        raise RuntimeError("a guest's data")

    use.private.signer = broken  # type: ignore[method-assign]
    refused(0x6F00, rig.use, 0x9A, P_256, DIGEST)
    assert [type(error) for error in rig.faults] == [RuntimeError]
    rig.verified()


# ---- keys of a material that follows, bare keys -------------------------------------------------------------------------


def test_a_key_without_a_certificate_is_there_for_whoever_knows_of_it() -> None:
    rig = CardRig()
    key = rig.push("ssh", chained=False, mode="follow", profile="ssh")
    rig.connect()
    refused(0x6985, rig.use, 0x9A, P_256, DIGEST)
    refused(0x6A82, rig.get, OBJECTS[0x9A])
    assert is_of(key, rig.use(0x9A, P_256, DIGEST))


def test_contents_are_what_the_token_has() -> None:
    rig = one_key()
    contents = rig.card._generations.contents
    key = shared_key("p256")
    assert contents[0x9A].key_id == key_id(key)
    assert contents[0x9A].spki == spki(key)
    assert not contents[0x9A].made_here
