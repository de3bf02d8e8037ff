"""The mechanisms that a policy may name: those with keys that modules have, without "CKM_".  A test holds them to the token."""

from __future__ import annotations

_HASHES = ("SHA1", "SHA224", "SHA256", "SHA384", "SHA512", "SHA3_224", "SHA3_256", "SHA3_384", "SHA3_512")

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
)


def named(text: str) -> str:
    """Returns the name as it stands in NAMES: case, "CKM_" and hyphens (as pkcs11-tool prints them) do not matter.  Raises
    ValueError."""
    name = text.upper().replace("-", "_").removeprefix("CKM_")
    if name not in NAMES:
        raise ValueError(f"{text!r:.60} is not a mechanism of a module")
    return name
