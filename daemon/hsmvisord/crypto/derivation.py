"""Key derivation: the KDFs of ECDH (PKCS#11 3.1, 6.3.17; ANSI X9.63), HKDF (6.36; RFC 5869), SP 800-108 in counter mode (6.42).

Parameters come as the fields of their structures:
    CK_ECDH1_DERIVE_PARAMS   kdf, shared data, public data
    CK_HKDF_PARAMS           extract, expand, hash, salt type, salt, handle of a salt key, info
    CK_SP800_108_KDF_PARAMS  PRF, then for each data parameter its type and what belongs to it: of the iteration variable and of a
                             counter little endian and bits, of a byte array the bytes, of the length method, little endian and bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.operations import HASH_MECHANISMS, HASHES
from hsmvisord.wire.calls import Mechanism

if TYPE_CHECKING:
    from hsmvisord.crypto.secret import SecretKey

#: CKD_ -> hash of the X9.63 KDF.
KDFS: dict[int, str] = {
    ck.CKD_SHA1_KDF: "sha1",
    ck.CKD_SHA224_KDF: "sha224",
    ck.CKD_SHA256_KDF: "sha256",
    ck.CKD_SHA384_KDF: "sha384",
    ck.CKD_SHA512_KDF: "sha512",
    ck.CKD_SHA3_224_KDF: "sha3_224",
    ck.CKD_SHA3_256_KDF: "sha3_256",
    ck.CKD_SHA3_384_KDF: "sha3_384",
    ck.CKD_SHA3_512_KDF: "sha3_512",
}


def _wrong(detail: str) -> CkError:
    return CkError(ck.CKR_MECHANISM_PARAM_INVALID, detail)


def _checked(length: int, most: int) -> int:
    if not length:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_VALUE_LEN: this derivation gives as many bytes as it is asked for")
    if not 0 < length <= min(most, limits.MAX_SECRET):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"this derivation gives 1 to {min(most, limits.MAX_SECRET)} bytes")
    return length


def of_agreement(mechanism: Mechanism, length: int, agree: Callable[[bytes], bytes]) -> bytes:
    """Returns what ECDH derives: the shared secret whole (CKD_NULL), or `length` bytes of the KDF.

    `agree`: from the peer's public data to the shared secret.
    """
    match mechanism.parameter:
        case (ck.CKD_NULL, b"", bytes(peer)):
            return agree(peer)
        case (int(kdf), bytes(shared), bytes(peer)) if kdf in KDFS:
            size = _checked(length, limits.MAX_SECRET)
            return X963KDF(HASHES[KDFS[kdf]], size, shared or None).derive(agree(peer))
    raise _wrong("CK_ECDH1_DERIVE_PARAMS: a kdf that there is; with CKD_NULL no shared data")


# ---- HKDF ---------------------------------------------------------------------------------------------------------------


def hkdf(mechanism: Mechanism, key: bytes, length: int, salt_key: Callable[[int], bytes]) -> bytes:
    """`salt_key`: from the handle of a key to its value."""
    match mechanism.parameter:
        case (int(extract), int(expand), int(alg), int(kind), bytes(salt), int(handle), bytes(info)) if alg in HASH_MECHANISMS:
            algorithm = HASHES[HASH_MECHANISMS[alg]]
        case _:
            raise _wrong("CK_HKDF_PARAMS")
    if not extract and not expand:
        raise _wrong("CK_HKDF_PARAMS: neither extract nor expand")
    if not extract:
        return HKDFExpand(algorithm, _checked(length, 255 * algorithm.digest_size), info).derive(key)
    match kind:
        case ck.CKF_HKDF_SALT_NULL:
            salt = b""
        case ck.CKF_HKDF_SALT_DATA:
            pass
        case ck.CKF_HKDF_SALT_KEY:
            salt = salt_key(handle)
        case _:
            raise _wrong("CK_HKDF_PARAMS: the salt's type")
    if not expand:
        extracted = HKDF.extract(algorithm, salt or None, key)
        if length not in (0, len(extracted)):
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"extraction gives {len(extracted)} bytes")
        return extracted
    return HKDF(algorithm, _checked(length, 255 * algorithm.digest_size), salt or None, info).derive(key)


# ---- SP 800-108 ---------------------------------------------------------------------------------------------------------

_COUNTER_BITS = (8, 16, 24, 32)
_LENGTH_BITS = (8, 16, 24, 32, 40, 48, 56, 64)
_METHODS = (ck.CK_SP800_108_DKM_LENGTH_SUM_OF_KEYS, ck.CK_SP800_108_DKM_LENGTH_SUM_OF_SEGMENTS)
#: From the counter's value to the bytes of one part of the PRF's input.
Part = Callable[[int], bytes]


def _number(little: object, bits: object, allowed: tuple[int, ...]) -> tuple[int, str]:
    if bits not in allowed or little not in (0, 1):
        raise _wrong(f"a counter or length has {', '.join(map(str, allowed))} bits")
    assert isinstance(bits, int)
    return bits // 8, "little" if little else "big"


def _parts(fields: Iterator[object], size: int, segments: int) -> Iterator[tuple[bool, int, Part]]:
    """Gives of each data parameter: whether it counts, bytes of its counter, its bytes."""
    for kind in fields:
        match kind:
            case ck.CK_SP800_108_ITERATION_VARIABLE:
                width, order = _number(next(fields, None), next(fields, None), _COUNTER_BITS)
                yield True, width, lambda n, width=width, order=order: n.to_bytes(width, order)  # type: ignore[misc]
            case ck.CK_SP800_108_DKM_LENGTH:
                method = next(fields, None)
                width, order = _number(next(fields, None), next(fields, None), _LENGTH_BITS)
                if method not in _METHODS:
                    raise _wrong("the length's method")
                whole = 8 * (size if method == ck.CK_SP800_108_DKM_LENGTH_SUM_OF_KEYS else segments)
                if whole >> 8 * width:
                    raise _wrong("the length does not fit its bits")
                told = whole.to_bytes(width, order)  # type: ignore[arg-type]
                yield False, 0, lambda n, told=told: told  # type: ignore[misc]
            case ck.CK_SP800_108_BYTE_ARRAY:
                data = next(fields, None)
                if not isinstance(data, bytes) or not data:
                    raise _wrong("a byte array without bytes")
                yield False, 0, lambda n, data=data: data  # type: ignore[misc]
            case _:
                raise _wrong("a data parameter that counter mode does not have")


def sp800_108_counter(mechanism: Mechanism, key: SecretKey, length: int) -> bytes:
    """K(i) = PRF(key, data parameters with the counter i), joined and cut (SP 800-108r1, 4.1)."""
    fields = mechanism.parameter
    if not isinstance(fields, tuple) or not fields or not isinstance(fields[0], int):
        raise _wrong("CK_SP800_108_KDF_PARAMS")
    try:
        signer = key.signer(Mechanism(fields[0]))
    except CkError:
        raise _wrong("the PRF, or a key that is not for it") from None
    size = _checked(length, limits.MAX_SECRET)
    rounds = -(-size // signer.output_size)
    parts = list(_parts(iter(fields[1:]), size, rounds * signer.output_size))
    counters = [width for counts, width, _ in parts if counts]
    if len(counters) != 1:
        raise _wrong("counter mode has one iteration variable")
    if rounds >> 8 * counters[0]:
        raise CkError(ck.CKR_KEY_SIZE_RANGE, "more than the counter can count")
    return b"".join(signer.sign(b"".join(part(n) for _, _, part in parts)) for n in range(1, rounds + 1))[:size]
