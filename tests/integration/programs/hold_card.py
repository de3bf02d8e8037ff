"""Run in a guest: holds a smart card's key by PKCS#11 and does what its input says, a word in each line, until that ends.

Arguments: library, CKA_ID in hexadecimal, PIN.  Words: `open` (a session, login, certificate and key), `sign`, `loop` (signs until
the next word comes), `pause` (nothing), `login`, `slots` (lists them, asks one for its token), `watch` (lists them until there is
no token), `close` (all sessions), `renew` (C_Finalize and C_Initialize).  For each word, and for each signature of a loop, one JSON
object in a line: the word; what failed, or "", and its "rv", 0 when it is not a function's; the certificate that is held (its
SHA-256); the message and its signature, in hexadecimal.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import select
import sys
import time
from ctypes import byref, c_byte, c_ulong, c_void_p, create_string_buffer

CKU_USER, CKF_SERIAL_SESSION, CKF_OS_LOCKING_OK = 1, 4, 2
CKO_CERTIFICATE, CKO_PRIVATE_KEY = 1, 3
CKA_CLASS, CKA_VALUE, CKA_ID = 0, 0x11, 0x102
CKM_ECDSA = 0x1041
MOST = 16  #: slots


class Attribute(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("value", c_void_p), ("length", c_ulong))


class Mechanism(ctypes.Structure):
    _fields_ = (("mechanism", c_ulong), ("parameter", c_void_p), ("length", c_ulong))


class InitializeArguments(ctypes.Structure):
    _fields_ = (("functions", c_void_p * 4), ("flags", c_ulong), ("reserved", c_void_p))


class Refused(Exception):
    def __init__(self, what: str, rv: int = 0) -> None:
        super().__init__(what)
        self.what, self.rv = what, rv


class Client:
    def __init__(self, path: str, ident: bytes, pin: bytes) -> None:
        self._library, self._ident, self._pin = ctypes.CDLL(path), ident, pin
        self._slot = self._session = self._key = c_ulong()
        self._count = itertools.count()
        self.certificate = ""
        self._initialize()

    def _call(self, function: str, *arguments: object) -> None:
        rv: int = getattr(self._library, function)(*arguments)
        if rv & 0xFFFFFFFF:
            raise Refused(function, rv & 0xFFFFFFFF)

    def _initialize(self) -> None:
        self._call("C_Initialize", byref(InitializeArguments(flags=CKF_OS_LOCKING_OK)))

    def _find(self, kind: int) -> c_ulong:
        number, ident = c_ulong(kind), create_string_buffer(self._ident, len(self._ident))
        template = (Attribute * 2)(
            (CKA_CLASS, ctypes.cast(byref(number), c_void_p), ctypes.sizeof(number)),
            (CKA_ID, ctypes.cast(ident, c_void_p), len(self._ident)),
        )
        found, count = c_ulong(), c_ulong()
        self._call("C_FindObjectsInit", self._session, template, c_ulong(2))
        self._call("C_FindObjects", self._session, byref(found), c_ulong(1), byref(count))
        self._call("C_FindObjectsFinal", self._session)
        if not count.value:
            raise Refused(f"no object of class {kind}")
        return found

    def open(self) -> None:
        self.slots()
        self._session = c_ulong()
        self._call("C_OpenSession", self._slot, c_ulong(CKF_SERIAL_SESSION), None, None, byref(self._session))
        self._read()
        self.login()
        self._key = self._find(CKO_PRIVATE_KEY)

    def _read(self) -> None:
        handle, value = self._find(CKO_CERTIFICATE), create_string_buffer(8192)
        wanted = Attribute(CKA_VALUE, ctypes.cast(value, c_void_p), len(value))
        self._call("C_GetAttributeValue", self._session, handle, byref(wanted), c_ulong(1))
        self.certificate = hashlib.sha256(value.raw[: wanted.length]).hexdigest()

    def login(self) -> None:
        self._call("C_Login", self._session, c_ulong(CKU_USER), self._pin, c_ulong(len(self._pin)))

    def sign(self) -> dict[str, str]:
        message = b"%d %d" % (os.getpid(), next(self._count))
        mechanism, digest = Mechanism(CKM_ECDSA, None, 0), hashlib.sha256(message).digest()
        signature, length = create_string_buffer(512), c_ulong(512)
        self._call("C_SignInit", self._session, byref(mechanism), self._key)
        self._call("C_Sign", self._session, digest, c_ulong(len(digest)), signature, byref(length))
        return {"message": message.hex(), "signature": signature.raw[: length.value].hex()}

    def slots(self) -> None:
        found, count, information = (c_ulong * MOST)(), c_ulong(MOST), create_string_buffer(512)
        self._call("C_GetSlotList", c_byte(0), None, byref(count))
        count = c_ulong(MOST)
        self._call("C_GetSlotList", c_byte(1), found, byref(count))
        if not count.value:
            raise Refused("no token")
        self._slot = c_ulong(found[0])
        self._call("C_GetSlotInfo", self._slot, information)
        self._call("C_GetTokenInfo", self._slot, information)

    def watch(self) -> None:
        with contextlib.suppress(Refused):
            while True:
                self.slots()
                time.sleep(0.1)

    def close(self) -> None:
        self._call("C_CloseAllSessions", self._slot)

    def renew(self) -> None:
        self._call("C_Finalize", None)
        self._initialize()

    def pause(self) -> None:
        pass

    def do(self, word: str) -> None:
        said = {"word": word, "failed": "", "rv": 0, "signature": ""}
        try:
            said |= getattr(self, word)() or {}
        except Refused as refused:
            said |= {"failed": refused.what, "rv": refused.rv}
        print(json.dumps(said | {"certificate": self.certificate}), flush=True)


def main(path: str, ident: str, pin: str) -> None:
    client = Client(path, bytes.fromhex(ident), pin.encode())
    while word := sys.stdin.buffer.raw.readline().decode().strip():  # type: ignore[attr-defined]
        if word != "loop":
            client.do(word)
        while word == "loop" and not select.select([0], [], [], 0.02)[0]:
            client.do("sign")


main(*sys.argv[1:])
