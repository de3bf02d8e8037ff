"""Makes control_domain/docs/pkcs11.md from the code: every function of PKCS#11 3.0 and every mechanism, with what a module does."""

from __future__ import annotations

import re
from pathlib import Path

from hsmvisord import ck
from hsmvisord.crypto import mechanisms
from hsmvisord.face import cryptography
from hsmvisord.face.face import HANDLERS
from hsmvisord.wire.calls import Call

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
}
#: Functions that answer one code in any slot, and why.
_ALWAYS = {
    "C_GetOperationState": "CKR_STATE_UNSAVEABLE",
    "C_SetOperationState": "CKR_SAVED_STATE_INVALID",
    "C_GetFunctionStatus": "CKR_FUNCTION_NOT_PARALLEL",
    "C_CancelFunction": "CKR_FUNCTION_NOT_PARALLEL",
}


def functions() -> list[str]:
    """Returns the names of both function lists, in their order."""
    return re.findall(r"F\((C_\w+),", (ROOT / "pkcs11_shim/include/pkcs11.h").read_text())


def _not_in_library() -> set[str]:
    return set(re.findall(r"^NOT_SUPPORTED\((C_\w+)", (ROOT / "pkcs11_shim/src/interface.c").read_text(), re.MULTILINE))


def _call(function: str) -> Call | None:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", function.removeprefix("C_")).upper()
    return Call.__members__.get(name)


def _does(function: str) -> tuple[str, str]:
    """What slot 0 and slot 1 answer."""
    call = _call(function)
    if function in _not_in_library() or (call is not None and HANDLERS.get(call) is cryptography.not_supported):
        return ("CKR_FUNCTION_NOT_SUPPORTED",) * 2
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
    return ", ".join(name for flag, name in _FLAGS.items() if flag & table[mechanism].flags) if mechanism in table else "-"


def text() -> str:
    lines = ["# PKCS#11: functions and mechanisms", "", "Made from the code by `scripts/generate`; a test holds it to it.", ""]
    lines += ["Slot 0 has what was delivered. Slot 1 is the guest's own token, where the operator allows it (`--guest-token`).", ""]
    lines += ["## Functions", "", "| function | slot 0 | slot 1 |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(_does(name))} |" for name in functions()]
    lines += ["", "## Mechanisms", "", "Sizes are what C_GetMechanismInfo tells: bits, or bytes for secret keys and lattices.", ""]
    lines += ["What says (legacy) is there where the module's policy says it too (`--legacy`). So are P-192, curves by explicit"]
    lines += ["parameters that are a named curve's, and public RSA keys of 512 to 1023 bits.", ""]
    lines += ["| mechanism | keys | sizes | slot 0 | slot 1 |", "|---|---|---|---|---|"]
    named = sorted((ck.mechanism_name(mechanism), mechanism, row) for mechanism, row in mechanisms.GUEST_TABLE.items())
    lines += [_row(mechanism, row) for _, mechanism, row in named]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text())
