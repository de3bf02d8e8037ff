"""Usage profiles: what a delivered key may do.  Decryption, derivation and raw RSA only where the profile says so."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hsmvisord import ck
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.crypto.mechanisms import TABLE


@dataclass(frozen=True)
class Usage:
    """The CKA_ booleans of a private key."""

    sign: bool = False
    decrypt: bool = False
    derive: bool = False
    raw: bool = False  #: CKM_RSA_X_509: signs or decrypts any number that the guest chooses


#: TLS 1.2 and 1.3 sign (RSA key exchange is not served); SSH signs; request signing signs; a card does what PIV does.
PROFILES: dict[str, Usage] = {
    "tls": Usage(sign=True),
    "ssh": Usage(sign=True),
    "request-signing": Usage(sign=True),
    "decrypt": Usage(decrypt=True, derive=True, raw=True),
    "card": Usage(sign=True, decrypt=True, derive=True, raw=True),
    "any": Usage(sign=True, decrypt=True, derive=True, raw=True),
}


def usage(profile: str, kind: KeyKind, sign_only: bool = False) -> Usage:
    """Returns what a key of this kind may do under the profile."""
    wanted = PROFILES[profile]
    able = 0
    for row in TABLE.values():
        if kind.key_type in row.key_types:
            able |= row.flags
    return Usage(
        sign=wanted.sign and bool(able & ck.CKF_SIGN),
        decrypt=not sign_only and wanted.decrypt and bool(able & ck.CKF_DECRYPT),
        derive=not sign_only and wanted.derive and bool(able & ck.CKF_DERIVE),
        raw=wanted.raw and kind.key_type == ck.CKK_RSA,
    )


@functools.cache
def allowed_mechanisms(profile: str, kind: KeyKind, sign_only: bool = False) -> tuple[int, ...]:
    """Returns CKA_ALLOWED_MECHANISMS of a key."""
    may = usage(profile, kind, sign_only)
    flags = (ck.CKF_SIGN * may.sign) | (ck.CKF_DECRYPT * may.decrypt) | (ck.CKF_DERIVE * may.derive)
    return tuple(
        mechanism
        for mechanism, row in sorted(TABLE.items())
        if kind.key_type in row.key_types and row.flags & flags and (may.raw or mechanism != ck.CKM_RSA_X_509)
    )
