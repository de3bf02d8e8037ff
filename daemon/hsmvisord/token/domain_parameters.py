"""Objects of class CKO_DOMAIN_PARAMETERS (PKCS#11 3.1, 4.11): of DSA and of Diffie-Hellman over primes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hsmvisord import ck
from hsmvisord.crypto import domain
from hsmvisord.token import rules
from hsmvisord.token.rules import By, Template


def _made(attributes: Mapping[int, Any], by: By) -> dict[int, Any]:
    return {**attributes, ck.CKA_LOCAL: by is By.GENERATE, ck.CKA_UNIQUE_ID: os.urandom(16).hex().encode()}


def created(attributes: Mapping[int, Any]) -> dict[int, Any]:
    """Returns the attributes of C_CreateObject's object; raises CkError(DOMAIN_PARAMS_INVALID)."""
    return _made(attributes, By.CREATE) | {ck.CKA_PRIME_BITS: domain.check(attributes[ck.CKA_KEY_TYPE], attributes)}


def generated(mechanism: int, template: Template, officer: bool) -> dict[int, Any]:
    """Returns the attributes of C_GenerateKey's object."""
    key_type = domain.PARAMETERS[mechanism][0]
    attributes, _ = rules.new_object(template, By.GENERATE, officer, cls=ck.CKO_DOMAIN_PARAMETERS, key_type=key_type)
    return _made(attributes, By.GENERATE) | domain.generate(mechanism, attributes[ck.CKA_PRIME_BITS])
