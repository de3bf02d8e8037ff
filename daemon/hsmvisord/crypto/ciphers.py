"""AES (PKCS#11 3.1, 6.13-6.16; NIST SP 800-38A, C, D, F) and ChaCha20-Poly1305 (6.30; RFC 8439) on data.

A parameter comes as bytes (an IV) or as the fields of its structure: CK_AES_CTR_PARAMS (bits, counter block), CK_GCM_PARAMS (iv,
iv bits, additional data, tag bits), CK_CCM_PARAMS (data length, nonce, additional data, MAC length),
CK_SALSA20_CHACHA20_POLY1305_PARAMS (nonce, additional data).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap,
    aes_key_wrap_with_padding,
)

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.gcm import Gcm
from hsmvisord.crypto.operations import ReadyCipher, no_parameter
from hsmvisord.crypto.streams import BlockStream, ByteStream, WholeStream
from hsmvisord.wire.calls import Mechanism

BLOCK = 16
BlockAlgorithm = algorithms.AES | TripleDES
#: Bits of a GCM tag: shorter ones are easily forged (SP 800-38D, appendix C).
GCM_TAGS = (96, 104, 112, 120, 128)
#: IV lengths in bytes that `cryptography` takes; gcm.py takes others.
USUAL_IVS = range(8, 129)
_CCM_TAGS = (4, 6, 8, 10, 12, 14, 16)
_CCM_NONCES = range(7, 14)


def _fields(mechanism: Mechanism, *kinds: type) -> tuple[Any, ...]:
    """Returns the parameter's fields; raises CkError(MECHANISM_PARAM_INVALID) unless they are of these types."""
    value = mechanism.parameter
    if not isinstance(value, tuple) or tuple(map(type, value)) != kinds:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"not the parameter of {ck.mechanism_name(mechanism.type)}")
    return value


def _wrong(detail: str) -> CkError:
    return CkError(ck.CKR_MECHANISM_PARAM_INVALID, detail)


def _iv(mechanism: Mechanism) -> bytes:
    if not isinstance(mechanism.parameter, bytes) or len(mechanism.parameter) != BLOCK:
        raise _wrong(f"the IV has {BLOCK} bytes")
    return mechanism.parameter


def _same(length: int) -> int:
    return length


# ---- blocks -------------------------------------------------------------------------------------------------------------


def blocks(algorithm: BlockAlgorithm, mode: modes.ECB | modes.CBC, encrypting: bool) -> ReadyCipher:
    wrong = ck.CKR_DATA_LEN_RANGE if encrypting else ck.CKR_ENCRYPTED_DATA_LEN_RANGE
    cipher = Cipher(algorithm, mode)

    def begin() -> BlockStream:
        return BlockStream(cipher.encryptor() if encrypting else cipher.decryptor(), wrong, block=algorithm.block_size // 8)

    return ReadyCipher(_same, _through(begin), begin)


def padded(algorithm: BlockAlgorithm, mode: modes.ECB | modes.CBC, encrypting: bool) -> ReadyCipher:
    cipher, block = Cipher(algorithm, mode), algorithm.block_size // 8
    filling = padding.PKCS7(algorithm.block_size)

    def begin() -> BlockStream:
        if encrypting:
            return BlockStream(cipher.encryptor(), ck.CKR_DATA_LEN_RANGE, pad=filling.padder(), block=block)
        return BlockStream(cipher.decryptor(), ck.CKR_ENCRYPTED_DATA_LEN_RANGE, unpad=filling.unpadder(), block=block)

    def bound(length: int) -> int:
        return (length // block + 1) * block if encrypting else length

    return ReadyCipher(bound, _through(begin), begin)


def _through(begin: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Returns the operation in one part, as one with a single part."""

    def run(data: bytes) -> bytes:
        stream = begin()
        return bytes(stream.update(data) + stream.finish())

    return run


def _ecb(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    no_parameter(mechanism.parameter)
    return blocks(algorithm, modes.ECB(), encrypting)


def _cbc(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    return blocks(algorithm, modes.CBC(_iv(mechanism)), encrypting)


def _cbc_pad(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    return padded(algorithm, modes.CBC(_iv(mechanism)), encrypting)


def _ctr(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    bits, block = _fields(mechanism, int, bytes)
    if not 1 <= bits <= 8 * BLOCK or len(block) != BLOCK:
        raise _wrong("the counter has 1 to 128 bits of a block of 16 bytes")
    cipher = Cipher(algorithm, modes.CTR(block))
    blocks = (1 << bits) - int.from_bytes(block, "big") % (1 << bits)  # until it would begin again at 0
    if bits == 8 * BLOCK:
        blocks = 1 << bits

    def begin() -> ByteStream:
        return ByteStream(cipher.encryptor() if encrypting else cipher.decryptor(), most=blocks * BLOCK)

    return ReadyCipher(_same, _through(begin), begin)


# ---- authenticated ------------------------------------------------------------------------------------------------------


def _authentic(run: Callable[[bytes], bytes], tag: int) -> Callable[[bytes], bytes]:
    """Returns a decryption that says of what is too short or not authentic what PKCS#11 says of it."""

    def decrypt(data: bytes) -> bytes:
        if len(data) < tag:
            raise CkError(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, f"the tag alone has {tag} bytes")
        try:
            return run(data)
        except InvalidTag:
            raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID, "not authentic") from None

    return decrypt


def _sealed(run: Callable[[bytes], bytes], tag: int, encrypting: bool) -> ReadyCipher:
    """Of an algorithm that works on whole messages only."""

    def bound(length: int) -> int:
        return length + tag if encrypting else max(0, length - tag)

    whole = run if encrypting else _authentic(run, tag)
    return ReadyCipher(bound, whole, lambda: WholeStream(whole, bound))


def gcm_parameter(mechanism: Mechanism) -> tuple[bytes, bytes, int]:
    """Returns IV, additional data and the tag's bytes of CK_GCM_PARAMS."""
    iv, _bits, more, tag = _fields(mechanism, bytes, int, bytes, int)
    if not 1 <= len(iv) <= limits.MAX_IV:
        raise _wrong(f"a GCM IV has 1 to {limits.MAX_IV} bytes")
    if tag not in GCM_TAGS:
        raise _wrong("a GCM tag has 96, 104, 112, 120 or 128 bits")
    return iv, more, tag // 8


def gcm_context(algorithm: algorithms.AES, iv: bytes, more: bytes, tag: bytes | None) -> Any:
    """`tag` of a decryption; None encrypts."""
    mode = modes.GCM(iv, tag, min_tag_length=GCM_TAGS[0] // 8)
    cipher = Cipher(algorithm, mode)
    context = cipher.encryptor() if tag is None else cipher.decryptor()
    context.authenticate_additional_data(more)
    return context


def _gcm(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    iv, more, tag = gcm_parameter(mechanism)
    if len(iv) not in USUAL_IVS:
        gcm = Gcm(algorithm, iv)
        return _sealed(lambda data: (gcm.encrypt if encrypting else gcm.decrypt)(data, more, tag), tag, encrypting)
    whole = AESGCM(bytes(algorithm.key)) if tag == BLOCK else None  # in one piece it is many times as fast as a context
    if encrypting:

        def begin() -> ByteStream:
            return ByteStream(gcm_context(algorithm, iv, more, None), tag=tag)

        one = (lambda data: whole.encrypt(iv, data, more)) if whole is not None else _through(begin)
        return ReadyCipher(lambda length: length + tag, one, begin)

    def run(data: bytes) -> bytes:
        if whole is not None:
            return whole.decrypt(iv, data, more)
        context = gcm_context(algorithm, iv, more, data[-tag:])
        return bytes(context.update(data[:-tag]) + context.finalize())

    return _sealed(run, tag, encrypting=False)


def _ccm(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    length, nonce, more, tag = _fields(mechanism, int, bytes, bytes, int)
    if tag not in _CCM_TAGS or len(nonce) not in _CCM_NONCES:
        raise _wrong("CCM has a MAC of 4, 6 ... 16 bytes and a nonce of 7 to 13 bytes")
    cipher = AESCCM(bytes(algorithm.key), tag)
    wrong = ck.CKR_DATA_LEN_RANGE if encrypting else ck.CKR_ENCRYPTED_DATA_LEN_RANGE

    def run(data: bytes) -> bytes:
        # Of a decryption the length is that of the data or that of data and MAC: implementations and texts differ.
        if len(data) not in ((length,) if encrypting else (length, length + tag)):
            raise CkError(wrong, f"CCM was told of {length} bytes")
        try:
            return cipher.encrypt(nonce, data, more) if encrypting else cipher.decrypt(nonce, data, more)
        except (OverflowError, ValueError):
            raise CkError(wrong, "more than a nonce of this length allows") from None

    return _sealed(run, tag, encrypting)


def chacha20_poly1305(key: bytes, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    nonce, more = _fields(mechanism, bytes, bytes)
    if len(nonce) != 12:
        raise _wrong("the nonce has 12 bytes")
    cipher = ChaCha20Poly1305(key)

    def run(data: bytes) -> bytes:
        return cipher.encrypt(nonce, data, more) if encrypting else cipher.decrypt(nonce, data, more)

    return _sealed(run, 16, encrypting)


# ---- key wrapping as encryption -----------------------------------------------------------------------------------------


def _wrap(
    encrypt: Callable[[bytes, bytes], bytes], decrypt: Callable[[bytes, bytes], bytes], bound: Callable[[int], int]
) -> Callable[[algorithms.AES, Mechanism, bool], ReadyCipher]:
    def ready(algorithm: algorithms.AES, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
        no_parameter(mechanism.parameter)
        key = bytes(algorithm.key)

        def run(data: bytes) -> bytes:
            try:
                return encrypt(key, data) if encrypting else decrypt(key, data)
            except InvalidUnwrap:
                raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID) from None
            except ValueError:
                raise CkError(ck.CKR_DATA_LEN_RANGE, "a length that this mechanism does not wrap") from None

        most = bound if encrypting else _same
        return ReadyCipher(most, run, lambda: WholeStream(run, most))

    return ready


def _padded_size(length: int) -> int:
    return -(-length // 8) * 8 + 8


_KEY_WRAP = _wrap(aes_key_wrap, aes_key_unwrap, lambda length: length + 8)
_KEY_WRAP_KWP = _wrap(aes_key_wrap_with_padding, aes_key_unwrap_with_padding, _padded_size)

#: Mechanism -> what makes its operation of a key.
AES: dict[int, Callable[[algorithms.AES, Mechanism, bool], ReadyCipher]] = {
    ck.CKM_AES_ECB: _ecb,
    ck.CKM_AES_CBC: _cbc,
    ck.CKM_AES_CBC_PAD: _cbc_pad,
    ck.CKM_AES_CTR: _ctr,
    ck.CKM_AES_GCM: _gcm,
    ck.CKM_AES_CCM: _ccm,
    ck.CKM_AES_KEY_WRAP: _KEY_WRAP,
    ck.CKM_AES_KEY_WRAP_KWP: _KEY_WRAP_KWP,
}


def checked(mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
    """Returns the operation of no key, for its bounds; raises CkError when the parameter is not right."""
    return AES[mechanism.type](algorithms.AES(bytes(BLOCK)), mechanism, encrypting)
