"""New objects of a guest: from template and key to the attributes that an object has (PKCS#11 3.1, 4.6-4.11, 5.7, 5.18).

Attributes of an object hold no secret part: its key stands for them (`part`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cryptography import x509

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import des, domain, encrypted_data, generation, parts
from hsmvisord.crypto.interface import Access, AnyKey, CryptoProvider, PrivateKey, SecretKey, Wanted
from hsmvisord.crypto.secret import as_key, fit
from hsmvisord.token import domain_parameters, keepers, rules
from hsmvisord.token.der import certificate_fields
from hsmvisord.token.rules import By, Rules, Template
from hsmvisord.wire.calls import Mechanism

Attributes = dict[int, Any]


@dataclass(frozen=True)
class Made:
    attributes: Attributes
    key: AnyKey | None = None


def _unique() -> Attributes:
    return {ck.CKA_UNIQUE_ID: os.urandom(16).hex().encode()}


def _plain(attributes: Mapping[int, Any], table: Rules) -> Attributes:
    """Without what the key stands for."""
    return {kind: value for kind, value in attributes.items() if not table[kind].secret}


def _key(
    attributes: Mapping[int, Any], table: Rules, key: AnyKey, by: By, mechanism: int, parent: Mapping[int, Any] | None = None
) -> Made:
    """`mechanism`: CKA_KEY_GEN_MECHANISM."""
    made = _plain(attributes, table) | rules.history(attributes, by, parent) | _unique() | {ck.CKA_KEY_GEN_MECHANISM: mechanism}
    if attributes[ck.CKA_CLASS] == ck.CKO_SECRET_KEY:
        secret: SecretKey = key  # type: ignore[assignment]
        told = {ck.CKA_VALUE_LEN: secret.kind.bits // 8, ck.CKA_CHECK_VALUE: secret.check_value}
        return Made(keepers.remembered(made | told), key)
    components = key.attributes()  # type: ignore[union-attr]
    public = key.public if attributes[ck.CKA_CLASS] == ck.CKO_PRIVATE_KEY else key  # type: ignore[union-attr]
    made |= components | {ck.CKA_PUBLIC_KEY_INFO: public.spki}  # type: ignore[union-attr]
    return Made(keepers.remembered(made), key)


def _access(attributes: Mapping[int, Any]) -> Access:
    wrappable = bool(attributes[ck.CKA_EXTRACTABLE])
    return Access(readable=wrappable and not attributes[ck.CKA_SENSITIVE], wrappable=wrappable)


# ---- created ------------------------------------------------------------------------------------------------------------


def created(template: Template, officer: bool, provider: CryptoProvider) -> Made:
    """C_CreateObject."""
    attributes, table = rules.new_object(template, By.CREATE, officer)
    match attributes[ck.CKA_CLASS]:
        case ck.CKO_DATA:
            return Made(attributes | _unique())
        case ck.CKO_CERTIFICATE:
            return Made(attributes | _certificate(attributes) | _unique())
        case ck.CKO_DOMAIN_PARAMETERS:
            return Made(domain_parameters.created(attributes))
        case ck.CKO_SECRET_KEY:
            key: AnyKey = provider.load_secret_key(attributes[ck.CKA_KEY_TYPE], attributes[ck.CKA_VALUE], _access(attributes))
        case ck.CKO_PUBLIC_KEY:
            key = parts.public_key(attributes[ck.CKA_KEY_TYPE], attributes)
        case _:
            key = provider.private_of_parts(attributes[ck.CKA_KEY_TYPE], attributes, _access(attributes))
    made = _key(attributes, table, key, By.CREATE, ck.CK_UNAVAILABLE_INFORMATION)
    # A curve stands as it was given: by its name or by its parameters.
    return replace(made, attributes=made.attributes | {k: attributes[k] for k in (ck.CKA_EC_PARAMS,) if k in attributes})


def _certificate(attributes: Mapping[int, Any]) -> Attributes:
    """What the certificate itself tells; a value that is no X.509 certificate is refused."""
    if attributes[ck.CKA_CERTIFICATE_TYPE] != ck.CKC_X_509:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "a certificate here is an X.509 one")
    der = attributes[ck.CKA_VALUE]
    try:
        x509.load_der_x509_certificate(der)
    except ValueError:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "CKA_VALUE is not an X.509 certificate in DER") from None
    return {
        ck.CKA_CHECK_VALUE: hashlib.sha1(der).digest()[:3],
        ck.CKA_PUBLIC_KEY_INFO: certificate_fields(der).spki,
    }


# ---- generated ----------------------------------------------------------------------------------------------------------


def generated(mechanism: int, template: Template, officer: bool, provider: CryptoProvider) -> Made:
    """C_GenerateKey."""
    if mechanism not in generation.SECRETS:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism)} does not generate a secret key")
    key_type = generation.SECRETS[mechanism][0]
    attributes, table = rules.new_object(template, By.GENERATE, officer, cls=ck.CKO_SECRET_KEY, key_type=key_type)
    key = provider.generate_secret(mechanism, attributes.get(ck.CKA_VALUE_LEN, 0), _access(attributes))
    return _key(attributes, table, key, By.GENERATE, mechanism)


def generated_pair(
    mechanism: int, public: Template, private: Template, officer: bool, provider: CryptoProvider
) -> tuple[Made, Made]:
    """C_GenerateKeyPair: public key, private key."""
    if mechanism not in generation.PAIRS:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism)} does not generate a key pair")
    key_type = generation.PAIRS[mechanism][0]
    ours, our_table = rules.new_object(private, By.GENERATE, officer, cls=ck.CKO_PRIVATE_KEY, key_type=key_type)
    theirs, their_table = rules.new_object(public, By.GENERATE, officer, cls=ck.CKO_PUBLIC_KEY, key_type=key_type)
    wanted = Wanted(
        bits=theirs.get(ck.CKA_MODULUS_BITS, 0),
        exponent=int.from_bytes(theirs.get(ck.CKA_PUBLIC_EXPONENT, b"")),
        parameters=theirs.get(ck.CKA_EC_PARAMS, b""),
        parameter_set=theirs.get(ck.CKA_PARAMETER_SET, 0),
        domain=theirs,
    )
    key = provider.generate_pair(mechanism, wanted, _access(ours))
    return (
        _key(theirs, their_table, key.public, By.GENERATE, mechanism),
        _key(ours, our_table, key, By.GENERATE, mechanism),
    )


# ---- from other keys ----------------------------------------------------------------------------------------------------


def from_secret(
    value: bytes, template: Template, officer: bool, mechanism: int, by: By, parent: Mapping[int, Any], provider: CryptoProvider
) -> Made:
    """A secret key that was derived or decapsulated."""
    attributes, table = _secret(template, officer, by)
    key_type = attributes[ck.CKA_KEY_TYPE]
    length = attributes.get(ck.CKA_VALUE_LEN) or des.SIZES.get(key_type, 0)
    part = as_key(key_type, fit(value, key_type, length, first=mechanism in encrypted_data.AES))
    key = provider.load_secret_key(key_type, part, _access(attributes))
    history = parent if by is By.DERIVE else None
    return _key(attributes, table, key, by, ck.CK_UNAVAILABLE_INFORMATION, history)


def _secret(template: Template, officer: bool, by: By) -> tuple[Attributes, Rules]:
    values = rules.as_dict(template)
    values.setdefault(ck.CKA_KEY_TYPE, ck.CKK_GENERIC_SECRET)
    return rules.new_object(values.items(), by, officer, cls=ck.CKO_SECRET_KEY)


def unwrapped_secret(
    unwrapper: PrivateKey | SecretKey,
    mechanism: Mechanism,
    wrapped: bytes,
    template: Template,
    officer: bool,
    provider: CryptoProvider,
) -> Made:
    """C_UnwrapKey of a secret key."""
    attributes, table = _secret(template, officer, By.UNWRAP)
    length = attributes.get(ck.CKA_VALUE_LEN) or 0
    try:
        key = provider.unwrap_secret(unwrapper, mechanism, wrapped, attributes[ck.CKA_KEY_TYPE], length, _access(attributes))
    except CkError as error:
        wrong = error.rv == ck.CKR_ATTRIBUTE_VALUE_INVALID
        raise CkError(ck.CKR_WRAPPED_KEY_INVALID if wrong else error.rv, str(error)) from None
    return _key(attributes, table, key, By.UNWRAP, ck.CK_UNAVAILABLE_INFORMATION)


def unwrapped_private(
    unwrapper: PrivateKey | SecretKey,
    mechanism: Mechanism,
    wrapped: bytes,
    template: Template,
    officer: bool,
    provider: CryptoProvider,
) -> Made:
    """C_UnwrapKey of a private key."""
    attributes, table = rules.new_object(template, By.UNWRAP, officer, cls=ck.CKO_PRIVATE_KEY)
    try:
        key = provider.unwrap_private(unwrapper, mechanism, wrapped, _access(attributes))
    except CkError as error:
        wrong = error.rv == ck.CKR_ATTRIBUTE_VALUE_INVALID
        raise CkError(ck.CKR_WRAPPED_KEY_INVALID if wrong else error.rv, "what was unwrapped is no such key") from None
    if key.kind.key_type != attributes[ck.CKA_KEY_TYPE]:
        raise CkError(ck.CKR_WRAPPED_KEY_INVALID, "what was unwrapped is a key of another type")
    if not domain.sound(key):
        raise CkError(ck.CKR_WRAPPED_KEY_INVALID, "the key's domain parameters are none")
    return _key(attributes, table, key, By.UNWRAP, ck.CK_UNAVAILABLE_INFORMATION)


def copied(attributes: Mapping[int, Any], key: AnyKey | None, template: Template, officer: bool) -> Made:
    """C_CopyObject."""
    if not attributes[ck.CKA_COPYABLE]:
        raise CkError(ck.CKR_ACTION_PROHIBITED, "the object is not copyable")
    made = rules.changed(attributes, template, officer, copying=True)
    if attributes[ck.CKA_PRIVATE] and not made[ck.CKA_PRIVATE]:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "a private object has no public copy")
    if ck.CKA_LOCAL in made:
        made |= rules.history(made, By.COPY, attributes)
    return Made(made | _unique(), key)


def part(attributes: Mapping[int, Any], key: AnyKey | None, kind: int) -> Any:
    """Returns a secret part of a key; None where it has no such."""
    if attributes[ck.CKA_CLASS] == ck.CKO_SECRET_KEY:
        return key.value if kind == ck.CKA_VALUE else None  # type: ignore[union-attr]
    private: PrivateKey = key  # type: ignore[assignment]
    return parts.secret_parts(private).get(kind)
