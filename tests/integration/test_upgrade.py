"""A module's worker is replaced in service: connections, sessions and what is open in them go along, with both dialects."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisor.host.module import LINGER
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Attribute, Call, Mechanism
from support.certificates import Authority, chain_pem, new_key
from support.guest import Guest, library
from support.host import Host, Module, wait_for
from support.host_process import gone, new_id
from support.load import Signer, TlsLoad, fits
from support.native_client import JOIN, NativeClient
from support.nginx import Nginx, client_context
from support.p11kit_client import P11KitClient
from support.processes import titled
from support.wire_client import Refused, WireClient

EC_KEY, RSA_KEY = new_key("p256"), new_key("rsa2048")
ECDSA, SHA256_RSA, SHA256 = Mechanism(ck.CKM_ECDSA), Mechanism(ck.CKM_SHA256_RSA_PKCS), Mechanism(ck.CKM_SHA256)
DIGEST = hashlib.sha256(b"message").digest()

NUMBERS = itertools.count()

Connect = Callable[[Module], WireClient]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def module(host: Host, request: pytest.FixtureRequest) -> Iterator[Module]:
    module = host.create(f"up-{next(NUMBERS)}")  # the authority never gives a generation's number twice
    module.push("ec", EC_KEY)
    module.push("rsa", RSA_KEY)
    yield module
    module.destroy()


def upgrade(module: Module, renew_launcher: bool = False) -> pb.UpgradeModuleResponse:
    before = module.pid
    request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name, renew_launcher=renew_launcher)
    done = module.host.process.modules.UpgradeModule(request, timeout=30)
    assert done.old_pid == before != done.pid == module.pid
    return done


def connected(module: Module) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(module.address.removeprefix("unix:path="))
    return sock


def native(module: Module) -> WireClient:
    client = NativeClient(connected(module))
    client.hello()
    return client


def p11kit(module: Module) -> WireClient:
    client = P11KitClient(connected(module))
    client.initialize()
    return client


def key(client: WireClient, session: int, label: str, kind: int = ck.CKO_PRIVATE_KEY) -> int:
    (handle,) = client.find(session, (ck.CKA_CLASS, kind), (ck.CKA_LABEL, label.encode()))
    return int(handle)


def check(signature: bytes) -> None:
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    public = EC_KEY.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


both = pytest.mark.parametrize("connect", [native, p11kit])


@both
def test_sessions_and_handles_stay(module: Module, connect: Connect) -> None:
    client = connect(module)
    first, second = client.open_session(), client.open_session(flags=ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION)
    handle = key(client, first, "ec")
    client.login(second, b"any")
    told = [client.call(Call.GET_SESSION_INFO, s) for s in (first, second)]
    done = upgrade(module)
    assert (done.connections, done.applications, done.lingering) == (1, 1, 0)
    assert [client.call(Call.GET_SESSION_INFO, s) for s in (first, second)] == told
    check(client.sign(first, ECDSA, handle, DIGEST))
    with pytest.raises(Refused) as refused:
        client.login(first, b"any")
    assert refused.value.rv == ck.CKR_USER_ALREADY_LOGGED_IN
    assert client.open_session() == second + 1
    client.close()


@both
def test_open_operations_stay(module: Module, connect: Connect) -> None:
    client = connect(module)
    sign, parts, digest, search, decrypt = [client.open_session() for _ in range(5)]
    ec_key, rsa_key = key(client, sign, "ec"), key(client, sign, "rsa")
    objects = client.find(sign)
    client.call(Call.SIGN_INIT, sign, ECDSA, ec_key)
    client.call(Call.SIGN_INIT, parts, SHA256_RSA, rsa_key)
    client.call(Call.SIGN_UPDATE, parts, b"mess")
    client.call(Call.DIGEST_INIT, digest, SHA256)
    for part in (b"m", b"ess"):
        client.call(Call.DIGEST_UPDATE, digest, part)
    client.call(Call.FIND_OBJECTS_INIT, search, ())
    found = list(client.call(Call.FIND_OBJECTS, search, 2)[0])
    client.call(Call.DECRYPT_INIT, decrypt, Mechanism(ck.CKM_RSA_PKCS), rsa_key)

    upgrade(module)
    upgrade(module)  # what was carried out again can be once more

    check(client.call(Call.SIGN, sign, DIGEST, 256)[0])
    client.call(Call.SIGN_UPDATE, parts, b"age")
    signature = client.call(Call.SIGN_FINAL, parts, 256)[0]
    RSA_KEY.public_key().verify(signature, b"message", padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr,call-arg,arg-type]
    client.call(Call.DIGEST_UPDATE, digest, b"age")
    assert client.call(Call.DIGEST_FINAL, digest, 64)[0] == DIGEST
    found += client.call(Call.FIND_OBJECTS, search, 64)[0]
    assert tuple(found) == objects
    secret = RSA_KEY.public_key().encrypt(b"secret", padding.PKCS1v15())  # type: ignore[union-attr,call-arg]
    assert client.call(Call.DECRYPT, decrypt, secret, 256)[0] == b"secret"
    client.close()


def test_session_objects_stay(module: Module) -> None:
    client = native(module)
    session, closed = client.open_session(), client.open_session()
    peer = ec.generate_private_key(ec.SECP256R1())
    numbers = peer.public_key().public_numbers()
    point = b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    template = (
        Attribute(ck.CKA_CLASS, ck.CKO_SECRET_KEY),
        Attribute(ck.CKA_KEY_TYPE, ck.CKK_GENERIC_SECRET),
        Attribute(ck.CKA_LABEL, b"shared"),
    )
    derive = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point))
    handle = client.call(Call.DERIVE_KEY, session, derive, key(client, session, "ec"), template)[0]
    value = client.value(session, handle, ck.CKA_VALUE)
    upgrade(module)
    assert client.value(session, handle, ck.CKA_VALUE) == value
    assert client.find(closed, (ck.CKA_LABEL, b"shared")) == (handle,)
    client.call(Call.CLOSE_SESSION, session)
    assert client.find(closed, (ck.CKA_LABEL, b"shared")) == ()
    client.close()


def test_an_application_of_several_connections_stays_one(module: Module) -> None:
    first, second, third = (NativeClient(connected(module)) for _ in range(3))
    ticket = first.hello().ticket
    second.hello(JOIN, ticket)
    session = first.open_session()
    handle = key(first, session, "ec")
    done = upgrade(module)
    assert (done.connections, done.applications) == (3, 1)
    check(second.sign(session, ECDSA, handle, DIGEST))
    third.hello(JOIN, ticket)
    check(third.sign(session, ECDSA, handle, DIGEST))
    for client in (first, second):
        client.close()
    check(third.sign(session, ECDSA, handle, DIGEST))
    third.close()


def test_a_request_that_has_come_in_part_is_answered(module: Module) -> None:
    client = native(module)
    session = client.open_session()
    message = client.encoding.request(Call.GENERATE_RANDOM, session, 16)
    frame = (77).to_bytes(4, "big") + bytes(4) + len(message).to_bytes(4, "big") + message
    client.sock.sendall(frame[:20])
    time.sleep(0.1)
    upgrade(module)
    client.sock.sendall(frame[20:])
    assert client.take(4) == (77).to_bytes(4, "big")
    client.close()


def test_those_who_wait_are_answered_by_the_successor(module: Module) -> None:
    client, waiting = native(module), native(module)
    waiting.send(Call.WAIT_FOR_SLOT_EVENT, 0)
    time.sleep(0.1)
    upgrade(module)
    present = module.host.process.modules.SetTokenPresent
    present(pb.SetTokenPresentRequest(request_id=new_id(), name=module.name, present=False), timeout=10)
    assert waiting.receive()[1] == (0,)
    present(pb.SetTokenPresentRequest(request_id=new_id(), name=module.name, present=True), timeout=10)
    client.close()
    waiting.close()


def test_a_long_operation_keeps_its_application_with_the_old_worker_until_it_is_done(module: Module) -> None:
    client, other = p11kit(module), p11kit(module)
    session = client.open_session()
    client.call(Call.DIGEST_INIT, session, SHA256)
    part = b"x" * (limits.MAX_JOURNAL // 2)
    for _ in range(3):
        client.call(Call.DIGEST_UPDATE, session, part)
    done = upgrade(module)
    assert (done.applications, done.lingering) == (1, 1)
    assert other.open_session()
    client.call(Call.DIGEST_UPDATE, session, part)
    assert client.call(Call.DIGEST_FINAL, session, 64)[0] == hashlib.sha256(part * 4).digest()
    wait_for(lambda: gone(done.old_pid), within=LINGER + 5)
    handle = key(client, session, "ec")
    check(client.sign(session, ECDSA, handle, DIGEST))
    client.close()
    other.close()


def test_a_long_operation_is_not_waited_for_for_ever(module: Module) -> None:
    client = p11kit(module)
    session = client.open_session()
    handle = key(client, session, "ec")
    client.call(Call.DIGEST_INIT, session, SHA256)
    client.call(Call.DIGEST_UPDATE, session, bytes(limits.MAX_JOURNAL + 1))
    done = upgrade(module)
    wait_for(lambda: gone(done.old_pid), within=LINGER + 5)
    with pytest.raises(Refused) as refused:
        client.call(Call.DIGEST_FINAL, session, 64)
    assert refused.value.rv == ck.CKR_OPERATION_NOT_INITIALIZED
    check(client.sign(session, ECDSA, handle, DIGEST))
    client.close()


def test_a_pin_is_tried_by_the_successor_with_the_count_that_was(module: Module) -> None:
    modules = module.host.process.modules
    modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=b"123456"), timeout=10)
    client = native(module)
    session = client.open_session()
    with pytest.raises(Refused):
        client.login(session, b"wrong1")
    upgrade(module)
    client.login(session, b"123456")
    assert key(client, session, "ec")
    upgrade(module)
    assert key(client, session, "ec"), "logged in is logged in"
    client.close()


def test_deliveries_and_what_is_counted_go_on(module: Module) -> None:
    client = native(module)
    session = client.open_session()
    handle = key(client, session, "ec")
    for _ in range(3):
        client.sign(session, ECDSA, handle, DIGEST)
    before = module.material("ec").generations[0]
    upgrade(module)
    after = module.material("ec").generations[0]
    assert (after.operations, after.connections) == (before.operations, before.connections) == (3, 1)
    module.push("ec", new_key("p256"))
    client.sign(session, ECDSA, handle, DIGEST)  # pinned
    assert module.states("ec") == {1: "retiring", 2: "current"}
    assert module.material("ec").generations[0].operations == 4
    client.close()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["ours", "p11-kit"])
def test_upgrades_under_load(host: Host, tmp_path: Path, name: str) -> None:
    module, authority = host.create(f"load-{name}"), Authority()
    served = new_key("p256")
    chain = authority.chain(served)
    module.push("web", served, chain)
    follower = new_key("p256")
    module.push("requests", follower, mode="follow", profile="request-signing")
    module.push("rsa", RSA_KEY)
    guest = Guest(library(name), module.address, tmp_path)
    certificate = guest.write("web.pem", chain_pem(chain))
    nginx = Nginx(guest, [(certificate, f"pkcs11:token={module.name};object=web;type=private")])
    load = TlsLoad(nginx.port, client_context(authority.root_pem))
    signers = [Signer(guest, "requests"), Signer(guest, "rsa", kind="rsa", name="rsa")]
    time.sleep(1)
    pauses = []
    for n in range(10):
        pauses.append(upgrade(module, renew_launcher=n % 5 == 0).paused_seconds)
        time.sleep(0.3)
    load.stop()
    made = [signer.stop() for signer in signers]
    nginx.stop()
    print(f"{len(load.done)} handshakes, {len(made[0])} + {len(made[1])} signatures, paused at most {max(pauses) * 1000:.0f} ms")
    assert load.failures == []
    assert [one.error for part in made for one in part if one.error] == []
    assert all(fits(follower, one) for one in made[0]) and all(fits(RSA_KEY, one) for one in made[1])
    assert len(load.done) > 100 and len(made[0]) > 100 and len(made[1]) > 100
    assert max(pauses) < 2
    module.destroy()


def test_a_successor_that_does_not_start_leaves_the_old_worker_serving(module: Module) -> None:
    client = native(module)
    session = client.open_session()
    handle, pid = key(client, session, "ec"), module.pid
    launcher = titled(module.host.pid(), "hsmvisord: launcher")
    os.kill(launcher, signal.SIGSTOP)
    try:
        with pytest.raises(Exception, match="not replaced"):
            upgrade(module)
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert module.pid == pid
    check(client.sign(session, ECDSA, handle, DIGEST))
    module.push("ec", new_key("p256"))
    client.close()


def test_after_a_destroy_for_compromise_another_process_serves(module: Module) -> None:
    client, long = native(module), p11kit(module)
    session = client.open_session()
    old_key, before = key(client, session, "ec"), module.pid
    module.push("ec", new_key("p256"))
    busy = long.open_session()
    long.call(Call.DIGEST_INIT, busy, SHA256)
    long.call(Call.DIGEST_UPDATE, busy, bytes(limits.MAX_JOURNAL + 1))
    module.host.pusher.destroy(module.name, "ec", 1)
    assert module.pid == before
    module.push("ec", new_key("p256"))
    module.host.pusher.destroy(module.name, "ec", 2, compromised=True)
    assert module.pid != before and gone(before), "who held the key is not there any more when the command is answered"
    with pytest.raises(Refused) as refused:
        client.sign(session, ECDSA, old_key, DIGEST)
    assert refused.value.rv == ck.CKR_KEY_HANDLE_INVALID
    assert len(client.sign(session, ECDSA, key(client, session, "ec"), DIGEST)) == 64
    with pytest.raises(Refused) as refused:
        long.call(Call.DIGEST_FINAL, busy, 64)
    assert refused.value.rv == ck.CKR_OPERATION_NOT_INITIALIZED
    lines = [line for line in module.host.process.audit_lines() if '"compromised":true' in line.replace(" ", "")]
    assert len(lines) == 1
    client.close()
    long.close()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["ours", "p11-kit"])
def test_the_service_is_upgraded_with_its_schema_under_load(tmp_path: Path, name: str) -> None:
    host = Host()
    try:
        module = host.start().create("load")
        follower = new_key("p256")
        module.push("requests", follower, mode="follow", profile="request-signing")
        module.push("rsa", RSA_KEY)
        guest = Guest(library(name), module.address, tmp_path)
        signers = [Signer(guest, "requests"), Signer(guest, "rsa", kind="rsa", name="rsa")]
        time.sleep(1)
        pid, away = module.pid, []
        for program in ("hsmvisor.host.main", "support.newer_host", "support.newer_host"):
            host.process.module = program
            host.stop(signal.SIGTERM)
            began = time.monotonic()
            host.start()
            away.append(time.monotonic() - began)
            assert module.serving().pid == pid, "the worker is adopted"
            module.push("requests", follower := new_key("p256"), mode="follow", profile="request-signing")
            time.sleep(0.5)
        upgrade(module)
        last = time.monotonic()
        time.sleep(0.5)
        made = [signer.stop() for signer in signers]
        print(f"{len(made[0])} + {len(made[1])} signatures, the control API was away for {max(away):.2f} s at most")
        assert [one.error for part in made for one in part if one.error] == []
        assert any(one.began > last for one in made[0]) and all(fits(follower, one) for one in made[0] if one.began > last)
        assert all(fits(RSA_KEY, one) for one in made[1])
        assert max(away) < 6
        host.stop(signal.SIGTERM)
        host.process.module = "hsmvisor.host.main"
        older = host.process.launch()
        assert older.wait(20) != 0
        assert "nothing was changed" in host.process.log.read_text()
    finally:
        host.clean()
