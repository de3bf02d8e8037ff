"""PKCS#11 functions on a real worker: sessions to the limit, operations and how they end, slot events, cancels, derived secrets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hsmvisord import ck
from hsmvisord.wire.calls import Attribute, Call, Mechanism, Needed
from support.bare_worker import BareWorker, m
from support.certificates import new_key, pkcs8, spki
from support.native_client import NativeClient
from support.wire_client import Refused

EC_KEY, RSA_KEY = new_key("p256"), new_key("rsa2048")
ECDSA, SHA256_RSA = Mechanism(ck.CKM_ECDSA), Mechanism(ck.CKM_SHA256_RSA_PKCS)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareWorker]:
    directory = tmp_path_factory.mktemp("worker")
    worker = BareWorker(directory)
    for name, key in (("ec", EC_KEY), ("rsa", RSA_KEY)):
        worker.push(name, 1, pkcs8(key), spki(key), profile="any")
    yield worker
    worker.stop()


def connect(worker: BareWorker) -> NativeClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(worker.guest_path))
    client = NativeClient(sock)
    client.hello()
    return client


@pytest.fixture
def client(worker: BareWorker) -> Iterator[NativeClient]:
    client = connect(worker)
    yield client
    client.close()


def key(client: NativeClient, session: int, label: str, kind: int = ck.CKO_PRIVATE_KEY) -> int:
    (handle,) = client.find(session, (ck.CKA_CLASS, kind), (ck.CKA_LABEL, label.encode()))
    return int(handle)


@contextlib.contextmanager
def refused(rv: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv == rv, ck.rv_name(caught.value.rv)


def test_4096_sessions_and_not_one_more(client: NativeClient, worker: BareWorker) -> None:
    handles = [client.open_session() for _ in range(4096)]
    assert len(set(handles)) == 4096 and max(handles) < 2**31
    with refused(ck.CKR_SESSION_COUNT):
        client.open_session()
    other = connect(worker)
    with refused(ck.CKR_SESSION_COUNT):
        other.open_session()
    client.call(Call.CLOSE_SESSION, handles[0])
    other.open_session()
    client.call(Call.CLOSE_ALL_SESSIONS, 0)
    with refused(ck.CKR_SESSION_HANDLE_INVALID):
        client.call(Call.GET_SESSION_INFO, handles[1])
    other.close()


def test_size_queries_and_small_buffers_keep_the_operation(client: NativeClient) -> None:
    session = client.open_session()
    private = key(client, session, "ec")
    client.call(Call.SIGN_INIT, session, ECDSA, private)
    for room in (None, 0, 63):
        assert client.call(Call.SIGN, session, b"d" * 32, room) == (Needed(64),)
    with refused(ck.CKR_OPERATION_ACTIVE):
        client.call(Call.SIGN_INIT, session, ECDSA, private)
    (signature,) = client.call(Call.SIGN, session, b"d" * 32, 64)
    assert len(signature) == 64
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.SIGN, session, b"d" * 32, 64)


def test_errors_end_the_operation(client: NativeClient) -> None:
    session = client.open_session()
    private = key(client, session, "rsa")
    client.call(Call.SIGN_INIT, session, Mechanism(ck.CKM_RSA_PKCS), private)
    with refused(ck.CKR_DATA_LEN_RANGE):
        client.call(Call.SIGN, session, b"d" * 246, 256)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.SIGN, session, b"d", 256)


def test_multi_part_and_its_mixtures(client: NativeClient) -> None:
    session = client.open_session()
    private, public = key(client, session, "rsa"), key(client, session, "rsa", ck.CKO_PUBLIC_KEY)
    client.call(Call.SIGN_INIT, session, SHA256_RSA, private)
    for part in (b"one ", b"two ", b"three"):
        client.call(Call.SIGN_UPDATE, session, part)
    assert client.call(Call.SIGN_FINAL, session, None) == (Needed(256),)
    (signature,) = client.call(Call.SIGN_FINAL, session, 256)
    assert isinstance(RSA_KEY, rsa.RSAPrivateKey)
    RSA_KEY.public_key().verify(signature, b"one two three", padding.PKCS1v15(), hashes.SHA256())
    client.call(Call.VERIFY_INIT, session, SHA256_RSA, public)
    client.call(Call.VERIFY_UPDATE, session, b"one two three")
    client.call(Call.VERIFY_FINAL, session, signature)
    client.call(Call.SIGN_INIT, session, SHA256_RSA, private)
    client.call(Call.SIGN_UPDATE, session, b"one")
    with refused(ck.CKR_OPERATION_ACTIVE):
        client.call(Call.SIGN, session, b"two", 256)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.SIGN_FINAL, session, 256)


def test_cancel_by_a_null_mechanism_and_by_session_cancel(client: NativeClient) -> None:
    session = client.open_session()
    private = key(client, session, "ec")
    client.call(Call.SIGN_INIT, session, ECDSA, private)
    client.call(Call.SIGN_INIT, session, None, 0)
    client.call(Call.SIGN_INIT, session, ECDSA, private)
    client.call(Call.DIGEST_INIT, session, Mechanism(ck.CKM_SHA256))
    client.call(Call.SESSION_CANCEL, session, ck.CKF_SIGN)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.SIGN, session, b"d" * 32, 64)
    assert client.call(Call.DIGEST, session, b"abc", 32) == (hashlib.sha256(b"abc").digest(),)


def test_decrypt_keeps_its_plaintext_until_there_is_room(client: NativeClient) -> None:
    session = client.open_session()
    private, public = key(client, session, "rsa"), key(client, session, "rsa", ck.CKO_PUBLIC_KEY)
    client.call(Call.ENCRYPT_INIT, session, Mechanism(ck.CKM_RSA_PKCS), public)
    (sealed,) = client.call(Call.ENCRYPT, session, b"hello", 256)
    client.call(Call.DECRYPT_INIT, session, Mechanism(ck.CKM_RSA_PKCS), private)
    assert client.call(Call.DECRYPT, session, sealed, None) == (Needed(245),)
    assert client.call(Call.DECRYPT, session, sealed, 4) == (Needed(5),)
    assert client.call(Call.DECRYPT, session, sealed, 5) == (b"hello",)
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.DECRYPT, session, sealed, 5)


def test_a_derived_secret_lives_in_its_session(client: NativeClient, worker: BareWorker) -> None:
    session = client.open_session()
    peer = ec.generate_private_key(ec.SECP256R1())
    point = peer.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    derive = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point))
    template = (Attribute(ck.CKA_SENSITIVE, False), Attribute(ck.CKA_EXTRACTABLE, True), Attribute(ck.CKA_VALUE_LEN, 16))
    (handle,) = client.call(Call.DERIVE_KEY, session, derive, key(client, session, "ec"), template)
    assert 0x40000000 <= handle < 2**31
    assert isinstance(EC_KEY, ec.EllipticCurvePrivateKey)
    assert client.value(session, handle, ck.CKA_VALUE) == EC_KEY.exchange(ec.ECDH(), peer.public_key())[-16:]
    (hidden,) = client.call(Call.DERIVE_KEY, session, derive, key(client, session, "ec"), (Attribute(ck.CKA_SENSITIVE, True),))
    answer, rv = client.call(Call.GET_ATTRIBUTE_VALUE, session, hidden, ((ck.CKA_VALUE, 64),))
    assert rv == ck.CKR_ATTRIBUTE_SENSITIVE and answer[0][1] is None
    with refused(ck.CKR_TOKEN_WRITE_PROTECTED):
        client.call(Call.DERIVE_KEY, session, derive, key(client, session, "ec"), (Attribute(ck.CKA_TOKEN, True),))
    with refused(ck.CKR_KEY_SIZE_RANGE):
        client.call(Call.DERIVE_KEY, session, derive, key(client, session, "ec"), (Attribute(ck.CKA_VALUE_LEN, 33),))
    client.call(Call.CLOSE_SESSION, session)
    other = connect(worker)
    foreign = other.open_session()
    (theirs,) = other.call(Call.DERIVE_KEY, foreign, derive, key(other, foreign, "ec"), ())
    assert theirs not in (handle, hidden), "after a reconnect an old handle must not name another secret"
    other.close()
    again = client.open_session()
    with refused(ck.CKR_OBJECT_HANDLE_INVALID):
        client.call(Call.GET_OBJECT_SIZE, again, handle)


def test_slot_events_park_without_a_thread(worker: BareWorker) -> None:
    waiters = [connect(worker) for _ in range(20)]
    threads = len(list(Path(f"/proc/{worker.pid}/task").iterdir()))
    for waiter in waiters:
        waiter.send(Call.WAIT_FOR_SLOT_EVENT, 0)
        session = waiter.send(Call.OPEN_SESSION, 0, ck.CKF_SERIAL_SESSION)
        assert waiter.receive()[0] == session, "other calls of the connection go on"
    assert len(list(Path(f"/proc/{worker.pid}/task").iterdir())) == threads
    worker.ask(m.SetTokenPresent(False))
    for waiter in waiters:
        assert waiter.receive()[1] == (0,)
        with refused(ck.CKR_NO_EVENT):
            waiter.call(Call.WAIT_FOR_SLOT_EVENT, ck.CKF_DONT_BLOCK)
        with refused(ck.CKR_TOKEN_NOT_PRESENT):
            waiter.open_session()
        assert waiter.call(Call.GET_SLOT_LIST, 1, 8) == ((),)
        assert waiter.call(Call.GET_SLOT_LIST, 0, 8) == ((0,),)
    worker.ask(m.SetTokenPresent(True))
    for waiter in waiters:
        assert waiter.call(Call.WAIT_FOR_SLOT_EVENT, ck.CKF_DONT_BLOCK) == (0,)
        waiter.close()


def test_a_rotation_wakes_who_waits_and_a_deadline_ends_it(worker: BareWorker) -> None:
    client, spare = connect(worker), connect(worker)
    now = client.rotation_wait(0)
    began = time.monotonic()
    with refused(ck.CKR_FUNCTION_CANCELED):
        client.rotation_wait(now, deadline_ms=300)
    assert 0.25 < time.monotonic() - began < 5
    spare.send(Call.ROTATION_WAIT, now)
    fresh = new_key("p256")
    worker.push("rotated", 1, pkcs8(fresh), spki(fresh))
    assert spare.receive()[1] == (now + 1,)
    with refused(ck.CKR_NO_EVENT):  # strongSwan adds a credential set at each event
        client.call(Call.WAIT_FOR_SLOT_EVENT, ck.CKF_DONT_BLOCK)
    client.close()
    spare.close()


def test_random_and_its_limit(client: NativeClient) -> None:
    session = client.open_session()
    (one,), (two,) = client.call(Call.GENERATE_RANDOM, session, 65536), client.call(Call.GENERATE_RANDOM, session, 65536)
    assert len(one) == len(two) == 65536 and one != two
    with refused(ck.CKR_ARGUMENTS_BAD):
        client.call(Call.GENERATE_RANDOM, session, 65537)
    client.call(Call.SEED_RANDOM, session, bytes(65536))
    assert client.call(Call.GENERATE_RANDOM, session, 65536) != client.call(Call.GENERATE_RANDOM, session, 65536)
    with refused(ck.CKR_ARGUMENTS_BAD):
        client.call(Call.SEED_RANDOM, session, bytes(65537))


@pytest.mark.parametrize(
    ("call", "arguments", "rv"),
    [
        (Call.CREATE_OBJECT, ((Attribute(ck.CKA_TOKEN, True),),), ck.CKR_TOKEN_WRITE_PROTECTED),
        (Call.CREATE_OBJECT, ((Attribute(ck.CKA_CLASS, 0),),), ck.CKR_FUNCTION_NOT_SUPPORTED),
        (Call.GENERATE_KEY, (Mechanism(0x1080), ()), ck.CKR_MECHANISM_INVALID),
        (Call.GENERATE_KEY_PAIR, (Mechanism(0x1040), (), ()), ck.CKR_MECHANISM_INVALID),
        (Call.GET_OPERATION_STATE, (64,), ck.CKR_OPERATION_NOT_INITIALIZED),
        (Call.SET_OPERATION_STATE, (b"state", 0, 0), ck.CKR_SAVED_STATE_INVALID),
        (Call.ENCAPSULATE_KEY, (Mechanism(ck.CKM_ML_KEM), 1, (), 64), ck.CKR_MECHANISM_INVALID),
        (Call.DECAPSULATE_KEY, (Mechanism(ck.CKM_ML_KEM), 1, b"", ()), ck.CKR_MECHANISM_INVALID),
    ],
)
def test_what_comes_later_answers_the_precise_code(client: NativeClient, call: Call, arguments: tuple[Any, ...], rv: int) -> None:
    session = client.open_session()
    with refused(rv):
        client.call(call, session, *arguments)


def test_what_delivered_keys_do_not_do(client: NativeClient) -> None:
    session, rsa_pkcs = client.open_session(), Mechanism(ck.CKM_RSA_PKCS)
    private, public = key(client, session, "rsa"), key(client, session, "rsa", ck.CKO_PUBLIC_KEY)
    for call, handle, rv in (
        (Call.SIGN_RECOVER_INIT, private, ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (Call.VERIFY_RECOVER_INIT, public, ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (Call.MESSAGE_DECRYPT_INIT, private, ck.CKR_MECHANISM_INVALID),
        (Call.MESSAGE_ENCRYPT_INIT, public, ck.CKR_MECHANISM_INVALID),
    ):
        with refused(rv):
            client.call(call, session, rsa_pkcs, handle)


def test_each_signature_is_told_where_the_module_logs_it(worker: BareWorker) -> None:
    worker.ask(m.Configure(json.dumps({"log_signatures": True})))
    client = connect(worker)
    session = client.open_session()
    client.sign_once(session, ECDSA, key(client, session, "ec"), b"d" * 32)
    client.call(Call.MESSAGE_SIGN_INIT, session, Mechanism(ck.CKM_ECDSA_SHA256), key(client, session, "ec"))
    client.call(Call.SIGN_MESSAGE, session, None, b"one", 64)
    client.call(Call.SIGN_MESSAGE_BEGIN, session, None)
    client.call(Call.SIGN_MESSAGE_NEXT, session, None, b"another", 64)
    end = time.monotonic() + 10
    told: list[dict[str, Any]] = []
    while len(told) < 3 and time.monotonic() < end:
        worker.ask(m.QueryStatus())
        told = [json.loads(e.report) for e in worker.worker.events if e.kind == "signature"]
    assert {one["material"] for one in told} == {"ec"}
    assert [one["mechanism"] for one in told] == ["CKM_ECDSA", "CKM_ECDSA_SHA256", "CKM_ECDSA_SHA256"]
    worker.ask(m.Configure("{}"))
    client.close()


def test_settings_that_cannot_be(worker: BareWorker) -> None:
    for wrong in ('{"max_sessions": 65537}', '{"max_connections": 1025}', '{"nonsense": 1}', "[]", '{"max_sessions": -1}'):
        assert isinstance(worker.ask(m.Configure(wrong)), m.Error), wrong
    assert isinstance(worker.ask(m.Configure('{"max_sessions": 65536, "max_connections": 1024}')), m.Done)
    worker.ask(m.Configure("{}"))


def test_a_key_used_by_both_of_its_kinds(client: NativeClient) -> None:
    """The wrong key for a mechanism: the standard's code, and no operation is left open."""
    session = client.open_session()
    with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
        client.call(Call.SIGN_INIT, session, ECDSA, key(client, session, "rsa"))
    with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
        client.call(Call.SIGN_INIT, session, ECDSA, key(client, session, "ec", ck.CKO_PUBLIC_KEY))
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        client.call(Call.SIGN_INIT, session, ECDSA, 99999)
    client.call(Call.SIGN_INIT, session, ECDSA, key(client, session, "ec"))


@pytest.mark.parametrize(
    ("init", "label", "kind", "mechanism", "rv"),
    [
        (Call.SIGN_INIT, "ec", 3, ck.CKM_ECDH1_DERIVE, ck.CKR_MECHANISM_INVALID),
        (Call.SIGN_INIT, "rsa", 3, ck.CKM_RSA_PKCS_OAEP, ck.CKR_MECHANISM_INVALID),
        (Call.SIGN_INIT, "rsa", 3, ck.CKM_SHA256, ck.CKR_MECHANISM_INVALID),
        (Call.SIGN_INIT, "rsa", 3, 0x80001234, ck.CKR_MECHANISM_INVALID),
        (Call.DECRYPT_INIT, "rsa", 3, ck.CKM_RSA_PKCS_PSS, ck.CKR_MECHANISM_INVALID),
        (Call.DECRYPT_INIT, "ec", 3, ck.CKM_RSA_PKCS, ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        (Call.VERIFY_INIT, "rsa", 2, ck.CKM_RSA_PKCS_OAEP, ck.CKR_MECHANISM_INVALID),
        (Call.VERIFY_INIT, "rsa", 2, ck.CKM_ECDSA, ck.CKR_KEY_TYPE_INCONSISTENT),
        (Call.ENCRYPT_INIT, "rsa", 2, ck.CKM_SHA256_RSA_PKCS, ck.CKR_MECHANISM_INVALID),
    ],
)  # fmt: skip
def test_a_mechanism_of_another_function(client: NativeClient, init: Call, label: str, kind: int, mechanism: int, rv: int) -> None:
    session = client.open_session()
    with refused(rv):
        client.call(init, session, Mechanism(mechanism), key(client, session, label, kind))


def test_attributes_of_a_private_key_that_cannot_be_read(client: NativeClient) -> None:
    """CKR_ATTRIBUTE_SENSITIVE for what its type has, CKR_ATTRIBUTE_TYPE_INVALID for what it has not; the others are answered."""
    session = client.open_session()

    def read(label: str, *wanted: tuple[int, int | None]) -> tuple[list[Any], int]:
        answer, rv = client.call(Call.GET_ATTRIBUTE_VALUE, session, key(client, session, label), wanted)
        return [value for _, value in answer], rv

    assert read("ec", (ck.CKA_VALUE, 64)) == ([None], ck.CKR_ATTRIBUTE_SENSITIVE)
    assert read("ec", (ck.CKA_PRIME_1, 64)) == ([None], ck.CKR_ATTRIBUTE_TYPE_INVALID)
    assert read("rsa", (ck.CKA_VALUE, None)) == ([None], ck.CKR_ATTRIBUTE_TYPE_INVALID)
    for secret in (ck.CKA_PRIVATE_EXPONENT, *range(ck.CKA_PRIME_1, ck.CKA_COEFFICIENT + 1)):
        assert read("rsa", (secret, None)) == ([None], ck.CKR_ATTRIBUTE_SENSITIVE)
    assert read("ec", (0x80000001, 4)) == ([None], ck.CKR_ATTRIBUTE_TYPE_INVALID)
    assert read("ec", (ck.CKA_LABEL, 1)) == ([Needed(2)], ck.CKR_BUFFER_TOO_SMALL)
    mixed = ((ck.CKA_LABEL, None), (ck.CKA_VALUE, 9), (0x80000001, 4), (ck.CKA_ID, 3), (ck.CKA_KEY_TYPE, 8))
    values, rv = read("ec", *mixed)
    assert values == [Needed(2), None, None, Needed(20), ck.CKK_EC]
    assert rv in (ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKR_BUFFER_TOO_SMALL)


def test_pins_and_states_that_slot_0_does_not_take(client: NativeClient) -> None:
    session, writing = client.open_session(), client.call(Call.OPEN_SESSION, 0, ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION)[0]
    for call, words in ((Call.INIT_PIN, (b"1234",)), (Call.SET_PIN, (b"1234", b"2345"))):
        with refused(ck.CKR_SESSION_READ_ONLY):
            client.call(call, session, *words)
        with refused(ck.CKR_TOKEN_WRITE_PROTECTED):
            client.call(call, writing, *words)
    client.call(Call.FIND_OBJECTS_INIT, session, ())
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.GET_OPERATION_STATE, session, 64)
    client.call(Call.FIND_OBJECTS_FINAL, session)
    client.call(Call.DIGEST_INIT, session, Mechanism(ck.CKM_SHA256))
    with refused(ck.CKR_STATE_UNSAVEABLE):
        client.call(Call.GET_OPERATION_STATE, session, 64)
    with refused(ck.CKR_KEY_INDIGESTIBLE):
        client.call(Call.DIGEST_KEY, session, key(client, session, "ec"))
    with refused(ck.CKR_OPERATION_NOT_INITIALIZED):
        client.call(Call.DIGEST, session, b"", 64)
    client.call(Call.DIGEST_INIT, session, Mechanism(ck.CKM_SHA256))
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        client.call(Call.DIGEST_KEY, session, 99999)
