"""An authority's keys in a PKCS #11 token (an HSM, or SoftHSM2): made there, and never out of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisor import pkcs11_token
from hsmvisor.manager.ca.builtin.keys import NoKey
from hsmvisor.pkcs11_token import TokenFault
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

_CURVE = ec.SECP384R1()
_PREFIX = "hsmvisor-ca-"


class TokenKey(ec.EllipticCurvePrivateKey):
    """As `cryptography` has private keys: its interface is there to be implemented by others."""

    def __init__(self, store: TokenKeys, name: str, public: ec.EllipticCurvePublicKey) -> None:
        self._store, self._name, self._public = store, name, public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Raises NoKey."""
        algorithm = signature_algorithm.algorithm
        digest = bytes(data) if isinstance(algorithm, Prehashed) else hashlib.new(algorithm.name, data).digest()
        raw = self._store.sign(self._name, digest)
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))

    def exchange(self, *_: Any) -> NoReturn:
        raise NoKey("an authority's key signs, and does nothing else")

    def private_numbers(self) -> NoReturn:
        raise NoKey("the key is in the token")

    def private_bytes(self, *_: Any) -> NoReturn:
        raise NoKey("the key is in the token")

    def __copy__(self) -> TokenKey:
        return self

    def __deepcopy__(self, memo: Any) -> TokenKey:
        return self


class TokenKeys:
    """`pin_file`: one line, the token's user PIN.  The token is asked one thing at a time, in a session of its own each."""

    def __init__(self, library: Path, token: str, pin_file: Path) -> None:
        self._library, self._token, self._pin_file = library, token, pin_file
        self._one = threading.Lock()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Any]:
        """Raises NoKey."""
        try:
            with self._one:
                pin = self._pin_file.read_text().removesuffix("\n")
                with pkcs11_token.session(self._library, self._token, pin, rw=True) as session:
                    yield session
        except OSError as error:
            raise NoKey(f"the PIN's file {self._pin_file}: {error.strerror}") from None
        except TokenFault as fault:
            raise NoKey(str(fault)) from None

    def key(self, name: str, make: bool) -> ec.EllipticCurvePrivateKey:
        label = _PREFIX + name
        with self._session() as session:
            found = list(session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.LABEL: label}))
            if not found and not make:
                raise NoKey(f"token {self._token!r} has no key {label!r}: use the right one, or begin a new authority")
            public = found[0] if found else self._made(session, label)
            point = bytes(public[Attribute.EC_POINT])
        return TokenKey(self, name, ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, _content(point)))

    def _made(self, session: Any, label: str) -> Any:
        domain = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp384r1")}, local=True
        )
        private = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        pair = domain.generate_keypair(
            label=label, store=True, capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY, private_template=private
        )
        return pair[0]

    def sign(self, name: str, digest: bytes) -> bytes:
        with self._session() as session:
            key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=_PREFIX + name)
            return bytes(key.sign(digest, mechanism=Mechanism.ECDSA))


def _content(octet_string: bytes) -> bytes:
    """The point in a DER OCTET STRING of fewer than 128 bytes, or as it is."""
    wrapped = len(octet_string) > 2 and octet_string[0] == 4 and octet_string[1] == len(octet_string) - 2
    return octet_string[2:] if wrapped else octet_string
