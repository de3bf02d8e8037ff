"""PKCS#11 objects of slot 0, built from the keystore's state: immutable, each with all the attributes that clients read.

Attribute values are those of wire.calls.Attribute: int, bool, bytes, tuple.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from hsmvisord import ck
from hsmvisord.crypto import generation as generating
from hsmvisord.crypto import profiles
from hsmvisord.crypto.base import key_identifier
from hsmvisord.crypto.interface import PrivateKey, PublicKey, SecretKey
from hsmvisord.keystore.state import FOLLOW, REFUSE, Certificate, Generation, Key, Material
from hsmvisord.token.der import CertificateFields, certificate_fields

_RSA_SECRETS = (
    ck.CKA_PRIVATE_EXPONENT,
    ck.CKA_PRIME_1,
    ck.CKA_PRIME_2,
    ck.CKA_EXPONENT_1,
    ck.CKA_EXPONENT_2,
    ck.CKA_COEFFICIENT,
)

#: What no client may read of a private key, by its type (PKCS#11 3.1, 4.9: CKA_SENSITIVE); other types do not have it.
SENSITIVE_ATTRIBUTES: dict[int, frozenset[int]] = {
    ck.CKK_RSA: frozenset(_RSA_SECRETS),
    ck.CKK_EC: frozenset((ck.CKA_VALUE,)),
    ck.CKK_EC_EDWARDS: frozenset((ck.CKA_VALUE,)),
    ck.CKK_EC_MONTGOMERY: frozenset((ck.CKA_VALUE,)),
    ck.CKK_ML_DSA: frozenset((ck.CKA_VALUE, ck.CKA_SEED)),
}

_FIXED = {ck.CKA_TOKEN: True, ck.CKA_MODIFIABLE: False, ck.CKA_COPYABLE: False, ck.CKA_DESTROYABLE: False}


@dataclass(frozen=True)
class KeyUse:
    """A key as operations use it: what it may do, and which generation it counts for."""

    private: PrivateKey | SecretKey
    allowed: frozenset[int]  #: mechanisms
    may_sign: bool
    may_decrypt: bool
    may_derive: bool
    refuse_after: float  #: seconds since 1970; infinite unless the material refuses after its certificate's expiry
    generation: tuple[str, int] | None  #: material, number; None: a guest's own key
    asks_again: bool = False  #: for the PIN, at each use
    may_recover: bool = False  #: signs so that the data can be recovered


@dataclass(frozen=True)
class TokenObject:
    """`use` is the key behind a private key object, `public` that behind a public key object."""

    handle: int
    attributes: dict[int, Any]
    use: KeyUse | None = None
    public: PublicKey | None = None

    @property
    def private(self) -> bool:
        """Whether it is hidden from an application that is not logged in, once slot 0 has a PIN."""
        return self.use is not None


@dataclass(frozen=True)
class _Leaf:
    """What a certificate tells about the key it is for."""

    subject: bytes = b""
    start: bytes = b""
    end: bytes = b""
    not_after: float = float("inf")


def _date(moment: datetime) -> bytes:
    return moment.strftime("%Y%m%d").encode()


def _leaf(certificate: Certificate | None) -> _Leaf:
    if certificate is None:
        return _Leaf()
    parsed = x509.load_der_x509_certificate(certificate.der)
    start, end = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    return _Leaf(certificate_fields(certificate.der).subject, _date(start), _date(end), end.timestamp())


def unique_id(material: str, what: str, handle: int) -> bytes:
    return f"{what}-{handle}-{hashlib.sha256(material.encode()).hexdigest()[:12]}".encode()


def key_objects(material: Material, generation: Generation, key: Key, leaf_certificate: Certificate | None) -> list[TokenObject]:
    """Returns the private and the public key object of a generation."""
    private, public = key.private, key.private.public
    leaf = _leaf(leaf_certificate)
    sign_only = material.mode == FOLLOW  # what was sealed to one key, or agreed with it, needs that key
    usage = profiles.usage(material.profile, private.kind, sign_only)
    allowed = profiles.allowed_mechanisms(material.profile, private.kind, sign_only)
    use = KeyUse(
        private=private,
        allowed=frozenset(allowed),
        may_sign=usage.sign,
        may_decrypt=usage.decrypt,
        may_derive=usage.derive,
        refuse_after=leaf.not_after if generation.on_expiry == REFUSE else float("inf"),
        generation=(material.name, generation.number),
    )
    here = key.request is not None  # made here, of parts that nobody ever had
    mechanism = generating.MECHANISMS[private.kind.key_type] if here else ck.CK_UNAVAILABLE_INFORMATION
    common = _FIXED | {
        ck.CKA_LABEL: material.name.encode(),
        ck.CKA_KEY_TYPE: private.kind.key_type,
        ck.CKA_ID: public.key_id,
        ck.CKA_SUBJECT: leaf.subject,
        ck.CKA_START_DATE: leaf.start,
        ck.CKA_END_DATE: leaf.end,
        ck.CKA_LOCAL: here,
        ck.CKA_KEY_GEN_MECHANISM: mechanism,
        ck.CKA_ALLOWED_MECHANISMS: allowed,
        ck.CKA_PUBLIC_KEY_INFO: public.spki,
    }
    handle = material.follow_handle or key.handle
    private_attributes = common | {
        ck.CKA_CLASS: ck.CKO_PRIVATE_KEY,
        ck.CKA_PRIVATE: True,
        ck.CKA_UNIQUE_ID: unique_id(material.name, "private", handle),
        ck.CKA_SENSITIVE: True,
        ck.CKA_EXTRACTABLE: False,
        ck.CKA_ALWAYS_SENSITIVE: here,
        ck.CKA_NEVER_EXTRACTABLE: here,
        ck.CKA_WRAP_WITH_TRUSTED: False,
        ck.CKA_ALWAYS_AUTHENTICATE: False,
        ck.CKA_SIGN: usage.sign,
        ck.CKA_SIGN_RECOVER: False,
        ck.CKA_DECRYPT: usage.decrypt,
        ck.CKA_DERIVE: usage.derive,
        ck.CKA_UNWRAP: False,
        ck.CKA_UNWRAP_TEMPLATE: (),
    }
    public_attributes = common | {
        ck.CKA_CLASS: ck.CKO_PUBLIC_KEY,
        ck.CKA_PRIVATE: False,
        ck.CKA_UNIQUE_ID: unique_id(material.name, "public", key.public_handle),
        ck.CKA_TRUSTED: False,
        ck.CKA_VERIFY: usage.sign,
        ck.CKA_VERIFY_RECOVER: False,
        ck.CKA_ENCRYPT: usage.decrypt,
        ck.CKA_DERIVE: False,
        ck.CKA_WRAP: False,
        ck.CKA_WRAP_TEMPLATE: (),
    }
    return [
        TokenObject(handle, private_attributes | private.attributes(), use=use),
        TokenObject(key.public_handle, public_attributes | public.attributes(), public=public),
    ]


def certificate_object(certificate: Certificate, label: str, key_id: bytes) -> TokenObject:
    """Returns the object of a leaf (the material's label and the key's id) or of an intermediate (its own)."""
    parsed = x509.load_der_x509_certificate(certificate.der)
    fields: CertificateFields = certificate_fields(certificate.der)
    category = ck.CK_CERTIFICATE_CATEGORY_AUTHORITY if certificate.authority else ck.CK_CERTIFICATE_CATEGORY_TOKEN_USER
    attributes = _FIXED | {
        ck.CKA_CLASS: ck.CKO_CERTIFICATE,
        ck.CKA_PRIVATE: False,
        ck.CKA_LABEL: label.encode(),
        ck.CKA_UNIQUE_ID: unique_id(label, "certificate", certificate.handle),
        ck.CKA_CERTIFICATE_TYPE: ck.CKC_X_509,
        ck.CKA_TRUSTED: False,
        ck.CKA_CERTIFICATE_CATEGORY: category,
        ck.CKA_CHECK_VALUE: hashlib.sha1(certificate.der).digest()[:3],
        ck.CKA_START_DATE: _date(parsed.not_valid_before_utc),
        ck.CKA_END_DATE: _date(parsed.not_valid_after_utc),
        ck.CKA_PUBLIC_KEY_INFO: fields.spki,
        ck.CKA_SUBJECT: fields.subject,
        ck.CKA_ID: key_id,
        ck.CKA_ISSUER: fields.issuer,
        ck.CKA_SERIAL_NUMBER: fields.serial,
        ck.CKA_VALUE: certificate.der,
        ck.CKA_URL: b"",
        ck.CKA_HASH_OF_SUBJECT_PUBLIC_KEY: b"",
        ck.CKA_HASH_OF_ISSUER_PUBLIC_KEY: b"",
        ck.CKA_JAVA_MIDP_SECURITY_DOMAIN: 0,
        ck.CKA_NAME_HASH_ALGORITHM: ck.CKM_SHA_1,
    }
    return TokenObject(certificate.handle, attributes)


def authority_object(certificate: Certificate) -> TokenObject:
    """Returns the object of an intermediate: its label is its common name, its id that of its key."""
    parsed = x509.load_der_x509_certificate(certificate.der)
    names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    label = str(names[0].value) if names else parsed.subject.rfc4514_string()
    return certificate_object(certificate, label, key_identifier(certificate_fields(certificate.der).spki))
