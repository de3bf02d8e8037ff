"""The module's keys in its guest's TPM: put in, swapped and taken away while the guest uses it.

A key is an object that the guest may use, and can neither take away, re-authorise, duplicate nor bring back: its parent is made
anew each time from a secret, and forgotten.  At a handle of the owner's the guest's owner may take it away, and no more than that.
"""

from __future__ import annotations

import hashlib
import os
import struct

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsmvisord.tpm.commands import Commands
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import OWNER, PLATFORM, Attributes, Authorization, Code, Parts, Tpm2Error, sized

FIRST, LAST = 0x81800000, 0x81FFFFFF  #: persistent handles of the platform
OWNERS_FIRST, OWNERS_LAST = 0x81000000, FIRST - 1  #: and of the owner
_NO_HANDLE = 0x18B  #: TPM_RC_HANDLE of the first handle: nothing is there

#: The policy of the module's keys at the owner's handles, where the guest has others: nobody can fulfil it, and it tells them.
OWNERS_POLICY = hashlib.sha256(b"hsmvisor: a module's key at a handle of the owner").digest()

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class NotLoaded(TpmFault):
    """The TPM does not take a key; what was at its handle is there."""


class Platform:
    """All within `Commands.room`, and with hierarchies that were claimed.  Each raises Tpm2Error, BadResponse."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    @staticmethod
    def attributes(decrypt: bool) -> Attributes:
        """Of a key: with ADMIN_WITH_POLICY and no policy, or none that can be, nobody may change its authorization."""
        use = Attributes.DECRYPT if decrypt else Attributes.SIGN
        return Attributes.USER_WITH_AUTH | Attributes.ADMIN_WITH_POLICY | Attributes.NO_DA | use

    @classmethod
    def public(cls, handle: int, key: PublicKey, decrypt: bool) -> bytes:
        """TPMT_PUBLIC.  Raises KeyError for a curve that TPMs do not have."""
        return tpm2.public_area(key, cls.attributes(decrypt), OWNERS_POLICY if handle < FIRST else b"")

    def put(self, handle: int, key: PrivateKey, decrypt: bool = False) -> None:
        """Has `key` at `handle`, in the place of whatever is there.

        `decrypt`: it decrypts and agrees, and signs nothing.  Raises KeyError for a curve that TPMs do not have, NotLoaded.  Where
        it fails otherwise an earlier key may be gone, so the caller commits the permanent state when all went well, and not before.
        """
        hierarchy = OWNER if handle < FIRST else PLATFORM
        public = self.public(handle, key.public_key(), decrypt)
        try:
            loaded = self._load(hierarchy, public, tpm2.sensitive_area(key))
        except Tpm2Error as error:
            raise NotLoaded(str(error)) from None
        try:
            self.remove(handle)
            self._commands.by_policy(Code.EVICT_CONTROL, (hierarchy, loaded), struct.pack(">I", handle))
        finally:
            self._commands.flush(loaded)

    def remove(self, handle: int) -> bool:
        """Returns whether there was something.  The platform may take away what is the owner's."""
        if self.public_at(handle) is None:
            return False
        self._commands.by_policy(Code.EVICT_CONTROL, (PLATFORM, handle), struct.pack(">I", handle))
        return True

    def public_at(self, handle: int) -> bytes | None:
        """TPMT_PUBLIC of what is at a persistent handle."""
        try:
            return self._commands.do(Code.READ_PUBLIC, (handle,)).sized()
        except Tpm2Error as error:
            if error.code == _NO_HANDLE:
                return None
            raise

    def names(self) -> dict[int, bytes]:
        """The Names of the module's keys, by handle: all at the platform's handles, and those of ours at the owner's."""
        found = {}
        for handle in self._commands.handles(OWNERS_FIRST, LAST):
            public = self.public_at(handle)  # none where the guest has switched the hierarchy off
            if public is not None and (handle >= FIRST or _policy(public) == OWNERS_POLICY):
                found[handle] = tpm2.name_of(public)
        return found

    def _load(self, hierarchy: int, public: bytes, sensitive: bytes) -> int:
        password = os.urandom(32)
        with self._commands.primary(hierarchy, tpm2.parent_template(os.urandom(32)), password) as (parent, _):
            authorization = Authorization(password=password)
            duplicate = sized(b"") + sized(public) + sized(sensitive) + sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM)
            answer = self._commands.do(Code.IMPORT, (parent,), duplicate, authorization)
            answer.parameters()
            private = answer.sized()
            return self._commands.do(Code.LOAD, (parent,), sized(private) + sized(public), authorization).number()


def _policy(public: bytes) -> bytes:
    parts = Parts(public, "TPMT_PUBLIC")
    parts.take(8)
    return parts.sized()
