"""Run in a guest: tries each PKCS#11 way to read, copy, wrap or change what was delivered, and prints what each one answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

#: attributes that are, or give away, a private key
SECRETS = ["VALUE", "PRIVATE_EXPONENT", "PRIME_1", "PRIME_2", "EXPONENT_1", "EXPONENT_2", "COEFFICIENT"]
CHANGES = {
    "SENSITIVE": False,
    "EXTRACTABLE": True,
    "LABEL": "mine",
    "ID": b"mine",
    "SIGN": False,
    "DECRYPT": True,
    "UNWRAP": True,
    "TOKEN": False,
    "PRIVATE": False,
    "MODIFIABLE": True,
}


def outcome(act: Callable[[], object]) -> str:
    try:
        value = act()
    except Exception as error:
        name = type(error).__name__
        return "ActionProhibited" if str(error).endswith("0x1b") else name  # python-pkcs11 has no name for this one
    return f"gave {value!r}"


def main(path: str) -> None:
    token = pkcs11.lib(path).get_token()
    answers: dict[str, str] = {}
    for rw in (False, True):
        with token.open(rw=rw, user_pin="any") as session:
            for key in list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY})):
                assert isinstance(key, pkcs11.PrivateKey)
                where = f"{key.label} rw={rw}"
                for name in SECRETS:
                    answers[f"{where} read {name}"] = outcome(lambda: key[Attribute[name]])  # noqa: B023
                for name, value in CHANGES.items():
                    answers[f"{where} change {name}"] = outcome(lambda: key.__setitem__(Attribute[name], value))  # noqa: B023
                answers[f"{where} copy"] = outcome(lambda: key.copy({Attribute.EXTRACTABLE: True}))  # noqa: B023
                answers[f"{where} destroy"] = outcome(key.destroy)
            for certificate in list(session.get_objects({Attribute.CLASS: ObjectClass.CERTIFICATE})):
                answers[f"certificate rw={rw} change"] = outcome(lambda: certificate.__setitem__(Attribute.LABEL, "mine"))  # noqa: B023
                answers[f"certificate rw={rw} destroy"] = outcome(certificate.destroy)
            answers[f"rw={rw} create"] = outcome(
                lambda: session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"x", Attribute.TOKEN: True})
            )
            answers[f"rw={rw} generate AES"] = outcome(lambda: session.generate_key(KeyType.AES, 256, store=True))
            wrapping = outcome(lambda: session.generate_key(KeyType.AES, 256))
            answers[f"rw={rw} a key to wrap with"] = wrapping
            rsa = [k for k in session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY}) if k.key_type == KeyType.RSA]
            private = list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY}))
            for public in rsa:
                for key in private:
                    answers[f"rw={rw} wrap {key.label} with {public.label}"] = outcome(
                        lambda: public.wrap_key(key, mechanism=Mechanism.RSA_PKCS)  # noqa: B023
                    )
    json.dump(answers, sys.stdout)


main(sys.argv[1])
