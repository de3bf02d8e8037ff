"""The attributes of objects that a guest makes: which there are, who gives them when, and which change (PKCS#11 3.1, 4.1-4.11).

Each class and key type has one table of rules.  The standard's footnotes (4.2, table 12) are fields of a rule:

    1, 3, 5   must be in a template of C_CreateObject, C_GenerateKey(Pair), C_UnwrapKey     required
    2, 4, 6   must not be                                                                   forbidden
    7         not revealed while CKA_SENSITIVE, or not CKA_EXTRACTABLE                      secret
    8         may be changed by C_SetAttributeValue                                         changes
    10        only the security officer sets it to CK_TRUE                                  officer
    11, 12    once CK_TRUE (CK_FALSE) it stays so                                           rises, falls
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import mechanisms
from hsmvisord.token import keepers


class By(enum.Flag):
    """How an object comes to be."""

    CREATE = enum.auto()
    GENERATE = enum.auto()
    UNWRAP = enum.auto()
    DERIVE = enum.auto()
    COPY = enum.auto()


_NEVER = By(0)
_ALWAYS = By.CREATE | By.GENERATE | By.UNWRAP | By.DERIVE


@dataclass(frozen=True, slots=True)
class Rule:
    """`default`: its value where a template says nothing; None: it has none, or it is made."""

    like: type  #: of its value: bool, int, bytes, tuple
    default: Any = None
    required: By = _NEVER
    forbidden: By = _NEVER
    read_only: bool = False  #: in no template at all
    changes: bool = False
    officer: bool = False
    rises: bool = False
    falls: bool = False
    secret: bool = False


Rules = Mapping[int, Rule]


def _made(like: type) -> Rule:
    return Rule(like, read_only=True)


def _flag(default: bool = False, **more: Any) -> Rule:
    return Rule(bool, default, **{"changes": True, **more})


def _text(**more: Any) -> Rule:
    return Rule(bytes, b"", **{"changes": True, **more})


def _list(**more: Any) -> Rule:
    return Rule(tuple, (), **more)


#: What a key may be used for -> the CKF_ of mechanisms for it.
USES = {
    ck.CKA_ENCRYPT: ck.CKF_ENCRYPT,
    ck.CKA_DECRYPT: ck.CKF_DECRYPT,
    ck.CKA_SIGN: ck.CKF_SIGN,
    ck.CKA_SIGN_RECOVER: ck.CKF_SIGN_RECOVER,
    ck.CKA_VERIFY: ck.CKF_VERIFY,
    ck.CKA_VERIFY_RECOVER: ck.CKF_VERIFY_RECOVER,
    ck.CKA_WRAP: ck.CKF_WRAP,
    ck.CKA_UNWRAP: ck.CKF_UNWRAP,
    ck.CKA_DERIVE: ck.CKF_DERIVE,
    ck.CKA_ENCAPSULATE: ck.CKF_ENCAPSULATE,
    ck.CKA_DECAPSULATE: ck.CKF_DECAPSULATE,
}

_DATE = re.compile(rb"(\d{8})?")

# ---- what objects share -------------------------------------------------------------------------------------------------

_STORAGE: Rules = {
    ck.CKA_CLASS: Rule(int, required=By.CREATE),
    ck.CKA_TOKEN: Rule(bool, False),
    ck.CKA_PRIVATE: Rule(bool),  # the default depends on the class: `private_by_default`
    ck.CKA_MODIFIABLE: Rule(bool, True),
    ck.CKA_LABEL: _text(),
    ck.CKA_COPYABLE: _flag(True, falls=True),
    ck.CKA_DESTROYABLE: _flag(True),
    ck.CKA_UNIQUE_ID: _made(bytes),
}

_KEY: Rules = {
    **_STORAGE,
    ck.CKA_KEY_TYPE: Rule(int, required=By.CREATE | By.UNWRAP),
    ck.CKA_ID: _text(),
    ck.CKA_START_DATE: _text(),
    ck.CKA_END_DATE: _text(),
    ck.CKA_DERIVE: _flag(),
    ck.CKA_LOCAL: _made(bool),
    ck.CKA_KEY_GEN_MECHANISM: _made(int),
    ck.CKA_ALLOWED_MECHANISMS: _list(),
}

_PUBLIC: Rules = {
    **_KEY,
    ck.CKA_SUBJECT: _text(),
    ck.CKA_ENCRYPT: _flag(),
    ck.CKA_VERIFY: _flag(),
    ck.CKA_VERIFY_RECOVER: _flag(),
    ck.CKA_WRAP: _flag(),
    ck.CKA_TRUSTED: _flag(officer=True),
    ck.CKA_WRAP_TEMPLATE: _list(),
    ck.CKA_PUBLIC_KEY_INFO: _made(bytes),
}

_SENSITIVE: Rules = {
    ck.CKA_SENSITIVE: _flag(True, rises=True),
    ck.CKA_EXTRACTABLE: _flag(False, falls=True),
    ck.CKA_ALWAYS_SENSITIVE: _made(bool),
    ck.CKA_NEVER_EXTRACTABLE: _made(bool),
    ck.CKA_WRAP_WITH_TRUSTED: _flag(rises=True),
    ck.CKA_UNWRAP_TEMPLATE: _list(),
    ck.CKA_DERIVE_TEMPLATE: _list(),
    ck.CKA_DECRYPT: _flag(),
    ck.CKA_SIGN: _flag(),
    ck.CKA_UNWRAP: _flag(),
}

_PRIVATE: Rules = {
    **_KEY,
    **_SENSITIVE,
    ck.CKA_SUBJECT: _text(),
    ck.CKA_SIGN_RECOVER: _flag(),
    ck.CKA_ALWAYS_AUTHENTICATE: Rule(bool, False),
    ck.CKA_PUBLIC_KEY_INFO: _made(bytes),
}

_SECRET: Rules = {
    **_KEY,
    **_SENSITIVE,
    ck.CKA_ENCRYPT: _flag(),
    ck.CKA_VERIFY: _flag(),
    ck.CKA_WRAP: _flag(),
    ck.CKA_TRUSTED: _flag(officer=True),
    ck.CKA_WRAP_TEMPLATE: _list(),
    ck.CKA_CHECK_VALUE: _made(bytes),
    ck.CKA_VALUE: Rule(bytes, required=By.CREATE, forbidden=By.GENERATE | By.UNWRAP | By.DERIVE, secret=True),
    ck.CKA_VALUE_LEN: Rule(int, forbidden=By.CREATE | By.UNWRAP),
}

_DATA: Rules = {
    **_STORAGE,
    ck.CKA_APPLICATION: _text(),
    ck.CKA_OBJECT_ID: _text(),
    ck.CKA_VALUE: _text(),
}

_CERTIFICATE: Rules = {
    **_STORAGE,
    ck.CKA_CERTIFICATE_TYPE: Rule(int, required=By.CREATE),
    ck.CKA_TRUSTED: _flag(officer=True),
    ck.CKA_CERTIFICATE_CATEGORY: Rule(int, 0),
    ck.CKA_CHECK_VALUE: Rule(bytes, b""),
    ck.CKA_START_DATE: _text(),
    ck.CKA_END_DATE: _text(),
    ck.CKA_PUBLIC_KEY_INFO: _made(bytes),
    ck.CKA_SUBJECT: Rule(bytes, required=By.CREATE),
    ck.CKA_ID: _text(),
    ck.CKA_ISSUER: _text(),
    ck.CKA_SERIAL_NUMBER: _text(),
    ck.CKA_VALUE: Rule(bytes, required=By.CREATE),
    ck.CKA_URL: Rule(bytes, b""),
    ck.CKA_HASH_OF_SUBJECT_PUBLIC_KEY: Rule(bytes, b""),
    ck.CKA_HASH_OF_ISSUER_PUBLIC_KEY: Rule(bytes, b""),
    ck.CKA_JAVA_MIDP_SECURITY_DOMAIN: Rule(int, 0),
    ck.CKA_NAME_HASH_ALGORITHM: Rule(int, ck.CKM_SHA_1),
}

# ---- what key types add -------------------------------------------------------------------------------------------------

_NEW = By.GENERATE | By.UNWRAP | By.DERIVE  #: where the parts come from elsewhere
_PART = Rule(bytes, required=By.CREATE, forbidden=_NEW)
_SECRET_PART = replace(_PART, secret=True)
_OPTIONAL_SECRET_PART = Rule(bytes, forbidden=_NEW, secret=True)

_RSA_PUBLIC: Rules = {
    ck.CKA_MODULUS: _PART,
    ck.CKA_MODULUS_BITS: Rule(int, required=By.GENERATE, forbidden=By.CREATE),
    ck.CKA_PUBLIC_EXPONENT: Rule(bytes, required=By.CREATE),
}
_RSA_PRIVATE: Rules = {
    ck.CKA_MODULUS: _PART,
    ck.CKA_PUBLIC_EXPONENT: _PART,
    ck.CKA_PRIVATE_EXPONENT: _SECRET_PART,
    **dict.fromkeys(
        (ck.CKA_PRIME_1, ck.CKA_PRIME_2, ck.CKA_EXPONENT_1, ck.CKA_EXPONENT_2, ck.CKA_COEFFICIENT), _OPTIONAL_SECRET_PART
    ),
}
_CURVE_PUBLIC: Rules = {ck.CKA_EC_PARAMS: Rule(bytes, required=By.CREATE | By.GENERATE), ck.CKA_EC_POINT: _PART}
_CURVE_PRIVATE: Rules = {ck.CKA_EC_PARAMS: _PART, ck.CKA_VALUE: _SECRET_PART}
_LATTICE_PUBLIC: Rules = {ck.CKA_PARAMETER_SET: Rule(int, required=By.CREATE | By.GENERATE), ck.CKA_VALUE: _PART}
_LATTICE_PRIVATE: Rules = {
    ck.CKA_PARAMETER_SET: Rule(int, required=By.CREATE, forbidden=_NEW),
    ck.CKA_VALUE: _OPTIONAL_SECRET_PART,
    ck.CKA_SEED: _OPTIONAL_SECRET_PART,
}
_GIVEN = Rule(bytes, required=By.CREATE | By.GENERATE)
_PRIME_PUBLIC: Rules = {ck.CKA_PRIME: _GIVEN, ck.CKA_BASE: _GIVEN, ck.CKA_VALUE: _PART}
_PRIME_PRIVATE: Rules = {ck.CKA_PRIME: _PART, ck.CKA_BASE: _PART, ck.CKA_VALUE: _SECRET_PART}
_DOMAIN: Rules = {
    **_STORAGE,
    ck.CKA_KEY_TYPE: Rule(int, required=By.CREATE),
    ck.CKA_LOCAL: _made(bool),
    ck.CKA_PRIME: _PART,
    ck.CKA_BASE: _PART,
    ck.CKA_PRIME_BITS: Rule(int, required=By.GENERATE, forbidden=By.CREATE),
}
_ENCAPSULATES: Rules = {ck.CKA_ENCAPSULATE: _flag()}
_DECAPSULATES: Rules = {ck.CKA_DECAPSULATE: _flag()}

CURVES = (ck.CKK_EC, ck.CKK_EC_EDWARDS, ck.CKK_EC_MONTGOMERY)

#: (class, key type) -> rules; key type None: of a class without one.
TABLES: dict[tuple[int, int | None], Rules] = {
    (ck.CKO_DATA, None): _DATA,
    (ck.CKO_CERTIFICATE, None): _CERTIFICATE,
    (ck.CKO_PUBLIC_KEY, ck.CKK_RSA): {**_PUBLIC, **_RSA_PUBLIC},
    (ck.CKO_PRIVATE_KEY, ck.CKK_RSA): {**_PRIVATE, **_RSA_PRIVATE},
    **{(ck.CKO_PUBLIC_KEY, kind): {**_PUBLIC, **_CURVE_PUBLIC} for kind in CURVES},
    **{(ck.CKO_PRIVATE_KEY, kind): {**_PRIVATE, **_CURVE_PRIVATE} for kind in CURVES},
    (ck.CKO_PUBLIC_KEY, ck.CKK_ML_DSA): {**_PUBLIC, **_LATTICE_PUBLIC},
    (ck.CKO_PRIVATE_KEY, ck.CKK_ML_DSA): {**_PRIVATE, **_LATTICE_PRIVATE},
    (ck.CKO_PUBLIC_KEY, ck.CKK_ML_KEM): {**_PUBLIC, **_LATTICE_PUBLIC, **_ENCAPSULATES},
    (ck.CKO_PRIVATE_KEY, ck.CKK_ML_KEM): {**_PRIVATE, **_LATTICE_PRIVATE, **_DECAPSULATES},
    **{(ck.CKO_SECRET_KEY, kind): _SECRET for kind in (ck.CKK_GENERIC_SECRET, ck.CKK_AES, ck.CKK_CHACHA20, *ck.HMAC_KEY_TYPES)},
    # legacy; the length of a new Diffie-Hellman key is the token's choice
    **{(ck.CKO_SECRET_KEY, kind): _SECRET for kind in (ck.CKK_DES2, ck.CKK_DES3)},
    (ck.CKO_PUBLIC_KEY, ck.CKK_DSA): {**_PUBLIC, **_PRIME_PUBLIC, ck.CKA_SUBPRIME: _GIVEN},
    (ck.CKO_PRIVATE_KEY, ck.CKK_DSA): {**_PRIVATE, **_PRIME_PRIVATE, ck.CKA_SUBPRIME: _PART},
    (ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DSA): {**_DOMAIN, ck.CKA_SUBPRIME: _PART},
    (ck.CKO_PUBLIC_KEY, ck.CKK_DH): {**_PUBLIC, **_PRIME_PUBLIC},
    (ck.CKO_PRIVATE_KEY, ck.CKK_DH): {**_PRIVATE, **_PRIME_PRIVATE, ck.CKA_VALUE_BITS: _made(int)},
    (ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DH): _DOMAIN,
}
#: Classes whose objects are there for a logged-in user alone where a template says nothing.
_PRIVATE_CLASSES = (ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY)
#: Longer values than limits.MAX_VALUE: parts of keys, certificates and data.
_LONG = frozenset((ck.CKA_VALUE, ck.CKA_MODULUS, ck.CKA_PRIVATE_EXPONENT, ck.CKA_EC_POINT))

Template = Iterable[tuple[int, Any]]


def as_dict(template: Template) -> dict[int, Any]:
    """Raises CKR_TEMPLATE_INCONSISTENT for two values of one attribute."""
    values: dict[int, Any] = {}
    for kind, value in template:
        if kind in values and values[kind] != value:
            raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"attribute 0x{kind:x} twice")
        values[kind] = value
    if len(values) > limits.MAX_TEMPLATE:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"an object has at most {limits.MAX_TEMPLATE} attributes in its template")
    return values


def rules_of(values: Mapping[int, Any]) -> Rules:
    """Returns the table of what a template describes.  Raises CkError for a class or key type that is missing or unknown."""
    cls = values.get(ck.CKA_CLASS)
    if cls is None:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_CLASS")
    key_type = None
    if cls in (ck.CKO_PUBLIC_KEY, ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY, ck.CKO_DOMAIN_PARAMETERS):
        key_type = values.get(ck.CKA_KEY_TYPE)
        if key_type is None:
            raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_KEY_TYPE")
    rules = TABLES.get((cls, key_type)) if _hashable(cls, key_type) else None
    if rules is None:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "CKA_CLASS or CKA_KEY_TYPE: of no object that can be here")
    return rules


def _hashable(cls: Any, key_type: Any) -> bool:
    return type(cls) is int and (key_type is None or type(key_type) is int)


def _check_value(kind: int, value: Any, rule: Rule) -> None:
    like: object = type(value)  # a bool is an int, and not wanted as one
    if like is not rule.like:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, f"attribute 0x{kind:x}: another type")
    if isinstance(value, bytes) and len(value) > (limits.MAX_OBJECT_VALUE if kind in _LONG else limits.MAX_VALUE):
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, f"attribute 0x{kind:x}: {len(value)} bytes are too long")
    if kind in (ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE):
        as_dict(value)
    if kind in (ck.CKA_START_DATE, ck.CKA_END_DATE) and not _DATE.fullmatch(value):
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "a date is empty or YYYYMMDD")


def new_object(template: Template, by: By, officer: bool = False, **made: Any) -> tuple[dict[int, Any], Rules]:
    """Returns what a new object's template says, with the defaults of the rest; raises CkError as 4.1.1 orders it.

    `made`: `cls` and `key_type`, where the function or the mechanism says them.
    """
    values = as_dict(template)
    for kind, value in ((ck.CKA_CLASS, made.get("cls")), (ck.CKA_KEY_TYPE, made.get("key_type"))):
        if value is not None and values.setdefault(kind, value) != value:
            raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"attribute 0x{kind:x} is another one of this mechanism or function")
    rules = rules_of(values)
    for kind, value in values.items():
        rule = rules.get(kind)
        if rule is None:
            raise CkError(ck.CKR_ATTRIBUTE_TYPE_INVALID, f"attribute 0x{kind:x}")
        _check_value(kind, value, rule)
        if rule.read_only:
            raise CkError(ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x} is made by the token")
        if rule.officer and value and not officer:
            raise CkError(ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x} is set by the security officer alone")
    outline = _outline(values[ck.CKA_CLASS], values.get(ck.CKA_KEY_TYPE), by)
    if missing := outline.required - values.keys():
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, f"attribute 0x{min(missing):x}")
    if forbidden := outline.forbidden & values.keys():
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"attribute 0x{min(forbidden):x} is not given here")
    return (outline.able if USES.keys().isdisjoint(values) else outline.defaults) | values, rules


@dataclass(frozen=True)
class _Outline:
    """Of all objects of a class and key type that come to be in one way."""

    required: frozenset[int]
    forbidden: frozenset[int]
    defaults: dict[int, Any]
    able: dict[int, Any]  #: the defaults of a key whose template names no use


@functools.cache
def _outline(cls: int, key_type: int | None, by: By) -> _Outline:
    """Of a row of TABLES; they are few."""
    rules = rules_of({ck.CKA_CLASS: cls, ck.CKA_KEY_TYPE: key_type})
    defaults = {kind: rule.default for kind, rule in rules.items() if rule.default is not None}
    defaults[ck.CKA_PRIVATE] = cls in _PRIVATE_CLASSES
    return _Outline(
        required=frozenset(kind for kind, rule in rules.items() if by in rule.required),
        forbidden=frozenset(kind for kind, rule in rules.items() if by in rule.forbidden),
        defaults=defaults,
        able=defaults | dict.fromkeys(_all_uses(rules, -1 if key_type is None else key_type), True),
    )


def _all_uses(rules: Rules, key_type: int) -> Iterator[int]:
    """Of a key whose template names no use: all that there are for its type, as tokens commonly have it (4.8: token-specific)."""
    able = 0
    for mechanism in mechanisms.of_key_type(key_type):
        able |= mechanisms.GUEST_TABLE[mechanism].flags
    return (kind for kind, function in USES.items() if kind in rules and able & function)


def changed(attributes: Mapping[int, Any], template: Template, officer: bool = False, copying: bool = False) -> dict[int, Any]:
    """Returns the attributes after C_SetAttributeValue, or of a copy (5.7.2, 5.7.6); raises CkError, and nothing has changed.

    A copy may choose CKA_TOKEN, CKA_PRIVATE and CKA_MODIFIABLE too.
    """
    rules, values = rules_of(attributes), as_dict(template)
    if not copying and not attributes[ck.CKA_MODIFIABLE]:
        raise CkError(ck.CKR_ACTION_PROHIBITED, "the object is not modifiable")
    for kind, value in values.items():
        rule = rules.get(kind)
        if rule is None:
            raise CkError(ck.CKR_ATTRIBUTE_TYPE_INVALID, f"attribute 0x{kind:x}")
        _check_value(kind, value, rule)
        before = attributes.get(kind)
        if not rule.changes and not (copying and kind in (ck.CKA_TOKEN, ck.CKA_PRIVATE, ck.CKA_MODIFIABLE)):
            raise CkError(ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x} does not change")
        if (rule.rises and before and not value) or (rule.falls and not before and value):
            raise CkError(ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x} does not change back")
        if rule.officer and value and not before and not officer:
            raise CkError(ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x} is set by the security officer alone")
    after = {**attributes, **values}
    keepers.check_change(attributes, after)
    return keepers.remembered(after)


# ---- what is known of a key ---------------------------------------------------------------------------------------------


def hides(attributes: Mapping[int, Any], kind: int) -> bool:
    """Whether an attribute may not be known (footnote 7)."""
    rule = rules_of(attributes).get(kind)
    if rule is None or not rule.secret:
        return False
    return bool(attributes.get(ck.CKA_SENSITIVE, True)) or not attributes.get(ck.CKA_EXTRACTABLE, False)


def sound(attributes: Mapping[int, Any]) -> bool:
    """Says whether an object that was made here can have these attributes."""
    try:
        rules = rules_of(attributes)
    except CkError:
        return False
    needed = {kind for kind, rule in rules.items() if rule.default is not None} | {ck.CKA_PRIVATE, ck.CKA_UNIQUE_ID}
    if attributes[ck.CKA_CLASS] == ck.CKO_SECRET_KEY:
        needed |= {keepers.EVER, ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE}
    secret = {kind for kind, rule in rules.items() if rule.secret}
    like: dict[int, object] = {kind: rule.like for kind, rule in rules.items()}
    return (
        needed <= attributes.keys()
        and not secret & attributes.keys()
        and all(type(value) is like.get(kind, type(value)) for kind, value in attributes.items())
    )


def history(attributes: Mapping[int, Any], by: By, parent: Mapping[int, Any] | None = None) -> dict[int, bool]:
    """Returns CKA_LOCAL, CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE of a new key (4.8, 4.9, 5.18).

    `parent`: the key that it was derived from, or the object that it is a copy of.
    """
    local = by is By.GENERATE or (by is By.COPY and parent is not None and bool(parent.get(ck.CKA_LOCAL)))
    if ck.CKA_SENSITIVE not in attributes:
        return {ck.CKA_LOCAL: local}
    kept = by is By.GENERATE
    always = kept or (parent is not None and bool(parent.get(ck.CKA_ALWAYS_SENSITIVE)))
    never = kept or (parent is not None and bool(parent.get(ck.CKA_NEVER_EXTRACTABLE)))
    return {
        ck.CKA_LOCAL: local,
        ck.CKA_ALWAYS_SENSITIVE: always and attributes[ck.CKA_SENSITIVE],
        ck.CKA_NEVER_EXTRACTABLE: never and not attributes[ck.CKA_EXTRACTABLE],
    }
