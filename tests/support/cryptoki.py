"""PKCS#11 by ctypes: calls as a C program makes them, wrong ones too."""

from __future__ import annotations

import os
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_ubyte, c_ulong, c_void_p, cast, create_string_buffer
from pathlib import Path
from typing import Any

from hsmvisord import ck

REPOSITORY = Path(__file__).parents[2]

#: HSMVISOR_TEST_LIBRARY names another build, one with a sanitizer.
LIBRARY = Path(os.environ.get("HSMVISOR_TEST_LIBRARY") or REPOSITORY / "pkcs11_shim/build/libhsmvisor-pkcs11.so")


class CkMechanism(Structure):
    _fields_ = (("mechanism", c_ulong), ("parameter", c_void_p), ("length", c_ulong))


class CkAttribute(Structure):
    _fields_ = (("type", c_ulong), ("value", c_void_p), ("length", c_ulong))


class CkInitializeArgs(Structure):
    _fields_ = (("mutexes", c_void_p * 4), ("flags", c_ulong), ("reserved", c_void_p))


class CkInterface(Structure):
    _fields_ = (("name", c_char_p), ("functions", c_void_p), ("flags", c_ulong))


UNAVAILABLE = c_ulong(-1).value


def mechanism(kind: int = ck.CKM_ECDSA, parameter: bytes = b"") -> CkMechanism:
    return CkMechanism(kind, cast(c_char_p(parameter), c_void_p) if parameter else None, len(parameter))


class Cryptoki:
    """`call` answers a CK_RV and takes numbers, bytes, None and ctypes objects; the other methods answer what their names say."""

    def __init__(self, path: Path = LIBRARY) -> None:
        self.library = CDLL(str(path))

    def call(self, name: str, *args: Any) -> int:
        function = self.library[name]
        function.restype = c_ulong
        return int(function(*[c_ulong(a) if isinstance(a, int) else a for a in args]))

    def good(self, name: str, *args: Any) -> None:
        rv = self.call(name, *args)
        assert rv == ck.CKR_OK, f"{name}: {ck.rv_name(rv)}"

    def initialize(self, address: str | None = None) -> None:
        if address is not None:
            os.environ["HSMVISOR_PKCS11_ADDRESS"] = address
        self.good("C_Initialize", byref(CkInitializeArgs(flags=ck.CKF_OS_LOCKING_OK)))

    def finalize(self) -> int:
        return self.call("C_Finalize", None)

    def slots(self, room: int = 8) -> list[int]:
        slots, count = (c_ulong * room)(), c_ulong(room)
        self.good("C_GetSlotList", 1, slots, byref(count))
        return list(slots[: count.value])

    def open_session(self, slot: int = 0, flags: int = ck.CKF_SERIAL_SESSION) -> int:
        session = c_ulong()
        self.good("C_OpenSession", slot, flags, None, None, byref(session))
        return session.value

    def sign_init(self, session: int, key: int, kind: CkMechanism | None = None) -> int:
        return self.call("C_SignInit", session, byref(kind or mechanism()), key)

    def sign(self, session: int, data: bytes, room: int | None = 256, name: str = "C_Sign") -> tuple[int, Any]:
        """Returns the CK_RV and the signature, or the length that was told.  `room` None: a NULL pointer."""
        buffer, length = (c_ubyte * (room or 1))() if room is not None else None, c_ulong(room or 0)
        inputs = (data, len(data)) if name == "C_Sign" else ()
        rv = self.call(name, session, *inputs, buffer, byref(length))
        if rv == ck.CKR_OK and buffer is not None:
            return rv, bytes(buffer[: length.value])
        return rv, length.value

    def find(self, session: int, most: int = 16, template: list[tuple[int, bytes]] | None = None) -> list[int]:
        attributes = (CkAttribute * max(1, len(template or [])))()
        for at, (kind, value) in enumerate(template or []):
            attributes[at] = CkAttribute(kind, cast(c_char_p(value), c_void_p), len(value))
        self.good("C_FindObjectsInit", session, attributes, len(template or []))
        handles, count = (c_ulong * most)(), c_ulong()
        self.good("C_FindObjects", session, handles, most, byref(count))
        self.good("C_FindObjectsFinal", session)
        return list(handles[: count.value])

    def attributes(self, session: int, handle: int, wanted: list[tuple[int, int | None]]) -> tuple[int, list[bytes | int]]:
        """Returns the CK_RV, and for each attribute its value, or the length told where there is no buffer or no value."""
        buffers = [None if room is None else create_string_buffer(b"\xaa" * max(room, 1), max(room, 1)) for _, room in wanted]
        array = (CkAttribute * len(wanted))()
        for at, ((kind, room), buffer) in enumerate(zip(wanted, buffers, strict=True)):
            array[at] = CkAttribute(kind, cast(buffer, c_void_p) if buffer else None, room or 0)
        rv = self.call("C_GetAttributeValue", session, handle, array, len(wanted))
        told = [
            buffer.raw[: item.length] if buffer is not None and item.length != UNAVAILABLE else item.length
            for item, buffer in zip(array, buffers, strict=True)
        ]
        return rv, told

    def interface(self, name: bytes | None, flags: int = 0, version: bytes | None = None) -> tuple[int, CkInterface | None]:
        found = POINTER(CkInterface)()
        rv = self.call("C_GetInterface", name, version, byref(found), flags)
        return rv, found.contents if rv == ck.CKR_OK else None

    def rotation_wait(self, last: int, timeout_ms: int) -> tuple[int, int]:
        from ctypes import CFUNCTYPE

        class Vendor(Structure):
            _fields_ = (("version", c_ubyte * 2), ("wait", CFUNCTYPE(c_ulong, c_ulong, c_ulong, POINTER(c_ulong))))

        _, interface = self.interface(b"Vendor hsmvisor")
        assert interface is not None
        now = c_ulong()
        vendor = cast(interface.functions, POINTER(Vendor)).contents
        return int(vendor.wait(last, timeout_ms, byref(now))), now.value
