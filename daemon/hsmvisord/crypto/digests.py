"""Digest mechanisms (PKCS#11 3.1, 6.19-6.25), by hashlib."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.operations import HASH_MECHANISMS, no_parameter
from hsmvisord.wire.calls import Mechanism

DIGESTS: dict[int, str] = HASH_MECHANISMS | {ck.CKM_SHA512_224: "sha512_224", ck.CKM_SHA512_256: "sha512_256"}


def digest(mechanism: Mechanism) -> tuple[int, Callable[[], Any]]:
    """Returns the digest's size in bytes and a factory of hash objects."""
    name = DIGESTS.get(mechanism.type)
    if name is None:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism.type)} does not digest")
    no_parameter(mechanism.parameter)
    factory = functools.partial(hashlib.new, name)
    return factory().digest_size, factory
