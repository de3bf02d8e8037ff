"""Both dialects against a real worker: the scripted clients of every p11-kit release, and Debian's own p11-kit-client.so."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism, Needed
from support.bare_worker import BareWorker
from support.native_client import FORK, JOIN, NativeClient
from support.p11kit_client import RELEASES, P11KitClient
from support.wire_client import Closed, Refused

STOCK = sorted(Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so"))
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
DIGEST = hashlib.sha256(b"data").digest()
PSS = Mechanism(ck.CKM_RSA_PKCS_PSS, (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 32))
SHA256_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path_factory.mktemp("worker"))
    for name, key in (("web", EC_KEY), ("mail", RSA_KEY)):
        pkcs8 = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        worker.push(name, 1, pkcs8, spki, self_signed=True)
    yield worker
    worker.stop()


def connected(worker: BareWorker) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(worker.guest_path))
    return sock


def key_id(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    """pkcs11-tool finds a key for signing by its id alone."""
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()


def verify_ecdsa(signature: bytes) -> None:
    half = len(signature) // 2
    der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
    EC_KEY.public_key().verify(der, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_finds_reads_and_signs(worker: BareWorker, release: str) -> None:
    client = P11KitClient(connected(worker), release)
    assert client.answer == RELEASES[release].first
    client.initialize()
    assert client.slots() == (0,)
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    values, rv = client.get(session, key, ck.CKA_KEY_TYPE, ck.CKA_LABEL, ck.CKA_SENSITIVE, ck.CKA_VALUE)
    assert values == {ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_LABEL: b"web", ck.CKA_SENSITIVE: True, ck.CKA_VALUE: None}
    assert rv == ck.CKR_ATTRIBUTE_SENSITIVE
    client.call(Call.SIGN_INIT, session, Mechanism(ck.CKM_ECDSA), key)
    assert client.call(Call.SIGN, session, DIGEST, None) == (Needed(64),)
    verify_ecdsa(client.call(Call.SIGN, session, DIGEST, 64)[0])
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"mail"))
    signature = client.sign(session, PSS, key, DIGEST)
    RSA_KEY.public_key().verify(signature, DIGEST, SHA256_PSS, Prehashed(hashes.SHA256()))
    client.close()


@pytest.mark.parametrize("release", [name for name, release in RELEASES.items() if release.null_mechanism])
def test_a_null_mechanism_cancels(worker: BareWorker, release: str) -> None:
    client = P11KitClient(connected(worker), release)
    client.initialize()
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    client.call(Call.SIGN_INIT, session, Mechanism(ck.CKM_ECDSA), key)
    client.call(Call.SIGN_INIT, session, None, 0)
    with pytest.raises(Refused) as caught:
        client.call(Call.SIGN, session, DIGEST, 64)
    assert caught.value.rv == ck.CKR_OPERATION_NOT_INITIALIZED
    client.close()


def test_native_once_calls(worker: BareWorker) -> None:
    client = NativeClient(connected(worker))
    client.hello()
    session = client.open_session()
    handles, more, _ = client.find_once(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    assert not more
    (key,) = handles
    (public,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PUBLIC_KEY), (ck.CKA_LABEL, b"web"))
    ecdsa = Mechanism(ck.CKM_ECDSA)
    signature = client.sign_once(session, ecdsa, key, DIGEST)
    verify_ecdsa(signature)
    client.verify_once(session, ecdsa, public, DIGEST, signature)
    with pytest.raises(Refused):
        client.verify_once(session, ecdsa, public, DIGEST, bytes(64))
    assert client.digest_once(session, Mechanism(ck.CKM_SHA256), b"data") == DIGEST
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"mail"))
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    secret = RSA_KEY.public_key().encrypt(b"secret", oaep)
    parameter = (ck.CKM_SHA_1, ck.CKG_MGF1_SHA1, ck.CKZ_DATA_SPECIFIED, b"")
    assert client.decrypt_once(session, Mechanism(ck.CKM_RSA_PKCS_OAEP, parameter), key, secret) == b"secret"
    client.close()


def test_a_size_query_by_sign_once_leaves_the_operation_active(worker: BareWorker) -> None:
    client = NativeClient(connected(worker))
    client.hello()
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    assert client.sign_once(session, Mechanism(ck.CKM_ECDSA), key, DIGEST, None) == Needed(64)
    verify_ecdsa(client.call(Call.SIGN, session, DIGEST, 64)[0])
    client.close()


def test_a_32_bit_library(worker: BareWorker) -> None:
    client = NativeClient(connected(worker), ulong_size=4)
    client.hello()
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    values, rv = client.get(session, key, ck.CKA_KEY_TYPE, room=4)
    assert (values, rv) == ({ck.CKA_KEY_TYPE: ck.CKK_EC}, ck.CKR_OK)
    client.close()


def test_joined_and_forked_connections(worker: BareWorker) -> None:
    first = NativeClient(connected(worker))
    greeting = first.hello()
    session = first.open_session()
    joined = NativeClient(connected(worker))
    assert joined.hello(JOIN, greeting.ticket).joined
    assert joined.find(session, (ck.CKA_LABEL, b"web")), "the session is the application's"
    forked = NativeClient(connected(worker))
    told = forked.hello(FORK, greeting.ticket)
    assert not told.joined
    assert told.ticket != greeting.ticket
    with pytest.raises(Refused) as caught:
        forked.find(session, (ck.CKA_LABEL, b"web"))
    assert caught.value.rv == ck.CKR_SESSION_HANDLE_INVALID
    for client in (first, joined, forked):
        client.close()


def test_pipelined_requests_are_answered_in_order(worker: BareWorker) -> None:
    client = NativeClient(connected(worker))
    client.hello()
    session = client.open_session()
    sent = [client.send(Call.GET_SESSION_INFO, session) for _ in range(50)]
    assert [client.receive()[0] for _ in sent] == sent
    client.close()


def test_a_malformed_message_does_not_end_the_connection(worker: BareWorker) -> None:
    client = NativeClient(connected(worker))
    client.hello()
    session = client.open_session()
    client.send_message(Call.GET_SESSION_INFO, b"\0\0\0\x0d\0")
    assert client.receive()[1].rv == ck.CKR_DEVICE_ERROR  # type: ignore[union-attr]
    client.send_message(Call.SIGN, b"")
    assert client.receive()[1].rv == ck.CKR_DEVICE_ERROR  # type: ignore[union-attr]
    assert client.call(Call.GET_SESSION_INFO, session)[0] == 0
    client.close()


def test_a_frame_past_the_limit_ends_it(worker: BareWorker) -> None:
    client = NativeClient(connected(worker))
    client.hello()
    client.sock.sendall(bytes.fromhex("00000010 00000000 00100001"))
    with pytest.raises(Closed):
        client.take(1)
    client.close()


@pytest.mark.parametrize("release", RELEASES)
def test_more_than_a_message_holds_does_not_end_a_stock_clients_connection(worker: BareWorker, release: str) -> None:
    client = P11KitClient(connected(worker), release)
    client.initialize()
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"mail"))
    client.call(Call.SIGN_INIT, session, Mechanism(ck.CKM_SHA256_RSA_PKCS), key)
    with pytest.raises(Refused) as caught:
        client.call(Call.SIGN, session, bytes(3 << 20), 256)
    assert caught.value.rv == ck.CKR_DATA_LEN_RANGE
    assert client.call(Call.GET_SESSION_INFO, session)[0] == 0
    client.close()


# ---- Debian's p11-kit-client.so (0.24.1) ------------------------------------------------------------------------------------


def pkcs11_tool(worker: BareWorker, *arguments: str) -> str:
    environment = os.environ | {"P11_KIT_SERVER_ADDRESS": f"unix:path={worker.guest_path}"}
    command = ["pkcs11-tool", "--module", str(STOCK[0]), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.real
@pytest.mark.skipif(not STOCK, reason="p11-kit-client.so is not installed")
class TestStockClient:
    def test_lists(self, worker: BareWorker) -> None:
        slots = pkcs11_tool(worker, "-L")
        assert "token label" in slots
        assert "web-1" in slots
        assert "ECDSA, keySize" in pkcs11_tool(worker, "-M")
        objects = pkcs11_tool(worker, "-O")
        assert objects.count("Private Key Object") == 2
        assert objects.count("Certificate Object") == 2
        assert "DN: CN=mail" in objects

    def test_signs_with_ecdsa(self, worker: BareWorker, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(DIGEST)
        pkcs11_tool(
            worker, "--sign", "-m", "ECDSA", "--id", key_id(EC_KEY), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")
        )
        verify_ecdsa((tmp_path / "out").read_bytes())

    def test_signs_with_pss(self, worker: BareWorker, tmp_path: Path) -> None:
        (tmp_path / "in").write_bytes(DIGEST)
        how = ("-m", "RSA-PKCS-PSS", "--hash-algorithm", "SHA256", "--id", key_id(RSA_KEY))
        pkcs11_tool(worker, "--sign", *how, "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
        RSA_KEY.public_key().verify((tmp_path / "out").read_bytes(), DIGEST, SHA256_PSS, Prehashed(hashes.SHA256()))

    def test_decrypts_with_oaep(self, worker: BareWorker, tmp_path: Path) -> None:
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        (tmp_path / "in").write_bytes(RSA_KEY.public_key().encrypt(b"secret", oaep))
        how = ("-m", "RSA-PKCS-OAEP", "--hash-algorithm", "SHA256", "--id", key_id(RSA_KEY))
        pkcs11_tool(worker, "--decrypt", *how, "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == b"secret"

    def test_logs_in_hashes_and_draws_random_bytes(self, worker: BareWorker, tmp_path: Path) -> None:
        assert "Private Key Object" in pkcs11_tool(worker, "--login", "--pin", "1234", "-O", "--type", "privkey")
        (tmp_path / "in").write_bytes(b"data")
        pkcs11_tool(worker, "--hash", "-m", "SHA256", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == DIGEST
        pkcs11_tool(worker, "--generate-random", "32", "-o", str(tmp_path / "random"))
        assert len((tmp_path / "random").read_bytes()) == 32
