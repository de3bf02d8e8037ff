"""Run in a guest: tries to read a sensitive key of slot 1 by wrapping, and prints what each attempt answered (JSON).

Arguments: the PKCS#11 library, the user's PIN, the security officer's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass

KW, USES = Mechanism.AES_KEY_WRAP, MechanismFlag
OPEN = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}


def outcome(act: Callable[[], Any]) -> str:
    try:
        return f"gave {act()!r}"
    except pkcs11.PKCS11Error as error:
        return type(error).__name__


class Attacker:
    def __init__(self, session: pkcs11.Session) -> None:
        self.session = session

    def aes(self, uses: MechanismFlag, label: str = "", **more: Any) -> Any:
        template = {Attribute[name.upper()]: value for name, value in more.items()}
        return self.session.generate_key(KeyType.AES, 256, capabilities=uses, label=label or None, template=template)

    def target(self) -> Any:
        return self.aes(USES.ENCRYPT | USES.DECRYPT, extractable=True)

    def unwrapped(self, key: Any, data: bytes, template: dict[Attribute, Any]) -> bytes:
        again = key.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, data, mechanism=KW, template=template)
        return bytes(again[Attribute.VALUE])

    def wrap_and_decrypt(self) -> bytes:
        both = self.aes(USES.WRAP | USES.DECRYPT)
        return bytes(both.decrypt(both.wrap_key(self.target(), mechanism=KW), mechanism=KW))

    def decrypt_later(self) -> bytes:
        key = self.aes(USES.WRAP)
        wrapped = key.wrap_key(self.target(), mechanism=KW)
        key[Attribute.DECRYPT] = True
        return bytes(key.decrypt(wrapped, mechanism=KW))

    def two_copies(self) -> bytes:
        blank = self.aes(USES.ENCRYPT)
        blank[Attribute.ENCRYPT] = False
        wrapper, opener = blank.copy({Attribute.WRAP: True}), blank.copy({Attribute.DECRYPT: True})
        return bytes(opener.decrypt(wrapper.wrap_key(self.target(), mechanism=KW), mechanism=KW))

    def re_import(self) -> bytes:
        key = self.aes(USES.WRAP | USES.UNWRAP)
        return self.unwrapped(key, key.wrap_key(self.target(), mechanism=KW), OPEN)

    def known_key(self) -> bytes:
        value = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: bytes(32)}
        key: Any = self.session.create_object(value | {Attribute.WRAP: True})
        return bytes(key.wrap_key(self.target(), mechanism=KW))

    def trojan(self) -> bytes:
        public, _ = self.session.generate_keypair(KeyType.RSA, 2048, capabilities=USES.WRAP | USES.UNWRAP)
        return bytes(public.wrap_key(self.target(), mechanism=Mechanism.RSA_PKCS))

    def chosen_iv(self) -> bytes:
        return bytes(self.aes(USES.WRAP).wrap_key(self.target(), mechanism=Mechanism.AES_CBC_PAD, mechanism_param=bytes(16)))

    def padding_oracle(self) -> Any:
        key = self.aes(USES.WRAP | USES.UNWRAP)
        return key.unwrap_key(
            ObjectClass.SECRET_KEY, KeyType.GENERIC_SECRET, bytes(32), mechanism=Mechanism.AES_CBC_PAD, mechanism_param=bytes(16)
        )

    def trusted_then_not(self, officers: Callable[[str], None]) -> bytes:
        key = self.aes(USES.WRAP | USES.UNWRAP, label="kek", token=True, private=False)
        careful = self.aes(USES.ENCRYPT, extractable=True, wrap_with_trusted=True)
        refused = outcome(lambda: key.wrap_key(careful, mechanism=KW))
        assert refused == "KeyNotWrappable", refused
        assert outcome(lambda: key.__setitem__(Attribute.TRUSTED, True)) == "AttributeReadOnly"
        officers("kek")
        wrapped = key.wrap_key(careful, mechanism=KW)
        key[Attribute.TRUSTED] = False
        return self.unwrapped(key, wrapped, OPEN)


def main(path: str, user: str, so: str) -> None:
    library = pkcs11.lib(path)
    token = next(slot for slot in library.get_slots() if slot.slot_id == 1).get_token()

    def officers(label: str) -> None:
        """In a program of its own: one application has one login."""
        subprocess.run([sys.executable, __file__, path, "trust", so, label], check=True)

    if user == "trust":
        with token.open(rw=True, so_pin=so) as session:
            session.get_key(label=sys.argv[4])[Attribute.TRUSTED] = True
        return
    with token.open(rw=True, user_pin=user) as session:
        attacker = Attacker(session)
        names = (
            "wrap_and_decrypt",
            "decrypt_later",
            "two_copies",
            "re_import",
            "known_key",
            "trojan",
            "chosen_iv",
            "padding_oracle",
        )
        told = {name: outcome(getattr(attacker, name)) for name in names}
        told["trusted_then_not"] = outcome(lambda: attacker.trusted_then_not(officers))
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:4])
