"""The cryptoprocessor that is an HSM: what software keys do, with the private part in hardware.

A key lives in the hardware as long as anything refers to it: an object in the worker's memory, or the sealed state.  `clean`
destroys what nobody needs any more, and `sweep`, at the start of a worker, what an earlier one left behind.  Public keys, digests
and random bytes are the software's; what ECDH agrees on, and parts that a guest gives or may read, pass through the worker.
"""

from __future__ import annotations

import os
import queue
import socket
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from hsmvisor_rpc.internal import hsm
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import ciphers, ec, generation, mechanisms, rsa
from hsmvisord.crypto.hardware.adapters import RsaKey
from hsmvisord.crypto.hardware.channel import Channel
from hsmvisord.crypto.hardware.keys import WHOLE, HardSecret, private_key
from hsmvisord.crypto.interface import LOCKED_IN, Access, KeyKind, PrivateKey, PublicKey, SecretKey, Wanted
from hsmvisord.crypto.secret import kind_of
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism

#: What is done with another mechanism of the hardware: the hash is the worker's, or the MAC is cut.
_BY: dict[int, int] = {
    **dict.fromkeys(rsa.HASHED_PKCS1, ck.CKM_RSA_PKCS),
    **dict.fromkeys(rsa.HASHED_PSS, ck.CKM_RSA_PKCS_PSS),
    **dict.fromkeys(ec.HASHED, ck.CKM_ECDSA),
    ck.CKM_ECDH1_COFACTOR_DERIVE: ck.CKM_ECDH1_DERIVE,
    **WHOLE,
}
#: What is done with the same one.
_SAME = (
    ck.CKM_RSA_PKCS, ck.CKM_RSA_X_509, ck.CKM_RSA_PKCS_OAEP, ck.CKM_RSA_PKCS_PSS, ck.CKM_ECDSA, ck.CKM_ECDH1_DERIVE, ck.CKM_EDDSA,
    ck.CKM_AES_ECB, ck.CKM_AES_CBC, ck.CKM_AES_CBC_PAD, ck.CKM_AES_CTR, ck.CKM_AES_GCM,
    ck.CKM_AES_KEY_WRAP, ck.CKM_AES_KEY_WRAP_KWP,
    ck.CKM_RSA_PKCS_KEY_PAIR_GEN, ck.CKM_EC_KEY_PAIR_GEN, ck.CKM_EC_EDWARDS_KEY_PAIR_GEN,
    ck.CKM_AES_KEY_GEN, ck.CKM_GENERIC_SECRET_KEY_GEN,
)  # fmt: skip
_NEEDS = _BY | {mechanism: mechanism for mechanism in _SAME}


@dataclass(frozen=True)
class StoredKey(Record):
    """What the sealed state keeps of a key in hardware."""

    TYPE: ClassVar[str] = "state-hardware-key"
    key: bytes  #: its name there
    key_type: int
    public: bytes  #: SubjectPublicKeyInfo; of a secret key empty
    size: int  #: bytes of a secret key
    rejection: bytes = field(repr=False)  #: of an RSA key: what wrong ciphertexts are answered by (adapters.py)


class HardwareProvider(SoftwareProvider):
    """`connect` first: with a helper's socket, and with that of each one that takes its place."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = Channel()
        self.retired = False  #: a successor of the worker has the keys
        self._held: Counter[bytes] = Counter()  #: objects in memory, by key
        self._dropped: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def connect(self, sock: socket.socket) -> None:
        """Raises Away."""
        self.channel.connect(sock)

    def offers(self, mechanism: int) -> bool:
        row = mechanisms.GUEST_TABLE.get(mechanism)
        if row is not None and not row.key_types:
            return True
        return _NEEDS.get(mechanism) in self.channel.mechanisms

    # ---- what is in the hardware ----------------------------------------------------------------------------------

    def clean(self) -> None:
        """Destroys the keys that nothing refers to any more; whoever dropped the last reference has said so.  Raises CkError."""
        while not self._dropped.empty():
            name = self._dropped.get()
            self._held[name] -= 1
            if self._held[name] <= 0:
                del self._held[name]
                if not self.retired:
                    self._destroy(name)

    def _destroy(self, name: bytes) -> None:
        try:
            self.channel.ask(hsm.Destroy(name), hsm.Data)
        except CkError:  # the next `clean` tries again
            self._held[name] = 1
            self._dropped.put(name)
            raise

    def sweep(self) -> int:
        """Destroys what no object refers to: the whole state is loaded.  Returns how many.  Raises CkError."""
        self.clean()
        left = [name for name in self.channel.ask(hsm.List(), hsm.Keys).names if name not in self._held]
        for name in left:
            self.channel.ask(hsm.Destroy(name), hsm.Data)
        return len(left)

    def _hold(self, inner: object, name: bytes) -> None:
        """`inner`: what every operation with the key refers to."""
        self._held[name] += 1
        weakref.finalize(inner, self._dropped.put, name).atexit = False

    def _private(self, record: StoredKey) -> PrivateKey:
        public = self.load_public_key(record.public)
        key = private_key(public, record.key, record.encode(), partial(self._use, record.key), partial(self._export, record.key))
        if isinstance(key._any_key, RsaKey):
            key._any_key.rejection = record.rejection
        self._hold(key._any_key, record.key)
        return key

    def _secret(self, record: StoredKey) -> HardSecret:
        use, export = partial(self._use, record.key), partial(self._export, record.key)
        key = HardSecret(record.key_type, record.size, record.key, record.encode(), use, export)
        self._hold(key, record.key)
        return key

    def _use(self, name: bytes, operation: str, mechanism: int, parameter: Any, data: bytes) -> bytes:
        return self.channel.ask(hsm.Use(operation, name, mechanism, hsm.encode_parameter(parameter), data), hsm.Data).data

    def _export(self, name: bytes) -> bytes:
        return self.channel.ask(hsm.Export(name), hsm.Data).data

    def _made(self, ask: Callable[[bytes], Record]) -> StoredKey:
        """`ask`: from the name of the new key to the question.  What is made and not heard of is destroyed by the next `clean`."""
        name = os.urandom(hsm.KEY_NAME)
        try:
            made = self.channel.ask(ask(name), hsm.Made)
        except CkError:
            self._held[name] += 1
            self._dropped.put(name)
            raise
        rejection = os.urandom(32) if made.key_type == ck.CKK_RSA else b""
        return StoredKey(name, made.key_type, made.public, made.size, rejection)

    # ---- keys -----------------------------------------------------------------------------------------------------

    def open_private(self, stored: bytes) -> PrivateKey:
        return self._private(_stored(stored))

    def open_secret(self, key_type: int, stored: bytes) -> SecretKey:
        record = _stored(stored)
        if record.key_type != key_type:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "the stored key is of another type")
        return self._secret(record)

    def load_private_key(self, pkcs8: bytes, access: Access = LOCKED_IN) -> PrivateKey:
        key = super().load_private_key(pkcs8)  # checked as all keys are; then it goes
        supported(key.kind)
        return self._private(self._made(lambda name: hsm.TakePrivate(name, pkcs8, access.readable, access.wrappable)))

    def private_of_parts(self, key_type: int, parts: Mapping[int, Any], access: Access = LOCKED_IN) -> PrivateKey:
        return self.load_private_key(super().private_of_parts(key_type, parts).pkcs8(), access)

    def load_secret_key(self, key_type: int, value: bytes, access: Access = LOCKED_IN) -> SecretKey:
        supported(kind_of(key_type, len(value)))
        return self._secret(self._made(lambda name: hsm.TakeSecret(name, key_type, value, access.readable, access.wrappable)))

    def generate_pair(self, mechanism: int, wanted: Wanted, access: Access = LOCKED_IN, wait: float = 0.0) -> PrivateKey:
        key_type = generation.PAIRS[mechanism][0]
        generation.check(mechanism, wanted)

        def question(name: bytes) -> hsm.MakePair:
            return hsm.MakePair(name, key_type, wanted.bits, wanted.parameters, access.readable, access.wrappable)

        if key_type != ck.CKK_RSA:
            return self._private(self._made(question))
        with generation.making_rsa(wait):
            return self._private(self._made(question))

    def generate_secret(self, mechanism: int, length: int, access: Access = LOCKED_IN) -> SecretKey:
        key_type, size = generation.secret_size(mechanism, length)
        supported(kind_of(key_type, size))
        return self._secret(self._made(lambda name: hsm.MakeSecret(name, key_type, size, access.readable, access.wrappable)))

    # ---- wrapping -------------------------------------------------------------------------------------------------

    def wrap(
        self, wrapper: PublicKey | SecretKey, mechanism: Mechanism, key: PrivateKey | SecretKey
    ) -> tuple[int, Callable[[], bytes]]:
        """The length of what is wrapped is known when it is: the bound is the largest key's."""
        if isinstance(wrapper, HardSecret):
            name, public = wrapper.name, b""
            ciphers.checked(mechanism, encrypting=True)
        else:
            name, public = b"", wrapper.spki  # type: ignore[union-attr]
        bound = wrapper.encrypter(mechanism).bound(_most_bytes(key))
        question = hsm.Wrap(name, public, mechanism.type, hsm.encode_parameter(mechanism.parameter), key.name)  # type: ignore[union-attr]
        return bound, lambda: self.channel.ask(question, hsm.Data).data

    def unwrap_private(self, unwrapper: PrivateKey | SecretKey, mechanism: Mechanism, wrapped: bytes, access: Access) -> PrivateKey:
        return self._private(self._unwrapped(unwrapper, mechanism, wrapped, True, ck.CKK_RSA, 0, access))

    def unwrap_secret(
        self, unwrapper: PrivateKey | SecretKey, mechanism: Mechanism, wrapped: bytes, key_type: int, length: int, access: Access
    ) -> SecretKey:
        supported(KeyKind("such", key_type, 0, b""))
        record = self._unwrapped(unwrapper, mechanism, wrapped, False, key_type, length, access)
        key = self._secret(record)  # held from here on: what is refused below is destroyed
        if length not in (0, record.size):
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"there are {record.size} bytes for the key")
        return key

    def _unwrapped(
        self,
        unwrapper: PrivateKey | SecretKey,
        mechanism: Mechanism,
        wrapped: bytes,
        private: bool,
        key_type: int,
        length: int,
        access: Access,
    ) -> StoredKey:
        if mechanism.type == ck.CKM_RSA_PKCS:  # its errors would tell an attacker what he wants to know
            raise CkError(ck.CKR_MECHANISM_INVALID, "keys in hardware unwrap by CKM_RSA_PKCS_OAEP")
        unwrapper.decrypter(mechanism)  # checks the parameter
        told = hsm.encode_parameter(mechanism.parameter)
        name: bytes = unwrapper.name  # type: ignore[union-attr]

        def question(new: bytes) -> hsm.Unwrap:
            allowed = (access.readable, access.wrappable)
            return hsm.Unwrap(new, name, mechanism.type, told, wrapped, private, key_type, length, *allowed)

        try:
            return self._made(question)
        except CkError as error:
            if error.rv != ck.CKR_FUNCTION_FAILED:
                raise
            raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID) from None


def _stored(stored: bytes) -> StoredKey:
    try:
        return StoredKey.decode(stored)
    except MalformedRecord:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "a stored key is not one in hardware") from None


def supported(kind: KeyKind) -> None:
    """Raises CkError(KEY_TYPE_INCONSISTENT) for a key that hardware does not keep."""
    if kind.key_type not in (ck.CKK_RSA, ck.CKK_EC, ck.CKK_EC_EDWARDS, ck.CKK_AES, ck.CKK_GENERIC_SECRET):
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"the module's hardware keeps no {kind.name} keys")


def _most_bytes(key: PrivateKey | SecretKey) -> int:
    """Returns the most bytes of a key in the clear."""
    if isinstance(key, HardSecret):
        return key.kind.bits // 8
    return 5 * (key.kind.bits + 7) // 8 + 256  # PrivateKeyInfo of an RSA key: modulus, exponent, primes and theirs
