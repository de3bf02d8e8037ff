"""Raw RSA by Debian's libcrypto (EVP_PKEY_decrypt(3), EVP_PKEY_CTX_set_rsa_padding(3)): constant time with blinding, GIL
released."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cffi
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

_DECLARATIONS = """
typedef ... EVP_PKEY;
typedef ... EVP_PKEY_CTX;
EVP_PKEY *d2i_AutoPrivateKey(EVP_PKEY **a, const unsigned char **pp, long length);
void EVP_PKEY_free(EVP_PKEY *key);
EVP_PKEY_CTX *EVP_PKEY_CTX_new(EVP_PKEY *pkey, void *e);
void EVP_PKEY_CTX_free(EVP_PKEY_CTX *ctx);
int EVP_PKEY_decrypt_init(EVP_PKEY_CTX *ctx);
int EVP_PKEY_CTX_set_rsa_padding(EVP_PKEY_CTX *ctx, int pad);
typedef ... EVP_MD;
const EVP_MD *EVP_get_digestbyname(const char *name);
int EVP_PKEY_CTX_set_rsa_oaep_md(EVP_PKEY_CTX *ctx, const EVP_MD *md);
int EVP_PKEY_CTX_set_rsa_mgf1_md(EVP_PKEY_CTX *ctx, const EVP_MD *md);
int EVP_PKEY_CTX_set0_rsa_oaep_label(EVP_PKEY_CTX *ctx, void *label, int len);
void *CRYPTO_memdup(const void *data, size_t size, const char *file, int line);
int EVP_PKEY_decrypt(EVP_PKEY_CTX *ctx, unsigned char *out, size_t *outlen, const unsigned char *in, size_t inlen);
void OPENSSL_cleanse(void *ptr, size_t len);
void ERR_clear_error(void);
"""
_RSA_NO_PADDING = 3
_RSA_OAEP_PADDING = 4

#: hashlib's names as OpenSSL's.
_DIGEST_NAMES = {f"sha3_{size}": f"SHA3-{size}".encode() for size in (224, 256, 384, 512)} | {
    f"sha{size}": f"SHA{size}".encode() for size in (1, 224, 256, 384, 512)
}
_LIBRARY = "libcrypto.so.3"


@functools.cache
def _library() -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(_LIBRARY)


def preload() -> None:
    """Opens the library, so that forked workers share it and need no file later."""
    _library()


class RawRsa:
    """The private operation of one RSA key on a number as long as its modulus."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        ffi, lib = _library()
        encoding, form = serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL
        der = key.private_bytes(encoding, form, serialization.NoEncryption())
        buffer = ffi.new("unsigned char[]", der)
        try:
            pointer = ffi.new("const unsigned char **", buffer)
            pkey = lib.d2i_AutoPrivateKey(ffi.NULL, pointer, len(der))
        finally:
            lib.OPENSSL_cleanse(buffer, len(der))
        if pkey == ffi.NULL:
            raise MemoryError("libcrypto does not take the key")
        self._pkey = ffi.gc(pkey, lib.EVP_PKEY_free)
        self._size = (key.key_size + 7) // 8

    def private(self, data: bytes) -> bytes | None:
        """`data` has the modulus's size; None when its number is not below the modulus."""
        _, lib = _library()
        out = self._decrypt(data, lambda context: lib.EVP_PKEY_CTX_set_rsa_padding(context, _RSA_NO_PADDING) > 0)
        return None if out is None else out.rjust(self._size, b"\0")

    def oaep(self, data: bytes, hash_name: str, mask_name: str, label: bytes) -> bytes | None:
        """RSAES-OAEP decryption (RFC 8017, 7.1.2) with hashes by hashlib's names; None when it does not decrypt."""
        ffi, lib = _library()

        def prepare(context: Any) -> bool:
            digests = [lib.EVP_get_digestbyname(_DIGEST_NAMES[name]) for name in (hash_name, mask_name)]
            good = (
                lib.EVP_PKEY_CTX_set_rsa_padding(context, _RSA_OAEP_PADDING) > 0
                and lib.EVP_PKEY_CTX_set_rsa_oaep_md(context, digests[0]) > 0
                and lib.EVP_PKEY_CTX_set_rsa_mgf1_md(context, digests[1]) > 0
            )
            if good and label:  # the context takes the copy
                copy = lib.CRYPTO_memdup(label, len(label), ffi.NULL, 0)
                good = lib.EVP_PKEY_CTX_set0_rsa_oaep_label(context, copy, len(label)) > 0
            return bool(good)

        return self._decrypt(data, prepare)

    def _decrypt(self, data: bytes, prepare: Callable[[Any], bool]) -> bytes | None:
        ffi, lib = _library()
        context = lib.EVP_PKEY_CTX_new(self._pkey, ffi.NULL)
        if context == ffi.NULL:
            raise MemoryError("libcrypto: EVP_PKEY_CTX_new")
        out = ffi.new("unsigned char[]", self._size)
        length = ffi.new("size_t *", self._size)
        try:
            good = (
                lib.EVP_PKEY_decrypt_init(context) > 0
                and prepare(context)
                and lib.EVP_PKEY_decrypt(context, out, length, data, len(data)) > 0
            )
            if not good:
                lib.ERR_clear_error()
                return None
            return bytes(ffi.buffer(out, length[0]))
        finally:
            lib.OPENSSL_cleanse(out, self._size)
            lib.EVP_PKEY_CTX_free(context)
