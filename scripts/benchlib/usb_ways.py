"""The ways to a module, and what is asked by each of them, on the host and in a guest."""

from __future__ import annotations

from typing import NamedTuple

from hsmvisord import limits
from support.usb_guest import USBIP, USBREDIR

PLAIN, QEMU = "plain", "qemu"  #: without USB, and QEMU's own card
HOST, GUEST = "host", "guest"
SMALL, LARGE = 32, limits.MAX_RANDOM  #: bytes of random numbers
SLOTS = {"p256": ("9a", "01"), "rsa2048": ("9e", "04")}  #: by key, where it is on a card: PIV's name and OpenSC's id
SELECT = bytes.fromhex("00A404000BA00000030800001000010000")  #: NIST SP 800-73-4, part 2, 3.1.1
DISCOVERY = bytes.fromhex("00CB3FFF035C017E00")  #: 3.1.2: GET DATA of the discovery object
TITLES = {
    HOST: {USBREDIR: "usbredir", USBIP: "USB/IP", PLAIN: "unix socket"},
    GUEST: {USBREDIR: "usbredir", USBIP: "USB/IP", PLAIN: "vsock", QEMU: "QEMU's card"},
}


class Row(NamedTuple):
    """One call.  Its figures are set beside those of call `plain` without USB, and of call `qemu` with QEMU's card."""

    title: str
    plain: str
    qemu: str = ""


ROWS = {
    HOST: {
        "apdu": Row("APDU: the discovery object", "small"),
        "small": Row("channel: C_GenerateRandom, 32 bytes", "small"),
        "large": Row("channel: C_GenerateRandom, 64 KiB", "large"),
        "card-p256": Row("P-256 signature by PIV", "p256"),
        "p256": Row("P-256 signature over a channel", "p256"),
    },
    GUEST: {
        "select": Row("APDU through pcscd: SELECT", "small", "select"),
        "apdu": Row("APDU through pcscd: the discovery object", "small", "select"),
        "small": Row("channel by pyusb: C_GenerateRandom, 32 bytes", "small", "select"),
        "large": Row("channel by pyusb: C_GenerateRandom, 64 KiB", "large"),
        "card-p256": Row("P-256 signature, OpenSC's library", "p256"),
        "p256": Row("P-256 signature, our library", "p256"),
        "card-rsa2048": Row("RSA-2048 signature, OpenSC's library", "rsa2048", "card-rsa2048"),
        "rsa2048": Row("RSA-2048 signature, our library", "rsa2048", "card-rsa2048"),
    },
}
#: by which ways it is asked
WAYS = {
    (HOST, "apdu"): (USBREDIR, USBIP),
    (HOST, "small"): (USBREDIR, USBIP, PLAIN),
    (HOST, "large"): (USBREDIR, USBIP, PLAIN),
    (HOST, "card-p256"): (USBREDIR, USBIP),
    (HOST, "p256"): (USBREDIR, USBIP, PLAIN),
    (GUEST, "select"): (USBREDIR, USBIP, QEMU),
    (GUEST, "apdu"): (USBREDIR, USBIP),
    (GUEST, "small"): (USBREDIR, USBIP, PLAIN),
    (GUEST, "large"): (USBREDIR, USBIP, PLAIN),
    (GUEST, "card-p256"): (USBREDIR, USBIP),
    (GUEST, "p256"): (USBREDIR, USBIP, PLAIN),
    (GUEST, "card-rsa2048"): (USBREDIR, USBIP, QEMU),
    (GUEST, "rsa2048"): (USBREDIR, USBIP, PLAIN),
}


def turned(where: str, call: str, number: int) -> tuple[str, ...]:
    """The ways of a call, each round another one first."""
    ways = WAYS[where, call]
    turn = number % len(ways)
    return ways[turn:] + ways[:turn]
