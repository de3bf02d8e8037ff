"""The mechanisms that a policy may name: those with keys that modules have, without "CKM_".  A test holds them to the token."""

from __future__ import annotations

_HASHES = ("SHA1", "SHA224", "SHA256", "SHA384", "SHA512", "SHA3_224", "SHA3_256", "SHA3_384", "SHA3_512")

_HMACS = (*("SHA_1" if name == "SHA1" else name for name in _HASHES), "SHA512_224", "SHA512_256")

#: What is old or weak: there where the policy says `legacy`.
LEGACY = (
    "DES2_KEY_GEN",
    "DES3_KEY_GEN",
    "DES3_ECB",
    "DES3_CBC",
    "DES3_CBC_PAD",
    "AES_MAC",
    "AES_MAC_GENERAL",
    "DSA_PARAMETER_GEN",
    "DSA_KEY_PAIR_GEN",
    "DSA",
    *(f"DSA_{name}" for name in _HASHES if not name.startswith("SHA3_")),
    "DH_PKCS_PARAMETER_GEN",
    "DH_PKCS_KEY_PAIR_GEN",
    "DH_PKCS_DERIVE",
)

NAMES = (
    "RSA_PKCS",
    "RSA_X_509",
    "RSA_PKCS_OAEP",
    "RSA_PKCS_PSS",
    *(f"{name}_RSA_PKCS" for name in _HASHES),
    *(f"{name}_RSA_PKCS_PSS" for name in _HASHES),
    "ECDSA",
    *(f"ECDSA_{name}" for name in _HASHES),
    "ECDH1_DERIVE",
    "ECDH1_COFACTOR_DERIVE",
    "EDDSA",
    "ML_DSA",
    "RSA_AES_KEY_WRAP",
    "ML_KEM",
    "AES_ECB",
    "AES_CBC",
    "AES_CBC_PAD",
    "AES_CTR",
    "AES_GCM",
    "AES_CCM",
    "AES_KEY_WRAP",
    "AES_KEY_WRAP_KWP",
    "AES_CMAC",
    "AES_CMAC_GENERAL",
    "AES_GMAC",
    "AES_ECB_ENCRYPT_DATA",
    "AES_CBC_ENCRYPT_DATA",
    "CHACHA20_POLY1305",
    *(f"{name}_HMAC{general}" for name in _HMACS for general in ("", "_GENERAL")),
    "HKDF_DERIVE",
    "HKDF_DATA",
    "SP800_108_COUNTER_KDF",
    "RSA_PKCS_KEY_PAIR_GEN",
    "EC_KEY_PAIR_GEN",
    "EC_EDWARDS_KEY_PAIR_GEN",
    "EC_MONTGOMERY_KEY_PAIR_GEN",
    "ML_DSA_KEY_PAIR_GEN",
    "ML_KEM_KEY_PAIR_GEN",
    "AES_KEY_GEN",
    "CHACHA20_KEY_GEN",
    "GENERIC_SECRET_KEY_GEN",
    *LEGACY,
)

#: What a policy may forbid a guest in slot 1.
FORBIDDABLE = ("generate", "create", "init-token", "init-pin", "set-pin")


def named(text: str) -> str:
    """Returns the name as it stands in NAMES: case, "CKM_" and hyphens (as pkcs11-tool prints them) do not matter.  Raises
    ValueError."""
    name = text.upper().replace("-", "_").removeprefix("CKM_")
    if name not in NAMES:
        raise ValueError(f"{text!r:.60} is not a mechanism of a module")
    return name
