"""A QEMU guest that has a module as its TPM: QEMU's emulator backend, whose other end is the module's.

A TPM is there from a machine's start to its end: firmware measures into it, so QEMU has no way to plug one in later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

DRIVERS = ("tpm-crb", "tpm-tis")  #: TCG PC Client Platform TPM Profile: CRB and FIFO interface; Linux and Windows drive both
_PREFIX = "hsmvisor-tpm-"


@dataclass(frozen=True)
class TpmPlug:
    """A module as QEMU is told of it."""

    name: str
    socket: str

    @property
    def id(self) -> str:
        """Of the device, its backend and its chardev."""
        return _PREFIX + self.name


def arguments(ours: TpmPlug, driver: str = DRIVERS[0]) -> list[str]:
    """Returns the arguments that go beside the guest's own."""
    path = ours.socket.replace(",", ",,")
    return [
        "-chardev",
        f"socket,id={ours.id}-socket,path={path}",
        "-tpmdev",
        f"emulator,id={ours.id},chardev={ours.id}-socket",
        "-device",
        f"{driver},tpmdev={ours.id}",
    ]


def libvirt_xml(ours: TpmPlug, driver: str = DRIVERS[0]) -> str:
    """Returns the part of a domain that makes the module its TPM (libvirt 9.0 and later: backend type external)."""
    path = json.dumps(ours.socket)
    lines = [
        "<domain type='kvm'>",
        "  <devices>",
        f"    <tpm model='{driver}'>",
        "      <backend type='external'>",
        f"        <source type='unix' mode='connect' path={path}/>",
        "      </backend>",
        "    </tpm>",
        "  </devices>",
        "</domain>",
    ]
    return "\n".join(lines) + "\n"
