"""Run in a guest: finds keys, signs, decrypts and derives with each; prints results as JSON (bytes in hexadecimal)."""

from __future__ import annotations

import hashlib
import json
import sys

import pkcs11
from pkcs11 import KeyType, Mechanism, ObjectClass
from pkcs11.mechanisms import MGF
from pkcs11.util.ec import encode_ec_public_key

MESSAGE = b"a message of the guest"
PSS = (Mechanism.SHA256, MGF.SHA256, 32)


def main(path: str, ciphertext: str, peer: str) -> None:
    session = pkcs11.lib(path).get_token().open(user_pin="any")
    results: dict[str, str] = {}

    def key(label: str) -> pkcs11.PrivateKey:
        found = session.get_key(ObjectClass.PRIVATE_KEY, label=label)
        assert isinstance(found, pkcs11.PrivateKey)
        return found

    def attempt(name: str, act: object) -> None:
        try:
            results[name] = act().hex()  # type: ignore[operator]
        except pkcs11.PKCS11Error as error:
            results[name] = type(error).__name__

    digest = hashlib.sha256(MESSAGE).digest()
    ec, rsa, edwards = key("ec"), key("rsa"), key("ed")
    attempt("ECDSA", lambda: ec.sign(digest, mechanism=Mechanism.ECDSA))
    attempt("ECDSA_SHA256", lambda: ec.sign(MESSAGE, mechanism=Mechanism.ECDSA_SHA256))
    attempt("SHA256_RSA_PKCS", lambda: rsa.sign(MESSAGE, mechanism=Mechanism.SHA256_RSA_PKCS))
    attempt("SHA256_RSA_PKCS in parts", lambda: rsa.sign([MESSAGE[:5], MESSAGE[5:]], mechanism=Mechanism.SHA256_RSA_PKCS))
    attempt("RSA_PKCS_PSS", lambda: rsa.sign(digest, mechanism=Mechanism.RSA_PKCS_PSS, mechanism_param=PSS))
    attempt("EDDSA", lambda: edwards.sign(MESSAGE, mechanism=Mechanism.EDDSA))
    oaep = (Mechanism.SHA_1, MGF.SHA1, None)
    attempt("OAEP", lambda: rsa.decrypt(bytes.fromhex(ciphertext), mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=oaep))

    def derive() -> bytes:
        secret = ec.derive_key(KeyType.GENERIC_SECRET, 256, mechanism_param=(pkcs11.mechanisms.KDF.NULL, None, bytes.fromhex(peer)),
                               template={pkcs11.Attribute.SENSITIVE: False, pkcs11.Attribute.EXTRACTABLE: True})  # fmt: skip
        return bytes(secret[pkcs11.Attribute.VALUE])

    attempt("ECDH", derive)
    public = session.get_key(ObjectClass.PUBLIC_KEY, label="ec")
    attempt("public EC", lambda: encode_ec_public_key(public))  # type: ignore[no-untyped-call]
    json.dump(results, sys.stdout)


main(*sys.argv[1:])
