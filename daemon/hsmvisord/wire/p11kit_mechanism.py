"""Mechanisms as p11-kit writes them (p11-kit/rpc-message.c, p11_rpc_buffer_add_mechanism).

Old form (byte 0 and 1): the parameter's fields follow, or a NULL `bytes` for a mechanism without parameter.
New form (byte 2): nothing follows for a mechanism without parameter, else one byte that says whether its fields follow.
"""

from __future__ import annotations

from hsmvisord import ck
from hsmvisord.wire.calls import Mechanism
from hsmvisord.wire.fields import NULL, Malformed, Reader, check_parameter

#: A NULL mechanism pointer; releases 0.25.0 to 0.25.2 write 0.
NULL_MECHANISM = 0xFFFFFFFF

_IV = "I"

#: Mechanisms whose parameter p11-kit knows: u = u64, y = byte, b = `bytes`, I = the parameter is these bytes alone.
PARAMETERS: dict[int, str] = {
    ck.CKM_RSA_PKCS_OAEP: "uuub",
    ck.CKM_ECDH1_DERIVE: "ubb",
    ck.CKM_AES_CTR: "ub",
    ck.CKM_AES_GCM: "bubu",
    **dict.fromkeys((ck.CKM_RSA_PKCS_PSS, 0xE, 0x47, 0x43, 0x44, 0x45), "uuu"),  # CKM_SHA..._RSA_PKCS_PSS
    **dict.fromkeys((0x1082, 0x1085, 0x2104, 0x2105, 0x2106, 0x2107, 0x2108, 0x1089), _IV),  # AES modes
    **dict.fromkeys((0x122, 0x125, 0x133, 0x136, 0x150, 0x152, 0x153), _IV),  # DES modes
    0x21: _IV,  # CKM_DH_PKCS_DERIVE
    # CKM_..._GENERAL: the length of the output
    **dict.fromkeys((0x222, 0x257, 0x252, 0x262, 0x272, 0x4A, 0x4E, 0x1084, 0x108B, 0x134, 0x137), "u"),
    # Releases after 0.26.4; older ones know neither mechanism.
    ck.CKM_EDDSA: "yb",
    ck.CKM_ML_DSA: "ub",
}


def read(reader: Reader, new_form: bool, client_version: int) -> Mechanism | None:
    """Returns None for a NULL mechanism."""
    kind = reader.u32()
    if kind == NULL_MECHANISM or (kind == 0 and client_version == 1 and not new_form and not _null_follows(reader)):
        return None
    layout = PARAMETERS.get(kind)
    if layout is None:
        if not new_form and reader.u32() != NULL:
            raise Malformed("a parameter for a mechanism without one")
        return Mechanism(kind)
    if new_form and not reader.u8():
        return Mechanism(kind)
    begin = reader.offset
    parameter = (reader.prefixed_or_null() or b"") if layout == _IV else tuple([_field(reader, code) for code in layout])
    check_parameter(reader.offset - begin)
    return Mechanism(kind, parameter)


def _field(reader: Reader, code: str) -> int | bytes:
    if code == "u":
        return reader.u64()
    if code == "y":
        return reader.u8()
    return reader.prefixed_or_null() or b""


def _null_follows(reader: Reader) -> bool:
    """CKM_RSA_PKCS_KEY_PAIR_GEN is 0 too; its NULL parameter follows.  A cancel is followed by a key's handle or by nothing."""
    return reader.data[reader.offset : reader.offset + 4] == b"\xff\xff\xff\xff"


def parameter_update(mechanism: Mechanism) -> bytes:
    """`P` in the reply of C_DeriveKey2: no mechanism here changes its parameter."""
    if mechanism.type not in PARAMETERS:
        return b""
    return b"\1" if mechanism.parameter is not None else b"\0"
