"""Domain parameters of DSA and Diffie-Hellman (PKCS#11 3.1, 6.2.8, 6.4.5): made, and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import dh, dsa
from hsmvisord.crypto.generation import making_rsa
from hsmvisord.crypto.interface import PrivateKey

#: Mechanism -> type of the keys, and from bits of the prime to the parameters.
PARAMETERS: dict[int, tuple[int, Callable[[int], dict[int, bytes]]]] = {
    ck.CKM_DSA_PARAMETER_GEN: (ck.CKK_DSA, dsa.generate_parameters),
    ck.CKM_DH_PKCS_PARAMETER_GEN: (ck.CKK_DH, dh.generate_parameters),
}
_CHECKS: dict[int, Callable[[Mapping[int, bytes]], Any]] = {ck.CKK_DSA: dsa.parameters, ck.CKK_DH: dh.parameters}


def generate(mechanism: int, bits: int) -> dict[int, bytes]:
    """Raises CkError(FUNCTION_REJECTED) while another long computation runs, CkError(KEY_SIZE_RANGE)."""
    with making_rsa():
        return PARAMETERS[mechanism][1](bits)


def check(key_type: int, parts: Mapping[int, bytes]) -> int:
    """Returns the bits of the prime; raises CkError(DOMAIN_PARAMS_INVALID)."""
    return int(_CHECKS[key_type](parts).p.bit_length())


def sound(key: PrivateKey) -> bool:
    """Says of a key that came whole from a guest whether its parameters are what they should be, if it has any."""
    if key.kind.key_type not in _CHECKS:
        return True
    try:
        check(key.kind.key_type, key.attributes())
    except CkError:
        return False
    return True
