"""PKCS#11 by ctypes, as bare as it goes: what a C program would call, with the CK_RV of each call."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char, c_ubyte, c_ulong, c_void_p

NAMES = """
    Initialize Finalize GetInfo GetFunctionList GetSlotList GetSlotInfo GetTokenInfo GetMechanismList GetMechanismInfo
    InitToken InitPIN SetPIN OpenSession CloseSession CloseAllSessions GetSessionInfo GetOperationState SetOperationState
    Login Logout CreateObject CopyObject DestroyObject GetObjectSize GetAttributeValue SetAttributeValue FindObjectsInit
    FindObjects FindObjectsFinal EncryptInit Encrypt EncryptUpdate EncryptFinal DecryptInit Decrypt DecryptUpdate DecryptFinal
    DigestInit Digest DigestUpdate DigestKey DigestFinal SignInit Sign SignUpdate SignFinal SignRecoverInit SignRecover
    VerifyInit Verify VerifyUpdate VerifyFinal VerifyRecoverInit VerifyRecover DigestEncryptUpdate DecryptDigestUpdate
    SignEncryptUpdate DecryptVerifyUpdate GenerateKey GenerateKeyPair WrapKey UnwrapKey DeriveKey SeedRandom GenerateRandom
    GetFunctionStatus CancelFunction WaitForSlotEvent
""".split()  # noqa: SIM905
CKA = {
    "CLASS": 0, "LABEL": 3, "VALUE": 0x11, "ID": 0x102,
    "SENSITIVE": 0x103, "EXTRACTABLE": 0x162, "LOCAL": 0x163, "NEVER_EXTRACTABLE": 0x164,
}  # fmt: skip
CKO = {"CERTIFICATE": 1, "PUBLIC_KEY": 2, "PRIVATE_KEY": 3}
CKM_ECDSA, CKF_OS_LOCKING_OK, CKF_SERIAL_SESSION = 0x1041, 2, 4
UNAVAILABLE = c_ulong(-1).value


class FunctionList(Structure):
    _fields_ = [("version", c_ubyte * 2), *((name, c_void_p) for name in NAMES)]


class Attribute(Structure):
    _fields_ = [("type", c_ulong), ("value", c_void_p), ("length", c_ulong)]


class Mechanism(Structure):
    _fields_ = [("type", c_ulong), ("parameter", c_void_p), ("length", c_ulong)]


class InitializeArgs(Structure):
    _fields_ = [("mutexes", c_void_p * 4), ("flags", c_ulong), ("reserved", c_void_p)]


class CkError(Exception):
    """`rv` in hexadecimal is its text."""

    def __init__(self, function: str, rv: int) -> None:
        super().__init__(f"C_{function} 0x{rv:x}")
        self.rv = rv


def template(wanted: dict[str, bytes]) -> tuple[ctypes.Array[Attribute], int]:
    rows = [
        Attribute(CKA[name], ctypes.cast(ctypes.create_string_buffer(v, len(v)), c_void_p), len(v)) for name, v in wanted.items()
    ]
    return (Attribute * len(rows))(*rows), len(rows)


def number(value: int) -> bytes:
    return bytes(c_ulong(value))


class Cryptoki:
    def __init__(self, path: str) -> None:
        functions = POINTER(FunctionList)()
        rv = ctypes.CDLL(path).C_GetFunctionList(byref(functions))
        if rv:
            raise CkError("GetFunctionList", rv)
        self._functions = functions.contents
        self.session = c_ulong(0)

    def call(self, name: str, *arguments: object) -> None:
        rv = ctypes.CFUNCTYPE(c_ulong)(getattr(self._functions, name))(*arguments)
        if rv:
            raise CkError(name, rv)

    def initialize(self) -> None:
        self.call("Initialize", byref(InitializeArgs(flags=CKF_OS_LOCKING_OK)))

    def finalize(self) -> None:
        self.call("Finalize", None)

    def open(self, flags: int = CKF_SERIAL_SESSION) -> None:
        self.call("OpenSession", c_ulong(0), c_ulong(flags), None, None, byref(self.session))

    def close(self) -> None:
        self.call("CloseSession", self.session)

    def find(self, wanted: dict[str, bytes]) -> list[int]:
        rows, count = template(wanted)
        self.call("FindObjectsInit", self.session, rows, c_ulong(count))
        handles, found = (c_ulong * 64)(), c_ulong()
        self.call("FindObjects", self.session, handles, c_ulong(64), byref(found))
        self.call("FindObjectsFinal", self.session)
        return list(handles[: found.value])

    def get(self, handle: int, name: str) -> bytes:
        room = (c_char * 8192)()
        row = Attribute(CKA[name], ctypes.cast(room, c_void_p), len(room))
        self.call("GetAttributeValue", self.session, c_ulong(handle), byref(row), c_ulong(1))
        return room.raw[: row.length]

    def sign(self, handle: int, data: bytes, mechanism: int = CKM_ECDSA) -> bytes:
        self.call("SignInit", self.session, byref(Mechanism(mechanism, None, 0)), c_ulong(handle))
        room, length = (c_char * 1024)(), c_ulong(1024)
        self.call("Sign", self.session, data, c_ulong(len(data)), room, byref(length))
        return room.raw[: length.value]

    def wrap(self, wrapping: int, handle: int, mechanism: int) -> bytes:
        room, length = (c_char * 8192)(), c_ulong(8192)
        self.call(
            "WrapKey", self.session, byref(Mechanism(mechanism, None, 0)), c_ulong(wrapping), c_ulong(handle), room, byref(length)
        )
        return room.raw[: length.value]

    def copy(self, handle: int, wanted: dict[str, bytes]) -> int:
        rows, count = template(wanted)
        made = c_ulong()
        self.call("CopyObject", self.session, c_ulong(handle), rows, c_ulong(count), byref(made))
        return made.value
