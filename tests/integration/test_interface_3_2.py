"""The interface of 3.2 of our library on a real host: messages, dual functions, recovery, encapsulation, authenticated wrapping."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from ctypes import byref, c_ulong
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from support.certificates import new_key
from support.cryptoki import CkMechanism, Cryptoki
from support.cryptoki_messages import Interface, Parameter, attributes
from support.host import Host, Module
from support.host_process import new_id
from support.own_keys import LABEL, RW, SLOT, SO, USER

pytestmark = pytest.mark.real
P256 = bytes.fromhex("06082a8648ce3d030107")
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
CRYPTS = {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True}
GCM, CCM, CHACHA = ck.CKM_AES_GCM, ck.CKM_AES_CCM, ck.CKM_CHACHA20_POLY1305
IV, END, LARGE = bytes(range(12)), ck.CKF_END_OF_MESSAGE, (1 << 21) + 3


def mechanism(kind: int) -> Any:
    return byref(CkMechanism(kind, None, 0))


@dataclass
class Client:
    p11: Cryptoki
    all: Interface
    session: int

    def login(self) -> None:
        self.p11.good("C_Login", self.session, ck.CKU_USER, USER, len(USER))

    def aes(self) -> tuple[int, bytes]:
        key = self.all.generate(self.session, ck.CKM_AES_KEY_GEN, AES | CRYPTS | OPEN)
        return key, self.all.value(self.session, key)

    def key_of(self, kind: int) -> tuple[int, Any]:
        """Returns a key for a mechanism, and what others do with its value."""
        if kind == CHACHA:
            key = self.all.generate(self.session, ck.CKM_CHACHA20_KEY_GEN, CRYPTS | OPEN)
            return key, ChaCha20Poly1305(self.all.value(self.session, key))
        key, value = self.aes()
        return key, AESGCM(value) if kind == GCM else AESCCM(value, 16)

    def ec_pair(self) -> tuple[int, int]:
        public = {ck.CKA_EC_PARAMS: P256, ck.CKA_VERIFY: True}
        return self.all.pair(self.session, ck.CKM_EC_KEY_PAIR_GEN, public, {ck.CKA_SIGN: True})


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def module(host: Host) -> Iterator[Module]:
    module = host.create("interface", guest_token=True)
    yield module
    module.destroy()


@pytest.fixture(scope="module")
def prepared(module: Module) -> Module:
    p11 = Cryptoki()
    p11.initialize(module.address)
    p11.good("C_InitToken", SLOT, SO, len(SO), LABEL)
    session = p11.open_session(SLOT, RW)
    p11.good("C_Login", session, ck.CKU_SO, SO, len(SO))
    p11.good("C_InitPIN", session, USER, len(USER))
    p11.finalize()
    return module


@pytest.fixture
def client(prepared: Module) -> Iterator[Client]:
    p11 = Cryptoki()
    p11.initialize(prepared.address)
    client = Client(p11, Interface(p11), p11.open_session(SLOT, RW))
    client.login()
    yield client
    p11.finalize()


# ---- messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GCM, CCM, CHACHA], ids=ck.mechanism_name)
def test_messages_are_encrypted_and_decrypted(client: Client, kind: int) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(kind)
    lists.good("C_MessageEncryptInit", session, mechanism(kind), key)
    lists.good("C_MessageDecryptInit", session, mechanism(kind), key)
    for at, data in enumerate((b"first", b"", bytes(70_000), b"last")):
        iv, more = IV[:-1] + bytes([at]), b"associated" if at % 2 else b""
        sent = Parameter(kind, iv, length=len(data))
        common = (*sent.arguments(), more or None, len(more), data, len(data))
        assert lists.output("C_EncryptMessage", session, *common, room=None) == (ck.CKR_OK, len(data))
        if data:
            assert lists.output("C_EncryptMessage", session, *common, room=len(data) - 1) == (ck.CKR_BUFFER_TOO_SMALL, len(data))
        assert sent.tag == bytes(16), "a question makes no tag"
        sealed = lists.got("C_EncryptMessage", session, *common, room=len(data) or 1)
        assert sealed + sent.tag == theirs.encrypt(iv, data, more) and sent.iv == iv
        back = (*sent.arguments(), more or None, len(more), sealed, len(sealed))
        assert lists.got("C_DecryptMessage", session, *back, room=len(data) or 1) == data
        other = Parameter(kind, iv, bytes(16), len(data))
        assert lists.output("C_DecryptMessage", session, *other.arguments(), *back[2:])[0] == ck.CKR_AEAD_DECRYPT_FAILED
    lists.good("C_MessageEncryptFinal", session)
    lists.good("C_MessageDecryptFinal", session)
    assert lists.call("C_MessageEncryptFinal", session) == ck.CKR_OPERATION_NOT_INITIALIZED


@pytest.mark.parametrize("kind", [GCM, CCM, CHACHA], ids=ck.mechanism_name)
def test_messages_in_parts(client: Client, kind: int) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(kind)
    data, more = bytes(range(100)), b"associated"
    sent = Parameter(kind, IV, length=100)
    lists.good("C_MessageEncryptInit", session, byref(sent.as_mechanism()), key)
    lists.good("C_EncryptMessageBegin", session, *sent.arguments(), more, len(more))
    sealed = b""
    for at in (0, 40):
        sealed += lists.got("C_EncryptMessageNext", session, *sent.arguments(), data[at : at + 40], 40, room=40, after=(0,))
        assert sent.tag == bytes(16)
    rest = (*sent.arguments(), data[80:], 20)
    assert lists.output("C_EncryptMessageNext", session, *rest, room=None, after=(END,)) == (ck.CKR_OK, 100 - len(sealed))
    sealed += lists.got("C_EncryptMessageNext", session, *rest, room=100, after=(END,))
    assert sealed + sent.tag == theirs.encrypt(IV, data, more)
    lists.good("C_MessageDecryptInit", session, mechanism(kind), key)
    lists.good("C_DecryptMessageBegin", session, *sent.arguments(), more, len(more))
    assert lists.got("C_DecryptMessageNext", session, *sent.arguments(), sealed[:50], 50, room=50, after=(0,)) == b""
    assert lists.got("C_DecryptMessageNext", session, *sent.arguments(), sealed[50:], 50, room=100, after=(END,)) == data


@pytest.mark.parametrize("generator", [ck.CKG_GENERATE, ck.CKG_GENERATE_COUNTER, ck.CKG_GENERATE_COUNTER_XOR])
def test_the_module_makes_ivs(client: Client, generator: int) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(GCM)
    sent = Parameter(GCM, b"fixd" + bytes(8), fixed=32, generator=generator)
    lists.good("C_MessageEncryptInit", session, byref(sent.as_mechanism()), key)
    made = []
    for _ in range(3):
        sealed = lists.got("C_EncryptMessage", session, *sent.arguments(), None, 0, b"data", 4)
        assert theirs.decrypt(sent.iv, sealed + sent.tag, b"") == b"data" and sent.iv.startswith(b"fixd")
        made.append(sent.iv)
    lists.good("C_EncryptMessageBegin", session, *sent.arguments(), None, 0)
    made.append(sent.iv)
    sealed = lists.got("C_EncryptMessageNext", session, *sent.arguments(), b"data", 4, after=(END,))
    assert theirs.decrypt(sent.iv, sealed + sent.tag, b"") == b"data"
    assert len(set(made)) == 4


def test_messages_longer_than_a_request(client: Client) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(GCM)
    data, sent = os.urandom(LARGE), Parameter(GCM, IV)
    lists.good("C_MessageEncryptInit", session, mechanism(GCM), key)
    common = (*sent.arguments(), b"more", 4, data, len(data))
    assert lists.output("C_EncryptMessage", session, *common, room=None) == (ck.CKR_OK, LARGE)
    assert lists.output("C_EncryptMessage", session, *common, room=LARGE - 1) == (ck.CKR_BUFFER_TOO_SMALL, LARGE)
    sealed = lists.got("C_EncryptMessage", session, *common, room=LARGE)
    assert sealed + sent.tag == theirs.encrypt(IV, data, b"more")
    lists.good("C_MessageDecryptInit", session, mechanism(GCM), key)
    back = (*sent.arguments(), b"more", 4, sealed, LARGE)
    assert lists.output("C_DecryptMessage", session, *back, room=LARGE)[0] == ck.CKR_DATA_LEN_RANGE, "more than a module keeps"
    short = (1 << 20) - 16  # with its tag as much as a module keeps
    sealed = lists.got("C_EncryptMessage", session, *sent.arguments(), None, 0, data, short, room=short)
    assert lists.got("C_DecryptMessage", session, *sent.arguments(), None, 0, sealed, short, room=short) == data[:short]
    public, private = client.ec_pair()
    lists.good("C_MessageSignInit", session, mechanism(ck.CKM_ECDSA_SHA256), private)
    lists.good("C_MessageVerifyInit", session, mechanism(ck.CKM_ECDSA_SHA256), public)
    assert lists.output("C_SignMessage", session, None, 0, data, LARGE, room=63) == (ck.CKR_BUFFER_TOO_SMALL, 64)
    signature = lists.got("C_SignMessage", session, None, 0, data, LARGE, room=64)
    lists.good("C_VerifyMessage", session, None, 0, data, LARGE, signature, 64)
    assert lists.call("C_VerifyMessage", session, None, 0, data, LARGE - 1, signature, 64) == ck.CKR_SIGNATURE_INVALID
    lists.good("C_MessageSignFinal", session)
    lists.good("C_MessageSignInit", session, mechanism(ck.CKM_ECDSA), private)
    assert lists.output("C_SignMessage", session, None, 0, data, LARGE, room=64)[0] == ck.CKR_DATA_LEN_RANGE


@pytest.mark.parametrize("key_type", ["p256", "rsa2048"])
def test_delivered_keys_sign_messages(prepared: Module, key_type: str) -> None:
    key = new_key(key_type)
    prepared.push(f"messages-{key_type}", key)
    p11 = Cryptoki()
    p11.initialize(prepared.address)
    lists, session = Interface(p11, b"\3\0"), p11.open_session(0)
    label = f"messages-{key_type}".encode()
    handles = {
        kind: p11.find(session, template=[(ck.CKA_LABEL, label), (ck.CKA_CLASS, kind.to_bytes(8, "little"))])[0]
        for kind in (ck.CKO_PRIVATE_KEY, ck.CKO_PUBLIC_KEY)
    }
    kind = ck.CKM_ECDSA_SHA256 if key_type == "p256" else ck.CKM_SHA256_RSA_PKCS
    lists.good("C_MessageSignInit", session, mechanism(kind), handles[ck.CKO_PRIVATE_KEY])
    lists.good("C_MessageVerifyInit", session, mechanism(kind), handles[ck.CKO_PUBLIC_KEY])
    for message in (b"one", b"two", bytes(3000)):
        signature = lists.got("C_SignMessage", session, None, 0, message, len(message))
        lists.good("C_VerifyMessage", session, None, 0, message, len(message), signature, len(signature))
        verify(key.public_key(), signature, message)
    lists.good("C_SignMessageBegin", session, None, 0)
    lists.good("C_SignMessageNext", session, None, 0, b"in ", 3, None, None)
    signature = lists.got("C_SignMessageNext", session, None, 0, b"parts", 5)
    verify(key.public_key(), signature, b"in parts")
    lists.good("C_VerifyMessageBegin", session, None, 0)
    lists.good("C_VerifyMessageNext", session, None, 0, b"in ", 3, None, 0)
    lists.good("C_VerifyMessageNext", session, None, 0, b"parts", 5, signature, len(signature))
    generation = prepared.material(f"messages-{key_type}").generations[0]
    assert generation.operations >= 4, "each message counts for the key's generation"
    p11.finalize()


def verify(public: Any, signature: bytes, message: bytes) -> None:
    if isinstance(public, rsa.RSAPublicKey):
        public.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    else:
        encoded = encode_dss_signature(int.from_bytes(signature[:32]), int.from_bytes(signature[32:]))
        public.verify(encoded, message, ec.ECDSA(hashes.SHA256()))


def test_wrong_arguments_change_nothing(client: Client) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(GCM)
    sent = Parameter(GCM, IV)
    classic = CkMechanism(GCM, sent.as_mechanism().parameter, 40)
    assert lists.call("C_MessageEncryptInit", session, byref(classic), key) == ck.CKR_MECHANISM_PARAM_INVALID
    lists.good("C_MessageEncryptInit", session, mechanism(GCM), key)
    structure, size = sent.arguments()
    for name, arguments, rv in (
        ("C_EncryptMessage", (None, 0, None, 0, b"data", 4), ck.CKR_MECHANISM_PARAM_INVALID),
        ("C_EncryptMessage", (structure, size - 8, None, 0, b"data", 4), ck.CKR_MECHANISM_PARAM_INVALID),
        ("C_EncryptMessage", (structure, size, None, 4, b"data", 4), ck.CKR_ARGUMENTS_BAD),
        ("C_EncryptMessage", (structure, size, None, 0, None, 4), ck.CKR_ARGUMENTS_BAD),
    ):
        assert lists.output(name, session, *arguments)[0] == rv
    long = Parameter(GCM, IV, bytes(17))
    assert lists.output("C_EncryptMessage", session, *long.arguments(), None, 0, b"data", 4)[0] == ck.CKR_MECHANISM_PARAM_INVALID
    assert lists.call("C_EncryptMessage", session, structure, size, None, 0, b"data", 4, None, None) == ck.CKR_ARGUMENTS_BAD
    assert lists.call("C_EncryptMessageBegin", session, structure, size, None, 1) == ck.CKR_ARGUMENTS_BAD
    sealed = lists.got("C_EncryptMessage", session, structure, size, None, 0, b"data", 4)
    assert sealed + sent.tag == theirs.encrypt(IV, b"data", b"")
    assert lists.output("C_EncryptMessage", 99, structure, size, None, 0, b"data", 4)[0] == ck.CKR_SESSION_HANDLE_INVALID
    assert lists.output("C_DecryptMessage", session, structure, size, None, 0, b"data", 4)[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_processes_are_cancelled(client: Client) -> None:
    lists, session = client.all, client.session
    key, _ = client.key_of(GCM)
    sent = Parameter(GCM, IV)
    lists.good("C_MessageEncryptInit", session, mechanism(GCM), key)
    lists.good("C_MessageDecryptInit", session, mechanism(GCM), key)
    lists.good("C_EncryptMessageBegin", session, *sent.arguments(), None, 0)
    assert lists.call("C_MessageEncryptFinal", session) == ck.CKR_OPERATION_ACTIVE
    lists.good("C_SessionCancel", session, ck.CKF_MESSAGE_ENCRYPT)
    assert lists.call("C_MessageEncryptFinal", session) == ck.CKR_OPERATION_NOT_INITIALIZED
    lists.good("C_MessageDecryptInit", session, None, key)
    assert lists.call("C_MessageDecryptFinal", session) == ck.CKR_OPERATION_NOT_INITIALIZED
    for kind in ("Encrypt", "Decrypt"):
        lists.good(f"C_Message{kind}Init", session, mechanism(GCM), key)


# ---- what happens to the module -----------------------------------------------------------------------------------------


def test_messages_go_on_in_a_successor(client: Client, prepared: Module) -> None:
    lists, session = client.all, client.session
    key, theirs = client.key_of(GCM)
    _, private = client.ec_pair()
    sent = Parameter(GCM, IV, generator=ck.CKG_GENERATE_COUNTER)
    lists.good("C_MessageEncryptInit", session, byref(sent.as_mechanism()), key)
    lists.good("C_MessageSignInit", session, mechanism(ck.CKM_ECDSA_SHA256), private)
    made = []
    for _ in range(2):
        lists.good("C_EncryptMessageBegin", session, *sent.arguments(), b"more", 4)
        iv = sent.iv
        lists.good("C_SignMessageBegin", session, None, 0)
        sealed = lists.got("C_EncryptMessageNext", session, *sent.arguments(), b"begun here, ", 12, after=(0,))
        lists.good("C_SignMessageNext", session, None, 0, b"begun here, ", 12, None, None)
        done = prepared.host.process.modules.UpgradeModule(
            pb.UpgradeModuleRequest(request_id=new_id(), name=prepared.name), timeout=30
        )
        assert done.old_pid != done.pid
        sealed += lists.got("C_EncryptMessageNext", session, *sent.arguments(), b"ended there", 11, after=(END,))
        assert theirs.decrypt(iv, sealed + sent.tag, b"more") == b"begun here, ended there"
        assert len(lists.got("C_SignMessageNext", session, None, 0, b"ended there", 11)) == 64
        lists.got("C_EncryptMessage", session, *sent.arguments(), None, 0, b"after", 5)
        made += [iv, sent.iv]
    numbers = [int.from_bytes(iv) for iv in made]
    assert [n - numbers[0] for n in numbers] == [0, 1, 2, 3], "the counter goes on"


def test_a_killed_worker_ends_processes(client: Client, prepared: Module) -> None:
    lists = client.all
    key, _ = client.key_of(GCM)
    sent = Parameter(GCM, IV)
    lists.good("C_MessageEncryptInit", client.session, mechanism(GCM), key)
    lists.got("C_EncryptMessage", client.session, *sent.arguments(), None, 0, b"data", 4)
    pid = prepared.pid
    os.kill(pid, signal.SIGKILL)
    prepared.serving(not_pid=pid)
    message = (*sent.arguments(), None, 0, b"data", 4)
    assert lists.output("C_EncryptMessage", client.session, *message)[0] == ck.CKR_DEVICE_ERROR
    assert lists.output("C_EncryptMessage", client.session, *message)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    client.login()
    key, theirs = client.key_of(GCM)
    lists.good("C_MessageEncryptInit", client.session, mechanism(GCM), key)
    sealed = lists.got("C_EncryptMessage", client.session, *message)
    assert sealed + sent.tag == theirs.encrypt(IV, b"data", b"")


# ---- two operations in one call -----------------------------------------------------------------------------------------


def test_dual_functions(client: Client) -> None:
    lists, session = client.all, client.session
    key, _ = client.aes()
    public, private = client.ec_pair()
    iv = bytes(16)
    kept = Parameter(GCM, iv)
    cbc = CkMechanism(ck.CKM_AES_CBC_PAD, kept.structure.iv, 16)
    data = os.urandom(1000)
    sealed = {}
    for name, inits, final in (
        ("C_DigestEncryptUpdate", [("C_DigestInit", mechanism(ck.CKM_SHA256))], "C_DigestFinal"),
        ("C_SignEncryptUpdate", [("C_SignInit", mechanism(ck.CKM_ECDSA_SHA256), private)], "C_SignFinal"),
    ):
        for _ in range(2):  # the second C_SignInit is put off until what follows
            for init, *arguments in inits:
                lists.good(init, session, *arguments)
            lists.good("C_EncryptInit", session, byref(cbc), key)
            out = b""
            for at in range(0, 1000, 300):
                part = data[at : at + 300]
                needed = lists.output(name, session, part, len(part), room=None)[1]
                assert lists.output(name, session, part, len(part), room=needed - 1) == (ck.CKR_BUFFER_TOO_SMALL, needed)
                out += lists.got(name, session, part, len(part), room=needed)
            out += lists.got("C_EncryptFinal", session)
            sealed[name] = out, lists.got(final, session)
    assert sealed["C_DigestEncryptUpdate"][1] == hashlib.sha256(data).digest()
    signature = sealed["C_SignEncryptUpdate"][1]
    out = sealed["C_SignEncryptUpdate"][0]
    assert out == sealed["C_DigestEncryptUpdate"][0]
    lists.good("C_VerifyInit", session, mechanism(ck.CKM_ECDSA_SHA256), public)
    lists.good("C_Verify", session, data, 1000, signature, 64)
    for name, init, last in (
        ("C_DecryptDigestUpdate", ("C_DigestInit", mechanism(ck.CKM_SHA256)), "C_DigestUpdate"),
        ("C_DecryptVerifyUpdate", ("C_VerifyInit", mechanism(ck.CKM_ECDSA_SHA256), public), "C_VerifyUpdate"),
    ):
        lists.good(init[0], session, *init[1:])
        lists.good("C_DecryptInit", session, byref(cbc), key)
        plain = lists.got(name, session, out[:500], 500) + lists.got(name, session, out[500:], len(out) - 500)
        rest = lists.got("C_DecryptFinal", session)
        lists.good(last, session, rest, len(rest))
        assert plain + rest == data
    lists.good("C_VerifyFinal", session, signature, 64)
    assert lists.got("C_DigestFinal", session) == hashlib.sha256(data).digest()


def test_errors_of_dual_functions(client: Client) -> None:
    lists, session = client.all, client.session
    key, _ = client.aes()
    assert lists.output("C_DigestEncryptUpdate", session, b"data", 4)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    lists.good("C_DigestInit", session, mechanism(ck.CKM_SHA256))
    assert lists.output("C_DigestEncryptUpdate", session, b"data", 4)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    assert lists.got("C_Digest", session, b"data", 4) == hashlib.sha256(b"data").digest(), "it was not touched"
    for arguments, rv in (((None, 4), ck.CKR_ARGUMENTS_BAD), ((bytes(LARGE), LARGE), ck.CKR_DATA_LEN_RANGE)):
        lists.good("C_DigestInit", session, mechanism(ck.CKM_SHA256))
        lists.good("C_EncryptInit", session, mechanism(ck.CKM_AES_ECB), key)
        assert lists.output("C_DigestEncryptUpdate", session, *arguments, room=LARGE)[0] == rv
        assert lists.call("C_DigestUpdate", session, b"x", 1) == ck.CKR_OPERATION_NOT_INITIALIZED
        assert lists.output("C_EncryptUpdate", session, b"x", 1)[0] == ck.CKR_OPERATION_NOT_INITIALIZED


# ---- recovery, and the signature first ----------------------------------------------------------------------------------


def test_recovery(client: Client) -> None:
    lists, session = client.all, client.session
    public, private = lists.pair(
        session,
        ck.CKM_RSA_PKCS_KEY_PAIR_GEN,
        {ck.CKA_MODULUS_BITS: 2048, ck.CKA_VERIFY_RECOVER: True},
        {ck.CKA_SIGN_RECOVER: True},
    )
    for kind, data in ((ck.CKM_RSA_PKCS, b"data in it"), (ck.CKM_RSA_X_509, b"\0" + b"d" * 255)):
        lists.good("C_SignRecoverInit", session, mechanism(kind), private)
        assert lists.output("C_SignRecover", session, data, len(data), room=None) == (ck.CKR_OK, 256)
        signature = lists.got("C_SignRecover", session, data, len(data), room=256)
        lists.good("C_VerifyRecoverInit", session, mechanism(kind), public)
        assert lists.output("C_VerifyRecover", session, signature, 256, room=1) == (ck.CKR_BUFFER_TOO_SMALL, len(data))
        assert lists.got("C_VerifyRecover", session, signature, 256) == data
        lists.good("C_VerifyRecoverInit", session, mechanism(kind), public)
        assert lists.output("C_VerifyRecover", session, b"\xff" * 256, 256)[0] == ck.CKR_SIGNATURE_INVALID
        assert lists.output("C_VerifyRecover", session, signature, 256)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    for init, call, key, rv in (
        ("C_SignRecoverInit", "C_SignRecover", private, ck.CKR_DATA_LEN_RANGE),
        ("C_VerifyRecoverInit", "C_VerifyRecover", public, ck.CKR_SIGNATURE_LEN_RANGE),
    ):
        lists.good(init, session, mechanism(ck.CKM_RSA_PKCS), key)
        assert lists.output(call, session, bytes(LARGE), LARGE)[0] == rv
        assert lists.output(call, session, bytes(10), 10)[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_the_signature_first(client: Client) -> None:
    lists, session = client.all, client.session
    public, private = client.ec_pair()
    ecdsa = mechanism(ck.CKM_ECDSA_SHA256)
    for data in (b"data", os.urandom(LARGE)):
        lists.good("C_SignInit", session, ecdsa, private)
        signature = lists.got("C_Sign", session, data, len(data))
        for right in (True, False):
            said = (data if right else data[:-1] + b"?", len(data))
            rv = ck.CKR_OK if right else ck.CKR_SIGNATURE_INVALID
            lists.good("C_VerifySignatureInit", session, ecdsa, public, signature, 64)
            assert lists.call("C_VerifySignature", session, *said) == rv
            lists.good("C_VerifySignatureInit", session, ecdsa, public, signature, 64)
            lists.good("C_VerifySignatureUpdate", session, *said)
            assert lists.call("C_VerifySignatureFinal", session) == rv
    assert lists.call("C_VerifySignatureFinal", session) == ck.CKR_OPERATION_NOT_INITIALIZED
    assert lists.call("C_VerifySignatureInit", session, ecdsa, public, None, 64) == ck.CKR_ARGUMENTS_BAD
    for _ in range(2):  # the second C_VerifyInit is put off, and is that of another function all the same
        lists.good("C_VerifyInit", session, ecdsa, public)
        assert lists.call("C_VerifySignatureInit", session, ecdsa, public, signature, 64) == ck.CKR_OPERATION_ACTIVE
        assert lists.call("C_VerifySignature", session, b"data", 4) == ck.CKR_OPERATION_NOT_INITIALIZED
        lists.good("C_Verify", session, data, len(data), signature, 64)
    lists.good("C_VerifySignatureInit", session, ecdsa, public, signature, 64)
    lists.good("C_VerifySignatureInit", session, None, public, None, 0)
    assert lists.call("C_VerifySignature", session, b"data", 4) == ck.CKR_OPERATION_NOT_INITIALIZED
    lists.good("C_VerifySignatureInit", session, ecdsa, public, signature, 64)
    lists.good("C_SessionCancel", session, ck.CKF_VERIFY)
    assert lists.call("C_VerifySignature", session, b"data", 4) == ck.CKR_OPERATION_NOT_INITIALIZED
    with pytest.raises(InvalidSignature):
        point = lists.value(session, public, ck.CKA_EC_POINT)[2:]
        verify(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point), signature, b"data")


# ---- keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("set_", "size"), [(2, 1088), (3, 1568)])
def test_encapsulation(client: Client, set_: int, size: int) -> None:
    lists, session = client.all, client.session
    public, private = lists.pair(
        session, ck.CKM_ML_KEM_KEY_PAIR_GEN, {ck.CKA_PARAMETER_SET: set_, ck.CKA_ENCAPSULATE: True}, {ck.CKA_DECAPSULATE: True}
    )
    kem, values = mechanism(ck.CKM_ML_KEM), attributes({ck.CKA_KEY_TYPE: ck.CKK_AES} | OPEN)
    ours, theirs = c_ulong(77), c_ulong(77)
    for room, rv in ((None, ck.CKR_OK), (size - 1, ck.CKR_BUFFER_TOO_SMALL)):
        assert lists.output("C_EncapsulateKey", session, kem, public, *values, room=room, after=(byref(ours),)) == (rv, size)
        assert ours.value == 77, "no key was made"
    ciphertext = lists.got("C_EncapsulateKey", session, kem, public, *values, room=size, after=(byref(ours),))
    lists.good("C_DecapsulateKey", session, kem, private, *values, ciphertext, size, byref(theirs))
    assert lists.value(session, ours.value) == lists.value(session, theirs.value)
    assert lists.call("C_DecapsulateKey", session, kem, private, *values, ciphertext, size - 1, byref(theirs)) == 0x112
    assert lists.call("C_DecapsulateKey", session, kem, private, *values, None, 0, byref(theirs)) == ck.CKR_ARGUMENTS_BAD
    assert lists.call("C_EncapsulateKey", session, kem, public, *values, None, None, byref(ours)) == ck.CKR_ARGUMENTS_BAD


@pytest.mark.parametrize("kind", [GCM, CCM], ids=ck.mechanism_name)
@pytest.mark.parametrize("generator", [ck.CKG_NO_GENERATE, ck.CKG_GENERATE_RANDOM])
def test_authenticated_wrapping(client: Client, kind: int, generator: int) -> None:
    lists, session = client.all, client.session
    wraps = AES | OPEN | {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True}
    wrapping = lists.generate(session, ck.CKM_AES_KEY_GEN, wraps)
    value = lists.value(session, wrapping)
    key, secret = client.aes()
    sent = Parameter(kind, IV, length=32, generator=generator)
    how = byref(sent.as_mechanism())
    for room, rv in ((None, ck.CKR_OK), (31, ck.CKR_BUFFER_TOO_SMALL)):
        assert lists.output("C_WrapKeyAuthenticated", session, how, wrapping, key, b"data", 4, room=room) == (rv, 32)
    wrapped = lists.got("C_WrapKeyAuthenticated", session, how, wrapping, key, b"data", 4, room=32)
    assert (sent.iv != IV) == (generator != ck.CKG_NO_GENERATE)
    theirs = AESGCM(value) if kind == GCM else AESCCM(value, 16)
    assert theirs.decrypt(sent.iv, wrapped + sent.tag, b"data") == secret
    values, made = attributes({ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES} | OPEN), c_ulong()
    received = Parameter(kind, sent.iv, sent.tag, 32)
    back = byref(received.as_mechanism())
    lists.good("C_UnwrapKeyAuthenticated", session, back, wrapping, wrapped, 32, *values, b"data", 4, byref(made))
    assert lists.value(session, made.value) == secret
    wrong = (wrapping, wrapped, 32, *values, b"date", 4, byref(made))
    assert lists.call("C_UnwrapKeyAuthenticated", session, back, *wrong) == 0x110
    plain = mechanism(ck.CKM_AES_KEY_WRAP_KWP)
    assert lists.output("C_WrapKeyAuthenticated", session, plain, wrapping, key, None, 0)[0] == ck.CKR_MECHANISM_INVALID
    assert lists.output("C_WrapKeyAuthenticated", session, mechanism(kind), wrapping, key, None, 0)[0] == 0x71


# ---- the rest -----------------------------------------------------------------------------------------------------------


def test_nothing_is_asynchronous(client: Client) -> None:
    lists, session = client.all, client.session
    number = c_ulong()
    assert lists.call("C_AsyncComplete", session, b"C_Sign", None) == ck.CKR_OPERATION_NOT_INITIALIZED
    assert lists.call("C_AsyncGetID", session, b"C_Sign", byref(number)) == ck.CKR_OPERATION_NOT_INITIALIZED
    assert lists.call("C_AsyncJoin", session, b"C_Sign", 1, None, 0) == ck.CKR_SAVED_STATE_INVALID
    for name, *arguments in (("C_AsyncComplete", None, None), ("C_AsyncGetID", b"C_Sign", None), ("C_AsyncJoin", None, 1, None, 0)):
        assert lists.call(name, session, *arguments) == ck.CKR_ARGUMENTS_BAD
    for name, *arguments in (("C_AsyncComplete", b"C_Sign", None), ("C_AsyncJoin", b"C_Sign", 1, None, 0)):
        assert lists.call(name, 99, *arguments) == ck.CKR_SESSION_HANDLE_INVALID
    opened = c_ulong()
    flags = RW | ck.CKF_ASYNC_SESSION
    assert lists.call("C_OpenSession", SLOT, flags, None, None, byref(opened)) == ck.CKR_SESSION_ASYNC_NOT_SUPPORTED


def test_validation_flags(client: Client) -> None:
    lists, flags = client.all, c_ulong(77)
    lists.good("C_GetSessionValidationFlags", client.session, ck.CKS_LAST_VALIDATION_OK, byref(flags))
    assert flags.value == 0
    assert lists.call("C_GetSessionValidationFlags", client.session, 9, byref(flags)) == ck.CKR_ARGUMENTS_BAD
    assert lists.call("C_GetSessionValidationFlags", client.session, 1, None) == ck.CKR_ARGUMENTS_BAD
    assert lists.call("C_GetSessionValidationFlags", 99, 1, byref(flags)) == ck.CKR_SESSION_HANDLE_INVALID


def test_operation_state_is_refused_cleanly(client: Client) -> None:
    lists, session = client.all, client.session
    key, _ = client.key_of(GCM)
    sent = Parameter(GCM, IV)
    assert lists.output("C_GetOperationState", session)[0] == ck.CKR_OPERATION_NOT_INITIALIZED
    lists.good("C_MessageEncryptInit", session, mechanism(GCM), key)
    assert lists.output("C_GetOperationState", session)[0] == ck.CKR_STATE_UNSAVEABLE
    lists.got("C_EncryptMessage", session, *sent.arguments(), None, 0, b"data", 4)
    assert lists.call("C_SetOperationState", session, b"state", 5, 0, 0) == ck.CKR_SAVED_STATE_INVALID
    lists.good("C_MessageEncryptFinal", session)
