"""Makes control_domain/docs/pkcs11.md from the code: every function of PKCS#11 3.2 and every mechanism, with what a module does."""

from __future__ import annotations

import re
from pathlib import Path

from hsmvisord import ck
from hsmvisord.crypto import mechanisms

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "control_domain/docs/pkcs11.md"

_FLAGS = {
    ck.CKF_SIGN: "sign",
    ck.CKF_VERIFY: "verify",
    ck.CKF_ENCRYPT: "encrypt",
    ck.CKF_DECRYPT: "decrypt",
    ck.CKF_WRAP: "wrap",
    ck.CKF_UNWRAP: "unwrap",
    ck.CKF_DERIVE: "derive",
    ck.CKF_DIGEST: "digest",
    ck.CKF_GENERATE: "generate",
    ck.CKF_GENERATE_KEY_PAIR: "generate a pair",
    ck.CKF_ENCAPSULATE: "encapsulate",
    ck.CKF_DECAPSULATE: "decapsulate",
    ck.CKF_SIGN_RECOVER: "sign with recovery",
    ck.CKF_VERIFY_RECOVER: "verify with recovery",
    ck.CKF_MESSAGE_SIGN: "messages",
    ck.CKF_MESSAGE_ENCRYPT: "messages",
}
_KEYS = {value: name.removeprefix("CKK_").replace("_", " ") for name, value in vars(ck).items() if name.startswith("CKK_")}

#: Calls that every session of slot 0 refuses, and what the answer is.
_SLOT_0 = {
    "C_InitToken": "CKR_TOKEN_WRITE_PROTECTED",
    "C_InitPIN": "CKR_TOKEN_WRITE_PROTECTED",
    "C_SetPIN": "CKR_TOKEN_WRITE_PROTECTED",
    "C_CreateObject": "CKR_TOKEN_WRITE_PROTECTED or CKR_FUNCTION_NOT_SUPPORTED",
    "C_CopyObject": "CKR_ACTION_PROHIBITED",
    "C_SetAttributeValue": "CKR_ACTION_PROHIBITED",
    "C_GenerateKey": "CKR_MECHANISM_INVALID",
    "C_GenerateKeyPair": "CKR_MECHANISM_INVALID",
    "C_WrapKey": "CKR_KEY_UNEXTRACTABLE",
    "C_UnwrapKey": "CKR_MECHANISM_INVALID",
    "C_SignRecoverInit": "CKR_KEY_FUNCTION_NOT_PERMITTED",
    "C_SignRecover": "CKR_OPERATION_NOT_INITIALIZED",
    "C_VerifyRecoverInit": "CKR_KEY_FUNCTION_NOT_PERMITTED",
    "C_VerifyRecover": "CKR_OPERATION_NOT_INITIALIZED",
    "C_MessageEncryptInit": "CKR_MECHANISM_INVALID",
    "C_EncryptMessage": "CKR_OPERATION_NOT_INITIALIZED",
    "C_EncryptMessageBegin": "CKR_OPERATION_NOT_INITIALIZED",
    "C_EncryptMessageNext": "CKR_OPERATION_NOT_INITIALIZED",
    "C_MessageEncryptFinal": "CKR_OPERATION_NOT_INITIALIZED",
    "C_MessageDecryptInit": "CKR_MECHANISM_INVALID",
    "C_DecryptMessage": "CKR_OPERATION_NOT_INITIALIZED",
    "C_DecryptMessageBegin": "CKR_OPERATION_NOT_INITIALIZED",
    "C_DecryptMessageNext": "CKR_OPERATION_NOT_INITIALIZED",
    "C_MessageDecryptFinal": "CKR_OPERATION_NOT_INITIALIZED",
    "C_EncapsulateKey": "CKR_MECHANISM_INVALID",
    "C_DecapsulateKey": "CKR_MECHANISM_INVALID",
    "C_WrapKeyAuthenticated": "CKR_MECHANISM_INVALID",
    "C_UnwrapKeyAuthenticated": "CKR_MECHANISM_INVALID",
}
#: Functions that answer one code in any slot, and why.
_ALWAYS = {
    "C_GetOperationState": "CKR_STATE_UNSAVEABLE",
    "C_SetOperationState": "CKR_SAVED_STATE_INVALID",
    "C_GetFunctionStatus": "CKR_FUNCTION_NOT_PARALLEL",
    "C_CancelFunction": "CKR_FUNCTION_NOT_PARALLEL",
    "C_AsyncComplete": "CKR_OPERATION_NOT_INITIALIZED",
    "C_AsyncGetID": "CKR_OPERATION_NOT_INITIALIZED",
    "C_AsyncJoin": "CKR_SAVED_STATE_INVALID",
}


def functions() -> list[str]:
    """Returns the names of the function list of 3.2, in their order; those of 3.0 and 2.40 are its beginning."""
    return re.findall(r"F\((C_\w+),", (ROOT / "pkcs11_shim/include/pkcs11.h").read_text())


def _does(function: str) -> tuple[str, str]:
    """What slot 0 and slot 1 answer."""
    if function in _ALWAYS:
        return (_ALWAYS[function],) * 2
    return _SLOT_0.get(function, "yes"), "yes"


def _row(mechanism: int, row: mechanisms.Row) -> str:
    keys = ", ".join(_KEYS[kind] for kind in row.key_types[:3]) + (" ..." if len(row.key_types) > 3 else "")
    sizes = "-" if not row.largest else str(row.smallest) if row.smallest == row.largest else f"{row.smallest}-{row.largest}"
    did = " | ".join(_functions(table, mechanism) for table in (mechanisms.TABLE, mechanisms.GUEST_TABLE))
    name = ck.mechanism_name(mechanism) + " (legacy)" * (mechanism in mechanisms.LEGACY)
    return f"| {name} | {keys or '-'} | {sizes} | {did} |"


def _functions(table: dict[int, mechanisms.Row], mechanism: int) -> str:
    if mechanism not in table:
        return "-"
    flags = table[mechanism].flags
    names = [name for flag, name in _FLAGS.items() if flag & flags]
    return ", ".join(names) + (" in parts" if flags & ck.CKF_MULTI_MESSAGE else "")


_HEAD = """# PKCS#11: functions and mechanisms

Made from the code by `scripts/generate`; a test holds it to it.

Slot 0 has what was delivered. Slot 1 is the guest's own token, where the operator allows it (`--guest-token`).

## Functions

The interface of 3.2 has all of them; that of 3.0, the default, those up to C_MessageVerifyFinal; that of 2.40 those up to
C_WaitForSlotEvent. A stock p11-kit client has those of 3.0 from release 0.25 on, without message-based encryption: its
parameters do not travel in p11-kit's protocol.

| function | slot 0 | slot 1 |
|---|---|---|
"""
_MECHANISMS = """
## Mechanisms

Sizes are what C_GetMechanismInfo tells: bits, or bytes for secret keys and lattices. `messages`: with the message-based functions
too, `in parts` also with their ..Begin and ..Next.

What says (legacy) is there where the module's policy says it too (`--legacy`). So are P-192, curves by explicit parameters that are
a named curve's, and public RSA keys of 512 to 1023 bits.

| mechanism | keys | sizes | slot 0 | slot 1 |
|---|---|---|---|---|
"""


def text() -> str:
    rows = [f"| {name} | {' | '.join(_does(name))} |" for name in functions()]
    named = sorted((ck.mechanism_name(mechanism), mechanism, row) for mechanism, row in mechanisms.GUEST_TABLE.items())
    table = [_row(mechanism, row) for _, mechanism, row in named]
    return _HEAD + "\n".join(rows) + "\n" + _MECHANISMS + "\n".join(table) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text())
