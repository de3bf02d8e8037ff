"""New keys in software (PKCS#11 3.1, 6.1.4, 6.3.3-6.3.5, 6.8.3, 6.13.2; 3.2, 6.67 and 6.68)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, mlkem, rsa, x448, x25519

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import des, dh, dsa
from hsmvisord.crypto import mlkem as kem
from hsmvisord.crypto.curve_names import as_oid
from hsmvisord.crypto.ec import CURVES, NAMED, EcPrivateKey
from hsmvisord.crypto.edwards import EDWARDS, ML_DSA, EdwardsPrivateKey, MlDsaPrivateKey
from hsmvisord.crypto.interface import PrivateKey, Wanted
from hsmvisord.crypto.montgomery import MONTGOMERY, MontgomeryPrivateKey
from hsmvisord.crypto.rsa import MAX_BITS, OWN_MIN_BITS, RsaPrivateKey
from hsmvisord.crypto.secret import SecretKey, as_key

EXPONENT = 65537


Make = Callable[[], PrivateKey]
_one_rsa = threading.Lock()


@contextmanager
def making_rsa(wait: float = 0.0) -> Iterator[None]:
    """It takes seconds of a processor: one at a time, of a module.  Raises CkError(FUNCTION_REJECTED) after `wait` seconds."""
    if not _one_rsa.acquire(timeout=wait):
        raise CkError(ck.CKR_FUNCTION_REJECTED, "the module is making another RSA key, or other parameters: one at a time")
    try:
        yield
    finally:
        _one_rsa.release()


def _rsa(wanted: Wanted) -> Make:
    if not OWN_MIN_BITS <= wanted.bits <= MAX_BITS or wanted.bits % 8:
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a new RSA key has {OWN_MIN_BITS} to {MAX_BITS} bits, a multiple of 8")
    if wanted.exponent not in (0, EXPONENT):
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, f"a new RSA key has the public exponent {EXPONENT}")

    return lambda: RsaPrivateKey(rsa.generate_private_key(EXPONENT, wanted.bits))


def _curve(wanted: Wanted, makers: dict[bytes, Make]) -> Make:
    if not wanted.parameters:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_EC_PARAMS")
    make = makers.get(as_oid(wanted.parameters))
    if make is None:
        raise CkError(ck.CKR_CURVE_NOT_SUPPORTED)
    return make


def _parameter_set(wanted: Wanted, makers: dict[int, Make]) -> Make:
    if not wanted.parameter_set:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_PARAMETER_SET")
    make = makers.get(wanted.parameter_set)
    if make is None:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "CKA_PARAMETER_SET")
    return make


_EC: dict[bytes, Make] = {
    parameters: lambda name=name: EcPrivateKey(ec.generate_private_key(NAMED[name]))  # type: ignore[misc]
    for name, (_, _, parameters) in CURVES.items()
}
_EDWARDS: dict[bytes, Make] = {
    EDWARDS[ed25519.Ed25519PublicKey][0].parameters: lambda: EdwardsPrivateKey(ed25519.Ed25519PrivateKey.generate()),
    EDWARDS[ed448.Ed448PublicKey][0].parameters: lambda: EdwardsPrivateKey(ed448.Ed448PrivateKey.generate()),
}
_MONTGOMERY: dict[bytes, Make] = {
    MONTGOMERY[x25519.X25519PublicKey][0].parameters: lambda: MontgomeryPrivateKey(x25519.X25519PrivateKey.generate()),
    MONTGOMERY[x448.X448PublicKey][0].parameters: lambda: MontgomeryPrivateKey(x448.X448PrivateKey.generate()),
}


def _makers(table: dict[Any, Any], wrapper: Callable[[Any], PrivateKey], *classes: Any) -> dict[int, Make]:
    """By parameter set; `classes` in the order of the table's rows."""
    sets = [row[1] for row in table.values()]
    return {number: lambda cls=cls: wrapper(cls.generate()) for number, cls in zip(sets, classes, strict=True)}  # type: ignore[misc]


_DSA = _makers(ML_DSA, MlDsaPrivateKey, mldsa.MLDSA44PrivateKey, mldsa.MLDSA65PrivateKey, mldsa.MLDSA87PrivateKey)
_KEM = _makers(kem.ML_KEM, kem.MlKemPrivateKey, mlkem.MLKEM768PrivateKey, mlkem.MLKEM1024PrivateKey)

#: Mechanism -> type of the key, and from what is wanted to what makes it.
PAIRS: dict[int, tuple[int, Callable[[Wanted], Make]]] = {
    ck.CKM_RSA_PKCS_KEY_PAIR_GEN: (ck.CKK_RSA, _rsa),
    ck.CKM_EC_KEY_PAIR_GEN: (ck.CKK_EC, lambda wanted: _curve(wanted, _EC)),
    ck.CKM_EC_EDWARDS_KEY_PAIR_GEN: (ck.CKK_EC_EDWARDS, lambda wanted: _curve(wanted, _EDWARDS)),
    ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN: (ck.CKK_EC_MONTGOMERY, lambda wanted: _curve(wanted, _MONTGOMERY)),
    ck.CKM_ML_DSA_KEY_PAIR_GEN: (ck.CKK_ML_DSA, lambda wanted: _parameter_set(wanted, _DSA)),
    ck.CKM_ML_KEM_KEY_PAIR_GEN: (ck.CKK_ML_KEM, lambda wanted: _parameter_set(wanted, _KEM)),
    ck.CKM_DSA_KEY_PAIR_GEN: (ck.CKK_DSA, lambda wanted: lambda: dsa.generate(wanted.domain)),
    ck.CKM_DH_PKCS_KEY_PAIR_GEN: (ck.CKK_DH, lambda wanted: lambda: dh.generate(wanted.domain)),
}

#: Type of a key -> the mechanism that makes it.
MECHANISMS: dict[int, int] = {key_type: mechanism for mechanism, (key_type, _) in PAIRS.items()}

#: What a manager's command calls a key (sealed/commands.py, KEY_TYPES) -> mechanism, and what is wanted of it.
BY_NAME: dict[str, tuple[int, Wanted]] = {
    **{f"P-{bits}": (ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=CURVES[f"secp{bits}r1"][2])) for bits in (256, 384, 521)},
    **{f"RSA-{bits}": (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=bits)) for bits in (2048, 3072, 4096)},
    **{k.name: (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, Wanted(parameters=k.parameters)) for k, _ in EDWARDS.values()},
    **{k.name: (ck.CKM_ML_DSA_KEY_PAIR_GEN, Wanted(parameter_set=number)) for k, number, _ in ML_DSA.values()},
}

#: Mechanism -> type of the key, its length in bytes where it has one alone.
SECRETS: dict[int, tuple[int, int]] = {
    ck.CKM_AES_KEY_GEN: (ck.CKK_AES, 0),
    ck.CKM_CHACHA20_KEY_GEN: (ck.CKK_CHACHA20, 32),
    ck.CKM_GENERIC_SECRET_KEY_GEN: (ck.CKK_GENERIC_SECRET, 0),
    ck.CKM_DES2_KEY_GEN: (ck.CKK_DES2, des.SIZES[ck.CKK_DES2]),
    ck.CKM_DES3_KEY_GEN: (ck.CKK_DES3, des.SIZES[ck.CKK_DES3]),
}


def check(mechanism: int, wanted: Wanted) -> None:
    """Raises CkError unless there is such a key pair."""
    PAIRS[mechanism][1](wanted)


def key_pair(mechanism: int, wanted: Wanted, wait: float = 0.0) -> PrivateKey:
    """Raises CkError(FUNCTION_REJECTED) when another RSA key is being made, and still is after `wait` seconds."""
    key_type, maker = PAIRS[mechanism]
    make = maker(wanted)
    if key_type != ck.CKK_RSA:
        return make()
    with making_rsa(wait):
        return make()


def secret_size(mechanism: int, length: int) -> tuple[int, int]:
    """Returns key type and bytes of a new secret key; `length` in bytes, 0 where the template says nothing.  Raises CkError."""
    key_type, fixed = SECRETS[mechanism]
    if not length and not fixed:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_VALUE_LEN")
    if fixed and length not in (0, fixed):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"such a key has {fixed} bytes")
    SecretKey.check_size(key_type, length or fixed)
    return key_type, length or fixed


def secret(mechanism: int, length: int) -> SecretKey:
    key_type, size = secret_size(mechanism, length)
    return SecretKey(key_type, as_key(key_type, os.urandom(size)))
