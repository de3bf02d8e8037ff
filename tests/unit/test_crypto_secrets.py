"""Secret keys: ciphers in one part and in several, MACs, and what each refuses.  The peer is `cryptography` used plainly."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import cmac, hashes, padding
from cryptography.hazmat.primitives.asymmetric import padding as asymmetric_padding
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding, aes_key_wrap, aes_key_wrap_with_padding
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import macs
from hsmvisord.crypto.secret import SecretKey
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import pkcs8

KEY, IV, NONCE, MORE = bytes(range(32)), bytes(range(16)), bytes(range(12)), b"additional"
AES = SecretKey(ck.CKK_AES, KEY)
CHACHA = SecretKey(ck.CKK_CHACHA20, KEY)
GENERIC = SecretKey(ck.CKK_GENERIC_SECRET, KEY)
RSA = rsa.generate_private_key(65537, 2048)
#: A counter of 8 bits that has 3 blocks to go.
SHORT_COUNTER = bytes(15) + b"\xfd"


def refused(rv: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        call(*arguments)
    assert caught.value.rv == rv, caught.value


def padded(data: bytes) -> bytes:
    padder = padding.PKCS7(128).padder()
    return padder.update(data) + padder.finalize()


def plainly(mode: modes.Mode, data: bytes) -> bytes:
    context = Cipher(algorithms.AES(KEY), mode).encryptor()
    return context.update(data) + context.finalize()


def gcm(tag: int = 128, iv: bytes = NONCE) -> Mechanism:
    return Mechanism(ck.CKM_AES_GCM, (iv, 8 * len(iv), MORE, tag))


def ccm(length: int, tag: int = 16, nonce: bytes = NONCE) -> Mechanism:
    return Mechanism(ck.CKM_AES_CCM, (length, nonce, MORE, tag))


#: Name -> mechanism for so many bytes of data, what the ciphertext is.
CIPHERS: dict[str, tuple[SecretKey, Callable[[int], Mechanism], Callable[[bytes], bytes]]] = {
    "ecb": (AES, lambda n: Mechanism(ck.CKM_AES_ECB), lambda d: plainly(modes.ECB(), d)),
    "cbc": (AES, lambda n: Mechanism(ck.CKM_AES_CBC, IV), lambda d: plainly(modes.CBC(IV), d)),
    "cbc-pad": (AES, lambda n: Mechanism(ck.CKM_AES_CBC_PAD, IV), lambda d: plainly(modes.CBC(IV), padded(d))),
    "ctr": (AES, lambda n: Mechanism(ck.CKM_AES_CTR, (128, IV)), lambda d: plainly(modes.CTR(IV), d)),
    "gcm": (AES, lambda n: gcm(), lambda d: AESGCM(KEY).encrypt(NONCE, d, MORE)),
    "gcm-96": (AES, lambda n: gcm(96), lambda d: AESGCM(KEY).encrypt(NONCE, d, MORE)[:-4]),
    "gcm, long iv": (AES, lambda n: gcm(iv=IV * 8), lambda d: AESGCM(KEY).encrypt(IV * 8, d, MORE)),
    "ccm": (AES, ccm, lambda d: AESCCM(KEY).encrypt(NONCE, d, MORE)),
    "ccm-8": (AES, lambda n: ccm(n, 8), lambda d: AESCCM(KEY, 8).encrypt(NONCE, d, MORE)),
    "chacha20-poly1305": (
        CHACHA,
        lambda n: Mechanism(ck.CKM_CHACHA20_POLY1305, (NONCE, MORE)),
        lambda d: ChaCha20Poly1305(KEY).encrypt(NONCE, d, MORE),
    ),
    "kw": (AES, lambda n: Mechanism(ck.CKM_AES_KEY_WRAP), lambda d: aes_key_wrap(KEY, d)),
    "kwp": (AES, lambda n: Mechanism(ck.CKM_AES_KEY_WRAP_KWP), lambda d: aes_key_wrap_with_padding(KEY, d)),
}
WHOLE_BLOCKS = ("ecb", "cbc")
STREAMS_OUT = ("ecb", "cbc", "cbc-pad", "ctr", "gcm", "gcm-96", "gcm, long iv")  # what gives something before the end


def data_for(name: str, size: int) -> bytes:
    size = -(-size // 16) * 16 if name in WHOLE_BLOCKS else max(16, size // 8 * 8) if name == "kw" else size
    return os.urandom(max(size, name == "kwp"))


def in_parts(stream: Any, data: bytes, cuts: list[int]) -> bytes:
    """Gives the data in parts; each part of the answer is as long as it was said before."""
    out, begin = b"", 0
    for cut in [*sorted(c for c in cuts if c < len(data)), len(data)]:
        part, begin = data[begin:cut], cut
        said = stream.room(len(part))
        given = stream.update(part)
        assert len(given) == said
        out += given
    last = stream.last()
    end = stream.finish()
    assert len(end) <= last
    return out + end


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 48, 1000])
@pytest.mark.parametrize("name", CIPHERS)
def test_ciphers_there_and_back(name: str, size: int) -> None:
    key, mechanism_for, peer = CIPHERS[name]
    data = data_for(name, size)
    mechanism = mechanism_for(len(data))
    encrypter, decrypter = key.encrypter(mechanism), key.decrypter(mechanism)
    sealed = encrypter.run(data)
    assert sealed == peer(data)
    assert len(sealed) == encrypter.bound(len(data)) and len(data) <= decrypter.bound(len(sealed))
    assert decrypter.run(sealed) == data


@given(st.sampled_from(sorted(CIPHERS)), st.integers(0, 200), st.lists(st.integers(0, 230), max_size=6))
def test_ciphers_in_parts(name: str, size: int, cuts: list[int]) -> None:
    key, mechanism_for, peer = CIPHERS[name]
    data = data_for(name, size)
    mechanism = mechanism_for(len(data))
    encrypter, decrypter = key.encrypter(mechanism), key.decrypter(mechanism)
    assert encrypter.begin is not None and decrypter.begin is not None
    sealed = in_parts(encrypter.begin(), data, cuts)
    assert sealed == peer(data)
    assert in_parts(decrypter.begin(), sealed, cuts) == data


@pytest.mark.parametrize("name", STREAMS_OUT)
def test_what_can_gives_its_output_as_it_comes(name: str) -> None:
    key, mechanism_for, _ = CIPHERS[name]
    begin = key.encrypter(mechanism_for(64)).begin
    assert begin is not None and len(begin().update(bytes(64))) == 64


@pytest.mark.parametrize("name", ["gcm", "gcm, long iv", "ccm", "chacha20-poly1305"])
def test_nothing_comes_out_before_it_is_authentic(name: str) -> None:
    key, mechanism_for, peer = CIPHERS[name]
    sealed = peer(bytes(64))
    decrypter = key.decrypter(mechanism_for(64))
    for place in (0, 63, 64, len(sealed) - 1):
        altered = bytearray(sealed)
        altered[place] ^= 1
        refused(ck.CKR_ENCRYPTED_DATA_INVALID, decrypter.run, bytes(altered))
        assert decrypter.begin is not None
        stream = decrypter.begin()
        assert stream.update(bytes(altered)) == b""
        refused(ck.CKR_ENCRYPTED_DATA_INVALID, stream.finish)
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, decrypter.run, sealed[:15])


@pytest.mark.parametrize("size", [1, 7, 8, 12, 128, 129, 257, limits.MAX_IV])
def test_gcm_with_an_iv_of_any_length(size: int) -> None:
    """Both backends say the same where both can; where one cannot, there and back, and the tag counts."""
    mechanism = gcm(iv=os.urandom(size))
    sealed = AES.encrypter(mechanism).run(b"of any length")
    assert AES.decrypter(mechanism).run(sealed) == b"of any length"
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, AES.decrypter(mechanism).run, sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_a_counter_does_not_come_back() -> None:
    mechanism = Mechanism(ck.CKM_AES_CTR, (8, SHORT_COUNTER))
    encrypter = AES.encrypter(mechanism)
    assert len(encrypter.run(bytes(48))) == 48
    refused(ck.CKR_DATA_LEN_RANGE, encrypter.run, bytes(49))
    assert encrypter.begin is not None
    stream = encrypter.begin()
    stream.update(bytes(47))
    stream.update(b"1")
    refused(ck.CKR_DATA_LEN_RANGE, stream.update, b"1")
    assert AES.encrypter(Mechanism(ck.CKM_AES_CTR, (128, b"\xff" * 16))).run(bytes(64)) == plainly(
        modes.CTR(b"\xff" * 16), bytes(64)
    )


def test_ciphers_refuse_other_lengths() -> None:
    for mechanism in (Mechanism(ck.CKM_AES_ECB), Mechanism(ck.CKM_AES_CBC, IV)):
        refused(ck.CKR_DATA_LEN_RANGE, AES.encrypter(mechanism).run, bytes(17))
        refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, AES.decrypter(mechanism).run, bytes(17))
    padded_cbc = AES.decrypter(Mechanism(ck.CKM_AES_CBC_PAD, IV))
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, padded_cbc.run, bytes(17))
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, padded_cbc.run, bytes(16))
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, padded_cbc.run, b"")
    refused(ck.CKR_DATA_LEN_RANGE, AES.encrypter(ccm(9)).run, bytes(8))
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, AES.decrypter(ccm(9)).run, AESCCM(KEY).encrypt(NONCE, bytes(8), MORE))
    for size in (0, 8, 17):
        refused(ck.CKR_DATA_LEN_RANGE, AES.encrypter(Mechanism(ck.CKM_AES_KEY_WRAP)).run, bytes(size))


@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism(ck.CKM_AES_ECB, IV),
        Mechanism(ck.CKM_AES_CBC),
        Mechanism(ck.CKM_AES_CBC, IV[1:]),
        Mechanism(ck.CKM_AES_CBC_PAD, IV + b"x"),
        Mechanism(ck.CKM_AES_CTR, (0, IV)),
        Mechanism(ck.CKM_AES_CTR, (129, IV)),
        Mechanism(ck.CKM_AES_CTR, (128, IV[1:])),
        Mechanism(ck.CKM_AES_CTR, IV),
        gcm(88),
        gcm(136),
        gcm(100),
        gcm(iv=b""),
        gcm(iv=bytes(limits.MAX_IV + 1)),
        Mechanism(ck.CKM_AES_GCM, (NONCE, MORE, 128)),
        ccm(8, 3),
        ccm(8, 17),
        ccm(8, nonce=bytes(6)),
        ccm(8, nonce=bytes(14)),
        Mechanism(ck.CKM_AES_KEY_WRAP, IV[:8]),
    ],
)
def test_ciphers_refuse_other_parameters(mechanism: Mechanism) -> None:
    refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.encrypter, mechanism)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.decrypter, mechanism)


def test_chacha_refuses_other_nonces() -> None:
    for nonce in (bytes(8), bytes(24)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, CHACHA.encrypter, Mechanism(ck.CKM_CHACHA20_POLY1305, (nonce, b"")))


# ---- MACs ---------------------------------------------------------------------------------------------------------------


def _parameter(mechanism: int, whole: int) -> tuple[int] | None:
    return (whole - 2,) if mechanism == ck.CKM_AES_CMAC_GENERAL or macs.HMACS.get(mechanism, ("", False))[1] else None


def check_mac(key: SecretKey, mechanism: Mechanism, whole: bytes) -> None:
    data = b"what is said"
    signer, verifier = key.signer(mechanism), key.verifier(mechanism)
    mac = signer.sign(data)
    assert mac == whole[: len(mac)] and len(mac) == signer.output_size
    assert signer.begin is not None and verifier.begin is not None
    signing, verifying = signer.begin(), verifier.begin()
    for part in (data[:5], b"", data[5:]):
        signing.update(part)
        verifying.update(part)
    assert signing.finish() == mac
    verifying.finish(mac)
    verifier.verify(data, mac)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, data + b"!", mac)
    refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, data, mac[:-1] + bytes([mac[-1] ^ 1]))
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, data, mac[:-1])
    refused(ck.CKR_SIGNATURE_LEN_RANGE, verifier.verify, data, mac + b"0")


@pytest.mark.parametrize("mechanism", macs.HMACS)
def test_hmac(mechanism: int) -> None:
    name, _ = macs.HMACS[mechanism]
    whole = hmac.digest(KEY, b"what is said", name)
    check_mac(GENERIC, Mechanism(mechanism, _parameter(mechanism, len(whole))), whole)


def test_cmac() -> None:
    peer = cmac.CMAC(algorithms.AES(KEY))
    peer.update(b"what is said")
    whole = peer.finalize()
    for mechanism in (ck.CKM_AES_CMAC, ck.CKM_AES_CMAC_GENERAL):
        check_mac(AES, Mechanism(mechanism, _parameter(mechanism, 16)), whole)


@pytest.mark.parametrize("size", [12, 200])
def test_gmac(size: int) -> None:
    iv = bytes(range(size))
    mechanism = Mechanism(ck.CKM_AES_GMAC, (iv, 8 * size, b"", 128))
    whole = AESGCM(KEY).encrypt(iv, b"", b"what is said") if size < 128 else AES.signer(mechanism).sign(b"what is said")
    check_mac(AES, mechanism, whole)
    refused(ck.CKR_MECHANISM_PARAM_INVALID, AES.signer, Mechanism(ck.CKM_AES_GMAC, (iv, 8 * size, b"more", 128)))


@pytest.mark.parametrize("mechanism", [m for m, (_, chosen) in macs.HMACS.items() if chosen] + [ck.CKM_AES_CMAC_GENERAL])
def test_a_macs_length_is_within_bounds(mechanism: int) -> None:
    key = AES if mechanism == ck.CKM_AES_CMAC_GENERAL else GENERIC
    whole = 16 if key is AES else hashlib.new(macs.HMACS[mechanism][0]).digest_size
    for length in (macs.SHORTEST, whole):
        assert len(key.signer(Mechanism(mechanism, (length,))).sign(b"")) == length
    for parameter in ((macs.SHORTEST - 1,), (whole + 1,), None, (b"1",), (8, 8)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, key.signer, Mechanism(mechanism, parameter))


# ---- keys ---------------------------------------------------------------------------------------------------------------


def test_keys_have_their_sizes() -> None:
    for size in (16, 24, 32):
        assert SecretKey(ck.CKK_AES, bytes(size)).kind.bits == 8 * size
    for key_type, size in [(ck.CKK_AES, 15), (ck.CKK_AES, 33), (ck.CKK_CHACHA20, 31), (ck.CKK_GENERIC_SECRET, 0)]:
        refused(ck.CKR_KEY_SIZE_RANGE, SecretKey, key_type, bytes(size))
    SecretKey(ck.CKK_GENERIC_SECRET, bytes(limits.MAX_SECRET))
    refused(ck.CKR_KEY_SIZE_RANGE, SecretKey, ck.CKK_GENERIC_SECRET, bytes(limits.MAX_SECRET + 1))
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, SecretKey, ck.CKK_RSA, bytes(16))


def test_a_key_serves_its_own_mechanisms() -> None:
    wrong = [(GENERIC, gcm()), (AES, Mechanism(ck.CKM_CHACHA20_POLY1305, (NONCE, b""))), (CHACHA, Mechanism(ck.CKM_AES_CBC, IV))]
    for key, mechanism in wrong:
        refused(ck.CKR_KEY_TYPE_INCONSISTENT, key.encrypter, mechanism)
    own = SecretKey(ck.CKK_SHA256_HMAC, KEY)
    own.signer(Mechanism(ck.CKM_SHA256_HMAC))
    for key, kind in [(own, ck.CKM_SHA384_HMAC), (AES, ck.CKM_SHA256_HMAC), (GENERIC, ck.CKM_AES_CMAC)]:
        refused(ck.CKR_KEY_TYPE_INCONSISTENT, key.signer, Mechanism(kind))


def test_check_values() -> None:
    assert AES.check_value == plainly(modes.ECB(), bytes(16))[:3]
    assert GENERIC.check_value == hashlib.sha1(KEY).digest()[:3]


def test_a_key_shows_nothing() -> None:
    assert repr(AES) == "<secret key, AES 256>"


# ---- RSA AES key wrap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [128, 192, 256])
def test_rsa_aes_key_wrap(bits: int) -> None:
    """Unwrapped by `cryptography` used plainly."""
    oaep = (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, ck.CKZ_DATA_SPECIFIED, b"")
    private = SoftwareProvider().load_private_key(pkcs8(RSA))
    mechanism = Mechanism(ck.CKM_RSA_AES_KEY_WRAP, (bits, *oaep))
    wrapper, unwrapper = private.public.encrypter(mechanism), private.decrypter(mechanism)
    for data in (b"k", os.urandom(32), os.urandom(1219)):
        wrapped = wrapper.run(data)
        assert len(wrapped) == wrapper.bound(len(data)) and len(data) <= unwrapper.bound(len(wrapped))
        aes = RSA.decrypt(wrapped[:256], asymmetric_padding.OAEP(asymmetric_padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
        assert len(aes) == bits // 8 and aes_key_unwrap_with_padding(aes, wrapped[256:]) == data == unwrapper.run(wrapped)
    altered = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, unwrapper.run, altered)
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, unwrapper.run, bytes([wrapped[0] ^ 1]) + wrapped[1:])
    refused(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, unwrapper.run, wrapped[: 256 + 15])
    other = private.decrypter(Mechanism(ck.CKM_RSA_AES_KEY_WRAP, (128 if bits != 128 else 256, *oaep)))
    refused(ck.CKR_ENCRYPTED_DATA_INVALID, other.run, wrapped)
    for parameter in ((bits + 1, *oaep), (bits, *oaep[:3]), (bits,), None, (b"x", *oaep)):
        refused(ck.CKR_MECHANISM_PARAM_INVALID, private.decrypter, Mechanism(ck.CKM_RSA_AES_KEY_WRAP, parameter))
