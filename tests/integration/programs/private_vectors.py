"""Run in a guest: reads JSON lines [label, kind, argument...], answers each with the result in hexadecimal or null for an error.

Kinds: pkcs1 CIPHERTEXT, oaep CIPHERTEXT LABEL, ecdh POINT.  Argument: the PKCS#11 library.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pkcs11
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass


def answer(session: pkcs11.Session, label: str, kind: str, *words: str) -> str | None:
    key: Any = session.get_key(ObjectClass.PRIVATE_KEY, label=label)
    data = [bytes.fromhex(word) for word in words]
    try:
        if kind == "pkcs1":
            return str(key.decrypt(data[0], mechanism=Mechanism.RSA_PKCS).hex())
        if kind == "oaep":
            return str(
                key.decrypt(data[0], mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=(Mechanism.SHA_1, MGF.SHA1, data[1])).hex()
            )
        template = {Attribute.TOKEN: False, Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
        parameter = (pkcs11.KDF.NULL, None, data[0])
        secret = key.derive_key(KeyType.GENERIC_SECRET, 256, mechanism_param=parameter, template=template)
        value = secret[Attribute.VALUE].hex()
        secret.destroy()
        return str(value)
    except pkcs11.PKCS11Error:
        return None


def main(path: str) -> None:
    with pkcs11.lib(path).get_token().open() as session:
        for line in sys.stdin:
            print(json.dumps(answer(session, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
