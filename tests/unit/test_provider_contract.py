"""The contract of cryptoprocessors: the same tests on software and on hardware (SoftHSM2 behind a module's helper)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.sealed import names as certificate_names
from hsmvisord import ck
from hsmvisord.crypto import mechanisms
from hsmvisord.crypto.domain import generate as parameters
from hsmvisord.crypto.hardware.provider import HardwareProvider
from hsmvisord.crypto.interface import Access, CryptoProvider, Wanted
from hsmvisord.wire.calls import Mechanism
from support.cryptoprocessors import CURVES, DATA, KEYS, NEW, OAEP, OPEN, PSS, SOFTWARE, pkcs8, refused, signs
from support.softhsm import Helper, make_token


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HardwareProvider]:
    helper = Helper(make_token(tmp_path_factory.mktemp("hsm")), bytes(16))
    provider = HardwareProvider()
    provider.connect(helper.socket())
    yield provider
    helper.close()


@pytest.fixture(params=["software", "pkcs11"])
def provider(request: pytest.FixtureRequest) -> CryptoProvider:
    if request.param == "software":
        return SOFTWARE
    found: HardwareProvider = request.getfixturevalue("hardware")
    return found


# ---- private keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_is_made(provider: CryptoProvider, name: str) -> None:
    mechanism, wanted = KEYS[name]
    key = provider.generate_pair(mechanism, wanted)
    signs(provider, key, name)
    again = provider.open_private(key.stored())
    assert again.public.spki == key.public.spki and again.kind == key.kind
    signs(provider, again, name)


@pytest.mark.parametrize("name", NEW)
def test_a_key_that_comes(provider: CryptoProvider, name: str) -> None:
    delivered = NEW[name]()
    key = provider.load_private_key(pkcs8(delivered))
    spki = delivered.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert key.public.spki == spki
    signs(provider, key, name)
    readable = provider.load_private_key(pkcs8(delivered), OPEN)
    assert SOFTWARE.load_private_key(readable.pkcs8()).public.spki == spki


@pytest.mark.parametrize("name", KEYS)
def test_it_signs_its_own_certificate(provider: CryptoProvider, name: str) -> None:
    mechanism, wanted = KEYS[name]
    der = provider.generate_pair(mechanism, wanted).self_signed("web", 1_000_000, 2_000_000)
    certificate = x509.load_der_x509_certificate(der)
    certificate.verify_directly_issued_by(certificate)


@pytest.mark.parametrize("name", KEYS)
def test_it_asks_for_a_certificate(provider: CryptoProvider, name: str) -> None:
    mechanism, wanted = KEYS[name]
    key = provider.generate_pair(mechanism, wanted)
    names = certificate_names.exact(["dns:www.example.net", "ip:192.0.2.7"])
    request = x509.load_der_x509_csr(key.certificate_request(names))
    assert request.is_signature_valid
    assert request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == key.public.spki
    found = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert (certificate_names.of_extension(found.value), found.critical) == (names, False)
    assert request.subject.rfc4514_string() == "CN=www.example.net"
    bare = x509.load_der_x509_csr(key.certificate_request(()))
    assert bare.is_signature_valid and not bare.subject and not list(bare.extensions)


def test_parts_that_are_a_key(provider: CryptoProvider) -> None:
    numbers = NEW["P-256"]().private_numbers()
    told = {ck.CKA_EC_PARAMS: bytes.fromhex(CURVES[256]), ck.CKA_VALUE: numbers.private_value.to_bytes(32, "big")}
    signs(provider, provider.private_of_parts(ck.CKK_EC, told), "P-256")


def test_what_is_no_key(provider: CryptoProvider) -> None:
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, provider.load_private_key, b"no key")
    refused(ck.CKR_KEY_SIZE_RANGE, provider.generate_pair, ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=512))
    refused(ck.CKR_CURVE_NOT_SUPPORTED, provider.generate_pair, ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=b"\6\1\1"))
    refused(ck.CKR_KEY_SIZE_RANGE, provider.load_secret_key, ck.CKK_AES, bytes(15))
    refused(ck.CKR_TEMPLATE_INCOMPLETE, provider.generate_secret, ck.CKM_AES_KEY_GEN, 0)


def test_data_out_of_range(provider: CryptoProvider) -> None:
    key = provider.generate_pair(*KEYS["RSA"])
    refused(ck.CKR_DATA_LEN_RANGE, key.signer(Mechanism(ck.CKM_RSA_PKCS)).sign, bytes(246))
    refused(ck.CKR_DATA_LEN_RANGE, key.signer(Mechanism(ck.CKM_RSA_PKCS_PSS, PSS)).sign, bytes(31))
    refused(ck.CKR_DATA_INVALID, key.signer(Mechanism(ck.CKM_RSA_X_509)).sign, b"\xff" * 256)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, key.signer, Mechanism(ck.CKM_RSA_PKCS_PSS, (1, 2, 3)))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, key.signer, Mechanism(ck.CKM_ECDSA))


DECRYPTING = [Mechanism(ck.CKM_RSA_PKCS), Mechanism(ck.CKM_RSA_PKCS_OAEP, OAEP), Mechanism(ck.CKM_RSA_X_509)]


@pytest.mark.parametrize("mechanism", DECRYPTING)
def test_rsa_decrypts(provider: CryptoProvider, mechanism: Mechanism) -> None:
    key = provider.generate_pair(*KEYS["RSA"])
    plain = b"secret" if mechanism.type != ck.CKM_RSA_X_509 else bytes(250) + b"secret"
    encrypted = key.public.encrypter(mechanism).run(plain)
    decrypter = key.decrypter(mechanism)
    assert decrypter.run(encrypted) == plain
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, decrypter.run, encrypted[1:])
    if mechanism.type != ck.CKM_RSA_PKCS:
        refused(ck.CKR_ENCRYPTED_DATA_INVALID, decrypter.run, b"\xff" * 256)


def test_each_ciphertext_decrypts(provider: CryptoProvider) -> None:
    """Of PKCS #1 v1.5: errors, or answers that change, would decrypt others' messages for whoever sends them (Bleichenbacher)."""
    key = provider.generate_pair(*KEYS["RSA"])
    decrypter = key.decrypter(Mechanism(ck.CKM_RSA_PKCS))
    answers = []
    for number in range(40):
        wrong = number.to_bytes(256, "big")
        answers.append(decrypter.run(wrong))
        assert decrypter.run(wrong) == answers[-1] and len(answers[-1]) <= 245
    long = [answer for answer in answers if len(answer) >= 8]  # lengths are random too: two that are empty are not a repetition
    assert len(set(long)) == len(long) > 20 and len(set(map(len, answers))) > 10
    again = provider.open_private(key.stored()).decrypter(Mechanism(ck.CKM_RSA_PKCS))
    assert [again.run(number.to_bytes(256, "big")) for number in range(40)] == answers, "after a restart too"


@pytest.mark.parametrize("bits", CURVES)
def test_ecdh(provider: CryptoProvider, bits: int) -> None:
    key = provider.generate_pair(*KEYS[f"P-{bits}"])
    peer = SOFTWARE.generate_pair(*KEYS[f"P-{bits}"])
    told = [k.public.attributes()[ck.CKA_EC_POINT] for k in (key, peer)]
    theirs = peer.derive(Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", told[0])))
    assert key.derive(Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", told[1]))) == theirs
    with_kdf = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_SHA256_KDF, b"info", told[1]))
    assert key.derive(with_kdf, 48) == peer.derive(Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_SHA256_KDF, b"info", told[0])), 48)
    not_on_it = b"\4" + bytes(2 * ((bits + 7) // 8))
    refused(ck.CKR_MECHANISM_PARAM_INVALID, key.derive, Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", not_on_it)))


# ---- secret keys --------------------------------------------------------------------------------------------------------

IV = bytes(range(16))
CIPHERS = {
    "ECB": Mechanism(ck.CKM_AES_ECB),
    "CBC": Mechanism(ck.CKM_AES_CBC, IV),
    "CBC-PAD": Mechanism(ck.CKM_AES_CBC_PAD, IV),
    "CTR": Mechanism(ck.CKM_AES_CTR, (128, IV)),
    "GCM": Mechanism(ck.CKM_AES_GCM, (IV[:12], 96, b"more", 128)),
}


@pytest.mark.parametrize("size", [16, 24, 32])
@pytest.mark.parametrize("name", CIPHERS)
def test_aes(provider: CryptoProvider, name: str, size: int) -> None:
    value, mechanism = os.urandom(size), CIPHERS[name]
    key, reference = provider.load_secret_key(ck.CKK_AES, value), SOFTWARE.load_secret_key(ck.CKK_AES, value)
    assert provider.offers(mechanism.type)
    for length in (16, 64, 4096):
        plain = os.urandom(length)
        encrypter, decrypter = key.encrypter(mechanism), key.decrypter(mechanism)
        encrypted = encrypter.run(plain)
        assert encrypted == reference.encrypter(mechanism).run(plain)
        assert len(encrypted) == encrypter.bound(length) and len(plain) <= decrypter.bound(len(encrypted))
        assert decrypter.run(encrypted) == plain
        assert encrypter.begin is not None
        stream = encrypter.begin()
        parts = stream.update(plain[:7]) + stream.update(plain[7:])
        assert parts + stream.finish() == encrypted
    assert key.check_value == reference.check_value


def test_aes_of_odd_lengths(provider: CryptoProvider) -> None:
    key = provider.generate_secret(ck.CKM_AES_KEY_GEN, 32)
    for name in ("ECB", "CBC"):
        refused(ck.CKR_DATA_LEN_RANGE, key.encrypter(CIPHERS[name]).run, bytes(17))
        refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, key.decrypter(CIPHERS[name]).run, bytes(17))
    for name in ("CBC-PAD", "CTR", "GCM"):
        for length in (0, 1, 15, 17):
            assert key.decrypter(CIPHERS[name]).run(key.encrypter(CIPHERS[name]).run(bytes(length))) == bytes(length)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, key.encrypter, Mechanism(ck.CKM_AES_CBC, IV[:15]))


def test_gcm_that_is_not_authentic(provider: CryptoProvider) -> None:
    key = provider.generate_secret(ck.CKM_AES_KEY_GEN, 32)
    encrypted = key.encrypter(CIPHERS["GCM"]).run(DATA)
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, key.decrypter(CIPHERS["GCM"]).run, encrypted[:-1] + bytes((encrypted[-1] ^ 1,)))
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, key.decrypter(CIPHERS["GCM"]).run, encrypted[:15])


@pytest.mark.parametrize(
    ("key_type", "mechanism"),
    [
        (ck.CKK_AES, Mechanism(ck.CKM_AES_CMAC)),
        (ck.CKK_AES, Mechanism(ck.CKM_AES_CMAC_GENERAL, (8,))),
        (ck.CKK_GENERIC_SECRET, Mechanism(ck.CKM_SHA_1_HMAC)),
        (ck.CKK_GENERIC_SECRET, Mechanism(ck.CKM_SHA256_HMAC)),
        (ck.CKK_GENERIC_SECRET, Mechanism(ck.CKM_SHA512_HMAC_GENERAL, (20,))),
    ],
)
def test_macs(provider: CryptoProvider, key_type: int, mechanism: Mechanism) -> None:
    value = os.urandom(64 if key_type == ck.CKK_GENERIC_SECRET else 32)
    key, reference = provider.load_secret_key(key_type, value), SOFTWARE.load_secret_key(key_type, value)
    assert provider.offers(mechanism.type)
    signer, verifier = key.signer(mechanism), key.verifier(mechanism)
    signature = signer.sign(DATA)
    assert signature == reference.signer(mechanism).sign(DATA) and len(signature) == signer.output_size
    verifier.verify(DATA, signature)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, DATA + b"!", signature)
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, DATA, signature[1:])
    assert signer.begin is not None
    parts = signer.begin()
    parts.update(DATA[:3])
    parts.update(DATA[3:])
    assert parts.finish() == signature


def test_a_secret_key_is_stored_and_opened(provider: CryptoProvider) -> None:
    for mechanism, key_type, size in (
        (ck.CKM_AES_KEY_GEN, ck.CKK_AES, 32),
        (ck.CKM_GENERIC_SECRET_KEY_GEN, ck.CKK_GENERIC_SECRET, 40),
    ):
        key = provider.generate_secret(mechanism, size, OPEN)
        assert len(key.value) == size and key.kind.bits == 8 * size
        again = provider.open_secret(key_type, key.stored())
        assert again.value == key.value and again.kind == key.kind
    taken = provider.load_secret_key(ck.CKK_AES, bytes(range(32)), OPEN)
    assert taken.value == bytes(range(32))
    assert "00" not in repr(taken) and repr(taken.value) not in repr(taken)


# ---- wrapping -----------------------------------------------------------------------------------------------------------


def test_keys_wrap_keys(provider: CryptoProvider) -> None:
    wrapper = provider.generate_secret(ck.CKM_AES_KEY_GEN, 32)
    target = provider.generate_secret(ck.CKM_AES_KEY_GEN, 16, Access(wrappable=True))
    mechanism = Mechanism(ck.CKM_AES_KEY_WRAP)
    bound, wrap = provider.wrap(wrapper, mechanism, target)
    wrapped = wrap()
    assert len(wrapped) <= bound
    again = provider.unwrap_secret(wrapper, mechanism, wrapped, ck.CKK_AES, 0, OPEN)
    assert again.encrypter(CIPHERS["CBC"]).run(bytes(16)) == target.encrypter(CIPHERS["CBC"]).run(bytes(16))
    broken = wrapped[:-1] + bytes((wrapped[-1] ^ 1,))
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, provider.unwrap_secret, wrapper, mechanism, broken, ck.CKK_AES, 0, OPEN)


def test_rsa_wraps_keys(provider: CryptoProvider) -> None:
    pair = provider.generate_pair(*KEYS["RSA"])
    target = provider.load_secret_key(ck.CKK_AES, bytes(range(32)), OPEN)
    mechanism = Mechanism(ck.CKM_RSA_PKCS_OAEP, OAEP)
    bound, wrap = provider.wrap(pair.public, mechanism, target)
    wrapped = wrap()
    assert len(wrapped) <= bound
    assert provider.unwrap_secret(pair, mechanism, wrapped, ck.CKK_AES, 0, OPEN).value == bytes(range(32))


# ---- hardware alone -----------------------------------------------------------------------------------------------------


def test_what_hardware_keeps_it_does_not_give(hardware: HardwareProvider) -> None:
    refused(ck.CKR_KEY_UNEXTRACTABLE, hardware.generate_pair(*KEYS["P-256"]).pkcs8)
    refused(ck.CKR_KEY_UNEXTRACTABLE, lambda: hardware.generate_secret(ck.CKM_AES_KEY_GEN, 32).value)
    wrapper = hardware.generate_secret(ck.CKM_AES_KEY_GEN, 32)
    _, wrap = hardware.wrap(wrapper, Mechanism(ck.CKM_AES_KEY_WRAP), hardware.generate_secret(ck.CKM_AES_KEY_GEN, 32))
    refused(ck.CKR_KEY_UNEXTRACTABLE, wrap)


def test_what_hardware_does_not_have(hardware: HardwareProvider) -> None:
    assert not hardware.offers(ck.CKM_ML_DSA) and not hardware.offers(ck.CKM_AES_CCM) and not hardware.offers(ck.CKM_HKDF_DERIVE)
    assert all(hardware.offers(mechanism) for mechanism, row in mechanisms.GUEST_TABLE.items() if not row.key_types)
    pair, by_rsa = hardware.generate_pair(*KEYS["RSA"]), Mechanism(ck.CKM_RSA_PKCS)
    refused(ck.CKR_MECHANISM_INVALID, hardware.unwrap_secret, pair, by_rsa, bytes(256), ck.CKK_AES, 0, OPEN)
    edwards = hardware.generate_pair(*KEYS["Ed25519"])
    refused(ck.CKR_MECHANISM_PARAM_INVALID, edwards.signer, Mechanism(ck.CKM_EDDSA, (0, b"context")))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.load_private_key, pkcs8(x25519.X25519PrivateKey.generate()))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.load_secret_key, ck.CKK_CHACHA20, bytes(32))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.open_private, SOFTWARE.generate_pair(*KEYS["P-256"]).stored())


def test_types_that_hardware_does_not_keep(hardware: HardwareProvider) -> None:
    """What is old is there in software alone."""
    wrapper, mechanism = hardware.generate_secret(ck.CKM_AES_KEY_GEN, 32, OPEN), Mechanism(ck.CKM_AES_KEY_WRAP)
    for key_type, value in ((ck.CKK_DES3, b"\1" * 24), (ck.CKK_CHACHA20, b"\1" * 32)):
        wrapped = SOFTWARE.load_secret_key(ck.CKK_AES, wrapper.value).encrypter(mechanism).run(value)
        refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.unwrap_secret, wrapper, mechanism, wrapped, key_type, 0, OPEN)
        refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.load_secret_key, key_type, value)
    domain = parameters(ck.CKM_DSA_PARAMETER_GEN, 1024)
    key = SOFTWARE.generate_pair(ck.CKM_DSA_KEY_PAIR_GEN, Wanted(domain=domain))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, hardware.load_private_key, key.pkcs8())
    assert not [mechanism for mechanism in mechanisms.LEGACY if hardware.offers(mechanism)]
