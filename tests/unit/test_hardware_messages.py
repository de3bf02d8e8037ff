"""What 3.0 and 3.2 add, with keys in hardware (SoftHSM2 stands in for it)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hsmvisord import ck
from hsmvisord.wire.calls import MORE_FOLLOWS, Call, Mechanism, Needed
from support.own_keys import OwnGuest, OwnToken, template
from support.softhsm import Helper, make_token
from support.wire_client import Refused

P256, NONCE, END = bytes.fromhex("06082a8648ce3d030107"), bytes(range(12)), ck.CKF_END_OF_MESSAGE
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
GCM = Mechanism(ck.CKM_AES_GCM)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[OwnGuest]:
    with contextlib.closing(Helper(make_token(tmp_path / "hsm"), b"1" * 16)) as helper:
        own = OwnToken()
        own.bench.provider = helper.provider()
        own.token = own._token()
        yield own.guest().begin()


def gcm(nonce: bytes = NONCE, tag: bytes = b"", generator: int = ck.CKG_NO_GENERATE) -> Mechanism:
    return Mechanism(ck.CKM_AES_GCM, (nonce, 0, generator, tag, 128))


def test_messages_are_encrypted_and_decrypted(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True})
    (value,) = guest.get(key, ck.CKA_VALUE)
    made = gcm(generator=ck.CKG_GENERATE)
    guest.call(Call.MESSAGE_ENCRYPT_INIT, guest.session, GCM, key)
    guest.call(Call.MESSAGE_DECRYPT_INIT, guest.session, GCM, key)
    nonce, tag, sealed = guest.call(Call.ENCRYPT_MESSAGE, guest.session, made, b"more", b"in one part", 64)
    assert AESGCM(value).decrypt(nonce, sealed + tag, b"more") == b"in one part"
    assert guest.call(Call.DECRYPT_MESSAGE, guest.session, gcm(nonce, tag), b"more", sealed, 64) == (b"in one part",)
    with pytest.raises(Refused) as refused:
        guest.call(Call.DECRYPT_MESSAGE, guest.session, gcm(nonce, bytes(16)), b"more", sealed, 64)
    assert refused.value.rv == ck.CKR_AEAD_DECRYPT_FAILED
    (nonce,) = guest.call(Call.ENCRYPT_MESSAGE_BEGIN, guest.session, made, b"more")
    assert guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, made, b"in ", 64, 0) == (b"", b"")
    tag, sealed = guest.call(Call.ENCRYPT_MESSAGE_NEXT, guest.session, made, b"parts", 64, END)
    assert AESGCM(value).decrypt(nonce, sealed + tag, b"more") == b"in parts"
    guest.call(Call.DECRYPT_MESSAGE_BEGIN, guest.session, gcm(nonce), b"more")
    assert guest.call(Call.DECRYPT_MESSAGE_NEXT, guest.session, gcm(nonce, tag), sealed, 64, END) == (b"in parts",)


def test_messages_are_signed(guest: OwnGuest) -> None:
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P256, ck.CKA_VERIFY: True}, {ck.CKA_SIGN: True})
    ecdsa = Mechanism(ck.CKM_ECDSA_SHA256)
    guest.call(Call.MESSAGE_SIGN_INIT, guest.session, ecdsa, private)
    (signature,) = guest.call(Call.SIGN_MESSAGE, guest.session, None, b"in parts", 64)
    guest.verify(ecdsa, public, b"in parts", signature)
    guest.call(Call.SIGN_MESSAGE_BEGIN, guest.session, None)
    guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"in ", MORE_FOLLOWS)
    (signature,) = guest.call(Call.SIGN_MESSAGE_NEXT, guest.session, None, b"parts", 64)
    guest.call(Call.VERIFY_SIGNATURE_INIT, guest.session, ecdsa, public, signature)
    guest.call(Call.VERIFY_SIGNATURE, guest.session, b"in parts")


def test_data_is_recovered_from_signatures(guest: OwnGuest) -> None:
    public, private = guest.pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, {ck.CKA_MODULUS_BITS: 2048}, {})
    for mechanism, data in ((Mechanism(ck.CKM_RSA_PKCS), b"data in it"), (Mechanism(ck.CKM_RSA_X_509), b"\0" + b"d" * 255)):
        guest.call(Call.SIGN_RECOVER_INIT, guest.session, mechanism, private)
        (signature,) = guest.call(Call.SIGN_RECOVER, guest.session, data, 256)
        guest.call(Call.VERIFY_RECOVER_INIT, guest.session, mechanism, public)
        assert guest.call(Call.VERIFY_RECOVER, guest.session, signature, 256) == (data,)


def test_two_operations_in_one_call(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_ENCRYPT: True, ck.CKA_SIGN: True, ck.CKA_VERIFY: True})
    counter = Mechanism(ck.CKM_AES_CTR, (128, bytes(16)))
    guest.call(Call.SIGN_INIT, guest.session, Mechanism(ck.CKM_AES_CMAC), key)
    guest.call(Call.ENCRYPT_INIT, guest.session, counter, key)
    assert guest.call(Call.SIGN_ENCRYPT_UPDATE, guest.session, b"data", 64) == (b"",), "hardware is asked once, at the end"
    (sealed,) = guest.call(Call.ENCRYPT_FINAL, guest.session, 64)
    (mac,) = guest.call(Call.SIGN_FINAL, guest.session, 16)
    guest.verify(Mechanism(ck.CKM_AES_CMAC), key, b"data", mac)
    assert len(sealed) == 4


def test_what_hardware_does_not_do(guest: OwnGuest) -> None:
    wraps = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True})
    target = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN | {ck.CKA_ENCRYPT: True})
    kem = (Mechanism(ck.CKM_ML_KEM), 1, template({}), 4096)
    with pytest.raises(Refused) as refused:
        guest.call(Call.ENCAPSULATE_KEY, guest.session, *kem)
    assert refused.value.rv in (ck.CKR_MECHANISM_INVALID, ck.CKR_KEY_HANDLE_INVALID)
    with pytest.raises(Refused) as refused:
        guest.call(Call.MESSAGE_ENCRYPT_INIT, guest.session, Mechanism(ck.CKM_AES_CCM), target)
    assert refused.value.rv == ck.CKR_MECHANISM_INVALID
    answer = guest.call(Call.WRAP_KEY_AUTHENTICATED, guest.session, gcm(), wraps, target, b"more", None)
    assert answer == (b"", b"", Needed(32))
