"""An escrow key in a PKCS #11 token (an HSM, or SoftHSM2): made there, and never out of it.

Each child that needs it opens the library for itself, for a library does not survive a fork; it is never loaded in the issuer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hsmvisor import pkcs11_token
from hsmvisor.manager.issuer.escrow import NotOpened, ProviderFault
from hsmvisor.pkcs11_token import TokenFault
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11 import exceptions as failures

_NOT_OPENED = (failures.EncryptedDataInvalid, failures.EncryptedDataLenRange)
_UNCLEAR = (failures.GeneralError, failures.FunctionFailed)  #: SoftHSM2 says so of a wrong tag
_TEMPLATE = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True, Attribute.MODIFIABLE: False}
_ID_SIZE, _TAG_BITS = 16, 128


class TokenWrapper:
    """Its repr shows nothing."""

    kind = "token"

    def __init__(self, library: Path, token: str, label: str, pin: str) -> None:
        """`token`, `label`: the token's, and the key's in it."""
        self._library, self._token, self._label, self._pin = library, token, label, pin

    @contextlib.contextmanager
    def _session(self, rw: bool = False) -> Iterator[Any]:
        """Raises ProviderFault."""
        try:
            with pkcs11_token.session(self._library, self._token, self._pin, rw) as session:
                try:
                    yield session
                except failures.MechanismInvalid:
                    self._fail("has no AES-GCM (CKM_AES_GCM), which escrow needs")
        except TokenFault as fault:
            then = "; it is not tried again before a restart" if fault.pin else ""
            raise ProviderFault(f"the escrow's {fault}{then}", locked=fault.pin) from None

    def _fail(self, what: str) -> NoReturn:
        raise ProviderFault(f"the escrow's token {self._token!r} in {self._library} {what}") from None

    def _key(self, session: Any) -> Any:
        """None: there is none."""
        wanted = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.LABEL: self._label}
        found = list(session.get_objects(wanted))
        if len(found) > 1:
            self._fail(f"has {len(found)} keys with the label {self._label!r}: leave the right one")
        return found[0] if found else None

    def _there(self, session: Any) -> Any:
        key = self._key(session)
        if key is None:
            self._fail(f"has no key with the label {self._label!r}")
        return key

    def probe(self) -> None:
        with self._session(rw=True) as session:
            if self._key(session) is None:
                session.generate_key(
                    KeyType.AES,
                    256,
                    id=os.urandom(_ID_SIZE),
                    label=self._label,
                    store=True,
                    capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                    template=_TEMPLATE,
                )

    def wrap(self, plain: bytes, nonce: bytes, context: bytes) -> tuple[bytes, bytes]:
        with self._session() as session:
            key = self._there(session)
            parameters = GCMParams(nonce, context, _TAG_BITS)
            sealed = key.encrypt(plain, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
            return bytes(key[Attribute.ID]), bytes(sealed)

    def unwrap(self, key_id: bytes, sealed: bytes, nonce: bytes, context: bytes) -> bytes:
        with self._session() as session:
            key = self._there(session)
            if bytes(key[Attribute.ID]) != key_id:
                self._fail(f"has another key with the label {self._label!r} than the one that wrapped this key")
            parameters = GCMParams(nonce, context, _TAG_BITS)
            try:
                return bytes(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))
            except _NOT_OPENED:
                raise NotOpened from None
            except _UNCLEAR:
                if self._works(key, plain=bytes(16), nonce=os.urandom(len(nonce))):
                    raise NotOpened from None
                raise

    def _works(self, key: Any, plain: bytes, nonce: bytes) -> bool:
        """Raises pkcs11.PKCS11Error."""
        parameters = GCMParams(nonce, b"", _TAG_BITS)
        sealed = key.encrypt(plain, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
        return bytes(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)) == plain
