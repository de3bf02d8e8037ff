"""One module's keys in a hardware security module, through python-pkcs11.

Each key is a token object whose label says which module's it is and whose CKA_ID is its name; nothing else there is looked at.
python-pkcs11 initializes a library for one thread at a time (C_Initialize without arguments): so is `Hardware`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
import pkcs11._pkcs11  # else `pkcs11.lib` does so when this process is already a user who may not be able to read it
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hsmvisor_rpc.internal import hsm
from pkcs11 import Attribute, KeyType, ObjectClass
from pkcs11 import exceptions as failures

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.hsm import parameters
from hsmvisord.hsm.material import USES, pkcs8, secret_attributes, spki

#: Errors of the library that name themselves as in PKCS#11; all others are CKR_DEVICE_ERROR.
_TOLD = {
    failures.DataInvalid: ck.CKR_DATA_INVALID,
    failures.DataLenRange: ck.CKR_DATA_LEN_RANGE,
    failures.EncryptedDataInvalid: ck.CKR_ENCRYPTED_DATA_INVALID,
    failures.EncryptedDataLenRange: ck.CKR_ENCRYPTED_DATA_LEN_RANGE,
    failures.WrappedKeyInvalid: ck.CKR_ENCRYPTED_DATA_INVALID,
    failures.WrappedKeyLenRange: ck.CKR_ENCRYPTED_DATA_LEN_RANGE,
    failures.MechanismInvalid: ck.CKR_MECHANISM_INVALID,
    failures.MechanismParamInvalid: ck.CKR_MECHANISM_PARAM_INVALID,
    failures.KeySizeRange: ck.CKR_KEY_SIZE_RANGE,
    failures.KeyTypeInconsistent: ck.CKR_KEY_TYPE_INCONSISTENT,
    failures.KeyUnextractable: ck.CKR_KEY_UNEXTRACTABLE,
    failures.KeyNotWrappable: ck.CKR_KEY_NOT_WRAPPABLE,
    failures.DomainParamsInvalid: ck.CKR_CURVE_NOT_SUPPORTED,
    failures.DeviceMemory: ck.CKR_DEVICE_MEMORY,
    failures.AttributeSensitive: ck.CKR_KEY_UNEXTRACTABLE,
    failures.GeneralError: ck.CKR_FUNCTION_FAILED,  # SoftHSM2 says so of what does not decrypt
    failures.FunctionFailed: ck.CKR_FUNCTION_FAILED,
}
#: After these nothing works but a new login, and that is the supervisor's to order: a PIN that is wrong by now would be tried by
#: the helper of each module.
_OVER = (
    failures.SessionHandleInvalid,
    failures.SessionClosed,
    failures.UserNotLoggedIn,
    failures.DeviceRemoved,
    failures.TokenNotPresent,
)
_MAX_HANDLES = 4096  #: of keys that are remembered
_LABEL = "hsmvisor {}"
_PRIVATE_USES = {
    ck.CKK_RSA: (Attribute.SIGN, Attribute.DECRYPT, Attribute.UNWRAP),
    ck.CKK_EC: (Attribute.SIGN, Attribute.DERIVE),
    ck.CKK_EC_EDWARDS: (Attribute.SIGN,),
}
_SECRET_USES = (
    Attribute.SIGN, Attribute.VERIFY, Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.WRAP, Attribute.UNWRAP, Attribute.DERIVE,
)  # fmt: skip


class SessionOver(Exception):
    """The hardware does not know the session any more: another helper logs in."""


class WrongPin(Exception):
    """The hardware does not take the PIN; trying again may lock it."""


def _failed(error: failures.PKCS11Error) -> CkError:
    rv = _TOLD.get(type(error), ck.CKR_DEVICE_ERROR)
    return CkError(rv, f"the hardware says {type(error).__name__}")


class Hardware:
    def __init__(self, library: Path, token: str, pin: str, module_id: bytes) -> None:
        """Logs in.  Raises WrongPin, and CkError for all else."""
        self._label = _LABEL.format(module_id.hex())
        self._token_label, self._pin = token, pin
        self._known: dict[bytes, Any] = {}
        try:
            self._library = pkcs11.lib(str(library))
        except (failures.PKCS11Error, RuntimeError, OSError) as error:
            raise CkError(ck.CKR_DEVICE_ERROR, f"{library}: no PKCS#11 library that can be used ({type(error).__name__})") from None
        self._session = self._log_in()

    def _log_in(self) -> Any:
        try:
            token = self._library.get_token(token_label=self._token_label)
            self.token = f"{token.manufacturer_id} {token.model} {token.serial.decode('ascii', 'replace')}"
            self.mechanisms = tuple(sorted(int(m) for m in token.slot.get_mechanisms()))
            return token.open(rw=True, user_pin=self._pin)
        except failures.NoSuchToken:
            raise CkError(ck.CKR_TOKEN_NOT_PRESENT, f"there is no token with the label {self._token_label!r}") from None
        except (failures.PinIncorrect, failures.PinLocked, failures.PinExpired, failures.PinInvalid, failures.PinLenRange) as error:
            raise WrongPin(f"the PIN is not taken: {type(error).__name__}") from None
        except failures.PKCS11Error as error:
            raise _failed(error) from None

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[Any]:
        """Gives the session.  Raises SessionOver, and CkError for all else that the hardware says."""
        try:
            yield self._session
        except _OVER as error:
            raise SessionOver(f"the session with the hardware is over: {type(error).__name__}") from None
        except (failures.KeyHandleInvalid, failures.ObjectHandleInvalid) as error:
            self._known.clear()
            raise _failed(error) from None
        except failures.PKCS11Error as error:
            raise _failed(error) from None

    # ---- keys -----------------------------------------------------------------------------------------------------

    def names(self) -> tuple[bytes, ...]:
        with self._speaking() as session:
            found = [key[Attribute.ID] for key in session.get_objects({Attribute.LABEL: self._label})]
        return tuple(name for name in found if len(name) == hsm.KEY_NAME)

    def destroy(self, name: bytes) -> None:
        self._known.pop(name, None)
        with self._speaking() as session:
            for key in list(session.get_objects({Attribute.LABEL: self._label, Attribute.ID: name})):
                key.destroy()

    def _key(self, session: Any, name: bytes) -> Any:
        key = self._known.get(name)
        if key is None:
            found = list(session.get_objects({Attribute.LABEL: self._label, Attribute.ID: name}))
            if len(found) != 1:
                raise CkError(ck.CKR_DEVICE_ERROR, "the hardware does not have this key (any more)")
            if len(self._known) >= _MAX_HANDLES:
                self._known.clear()
            key = self._known[name] = found[0]
        return key

    def _new(self, untrusted_name: bytes) -> bytes:
        """Returns the name of a key that is about to be made: what an earlier attempt made under it is destroyed."""
        if len(untrusted_name) != hsm.KEY_NAME:
            raise CkError(ck.CKR_ARGUMENTS_BAD, f"a key's name has {hsm.KEY_NAME} bytes")
        self.destroy(untrusted_name)
        return untrusted_name

    def _template(self, name: bytes, readable: bool, wrappable: bool) -> dict[Attribute, Any]:
        return {
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.LABEL: self._label,
            Attribute.ID: name,
            Attribute.SENSITIVE: not readable,
            Attribute.EXTRACTABLE: readable or wrappable,
        }

    def make_pair(self, ask: hsm.MakePair) -> hsm.Made:
        name = self._new(ask.key)
        private = self._template(name, ask.readable, ask.wrappable)
        with self._speaking() as session:
            public: dict[Attribute, Any] = {Attribute.TOKEN: False, Attribute.LABEL: self._label}
            if ask.key_type == ck.CKK_RSA:
                made = session.generate_keypair(
                    KeyType.RSA, ask.bits, capabilities=USES[ask.key_type], public_template=public, private_template=private
                )
            else:
                domain = session.create_domain_parameters(KeyType(ask.key_type), {Attribute.EC_PARAMS: ask.parameters}, local=True)
                made = domain.generate_keypair(capabilities=USES[ask.key_type], public_template=public, private_template=private)
            public_key = spki(ask.key_type, made[0])
            made[0].destroy()
        return hsm.Made(ask.key_type, public_key, 0)

    def make_secret(self, ask: hsm.MakeSecret) -> hsm.Made:
        name = self._new(ask.key)
        template = self._template(name, ask.readable, ask.wrappable)
        with self._speaking() as session:
            session.generate_key(KeyType(ask.key_type), 8 * ask.size, capabilities=USES[ask.key_type], template=template)
        return hsm.Made(ask.key_type, b"", ask.size)

    def take_private(self, ask: hsm.TakePrivate) -> hsm.Made:
        """Raises CkError(KEY_TYPE_INCONSISTENT) for a type that hardware does not keep."""
        key = serialization.load_der_private_key(ask.pkcs8, None)
        key_type, attributes = secret_attributes(key)
        name = self._new(ask.key)
        uses = dict.fromkeys(
            (Attribute.SIGN, Attribute.DECRYPT, Attribute.UNWRAP) if key_type == ck.CKK_RSA else (Attribute.SIGN,), True
        )
        if key_type == ck.CKK_EC:
            uses[Attribute.DERIVE] = True
        whole = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.KEY_TYPE: KeyType(key_type)}
        with self._speaking() as session:
            session.create_object(whole | attributes | uses | self._template(name, ask.readable, ask.wrappable))
        public_key = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hsm.Made(key_type, public_key, 0)

    def take_secret(self, ask: hsm.TakeSecret) -> hsm.Made:
        name = self._new(ask.key)
        uses = dict.fromkeys(
            (
                Attribute.SIGN,
                Attribute.VERIFY,
                Attribute.ENCRYPT,
                Attribute.DECRYPT,
                Attribute.WRAP,
                Attribute.UNWRAP,
                Attribute.DERIVE,
            ),
            True,
        )
        whole = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType(ask.key_type), Attribute.VALUE: ask.value}
        with self._speaking() as session:
            session.create_object(whole | uses | self._template(name, ask.readable, ask.wrappable))
        return hsm.Made(ask.key_type, b"", len(ask.value))

    def export(self, name: bytes) -> bytes:
        """Raises CkError(KEY_UNEXTRACTABLE)."""
        with self._speaking() as session:
            key = self._key(session, name)
            if key[Attribute.SENSITIVE]:
                raise CkError(ck.CKR_KEY_UNEXTRACTABLE, "the hardware does not give this key")
            if key[Attribute.CLASS] == ObjectClass.SECRET_KEY:
                return bytes(key[Attribute.VALUE])
            return pkcs8(key)

    # ---- operations -----------------------------------------------------------------------------------------------

    def use(self, ask: hsm.Use, parameter: Any) -> bytes:
        mechanism, told = parameters.of(ask.mechanism, parameter)
        with self._speaking() as session:
            key = self._key(session, ask.key)
            match ask.operation:
                case hsm.SIGN:
                    return bytes(key.sign(ask.data, mechanism=mechanism, mechanism_param=told))
                case hsm.ENCRYPT:
                    return bytes(key.encrypt(ask.data, mechanism=mechanism, mechanism_param=told))
                case hsm.DECRYPT:
                    return bytes(key.decrypt(ask.data, mechanism=mechanism, mechanism_param=told))
                case hsm.DERIVE:
                    return self._derive(key, mechanism, told, int.from_bytes(ask.data))
        raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "no such operation")

    def _derive(self, key: Any, mechanism: Any, parameter: Any, size: int) -> bytes:
        """The shared secret of ECDH: a session object that is read and destroyed."""
        open_to_us = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True, Attribute.TOKEN: False}
        secret = key.derive_key(
            KeyType.GENERIC_SECRET, 8 * size, mechanism=mechanism, mechanism_param=parameter, template=open_to_us
        )
        try:
            return bytes(secret[Attribute.VALUE])
        finally:
            secret.destroy()

    def wrap(self, ask: hsm.Wrap, parameter: Any) -> bytes:
        mechanism, told = parameters.of(ask.mechanism, parameter)
        with self._speaking() as session:
            key = self._key(session, ask.key)
            if not ask.public:
                return bytes(self._key(session, ask.wrapper).wrap_key(key, mechanism=mechanism, mechanism_param=told))
            wrapper = self._public(session, ask.public)
            try:
                return bytes(wrapper.wrap_key(key, mechanism=mechanism, mechanism_param=told))
            finally:
                wrapper.destroy()

    def _public(self, session: Any, spki: bytes) -> Any:
        numbers = serialization.load_der_public_key(spki)
        if not isinstance(numbers, rsa.RSAPublicKey):
            raise CkError(ck.CKR_WRAPPING_KEY_TYPE_INCONSISTENT)
        whole = numbers.public_numbers()
        return session.create_object(
            {
                Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                Attribute.KEY_TYPE: KeyType.RSA,
                Attribute.TOKEN: False,
                Attribute.WRAP: True,
                Attribute.MODULUS: big_endian(whole.n),
                Attribute.PUBLIC_EXPONENT: big_endian(whole.e),
            }
        )

    def unwrap(self, ask: hsm.Unwrap, parameter: Any) -> hsm.Made:
        mechanism, told = parameters.of(ask.mechanism, parameter)
        name = self._new(ask.key)
        template = self._template(name, ask.readable, ask.wrappable)
        with self._speaking() as session:
            made = self._key(session, ask.unwrapper).unwrap_key(
                ObjectClass.PRIVATE_KEY if ask.private else ObjectClass.SECRET_KEY,
                KeyType(ask.key_type),
                ask.wrapped,
                mechanism=mechanism,
                mechanism_param=told,
                capabilities=USES[ask.key_type],
                template=template,
            )
            if not ask.private:
                return hsm.Made(ask.key_type, b"", self._size(made, ask))
            if ask.key_type != ck.CKK_RSA:  # a private key on a curve does not tell its point
                made.destroy()
                raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "the hardware unwraps private keys of RSA alone")
            return hsm.Made(ask.key_type, spki(ask.key_type, made), 0)

    @staticmethod
    def _size(made: Any, ask: hsm.Unwrap) -> int:
        """Some hardware (SoftHSM2) does not tell how long a secret key is that it unwrapped."""
        size = int(made[Attribute.VALUE_LEN]) or ask.size
        if not size and ask.mechanism == ck.CKM_AES_KEY_WRAP:
            size = len(ask.wrapped) - 8
        if not size and ask.readable:
            size = len(made[Attribute.VALUE])
        if not size:
            made.destroy()
            raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_VALUE_LEN: the hardware does not tell how long the key is")
        return size
