"""What a guest says to its TPM, command by command; the TPM is in this process (libtpms has one in each)."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisord.tpm.managed import ManagedTpm
from hsmvisord.tpm.platform import PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, NULL, Authorization, Code, sized

OWNER, LOCKOUT = 0x40000001, 0x4000000A
DUPLICATE, OBJECT_CHANGE_AUTH, RSA_DECRYPT = 0x14B, 0x150, 0x159
ECDSA, RSASSA = 0x0018, 0x0014


class Guest:
    """`process`: of a TPM."""

    def __init__(self, process: Callable[[bytes], bytes]) -> None:
        self._process = process

    def say(
        self, code: int, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
    ) -> tuple[int, bytes]:
        """Returns the response's code, and what is behind its head."""
        told = bytearray(tpm2.command(Code.STARTUP, handles, parameters, authorization))
        told[6:10] = struct.pack(">I", code)
        answer = self._process(bytes(told))
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
        answer = self._process(sign_command(handle, digest, scheme))
        return HEAD.unpack_from(answer)[2], signature_in(answer)

    def primary(self) -> int:
        """A loaded object of the owner's."""
        sensitive = sized(sized(b"") + sized(b""))
        parameters = sensitive + sized(tpm2.parent_template(os.urandom(32))) + sized(b"") + struct.pack(">I", 0)
        return int.from_bytes(self.good(Code.CREATE_PRIMARY, (OWNER,), parameters, EMPTY_PASSWORD)[:4], "big")

    def session(self) -> int:
        parameters = sized(os.urandom(16)) + sized(b"") + struct.pack(">BHH", 0, tpm2.NULL_ALGORITHM, tpm2.SHA256)
        return int.from_bytes(self.good(Code.START_AUTH_SESSION, (NULL, NULL), parameters)[:4], "big")

    def flush(self, handle: int) -> None:
        self.good(Code.FLUSH_CONTEXT, (), struct.pack(">I", handle))

    def handles(self, first: int) -> list[int]:
        answer = self.good(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, first, 254))
        count = int.from_bytes(answer[5:9], "big")
        return list(struct.unpack_from(f">{count}I", answer, 9))


def sign_command(handle: int, digest: bytes, scheme: int = ECDSA) -> bytes:
    ticket = struct.pack(">HI", 0x8024, NULL) + sized(b"")
    parameters = sized(digest) + struct.pack(">HH", scheme, tpm2.SHA256) + ticket
    return tpm2.command(Code.SIGN, (handle,), parameters, EMPTY_PASSWORD)


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

    def anew(self, permanent: bytes = b"") -> None:
        """Another machine, or the same one with an older state."""
        self.managed.switch_off()
        self.managed._wanted = {}
        self.refuses = False
        self.managed.tpm.permanent = permanent
        del self.kept[:], self.said[:]
        if not permanent:
            self.managed.manufacture()
        self.managed.switch_on()

    def reset(self) -> None:
        self.managed.switch_off()
        self.managed.switch_on()
        assert self.guest.startup() == 0


@functools.cache
def the_machine() -> Machine:
    """That of this process."""
    return Machine()
