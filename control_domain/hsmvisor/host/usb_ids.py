"""Which vendor and product ids a module's USB device has.

pcscd on Linux finds a reader by its ids alone: libccid has a list of them, and looks at no interface class.  So there are two ways:

- Ids of our own, and an entry for them in the guest's libccid list, which `hsmvisor-ccid-entry` makes (it comes with the guest's
  library; control_domain/docs/usb.md).  This is the default: the device says what it is.  The ids are those that pid.codes
  keeps for tests, until the project has a pair of its own; they are the host's to set for each module.
- Ids that libccid lists already (`usb_id` of a module's card, as 20a0:42d4).  An image without our entry works then, but the device
  says that it is another maker's: an operator who may use these ids asks for them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hsmvisor.serving.errors import Invalid

_ID = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4})")


@dataclass(frozen=True)
class UsbId:
    vendor: int
    product: int

    def __str__(self) -> str:
        return f"{self.vendor:04x}:{self.product:04x}"


OWN = UsbId(0x1209, 0x0001)
YUBIKEY = UsbId(0x1050, 0x0404)  #: of a YubiKey with its CCID interface alone: ykcs11 and ykman look for it


def parse(text: str) -> UsbId:
    """Raises Invalid."""
    match = _ID.fullmatch(text.lower())
    if match is None:
        raise Invalid("USB_ID", f"a USB id is VVVV:PPPP in hexadecimal, as {OWN}, not {text!r:.20}")
    return UsbId(int(match[1], 16), int(match[2], 16))


def chosen(asked: str, yubikey: bool) -> UsbId:
    """Returns the ids of a card with these settings; `asked` "": the default."""
    if asked:
        return parse(asked)
    return YUBIKEY if yubikey else OWN
