"""Types of events in a log of measured boot, and what people may be told of one (TCG PC Client Platform Firmware Profile 1.05,
10.4.1).  What an event says of itself comes from the guest."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

MAX_DESCRIPTION = 200  #: characters
NO_ACTION = 0x03

#: Table 14; and what older firmware measures.
_NAMES = {
    0x00: "EV_PREBOOT_CERT",
    0x01: "EV_POST_CODE",
    NO_ACTION: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR",
    0x05: "EV_ACTION",
    0x06: "EV_EVENT_TAG",
    0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION",
    0x09: "EV_CPU_MICROCODE",
    0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES",
    0x0C: "EV_COMPACT_HASH",
    0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA",
    0x0F: "EV_NONHOST_CODE",
    0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO",
    0x12: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x13: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}


def name(kind: int) -> str:
    """As the specification has it, or the number."""
    return _NAMES.get(kind, f"{kind:#010x}")


def described(kind: int, untrusted_data: bytes) -> str:
    """At most MAX_DESCRIPTION characters of printable ASCII; the number of bytes where nothing better is known."""
    describe = _DESCRIBE.get(kind)
    text = _clean(describe(untrusted_data)) if describe else ""
    return text or f"{len(untrusted_data)} bytes"


def _clean(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]+", "?", text.rstrip("\0"))[:MAX_DESCRIPTION].strip()


def _text(data: bytes) -> str:
    return data[: 4 * MAX_DESCRIPTION].decode("utf-8", "replace")


def _wide(data: bytes) -> str:
    """Of CHAR16, as a version of edk2's is."""
    return data[: 2 * MAX_DESCRIPTION].decode("utf-16-le", "replace")


def _variable(data: bytes) -> str:
    """UEFI_VARIABLE_DATA: GUID, length of the name in characters, length of the data; the name, the data."""
    if len(data) < 32:
        return ""
    (characters,) = struct.unpack_from("<Q", data, 16)
    return _wide(data[32 : 32 + 2 * min(characters, MAX_DESCRIPTION)])


def _separator(data: bytes) -> str:
    """All bits alike: the firmware hands over; anything else: it failed (3.3.2.2)."""
    return "end of the firmware's part" if data in (bytes(4), b"\xff" * 4) else "an error of the firmware"


def _tagged(data: bytes) -> str:
    """TCG_PCClientTaggedEvent: its id, and bytes of whoever gave it; Linux and systemd have a text there."""
    if len(data) < 8:
        return ""
    ident, size = struct.unpack_from("<II", data)
    told = data[8 : 8 + min(size, 4 * MAX_DESCRIPTION)]
    wide = len(told) % 2 == 0 and told[1::2].count(0) * 2 > len(told) // 2
    text = _wide(told) if wide else _text(told)
    return f"{ident:#010x} {text}" if text.rstrip("\0").isprintable() else f"{ident:#010x}, {size} bytes"


def _blob(data: bytes) -> str:
    """UEFI_PLATFORM_FIRMWARE_BLOB2 and UEFI_HANDOFF_TABLE_POINTERS2: one byte's number of characters, and these."""
    return _text(data[1 : 1 + data[0]]) if data else ""


def _application(data: bytes) -> str:
    """UEFI_IMAGE_LOAD_EVENT: four numbers of 8 bytes, the last of them the length of a device path; the files in that (UEFI 2.9,
    10.3.5.4: a node has type, subtype, and its length with these four bytes)."""
    if len(data) < 32:
        return ""
    (size,) = struct.unpack_from("<Q", data, 24)
    path, names = data[32 : 32 + min(size, 4096)], list[str]()
    while len(path) >= 4:
        kind, length = struct.unpack_from("<HH", path)
        if length < 4:
            break
        if kind == 0x0404:
            names.append(_wide(path[4:length]).rstrip("\0"))
        path = path[length:]
    return "".join(names)


_DESCRIBE: dict[int, Callable[[bytes], str]] = {
    **dict.fromkeys((0x01, 0x05, 0x0D, 0x80000007), _text),
    **dict.fromkeys((0x80000001, 0x80000002, 0x8000000C, 0x800000E0), _variable),
    **dict.fromkeys((0x80000003, 0x80000004, 0x80000005), _application),
    **dict.fromkeys((0x13, 0x8000000A, 0x8000000B), _blob),
    0x04: _separator,
    0x06: _tagged,
    0x08: _wide,
}
