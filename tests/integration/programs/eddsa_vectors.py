"""Run in a guest: reads vectors of RFC 8032 (JSON), takes each key into slot 1, signs and verifies; tells by JSON.

Arguments: the PKCS#11 library, the user's PIN.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

OIDS = {32: bytes.fromhex("06032b6570"), 57: bytes.fromhex("06032b6571")}


def keys_of(session: pkcs11.Session, vector: dict[str, Any]) -> tuple[Any, Any]:
    secret, point = bytes.fromhex(vector["secret"]), bytes.fromhex(vector["public"])
    common = {Attribute.KEY_TYPE: KeyType.EC_EDWARDS, Attribute.EC_PARAMS: OIDS[len(secret)]}
    private = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.VALUE: secret, Attribute.SIGN: True}
    public = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.EC_POINT: bytes((4, len(point))) + point, Attribute.VERIFY: True}
    return session.create_object(common | private), session.create_object(common | public)


def answer(session: pkcs11.Session, vector: dict[str, Any]) -> dict[str, Any]:
    private, public = keys_of(session, vector)
    message, context = bytes.fromhex(vector["message"]), bytes.fromhex(vector["context"])
    parameter = (vector["prehash"], context or None) if vector["prehash"] or context else None
    signature = bytes.fromhex(vector["signature"])

    def signed(data: Any) -> str:
        return str(private.sign(data, mechanism=Mechanism.EDDSA, mechanism_param=parameter).hex())

    def verified(given: bytes, parameter: Any = parameter) -> bool:
        return bool(public.verify(message, given, mechanism=Mechanism.EDDSA, mechanism_param=parameter))

    def mutated(at: int) -> bytes:
        return signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]

    half = len(message) // 2
    return {
        "one part": signed(message),
        "in parts": signed([message[:half], message[half:]]),
        "verified": verified(signature),
        "mutated": [verified(mutated(at)) for at in range(0, len(signature), -(-len(signature) // 8))],
        "wrong context": verified(signature, (vector["prehash"], b"wrong")),
        "wrong scheme": verified(signature, (not vector["prehash"], context or b"any")),
    }


def contexts(session: pkcs11.Session, vector: dict[str, Any]) -> dict[str, Any]:
    private, public = keys_of(session, vector)
    told: dict[str, Any] = {}
    for prehash in (False, True):
        for length in (255, 256):
            name = f"{length} ph" if prehash else str(length)
            parameter = (prehash, b"c" * length)
            try:
                signature = private.sign(b"message", mechanism=Mechanism.EDDSA, mechanism_param=parameter)
                told[name] = public.verify(b"message", signature, mechanism=Mechanism.EDDSA, mechanism_param=parameter)
            except pkcs11.PKCS11Error as error:
                told[name] = type(error).__name__
    return told


def main(path: str, pin: str) -> None:
    vectors = json.load(sys.stdin)
    library = pkcs11.lib(path)
    slot = next(slot for slot in library.get_slots() if slot.slot_id == 1)
    with slot.get_token().open(rw=True, user_pin=pin) as session:
        told = {"vectors": [answer(session, vector) for vector in vectors], "contexts": contexts(session, vectors[0])}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
