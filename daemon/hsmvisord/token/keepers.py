"""What wraps what: the well-known attacks on a token's wrapping, and CKA_TRUSTED (PKCS#11 3.1, 4.8-4.10, 5.18.3-5.18.5).

A key that wraps and decrypts opens what it has wrapped; one that unwraps what it can encrypt takes in what its holder knows; flags
that change, or copies with other flags, make each key both; a wrapping key that leaves the token comes back as another one; and a
MAC, a mode with a nonce of the caller's choice or an error about padding gives away what a wrapped key is hidden under (Clulow: On
the Security of PKCS #11, 2003; Bortolozzo, Centenaro, Focardi, Steel: Attacking and Fixing PKCS#11 Security Tokens, 2010).

So a key remembers what it ever could do; sensitive keys are wrapped only by one that keeps secrets (`keeps_secrets`); what such a
key unwraps is as secret as what it may have wrapped; and it wraps and unwraps only by mechanisms that tell nothing.
control_domain/docs/wrapping.md lists the attacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import legacy

Attributes = Mapping[int, Any]

# ---- what a key ever could do -------------------------------------------------------------------------------------------

#: Kept with a private or secret key's attributes, and no attribute that anybody may name: uses, CKA_EXTRACTABLE, CKA_TRUSTED, and
#: CKA_COPYABLE of a key that could be copied while nobody trusted it.
EVER = 0xFFFF_0001
_OPENS = (ck.CKA_DECRYPT, ck.CKA_ENCRYPT, ck.CKA_SIGN, ck.CKA_SIGN_RECOVER, ck.CKA_VERIFY, ck.CKA_DERIVE)
_CLOSES = (ck.CKA_WRAP, ck.CKA_UNWRAP)


def remembered(attributes: Attributes) -> dict[int, Any]:
    """Returns a private or secret key's attributes with what it ever could do; those of other objects as they are."""
    if attributes[ck.CKA_CLASS] not in (ck.CKO_SECRET_KEY, ck.CKO_PRIVATE_KEY):
        return dict(attributes)
    trust = ck.CKA_TRUSTED if attributes.get(ck.CKA_TRUSTED) else ck.CKA_COPYABLE
    now = {kind for kind in (*_OPENS, *_CLOSES, ck.CKA_EXTRACTABLE, trust) if attributes.get(kind)}
    return {**attributes, EVER: tuple(sorted(now | _ever(attributes)))}


def _ever(attributes: Attributes) -> set[int]:
    return set(attributes.get(EVER, ()))


def check_change(before: Attributes, after: Attributes) -> None:
    """A key wraps and unwraps from the start or never, and one that does begins nothing else: so no two copies of a key, nor one
    key at two times, have both roles."""
    if EVER not in before:
        return
    ever = _ever(before)
    closes, opens = ever & set(_CLOSES), ever & set(_OPENS)
    for kind in (*_OPENS, *_CLOSES):
        if not after.get(kind) or kind in ever:
            continue
        if closes if kind in _OPENS else opens or not closes:
            raise CkError(
                ck.CKR_ATTRIBUTE_READ_ONLY, f"attribute 0x{kind:x}: a key wraps keys from the start or never, and nothing else"
            )


# ---- keys that keep secrets ---------------------------------------------------------------------------------------------

#: Mechanisms of keys that keep secrets: without a nonce or IV that the caller chooses, and with no error that tells of padding.
KEEPING = frozenset((ck.CKM_AES_KEY_WRAP, ck.CKM_AES_KEY_WRAP_KWP, ck.CKM_RSA_PKCS, ck.CKM_RSA_PKCS_OAEP, ck.CKM_RSA_AES_KEY_WRAP))
#: Bits of a trusted public key.
LEAST_BITS = 2048
#: Bytes of a derived key that a template hides.
LEAST_HIDDEN = 16


def keeps_secrets(attributes: Attributes) -> bool:
    """Whether nobody can open what this key wraps but by unwrapping it again.

    A secret key that never could do anything but wrap and unwrap, and that was generated here, was always sensitive and never
    extractable, or for which the security officer vouches (CKA_TRUSTED) and of which no other copy can be; or a trusted public key
    that was not generated here, for the private half of one that was is a guest's.  A legacy key keeps none.
    """
    if _is_legacy(attributes):
        return False
    if attributes[ck.CKA_CLASS] == ck.CKO_PUBLIC_KEY:
        long = attributes.get(ck.CKA_MODULUS_BITS, 0) >= LEAST_BITS
        return bool(attributes.get(ck.CKA_TRUSTED)) and long and not attributes[ck.CKA_LOCAL]
    if attributes[ck.CKA_CLASS] != ck.CKO_SECRET_KEY or _ever(attributes) & set(_OPENS):
        return False
    vouched = attributes[ck.CKA_TRUSTED] and not _ever(attributes) & {ck.CKA_COPYABLE, ck.CKA_EXTRACTABLE}
    always = (ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE)
    return bool(vouched) or all(attributes[kind] for kind in always)


def _may_have_kept(attributes: Attributes) -> bool:
    """Trust that was taken away does not take back what was wrapped."""
    return keeps_secrets(attributes) or (ck.CKA_TRUSTED in _ever(attributes) and not _is_legacy(attributes))


def _is_legacy(attributes: Attributes) -> bool:
    return legacy.is_legacy(attributes.get(ck.CKA_KEY_TYPE, -1), 8 * len(attributes.get(ck.CKA_MODULUS, b"")))


def _hides(template: Mapping[int, Any]) -> bool:
    return template.get(ck.CKA_SENSITIVE) is True or template.get(ck.CKA_EXTRACTABLE) is False


# ---- wrapping -----------------------------------------------------------------------------------------------------------


def check_wrapping(key: Attributes, wrapper: Attributes, mechanism: int) -> None:
    """Raises unless `wrapper` may wrap `key` (5.18.3)."""
    if not key[ck.CKA_EXTRACTABLE]:
        raise CkError(ck.CKR_KEY_UNEXTRACTABLE)
    if key[ck.CKA_WRAP_WITH_TRUSTED] and not wrapper[ck.CKA_TRUSTED]:
        raise CkError(ck.CKR_KEY_NOT_WRAPPABLE, "this key is wrapped by a trusted key alone")
    if any(key.get(kind) != wanted for kind, wanted in wrapper[ck.CKA_WRAP_TEMPLATE]):
        # "If any attribute mismatch occurs [...] the function SHALL return CKR_KEY_HANDLE_INVALID."
        raise CkError(ck.CKR_KEY_HANDLE_INVALID, "the key is not what the wrapping key's template demands")
    keeps = keeps_secrets(wrapper)
    if key[ck.CKA_SENSITIVE] and not (keeps and mechanism in KEEPING):
        raise CkError(
            ck.CKR_KEY_NOT_WRAPPABLE, "a sensitive key is wrapped by a key that nobody can open it with, by CKM_AES_KEY_WRAP_KWP"
        )
    if keeps:
        _check_keeping(mechanism)


def check_unwrapping(unwrapper: Attributes, mechanism: int) -> None:
    """Raises unless `unwrapper` may unwrap by this mechanism."""
    if _may_have_kept(unwrapper):
        _check_keeping(mechanism)
    if mechanism == ck.CKM_AES_CBC_PAD and _hides(dict(unwrapper[ck.CKA_UNWRAP_TEMPLATE])):
        raise CkError(ck.CKR_MECHANISM_INVALID, "its errors tell of padding what the unwrapping key's template hides")


def _check_keeping(mechanism: int) -> None:
    if mechanism not in KEEPING:
        name = ck.mechanism_name(mechanism)
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{name}: a key that may wrap sensitive keys uses CKM_AES_KEY_WRAP_KWP")


# ---- what unwrapping and deriving keys demand ----------------------------------------------------------------------------


def unwrapped_by(unwrapper: Attributes, values: dict[int, Any]) -> dict[int, Any]:
    """Returns the template of a key that is unwrapped: with CKA_UNWRAP_TEMPLATE, and as secret as what the key may have wrapped."""
    demanded = list(unwrapper[ck.CKA_UNWRAP_TEMPLATE])
    if _may_have_kept(unwrapper):
        demanded.append((ck.CKA_SENSITIVE, True))
    if ck.CKA_TRUSTED in _ever(unwrapper):
        demanded.append((ck.CKA_WRAP_WITH_TRUSTED, True))
    return _joined(values, demanded)


def derived_from(bases: Iterable[Attributes], values: dict[int, Any]) -> dict[int, Any]:
    """Returns the template of a key that is derived: with CKA_DERIVE_TEMPLATE of each base."""
    return _joined(values, [pair for base in bases for pair in base[ck.CKA_DERIVE_TEMPLATE]])


def check_length(bases: Iterable[Attributes], length: int) -> None:
    """Raises for a derived key that a base's CKA_DERIVE_TEMPLATE hides and that is short enough to be tried: derivations give the
    same first or last bytes whatever the length, so a longer key would be found byte by byte."""
    if length < LEAST_HIDDEN and any(_hides(dict(base[ck.CKA_DERIVE_TEMPLATE])) for base in bases):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a hidden key that this one derives has at least {LEAST_HIDDEN} bytes")


def _joined(values: dict[int, Any], demanded: Iterable[tuple[int, Any]]) -> dict[int, Any]:
    """ "If any attribute conflict occurs [...] the function SHALL return CKR_TEMPLATE_INCONSISTENT" (5.18.4)."""
    for kind, wanted in demanded:
        if values.setdefault(kind, wanted) != wanted:
            raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"attribute 0x{kind:x} is not what the other key demands")
    return values
