"""Old mechanisms as operators and programs meet them: turned on and off in service, used by python-pkcs11, checked by OpenSSL."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dh, dsa
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from hsmvisord.crypto.parts import public_key
from hsmvisord.wire.calls import Call, Mechanism
from support.command import Command
from support.guest import Guest
from support.guest import library as library_named
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.native_client import NativeClient
from support.own_keys import LABEL, RW, SLOT, SO, USER, template
from support.wire_client import Refused

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def cli(host: Host) -> Command:
    return Command(f"unix:{host.process.socket}", host.process.directory / "authority")


@pytest.fixture
def module(host: Host, cli: Command, request: pytest.FixtureRequest) -> Iterator[Module]:
    name = f"old-{abs(hash(request.node.name)) % 10**8}"
    cli("module", "create", name, "--guest-token", "--legacy")
    module = Module(host, name, host.process.get(name).address)
    yield module
    module.destroy()


def connect(module: Module) -> NativeClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(module.address.removeprefix("unix:path="))
    client = NativeClient(sock)
    client.hello()
    return client


def own(client: NativeClient) -> int:
    """A session of slot 1, logged in."""
    session = int(client.call(Call.OPEN_SESSION, SLOT, RW)[0])
    client.call(Call.LOGIN, session, ck.CKU_USER, USER)
    return session


def initialize(module: Module) -> NativeClient:
    client = connect(module)
    client.call(Call.INIT_TOKEN, SLOT, SO, LABEL)
    officer = int(client.call(Call.OPEN_SESSION, SLOT, RW)[0])
    client.call(Call.LOGIN, officer, ck.CKU_SO, SO)
    client.call(Call.INIT_PIN, officer, USER)
    client.call(Call.CLOSE_SESSION, officer)
    return client


#: Speaks JSON: makes keys, signs, encrypts and agrees; bytes are hexadecimal.
PROGRAM = """
import json, sys
import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism
from pkcs11.util.dsa import encode_dsa_signature
token = pkcs11.lib(sys.argv[1]).get_token(token_label="own keys")
session = token.open(rw=True, user_pin=sys.argv[2])
told = {}
public, private = session.generate_keypair(KeyType.DSA, 2048)
for name in ("PRIME", "SUBPRIME", "BASE", "VALUE"):
    told[name] = bytes(public[Attribute[name]]).hex()
told["signature"] = encode_dsa_signature(private.sign(b"message", mechanism=Mechanism.DSA_SHA256)).hex()
open_ = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
key = session.generate_key(KeyType.DES3, template=open_)
told["des"] = bytes(key[Attribute.VALUE]).hex()
told["encrypted"] = key.encrypt(b"message", mechanism_param=b"8 bytes.").hex()
prime, peer = map(bytes.fromhex, sys.argv[3].split(":"))
parameters = session.create_domain_parameters(KeyType.DH, {Attribute.PRIME: prime, Attribute.BASE: b"\\2"}, local=True)
public, private = parameters.generate_keypair()
told["dh"] = bytes(public[Attribute.VALUE]).hex()
secret = private.derive_key(KeyType.GENERIC_SECRET, 8 * len(prime), mechanism_param=peer, template=open_)
told["secret"] = bytes(secret[Attribute.VALUE]).hex()
print(json.dumps(told))
"""


def test_openssl_agrees(module: Module, tmp_path: Path) -> None:
    """Through our library: Debian's p11-kit knows neither DSA with SHA-2 nor an IV of triple DES."""
    initialize(module).close()
    library = library_named("ours")
    guest = Guest(library, module.address, tmp_path)

    def openssl(*arguments: object) -> bytes:
        return guest.run("openssl", *arguments, more={"OPENSSL_CONF": "/dev/null"}).stdout

    peer = tmp_path / "peer.pem"
    openssl("genpkey", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048", "-out", peer)
    theirs = serialization.load_pem_private_key(peer.read_bytes(), None)
    assert isinstance(theirs, dh.DHPrivateKey)
    numbers = theirs.private_numbers().public_numbers
    given = ":".join(f"{n:0512x}" for n in (numbers.parameter_numbers.p, numbers.y))
    answer = guest.run(sys.executable, "-c", PROGRAM, library.path, USER.decode(), given)
    told = {name: bytes.fromhex(text) for name, text in json.loads(answer.stdout).items()}

    (tmp_path / "message").write_bytes(b"message")
    for name in ("signature", "encrypted"):
        (tmp_path / name).write_bytes(told[name])
    p, q, g, y = (int.from_bytes(told[name]) for name in ("PRIME", "SUBPRIME", "BASE", "VALUE"))
    signer = dsa.DSAPublicNumbers(y, dsa.DSAParameterNumbers(p, q, g)).public_key()
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "dsa.pem").write_bytes(signer.public_bytes(*form))
    group = {ck.CKA_PRIME: bytes.fromhex(given.split(":")[0]), ck.CKA_BASE: b"\2"}
    (tmp_path / "dh.der").write_bytes(public_key(ck.CKK_DH, group | {ck.CKA_VALUE: told["dh"]}).spki)
    openssl("pkey", "-pubin", "-inform", "DER", "-in", tmp_path / "dh.der", "-out", tmp_path / "dh.pem")
    verified = ("dgst", "-sha256", "-verify", tmp_path / "dsa.pem", "-signature", tmp_path / "signature", tmp_path / "message")
    assert openssl(*verified) == b"Verified OK\n"
    secret = ("-K", told["des"].hex(), "-iv", b"8 bytes.".hex())
    assert openssl("enc", "-d", "-des-ede3-cbc", *secret, "-in", tmp_path / "encrypted") == b"message"
    assert openssl("pkeyutl", "-derive", "-inkey", peer, "-peerkey", tmp_path / "dh.pem") == told["secret"]


def test_it_is_turned_on_and_off_in_service(host: Host, cli: Command, module: Module) -> None:
    assert "legacy mechanisms and keys" in cli("module", "show", module.name)
    assert cli.json("module", "show", module.name)["settings"]["policy"]["legacy"] is True
    client = initialize(module)
    session = own(client)
    kept = {ck.CKA_TOKEN: True}
    (key,) = client.call(Call.GENERATE_KEY, session, Mechanism(ck.CKM_DES3_KEY_GEN), template(kept))
    cbc = Mechanism(ck.CKM_DES3_CBC, bytes(8))

    def encrypt() -> bytes:
        client.call(Call.ENCRYPT_INIT, session, cbc, key)
        return bytes(client.call(Call.ENCRYPT, session, bytes(8), 64)[0])

    def listed() -> bool:
        return ck.CKM_DES3_CBC in client.call(Call.GET_MECHANISM_LIST, SLOT, 256)[0]

    before = encrypt()
    assert listed()
    cli("module", "settings", module.name, "--guest-token", "--mechanism", "DES3_CBC", code=4)
    assert "DES3_CBC is a mechanism of legacy" in cli.errors and listed()
    cli("module", "settings", module.name, "--guest-token")
    assert "legacy" not in cli("module", "show", module.name) and not listed()
    with pytest.raises(Refused) as refused:
        encrypt()
    assert refused.value.rv == ck.CKR_MECHANISM_INVALID

    def told() -> list[str]:
        lines = map(json.loads, host.process.audit_lines())
        return [x["detail"]["mechanism"] for x in lines if x["kind"] == "module.policy-refused" and x["module"] == module.name]

    wait_for(lambda: "CKM_DES3_CBC" in told(), what="the audit log")
    cli("module", "settings", module.name, "--guest-token", "--legacy", "--mechanism", "DES3_CBC")
    assert encrypt() == before
    client.close()


def test_old_objects_outlive_workers(module: Module) -> None:
    """A successor takes those of sessions and what is open; those of the token are there after a kill."""
    client = initialize(module)
    session, kept = own(client), {ck.CKA_TOKEN: True}
    (passing,) = client.call(Call.GENERATE_KEY, session, Mechanism(ck.CKM_DSA_PARAMETER_GEN), template({ck.CKA_PRIME_BITS: 1024}))
    kinds = (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE)

    def parts(handle: int) -> list[Any]:
        answer = client.call(Call.GET_ATTRIBUTE_VALUE, session, handle, tuple((kind, 512) for kind in kinds))
        return [value for _, value in answer[0]]

    domain = dict(zip(kinds, parts(passing), strict=True))
    pair_gen = (Call.GENERATE_KEY_PAIR, session, Mechanism(ck.CKM_DSA_KEY_PAIR_GEN))
    public, private = client.call(*pair_gen, template(domain | kept), template(kept))
    of_session = client.call(*pair_gen, template(domain), template({}))
    (des,) = client.call(Call.GENERATE_KEY, session, Mechanism(ck.CKM_DES2_KEY_GEN), template({}))
    cbc = Mechanism(ck.CKM_DES3_CBC_PAD, bytes(8))
    client.call(Call.ENCRYPT_INIT, session, cbc, des)
    (first,) = client.call(Call.ENCRYPT_UPDATE, session, b"x" * 13, 64)

    def check(public: int, private: int) -> None:
        client.call(Call.SIGN_INIT, session, Mechanism(ck.CKM_DSA_SHA256), private)
        (signature,) = client.call(Call.SIGN, session, b"message", 64)
        client.call(Call.VERIFY_INIT, session, Mechanism(ck.CKM_DSA_SHA256), public)
        client.call(Call.VERIFY, session, b"message", signature)

    request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
    done = module.host.process.modules.UpgradeModule(request, timeout=30)
    assert done.old_pid != done.pid == module.pid
    (last,) = client.call(Call.ENCRYPT_FINAL, session, 64)
    client.call(Call.DECRYPT_INIT, session, cbc, des)
    assert client.call(Call.DECRYPT, session, first + last, 64)[0] == b"x" * 13
    assert parts(passing) == list(domain.values())
    check(public, private)
    check(*of_session)
    os.kill(done.pid, signal.SIGKILL)
    module.serving(not_pid=done.pid)
    client.close()
    client = connect(module)
    session = own(client)
    check(public, private)
    client.close()


def test_the_guests_own_slot_alone(module: Module, tmp_path: Path) -> None:
    """Software that takes the first slot, and the library's setting for it, with stock programs."""
    initialize(module).close()
    guest = Guest(library_named("ours"), module.address, tmp_path)

    def slots(**more: str) -> str:
        return guest.run("pkcs11-tool", "--module", guest.library.path, "--list-token-slots", more=more).stdout.decode()

    assert slots().count("token label") == 2
    alone = slots(HSMVISOR_PKCS11_SLOTS="1")
    assert alone.count("token label") == 1 and "own keys" in alone and "Slot 0 (0x1)" in alone
    program = "import sys, pkcs11; print(pkcs11.lib(sys.argv[1]).get_slots()[0].get_token().label)"
    for shown, label in (("all", module.name), ("1,0", "own keys"), ("1", "own keys")):
        said = guest.run(sys.executable, "-c", program, guest.library.path, more={"HSMVISOR_PKCS11_SLOTS": shown})
        assert said.stdout.decode().strip() == label
