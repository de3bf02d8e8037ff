"""Run in a guest: an application that is told line by line (JSON) what to do with PKCS#11, and answers line by line.

open                      closes its session, opens a new one; no view outlives that
find {template}           handles of objects, as [handle, label, id]; template: class, label, id, value
sign handle               one ECDSA signature over SHA-256 of "message"
get handle attribute      an attribute's value
wrap key with mechanism   C_WrapKey
copy handle               C_CopyObject
fork                      from now on the child speaks, after C_Initialize; the parent waits
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

from cryptoki import CKO, Cryptoki, number


class Shell:
    def __init__(self, path: str) -> None:
        self.token = Cryptoki(path)
        self.token.initialize()
        self.token.open()

    def open(self) -> None:
        self.token.close()
        self.token.open()

    def find(self, wanted: dict[str, str]) -> list[tuple[int, str, str]]:
        template = {}
        for name, value in wanted.items():
            template[name.upper()] = {
                "class": lambda v: number(CKO[v]),
                "label": str.encode,
            }.get(name, bytes.fromhex)(value)
        handles = self.token.find(template)
        return [(h, self.token.get(h, "LABEL").decode(), self.token.get(h, "ID").hex()) for h in handles]

    def sign(self, handle: int) -> str:
        return self.token.sign(handle, hashlib.sha256(b"message").digest()).hex()

    def get(self, handle: int, attribute: str) -> str:
        return self.token.get(handle, attribute).hex()

    def wrap(self, handle: int, wrapping: int, mechanism: int) -> str:
        return self.token.wrap(wrapping, handle, mechanism).hex()

    def copy(self, handle: int) -> int:
        return self.token.copy(handle, {"LABEL": b"mine"})

    def fork(self) -> int:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        self.token.initialize()  # as libp11 does, without C_Finalize
        self.token.open()
        return os.getpid()


def main() -> None:
    shell = Shell(sys.argv[1])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"ok": getattr(shell, name)(*arguments)}
        except Exception as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


main()
