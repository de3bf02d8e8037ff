"""Slot 1 as programs and operators meet it: stock tools with both libraries; kills, restarts and replaced workers."""

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
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.command import Command
from support.guest import Guest, Library
from support.guest import library as library_named
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.native_client import NativeClient
from support.own_keys import LABEL, RW, SLOT, SO, USER, template
from support.p11kit_client import P11KitClient
from support.wire_client import Refused, WireClient

pytestmark = pytest.mark.real
ECDSA = Mechanism(ck.CKM_ECDSA)
P256 = bytes.fromhex("06082a8648ce3d030107")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def module(host: Host, request: pytest.FixtureRequest) -> Iterator[Module]:
    module = host.create(f"own-{abs(hash(request.node.name)) % 10**8}", guest_token=True)
    yield module
    module.destroy()


@pytest.fixture
def guest(library: Library, module: Module, tmp_path: Path) -> Guest:
    return Guest(library, module.address, tmp_path)


def tool(guest: Guest, *arguments: object, check: bool = True) -> str:
    command = ("pkcs11-tool", "--module", guest.library.path, "--slot", "1")
    return guest.run(*command, *map(str, arguments), check=check).stdout.decode()


def prepared(guest: Guest) -> Guest:
    tool(guest, "--init-token", "--label", "own", "--so-pin", SO.decode())
    tool(guest, "--login", "--login-type", "so", "--so-pin", SO.decode(), "--init-pin", "--new-pin", USER.decode())
    return guest


def with_pin(guest: Guest, *arguments: object) -> str:
    return tool(guest, "--login", "--pin", USER.decode(), *arguments)


# ---- stock tools --------------------------------------------------------------------------------------------------------


def test_pkcs11_tool_makes_and_uses_keys(guest: Guest) -> None:
    prepared(guest)
    slots = guest.run("pkcs11-tool", "--module", guest.library.path, "--list-slots").stdout.decode()
    assert "token label        : own" in slots and slots.count("Slot ") == 2
    with_pin(guest, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "mine", "--id", "07")
    listed = with_pin(guest, "--list-objects")
    assert "Private Key Object; EC" in listed and "Public Key Object; EC" in listed and "never extractable" in listed
    message, signature = guest.directory / "message", guest.directory / "signature"
    message.write_bytes(b"m" * 32)
    with_pin(guest, "--sign", "--mechanism", "ECDSA", "--id", "07", "--input-file", message, "--output-file", signature)
    with_pin(guest, "--verify", "--mechanism", "ECDSA", "--id", "07", "--input-file", message, "--signature-file", signature)
    point = guest.directory / "public"
    tool(guest, "--read-object", "--type", "pubkey", "--id", "07", "--output-file", point)
    public = serialization.load_der_public_key(point.read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    with_pin(guest, "--delete-object", "--type", "privkey", "--id", "07")
    assert "Private Key Object" not in with_pin(guest, "--list-objects")


def test_pkcs11_tool_writes_and_reads_objects(guest: Guest) -> None:
    prepared(guest)
    note, out = guest.directory / "note", guest.directory / "out"
    note.write_bytes(b"a note of the guest")
    with_pin(guest, "--write-object", note, "--type", "data", "--label", "note", "--application-label", "notes")
    assert "label:          'note'" in with_pin(guest, "--list-objects")
    with_pin(guest, "--read-object", "--type", "data", "--label", "note", "--output-file", out)
    assert out.read_bytes() == note.read_bytes()
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8
    note.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    with_pin(guest, "--write-object", note, "--type", "privkey", "--label", "brought", "--id", "08", "--usage-sign")
    message = guest.directory / "message"
    message.write_bytes(b"m" * 32)
    with_pin(
        guest,
        "--sign",
        "--mechanism",
        "ECDSA",
        "--id",
        "08",
        "--input-file",
        message,
        "--output-file",
        out,
        "--signature-format",
        "openssl",
    )

    key.public_key().verify(out.read_bytes(), b"m" * 32, ec.ECDSA(Prehashed(hashes.SHA256())))


def test_a_wrong_pin_and_a_changed_one(guest: Guest) -> None:
    prepared(guest)
    assert "CKR_PIN_INCORRECT" in tool(guest, "--login", "--pin", "wrong!", "--list-objects", check=False)
    tool(guest, "--login", "--pin", USER.decode(), "--change-pin", "--new-pin", "another")
    assert "CKR_PIN_INCORRECT" in tool(guest, "--login", "--pin", USER.decode(), "--list-objects", check=False)
    tool(guest, "--login", "--pin", "another", "--list-objects")


def test_openssl_signs_with_a_key_of_the_guests_own(guest: Guest) -> None:
    prepared(guest)
    with_pin(guest, "--keypairgen", "--key-type", "rsa:2048", "--label", "request", "--id", "09", "--usage-sign")
    uri = f"pkcs11:token=own;object=request;type=private;pin-value={USER.decode()}"
    command = ("openssl", "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-key", uri, "-subj", "/CN=own")
    request = guest.run(*command, more=guest.with_engine).stdout
    (guest.directory / "request.pem").write_bytes(request[request.index(b"-----BEGIN") :])
    assert b"verify OK" in guest.run("openssl", "req", "-in", "request.pem", "-noout", "-verify").stdout


LARGE = """
import sys, pkcs11
from pkcs11 import KeyType, Mechanism
token = pkcs11.lib(sys.argv[1]).get_token(token_label="own")
data = bytes(range(256)) * 4096 * 3 + b"the end"
with token.open(user_pin=sys.argv[2]) as session:
    key = session.generate_key(KeyType.AES, 256)
    for mechanism, iv in ((Mechanism.AES_CBC_PAD, bytes(16)), (Mechanism.AES_CTR, pkcs11.CTRParams(bytes(12)))):
        sealed = key.encrypt(data, mechanism=mechanism, mechanism_param=iv)
        assert key.decrypt(sealed, mechanism=mechanism, mechanism_param=iv) == data, mechanism
    sealed = key.encrypt(data, mechanism=Mechanism.AES_GCM, mechanism_param=pkcs11.GCMParams(bytes(12), None, 128))
    assert len(sealed) == len(data) + 16
    try:
        key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=pkcs11.GCMParams(bytes(12), None, 128))
    except pkcs11.PKCS11Error as error:
        print(type(error).__name__)
"""


def test_data_of_any_length_in_one_call(module: Module, tmp_path: Path) -> None:
    guest = prepared(Guest(library_named("ours"), module.address, tmp_path))
    said = guest.run(sys.executable, "-c", LARGE, guest.library.path, USER.decode()).stdout.decode().split()
    assert said in (["DataLenRange"], ["EncryptedDataLenRange"]), "what is not authentic yet is kept, up to 1 MiB"


# ---- what happens to the module -----------------------------------------------------------------------------------------


class Own:
    """A client of the wire, logged in to slot 1."""

    def __init__(self, module: Module, dialect: str) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(module.address.removeprefix("unix:path="))
        self.client: WireClient = NativeClient(sock) if dialect == "ours" else P11KitClient(sock)
        if isinstance(self.client, NativeClient):
            self.client.hello()
        else:
            self.client.initialize()  # type: ignore[attr-defined]
        self.session = 0

    def prepare(self) -> Own:
        self.client.call(Call.INIT_TOKEN, SLOT, SO, LABEL)
        self.session = self.client.open_session(SLOT, RW)
        self.client.call(Call.LOGIN, self.session, ck.CKU_SO, SO)
        self.client.call(Call.INIT_PIN, self.session, USER)
        self.client.call(Call.LOGOUT, self.session)
        self.client.call(Call.LOGIN, self.session, ck.CKU_USER, USER)
        return self

    def login(self) -> Own:
        self.session = self.client.open_session(SLOT, RW)
        self.client.call(Call.LOGIN, self.session, ck.CKU_USER, USER)
        return self

    def pair(self, **more: Any) -> tuple[int, int]:
        public = {ck.CKA_EC_PARAMS: P256, ck.CKA_VERIFY: True, ck.CKA_TOKEN: more.get("token", True)}
        private = {ck.CKA_SIGN: True, ck.CKA_TOKEN: more.get("token", True)}
        mechanism = Mechanism(ck.CKM_EC_KEY_PAIR_GEN)
        handles = self.client.call(Call.GENERATE_KEY_PAIR, self.session, mechanism, template(public), template(private))
        return handles[0], handles[1]

    def check(self, public: int, private: int) -> None:
        signature = self.client.sign(self.session, ECDSA, private, b"d" * 32)
        self.client.call(Call.VERIFY_INIT, self.session, ECDSA, public)
        self.client.call(Call.VERIFY, self.session, b"d" * 32, signature)


def test_a_key_that_was_made_is_there_after_a_kill(module: Module) -> None:
    own = Own(module, "ours").prepare()
    for _ in range(3):
        pair, pid = own.pair(), module.pid
        os.kill(pid, signal.SIGKILL)
        module.serving(not_pid=pid)
        own = Own(module, "ours").login()
        own.check(*pair)


def test_keys_outlive_the_service(module: Module, host: Host) -> None:
    own = Own(module, "ours").prepare()
    pair = own.pair()
    host.stop(signal.SIGTERM)
    host.start()
    module.serving()
    own.check(*pair)
    again = own.pair()
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(not_pid=pid)
    own = Own(module, "ours").login()
    own.check(*pair)
    own.check(*again)


@pytest.mark.parametrize("dialect", ["ours", "p11-kit"])
def test_a_successor_takes_everything(module: Module, dialect: str) -> None:
    """Login, session objects, token objects and what is open."""
    own = Own(module, dialect).prepare()
    of_token, of_session = own.pair(), own.pair(token=False)
    own.client.call(Call.SIGN_INIT, own.session, ECDSA, of_session[1])
    key = {ck.CKA_VALUE_LEN: 32, ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True, ck.CKA_TOKEN: False}
    (aes,) = own.client.call(Call.GENERATE_KEY, own.session, Mechanism(ck.CKM_AES_KEY_GEN), template(key))
    cbc = Mechanism(ck.CKM_AES_CBC_PAD, bytes(16))
    own.client.call(Call.ENCRYPT_INIT, own.session, cbc, aes)
    (first,) = own.client.call(Call.ENCRYPT_UPDATE, own.session, b"x" * 20, 64)
    request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
    done = module.host.process.modules.UpgradeModule(request, timeout=30)
    assert done.old_pid != done.pid == module.pid
    (signature,) = own.client.call(Call.SIGN, own.session, b"d" * 32, 64)
    own.client.call(Call.VERIFY_INIT, own.session, ECDSA, of_session[0])
    own.client.call(Call.VERIFY, own.session, b"d" * 32, signature)
    (second,) = own.client.call(Call.ENCRYPT_UPDATE, own.session, b"x" * 20, 64)
    (last,) = own.client.call(Call.ENCRYPT_FINAL, own.session, 64)
    own.client.call(Call.DECRYPT_INIT, own.session, cbc, aes)
    assert own.client.call(Call.DECRYPT, own.session, first + second + last, 64)[0] == b"x" * 40
    own.check(*of_token)
    own.check(*of_session)
    assert own.client.call(Call.GET_SESSION_INFO, own.session)[1] == ck.CKS_RW_USER_FUNCTIONS


# ---- the operator -------------------------------------------------------------------------------------------------------


def test_the_operator_decides(host: Host, library: Library, tmp_path: Path) -> None:
    cli, name = Command(f"unix:{host.process.socket}", host.process.directory / "authority"), f"decided-{library.name}"
    cli("module", "create", name)
    guest = Guest(library, host.process.get(name).address, tmp_path)

    def slots() -> int:
        return guest.run("pkcs11-tool", "--module", guest.library.path, "--list-slots").stdout.count(b"Slot ")

    assert slots() == 1
    cli("module", "settings", name, "--guest-token", "--forbid", "generate", "--min-pin", "6")
    assert slots() == 2
    shown = cli("module", "show", name)
    assert "slot 1" in shown and "forbidden: generate; PINs from 6 bytes" in shown
    assert cli.json("module", "show", name)["settings"]["guest_token"] is True
    assert "CKR_PIN_LEN_RANGE" in tool(guest, "--init-token", "--label", "own", "--so-pin", "12345", check=False)
    prepared(guest)
    said = tool(guest, "--login", "--pin", USER.decode(), "--keypairgen", "--key-type", "EC:prime256v1", check=False)
    assert "0x1b" in said, "CKR_ACTION_PROHIBITED, a code of 2.40 that OpenSC has no name for"

    def told() -> list[str]:
        lines = map(json.loads, host.process.audit_lines())
        return [line["detail"]["what"] for line in lines if line["kind"] == "module.policy-refused" and line["module"] == name]

    wait_for(lambda: "generate" in told())
    cli("module", "settings", name, "--guest-token")
    with_pin(guest, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "mine")
    cli("module", "settings", name)
    assert slots() == 1
    cli("module", "settings", name, "--guest-token")
    assert "mine" in with_pin(guest, "--list-objects"), "what was kept is there when the slot comes back"


def test_a_slot_that_is_taken_away_ends_its_sessions(module: Module, host: Host) -> None:
    own = Own(module, "ours").prepare()
    request = pb.UpdateModuleRequest(request_id=new_id(), name=module.name, settings=pb.ModuleSettings())
    host.process.modules.UpdateModule(request, timeout=10)
    with pytest.raises(Refused) as refused:
        own.client.call(Call.GET_SESSION_INFO, own.session)
    assert refused.value.rv == ck.CKR_SESSION_HANDLE_INVALID
