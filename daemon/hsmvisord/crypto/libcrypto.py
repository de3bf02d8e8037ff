"""Raw RSA by Debian's libcrypto (EVP_PKEY_decrypt(3), EVP_PKEY_CTX_set_rsa_padding(3)): constant time with blinding, GIL
released."""

from __future__ import annotations

import functools
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
int EVP_PKEY_decrypt(EVP_PKEY_CTX *ctx, unsigned char *out, size_t *outlen, const unsigned char *in, size_t inlen);
void OPENSSL_cleanse(void *ptr, size_t len);
void ERR_clear_error(void);
"""
_RSA_NO_PADDING = 3
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
        ffi, lib = _library()
        context = lib.EVP_PKEY_CTX_new(self._pkey, ffi.NULL)
        if context == ffi.NULL:
            raise MemoryError("libcrypto: EVP_PKEY_CTX_new")
        out = ffi.new("unsigned char[]", self._size)
        length = ffi.new("size_t *", self._size)
        try:
            good = (
                lib.EVP_PKEY_decrypt_init(context) > 0
                and lib.EVP_PKEY_CTX_set_rsa_padding(context, _RSA_NO_PADDING) > 0
                and lib.EVP_PKEY_decrypt(context, out, length, data, len(data)) > 0
            )
            if not good:
                lib.ERR_clear_error()
                return None
            return bytes(ffi.buffer(out, length[0])).rjust(self._size, b"\0")
        finally:
            lib.OPENSSL_cleanse(out, self._size)
            lib.EVP_PKEY_CTX_free(context)
