"""Message-based functions and those of 3.2 by ctypes, through the function list of an interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_ulong, c_void_p, cast, create_string_buffer, pointer, sizeof
from typing import Any

from hsmvisord import ck
from support.cryptoki import REPOSITORY, CkAttribute, CkMechanism, Cryptoki

_NAMES = re.findall(r"F\((C_\w+),", (REPOSITORY / "pkcs11_shim/include/pkcs11.h").read_text())


class GcmMessage(Structure):
    _fields_ = (
        ("iv", c_void_p),
        ("iv_length", c_ulong),
        ("fixed", c_ulong),
        ("generator", c_ulong),
        ("tag", c_void_p),
        ("tag_bits", c_ulong),
    )


class CcmMessage(Structure):
    _fields_ = (
        ("length", c_ulong),
        ("iv", c_void_p),
        ("iv_length", c_ulong),
        ("fixed", c_ulong),
        ("generator", c_ulong),
        ("tag", c_void_p),
        ("tag_length", c_ulong),
    )


class ChachaMessage(Structure):
    _fields_ = (("iv", c_void_p), ("iv_length", c_ulong), ("tag", c_void_p))


class Parameter:
    """The structure of one message, with a guard behind its IV and its tag."""

    GUARD = b"\x5a" * 16

    def __init__(
        self, mechanism: int, iv: bytes, tag: bytes = bytes(16), length: int = 0, fixed: int = 0, generator: int = 0
    ) -> None:
        self._iv = create_string_buffer(iv + self.GUARD, len(iv) + 16)
        self._tag = create_string_buffer(tag + self.GUARD, len(tag) + 16)
        at_iv, at_tag = cast(self._iv, c_void_p), cast(self._tag, c_void_p)
        self.structure: Structure
        if mechanism == ck.CKM_AES_GCM:
            self.structure = GcmMessage(at_iv, len(iv), fixed, generator, at_tag, 8 * len(tag))
        elif mechanism == ck.CKM_AES_CCM:
            self.structure = CcmMessage(length, at_iv, len(iv), fixed, generator, at_tag, len(tag))
        else:
            self.structure = ChachaMessage(at_iv, len(iv), at_tag)
        self.mechanism = mechanism

    @property
    def iv(self) -> bytes:
        return self._whole(self._iv)

    @property
    def tag(self) -> bytes:
        return self._whole(self._tag)

    def _whole(self, buffer: Any) -> bytes:
        assert buffer.raw.endswith(self.GUARD), "written past the end"
        return bytes(buffer.raw[:-16])

    def arguments(self) -> tuple[Any, int]:
        return byref(self.structure), sizeof(self.structure)

    def as_mechanism(self) -> CkMechanism:
        return CkMechanism(self.mechanism, cast(pointer(self.structure), c_void_p), sizeof(self.structure))


def attributes(values: dict[int, Any]) -> tuple[Any, int]:
    """Returns a template as an array and its count."""
    array = (CkAttribute * max(1, len(values)))()
    for at, (kind, value) in enumerate(values.items()):
        memory = value if isinstance(value, bytes) else bytes((value,)) if isinstance(value, bool) else value.to_bytes(8, "little")
        kept = create_string_buffer(memory, len(memory))
        array[at] = CkAttribute(kind, cast(kept, c_void_p), len(memory))
        array.__dict__.setdefault("kept", []).append(kept)
    return array, len(values)


class Interface:
    """The functions of one version, called by their place in its list."""

    def __init__(self, p11: Cryptoki, version: bytes = b"\3\2") -> None:
        rv, found = p11.interface(b"PKCS 11", version=version)
        assert rv == ck.CKR_OK and found is not None
        self._list = cast(found.functions, POINTER(c_void_p))

    def call(self, name: str, *arguments: Any) -> int:
        given = [c_ulong(a) if isinstance(a, int) else a for a in arguments]
        types = [c_ulong if isinstance(a, c_ulong) else c_void_p for a in given]
        passed = [cast(a, c_void_p) if isinstance(a, bytes) else a for a in given]
        function = CFUNCTYPE(c_ulong, *types)(self._list[1 + _NAMES.index(name)] or 0)
        return int(function(*passed))

    def good(self, name: str, *arguments: Any) -> None:
        rv = self.call(name, *arguments)
        assert rv == ck.CKR_OK, f"{name}: {ck.rv_name(rv)}"

    def output(self, name: str, *arguments: Any, room: int | None = 1 << 17, after: Sequence[Any] = ()) -> tuple[int, Any]:
        """Returns the CK_RV and the output, or the length that was told; `after`: arguments that follow it."""
        buffer = create_string_buffer(b"\x5a" * ((room or 0) + 16), (room or 0) + 16) if room is not None else None
        length = c_ulong(room or 0)
        rv = self.call(name, *arguments, buffer, byref(length), *after)
        assert buffer is None or buffer.raw.endswith(b"\x5a" * 16), "written past the end"
        if rv == ck.CKR_OK and buffer is not None:
            return rv, bytes(buffer.raw[: length.value])
        return rv, length.value

    def got(self, name: str, *arguments: Any, **more: Any) -> bytes:
        rv, output = self.output(name, *arguments, **more)
        assert rv == ck.CKR_OK, f"{name}: {ck.rv_name(rv)}"
        assert isinstance(output, bytes)
        return output

    def generate(self, session: int, mechanism: int, values: dict[int, Any]) -> int:
        key = c_ulong()
        self.good("C_GenerateKey", session, byref(CkMechanism(mechanism, None, 0)), *attributes(values), byref(key))
        return key.value

    def pair(self, session: int, mechanism: int, public: dict[int, Any], private: dict[int, Any]) -> tuple[int, int]:
        theirs, ours = c_ulong(), c_ulong()
        made = (*attributes(public), *attributes(private), byref(theirs), byref(ours))
        self.good("C_GenerateKeyPair", session, byref(CkMechanism(mechanism, None, 0)), *made)
        return theirs.value, ours.value

    def value(self, session: int, key: int, kind: int = ck.CKA_VALUE) -> bytes:
        buffer = create_string_buffer(8192)
        array = (CkAttribute * 1)(CkAttribute(kind, cast(buffer, c_void_p), 8192))
        self.good("C_GetAttributeValue", session, key, array, 1)
        return buffer.raw[: array[0].length]
