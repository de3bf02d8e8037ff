"""What a guest says to its TPM, command by command; the TPM is in this process (libtpms has one in each)."""

from __future__ import annotations

import functools
import hashlib
import hmac
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from hsmvisor_rpc.internal.phases import TPM_BUSY_SIZE
from hsmvisord import limits
from hsmvisord.tpm import wanted
from hsmvisord.tpm.managed import ManagedTpm, Wanted
from hsmvisord.tpm.platform import PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, NULL, Authorization, Code, sized

HANDLE, INDEX = 0x81800001, 0x01400001  #: of a module's key, and of its certificate
DIGEST = hashlib.sha256(b"what a guest has to sign").digest()

OWNER, LOCKOUT, ENDORSEMENT = 0x40000001, 0x4000000A, 0x4000000B
DUPLICATE, OBJECT_CHANGE_AUTH, RSA_DECRYPT = 0x14B, 0x150, 0x159
ACTIVATE_CREDENTIAL, POLICY_SECRET, PCR_EXTEND, HIERARCHY_CONTROL = 0x147, 0x151, 0x182, 0x121
ECDSA, RSASSA = 0x0018, 0x0014


class Guest:
    """`process`: of a TPM."""

    def __init__(self, process: Callable[[bytes], bytes]) -> None:
        self.process = process

    def say(
        self, code: int, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
    ) -> tuple[int, bytes]:
        """Returns the response's code, and what is behind its head."""
        told = bytearray(tpm2.command(Code.STARTUP, handles, parameters, authorization))
        told[6:10] = struct.pack(">I", code)
        answer = self.process(bytes(told))
        assert HEAD.unpack_from(answer)[1] == len(answer)
        return HEAD.unpack_from(answer)[2], answer[HEAD.size :]

    def good(
        self, code: int, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
    ) -> bytes:
        result, answer = self.say(code, handles, parameters, authorization)
        assert result == 0, f"{code:#x}: {result:#x}"
        return answer

    def startup(self, kind: int = tpm2.CLEAR) -> int:
        return self.say(Code.STARTUP, (), struct.pack(">H", kind))[0]

    def shutdown(self, kind: int = tpm2.CLEAR) -> int:
        return self.say(Code.SHUTDOWN, (), struct.pack(">H", kind))[0]

    # ---- keys -----------------------------------------------------------------------------------------------------------

    def public(self, handle: int) -> bytes:
        """TPMT_PUBLIC."""
        answer = self.good(Code.READ_PUBLIC, (handle,))
        return answer[2 : 2 + int.from_bytes(answer[:2], "big")]

    def sign(self, handle: int, digest: bytes, scheme: int = ECDSA) -> tuple[int, bytes]:
        """Returns the response's code, and TPMT_SIGNATURE."""
        answer = self.process(sign_command(handle, digest, scheme))
        return HEAD.unpack_from(answer)[2], signature_in(answer)

    def primary(self) -> int:
        """A loaded object of the owner's."""
        sensitive = sized(sized(b"") + sized(b""))
        parameters = sensitive + sized(tpm2.parent_template(os.urandom(32))) + sized(b"") + struct.pack(">I", 0)
        return int.from_bytes(self.good(Code.CREATE_PRIMARY, (OWNER,), parameters, EMPTY_PASSWORD)[:4], "big")

    def persist(self, handle: int) -> None:
        """Has a key of the owner's there."""
        primary = self.primary()
        self.good(Code.EVICT_CONTROL, (OWNER, primary), struct.pack(">I", handle), EMPTY_PASSWORD)
        self.flush(primary)

    def made(self, hierarchy: int, template: bytes) -> tuple[int, bytes]:
        """A primary key: its handle and its TPMT_PUBLIC."""
        parameters = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + struct.pack(">I", 0)
        answer = self.good(Code.CREATE_PRIMARY, (hierarchy,), parameters, EMPTY_PASSWORD)
        return int.from_bytes(answer[:4], "big"), answer[10 : 10 + int.from_bytes(answer[8:10], "big")]

    def session(self, kind: int = 0) -> int:
        """TPM_SE; one for HMACs."""
        return self.session_begun(kind)[0]

    def session_begun(self, kind: int = 0) -> tuple[int, bytes]:
        """And the TPM's nonce."""
        parameters = sized(os.urandom(16)) + sized(b"") + struct.pack(">BHH", kind, tpm2.NULL_ALGORITHM, tpm2.SHA256)
        answer = self.good(Code.START_AUTH_SESSION, (NULL, NULL), parameters)
        return int.from_bytes(answer[:4], "big"), answer[6:]

    def flush(self, handle: int) -> None:
        self.good(Code.FLUSH_CONTEXT, (), struct.pack(">I", handle))

    def handles(self, first: int) -> list[int]:
        answer = self.good(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, first, 254))
        count = int.from_bytes(answer[5:9], "big")
        return list(struct.unpack_from(f">{count}I", answer, 9))

    # ---- NV memory ------------------------------------------------------------------------------------------------------

    def nv(self, index: int) -> bytes | None:
        """What is in it, read with its own authorization, as anybody may; None where there is no such index."""
        result, answer = self.say(Code.NV_READ_PUBLIC, (index,))
        if result:
            assert result == 0x18B, hex(result)
            return None
        size, found = int.from_bytes(answer[2 : 2 + int.from_bytes(answer[:2], "big")][-2:], "big"), b""
        while len(found) < size:
            asked = struct.pack(">HH", min(1024, size - len(found)), len(found))
            found += self.good(Code.NV_READ, (index, index), asked, EMPTY_PASSWORD)[6 : 6 + min(1024, size - len(found))]
        return found

    def nv_attributes(self, index: int) -> int:
        """TPMA_NV."""
        return int.from_bytes(self.good(Code.NV_READ_PUBLIC, (index,))[8:12], "big")

    def nv_define(self, index: int, size: int, attributes: int = 0x02060006) -> int:
        """As the owner, who may read and write it; returns the response's code."""
        public = struct.pack(">IHI", index, tpm2.SHA256, attributes) + sized(b"") + struct.pack(">H", size)
        return self.say(Code.NV_DEFINE_SPACE, (OWNER,), sized(b"") + sized(public), EMPTY_PASSWORD)[0]

    def fill(self, with_keys: bool = False) -> None:
        """Nothing fits into its NV memory any more; `with_keys`: no persistent key of its own either."""
        at = 0x01800000
        if with_keys:
            primary = self.primary()
            for handle in range(0x81000100, 0x81000200):
                if self.say(Code.EVICT_CONTROL, (OWNER, primary), struct.pack(">I", handle), EMPTY_PASSWORD)[0]:
                    break
            self.flush(primary)
        for size in (2048, 256, 16, 1):
            while self.nv_define(at, size) == 0:
                at += 1

    def nv_empty(self) -> None:
        """What `fill` has made is gone."""
        while made := [index for index in self.handles(0x01800000) if index < 0x01C00000]:
            for index in made:
                self.good(Code.NV_UNDEFINE_SPACE, (OWNER, index), b"", EMPTY_PASSWORD)

    def extend(self, pcr: int, digest: bytes) -> None:
        self.good(PCR_EXTEND, (pcr,), struct.pack(">IH", 1, tpm2.SHA256) + digest, EMPTY_PASSWORD)


@dataclass(frozen=True)
class Several(Authorization):
    """Of a command whose first handles each need one."""

    all: tuple[Authorization, ...] = ()

    def encode(self) -> bytes:
        return b"".join(one.encode() for one in self.all)


class HmacSession:
    """Neither salted nor bound (part 1, 19.6): its HMACs have an empty key, and bind each command to the Names of its objects."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.handle, self._nonce = guest.session_begun()

    def sign(self, handle: int, name: bytes, digest: bytes) -> tuple[int, bytes]:
        """As Guest.sign; `name`: which key the guest believes to be there."""
        parameters, caller, attributes = sign_parameters(digest, ECDSA), os.urandom(16), b"\1"
        told = hashlib.sha256(struct.pack(">I", Code.SIGN) + name + parameters).digest()
        proof = hmac.digest(b"", told + caller + self._nonce + attributes, "sha256")
        area = struct.pack(">I", self.handle) + sized(caller) + attributes + sized(proof)
        body = struct.pack(">II", handle, len(area)) + area + parameters
        answer = self._guest.process(HEAD.pack(tpm2.SESSIONS, HEAD.size + len(body), Code.SIGN) + body)
        result = HEAD.unpack_from(answer)[2]
        if not result:
            size = int.from_bytes(answer[10:14], "big")
            said, rest = answer[14 : 14 + size], answer[14 + size :]
            self._nonce = rest[2 : 2 + int.from_bytes(rest[:2], "big")]
            told = hashlib.sha256(struct.pack(">II", 0, Code.SIGN) + said).digest()
            assert answer.endswith(hmac.digest(b"", told + self._nonce + caller + attributes, "sha256")), "the TPM's own proof"
        return result, signature_in(answer)


def sign_parameters(digest: bytes, scheme: int) -> bytes:
    ticket = struct.pack(">HI", 0x8024, NULL) + sized(b"")
    return sized(digest) + struct.pack(">HH", scheme, tpm2.SHA256) + ticket


def sign_command(handle: int, digest: bytes, scheme: int = ECDSA) -> bytes:
    return tpm2.command(Code.SIGN, (handle,), sign_parameters(digest, scheme), EMPTY_PASSWORD)


def signature_in(answer: bytes) -> bytes:
    """TPMT_SIGNATURE of a response to Sign; empty where there is none."""
    size = int.from_bytes(answer[10:14], "big")
    return answer[14 : 14 + size]


def verify(key: PrivateKey, digest: bytes, signature: bytes) -> None:
    """Fails unless the TPMT_SIGNATURE is the key's."""
    if isinstance(key, rsa.RSAPrivateKey):
        size = int.from_bytes(signature[4:6], "big")
        key.public_key().verify(signature[6 : 6 + size], digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
        return
    size = int.from_bytes(signature[4:6], "big")
    r, rest = signature[6 : 6 + size], signature[6 + size :]
    s = rest[2 : 2 + int.from_bytes(rest[:2], "big")]
    der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
    key.public_key().verify(der, digest, ec.ECDSA(Prehashed(hashes.SHA256())))


class Machine:
    """One ManagedTpm that is new again for each test; `kept` has what was committed."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.said: list[str] = []
        self.refuses = False
        self.managed = ManagedTpm(b"", self._commit, self.said.append)
        self.guest = Guest(self.managed.process)

    def _commit(self, data: bytes) -> None:
        if self.refuses:
            raise OSError("no space")
        self.kept.append(data)

    def anew(self, permanent: bytes = b"", keys: dict[int, Wanted] | None = None, told: bool = True) -> None:
        """Another machine, or the same one with an older state; `told`: which keys are wanted is known, `keys`."""
        managed = self.managed
        managed._frozen, managed._identity, managed._late, managed._barred = False, None, False, ()
        managed._wanted, managed._impossible = dict(keys or {}) if told else None, {}
        managed._brought.clear()
        managed.switch_off()
        self.refuses = False
        managed.tpm.permanent = permanent
        del self.kept[:], self.said[:]
        if not permanent:
            self.managed.manufacture()
        self.managed.switch_on()
        self.managed.tpm.reset_established(4)  # which libtpms keeps for its process

    def deliver(self, key: PrivateKey | None = None, handle: int = HANDLE, certificate: bytes = b"") -> PrivateKey:
        """What was at the handle before may stay where this does not come."""
        key = key or new_p256()
        before = (self.managed._wanted or {}).get(handle)
        earlier = frozenset([wanted.name_of(handle, before)] if before else [])
        self.managed.want({handle: Wanted(key, certificate=certificate, earlier=earlier)})
        return key

    def reset(self) -> None:
        self.managed.switch_off()
        self.managed.switch_on()
        assert self.guest.startup() == 0


class Soon:
    """How a guest's commands are answered that come soon after each other: plain ones without the interpreter (plain.c)."""

    def __init__(self, managed: ManagedTpm) -> None:
        self._managed, self._turn = managed, threading.Lock()
        self._ours, self._theirs = socket.socketpair()
        self.page = mmap.mmap(-1, TPM_BUSY_SIZE)
        self.plain = 0  #: commands

    def process(self, command: bytes, locality: int = 0) -> bytes:
        with self._turn:
            return self._process(command, locality) if command else self._managed.process(command, locality)

    def _process(self, command: bytes, locality: int) -> bytes:
        self._ours.sendall(command)
        left = self._managed.process_plain(self._theirs, self.page, lambda: locality)
        if left.taken:
            assert (left.taken, self.page[: len(command)]) == (command, b"\1" + bytes(len(command) - 1))
            self.page[0] = 0
            return self._managed.process(command, locality)
        assert self.page[:] == bytes(TPM_BUSY_SIZE) and not left.unsent
        try:
            response = self._ours.recv(limits.MAX_TPM_COMMAND, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self._managed.process(self._theirs.recv(limits.MAX_TPM_COMMAND), locality)
        self.plain += 1
        return response


def new_p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def the_machine() -> Machine:
    """That of this process."""
    return Machine()


def started() -> Iterator[Machine]:
    """A new one, started by its guest; for a fixture."""
    machine = the_machine()
    machine.anew()
    machine.guest = Guest(machine.managed.process)
    assert machine.guest.startup() == 0
    yield machine
    machine.managed.tpm.switch_off()  # also one that is handed over


def started_either_way(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """As `started`, for a fixture with WAYS: its guest's commands come as they come, or soon after each other."""
    for machine in started():
        if request.param == "soon":
            machine.guest = Guest(Soon(machine.managed).process)
        yield machine


WAYS = ("each", "soon")


# ---- credentials ----------------------------------------------------------------------------------------------------------


def make_credential(endorsement: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """What a certification authority gives to whoever has the endorsement key of a certificate and an object of that Name: contents
    of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET (part 1, 24; annex B.10.4, C.6.4)."""
    if isinstance(endorsement, rsa.RSAPublicKey):
        seed = os.urandom(32)
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
        encrypted = endorsement.encrypt(seed, oaep)
    else:
        ephemeral, size = ec.generate_private_key(endorsement.curve), (endorsement.key_size + 7) // 8
        ours, theirs = (key.public_numbers() for key in (ephemeral.public_key(), endorsement))
        x, y, other = (number.to_bytes(size, "big") for number in (ours.x, ours.y, theirs.x))
        shared = ephemeral.exchange(ec.ECDH(), endorsement)
        seed = hashlib.sha256(struct.pack(">I", 1) + shared + b"IDENTITY\0" + x + other).digest()
        encrypted = sized(x) + sized(y)
    sealing = Cipher(AES(_kdfa(seed, b"STORAGE", name, 128)), CFB(bytes(16))).encryptor()
    sealed = sealing.update(sized(secret)) + sealing.finalize()
    outer = hmac.digest(_kdfa(seed, b"INTEGRITY", b"", 256), sealed + name, "sha256")
    return sized(outer) + sealed, encrypted


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """SP 800-108, counter mode (part 1, 11.4.10.2); one block of SHA-256 is enough."""
    return hmac.digest(key, struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits), "sha256")[: bits // 8]
