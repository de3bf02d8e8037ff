"""Session secrets: what C_DeriveKey makes (PKCS#11 3.1, 6.3.17: a CKO_SECRET_KEY from the template)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError

_DEFAULTS: dict[int, Any] = {
    ck.CKA_CLASS: ck.CKO_SECRET_KEY,
    ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET,
    ck.CKA_TOKEN: False,
    ck.CKA_PRIVATE: False,
    ck.CKA_LABEL: b"",
    ck.CKA_ID: b"",
    ck.CKA_START_DATE: b"",
    ck.CKA_END_DATE: b"",
    ck.CKA_SENSITIVE: False,
    ck.CKA_EXTRACTABLE: True,
    ck.CKA_MODIFIABLE: True,
    ck.CKA_COPYABLE: True,
    ck.CKA_DESTROYABLE: True,
    ck.CKA_ENCRYPT: False,
    ck.CKA_DECRYPT: False,
    ck.CKA_SIGN: False,
    ck.CKA_VERIFY: False,
    ck.CKA_WRAP: False,
    ck.CKA_UNWRAP: False,
    ck.CKA_DERIVE: False,
}

#: What is added to the template.
_MADE: dict[int, Any] = {
    ck.CKA_VALUE: b"",
    ck.CKA_VALUE_LEN: 0,
    ck.CKA_LOCAL: False,
    ck.CKA_ALWAYS_SENSITIVE: False,
    ck.CKA_NEVER_EXTRACTABLE: False,
    ck.CKA_KEY_GEN_MECHANISM: 0,
}

_KEY_SIZES = {ck.CKK_AES: (16, 24, 32)}


@dataclass(frozen=True)
class SecretObject:
    """A secret that lives as long as its session; `attributes` hold its CKA_VALUE."""

    handle: int
    attributes: dict[int, Any] = field(repr=False)

    @property
    def private(self) -> bool:
        return bool(self.attributes.get(ck.CKA_PRIVATE))

    def hides(self, kind: int) -> bool:
        """Whether the attribute may not be known."""
        closed = self.attributes.get(ck.CKA_SENSITIVE) or self.attributes.get(ck.CKA_EXTRACTABLE) is False
        return kind == ck.CKA_VALUE and bool(closed)


def secret_attributes(template: dict[int, Any], secret: bytes, mechanism: int) -> dict[int, Any]:
    """Returns the attributes of a derived secret; raises CkError for a template that the standard forbids."""
    attributes = _DEFAULTS | template
    if attributes[ck.CKA_TOKEN]:
        raise CkError(ck.CKR_TOKEN_WRITE_PROTECTED, "slot 0 keeps session objects only")
    if attributes[ck.CKA_CLASS] != ck.CKO_SECRET_KEY or attributes[ck.CKA_KEY_TYPE] not in (ck.CKK_GENERIC_SECRET, ck.CKK_AES):
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "a derived key is a generic secret or an AES key")
    if ck.CKA_VALUE in template:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, "a derived key's value is not given")
    unknown = set(template) - set(_DEFAULTS) - {ck.CKA_VALUE_LEN}
    if unknown:
        raise CkError(ck.CKR_ATTRIBUTE_TYPE_INVALID, f"attribute 0x{min(unknown):x}")
    wrong = [k for k, v in template.items() if k in _DEFAULTS and not _fits(v, _DEFAULTS[k])]
    if wrong:
        raise CkError(
            ck.CKR_ATTRIBUTE_VALUE_INVALID, f"attribute 0x{wrong[0]:x}: another type, or more than {limits.MAX_VALUE} bytes"
        )
    length = template.get(ck.CKA_VALUE_LEN)
    if length is None and attributes[ck.CKA_KEY_TYPE] == ck.CKK_AES:
        length = max((s for s in _KEY_SIZES[ck.CKK_AES] if s <= len(secret)), default=0)
    if length is None:
        length = len(secret)
    if not isinstance(length, int) or not 0 < length <= min(len(secret), limits.MAX_SECRET):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"the secret has {len(secret)} bytes")
    if length not in _KEY_SIZES.get(attributes[ck.CKA_KEY_TYPE], (length,)):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, "an AES key has 16, 24 or 32 bytes")
    made = {
        ck.CKA_VALUE: secret[-length:] if length < len(secret) else secret,
        ck.CKA_VALUE_LEN: length,
        ck.CKA_KEY_GEN_MECHANISM: mechanism,
    }
    return attributes | _MADE | made


def _fits(value: Any, like: Any) -> bool:
    return type(value) is type(like) and not (isinstance(value, bytes) and len(value) > limits.MAX_VALUE)


def sound(attributes: dict[int, Any]) -> bool:
    """Says whether `secret_attributes` can have made them."""
    kinds = _DEFAULTS | _MADE
    plain = {kind: value for kind, value in attributes.items() if kind != ck.CKA_VALUE}
    value = attributes.get(ck.CKA_VALUE)
    return (
        attributes.keys() == kinds.keys()
        and all(_fits(v, kinds[k]) for k, v in plain.items())
        and isinstance(value, bytes)
        and len(value) <= limits.MAX_SECRET
    )
