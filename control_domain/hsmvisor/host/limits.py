"""The host's limits, and the one place where names and sizes that its callers send are checked.

Those of every service are in serving/limits.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hsmvisor.serving.errors import Invalid
from hsmvisor.serving.limits import MAX_UNIX_PATH

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_MATERIAL_NAME = 64  #: characters
MAX_PIN = 255  #: bytes
OWN_PINS = range(4, 65)  #: bytes of a PIN that a guest sets (hsmvisord/keystore/pin.py)
ROOT_SIZE = 32  #: bytes of a raw Ed25519 public key

MAX_SESSIONS = 65536  #: of one module
MAX_CONNECTIONS = 1024  #: of one module
MOST_IN_POLICY = 1_000_000  #: bits, operations a second, operations at once

MAX_RECORD_NAME = 255  #: characters of the name of one sealed record
MAX_MODULE_STATE = 256 * 1024 * 1024  #: bytes of all sealed records of one module
LOAD_PART = 4 * 1024 * 1024  #: bytes of sealed records in one LoadState

MAX_REPORT_ROWS = 512  #: rows that are taken from one worker's statistics
MAX_ENROLMENTS = 16  #: one-time secrets that are open at a time
MAX_ENROLMENT_ATTEMPTS = 10  #: wrong proofs until a one-time secret is void
MAX_ENROLMENT_LIFETIME = 7 * 86400  #: seconds
DEFAULT_ENROLMENT_LIFETIME = 3600  #: seconds

MAX_SAID = 256  #: characters of one line that an HSM's helper or library says
HELPER_LINES = 20  #: of them that are logged at once; one a second after that

VSOCK_PORT = 9111  #: at which a guest reaches its module, CID 2; as in hsmvisord/limits.py
FIRST_CID = 1024  #: module number n is plugged into a guest of CID FIRST_CID + n
MAX_DEVICE_STATE = 64 * 1024  #: bytes that a worker may have kept of its device
MAX_TPM_STATE = 1024 * 1024  #: bytes of a TPM's sealed state
MAX_USB_SHOWN = 4096  #: bytes that a worker may have kept of what its card has shown
MAX_CARD_SLOTS = 24  #: of a card: 9a, 9c, 9d, 9e, 82-95
USB_TURN_SECONDS = 0.5  #: that an importer waits for the one before it to be gone; only one waits
USBIP_BACKLOG = 4  #: connections at a USB/IP listener that were not accepted yet
MAX_USBIP_PEERS = 16  #: addresses and networks that may import a device
MAX_QMP_LINE = 1024 * 1024  #: bytes of one line of QEMU's monitor
QMP_EVENTS = 1024  #: events of QEMU's monitor that are kept while another is waited for
MAX_HYBRID_PATH = MAX_UNIX_PATH - len(f"_{VSOCK_PORT}")  #: bytes of a monitor's vsock path (hybrid.py)
MAX_PASSING = 256  #: connections that wait for one module's worker to take them (intake.py)
MAX_BUS = 64  #: characters of the name of a guest's bus
_BUS = re.compile(rf"[A-Za-z][A-Za-z0-9._-]{{0,{MAX_BUS - 1}}}")
_MEMORY = re.compile(r"[1-9][0-9]{0,7}[MG]")
MAX_COMMAND_LINE = 64 * 1024  #: characters of a QEMU command line to check

MAX_GUESTS = 1000  #: registered guests of one host
GUEST_KINDS = ("VM", "server", "database", "volume")
MAX_OWNER = 128  #: characters
MAX_ATTRIBUTES = 64  #: of one guest
MAX_ATTRIBUTE_KEY = 64  #: characters
MAX_ATTRIBUTE_VALUE = 256  #: characters
_ATTRIBUTE_KEY = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_ATTRIBUTE_KEY}}}")

MAX_MANAGERS = 16  #: addresses of one management plane
MAX_ADDRESS = 261  #: characters of host:port
MAX_AUTHORITIES = 16  #: certificates of a chain, or that are believed
MAX_COMMANDS = 1000  #: of a manager that wait or run; what is beyond is given again
MAX_RESULTS = 200  #: of commands in one exchange
MAX_REPORTED = 500  #: guests in one exchange that does not tell all
MAX_REPORTED_MATERIALS, MAX_REPORTED_GENERATIONS = 256, 64  #: of one module, of one material


_PCRS = range(24)
DEFAULT_PCRS = (*range(10), 14)  #: firmware, boot loader, kernel and Secure Boot's own; shim's (UAPI Linux TPM PCR registry)
QUOTE_NONCE = range(8, 65)  #: bytes


def quote(untrusted_nonce: bytes, untrusted_pcrs: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
    """Returns a nonce and PCRs that may be quoted, ascending; raises Invalid."""
    if len(untrusted_nonce) not in QUOTE_NONCE:
        raise Invalid("NONCE", f"a nonce has {QUOTE_NONCE.start} to {QUOTE_NONCE.stop - 1} bytes, not {len(untrusted_nonce)}")
    pcrs = tuple(sorted(set(untrusted_pcrs))) or DEFAULT_PCRS
    if len(untrusted_pcrs) > len(_PCRS) or any(pcr not in _PCRS for pcr in pcrs):
        raise Invalid("PCRS", f"PCRs are 0 to {_PCRS.stop - 1}, each once")
    return untrusted_nonce, pcrs


def module_name(untrusted_name: str) -> str:
    """Returns a valid module name; raises Invalid."""
    if not NAME.fullmatch(untrusted_name):
        raise Invalid("NAME", "a module's name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
    return untrusted_name


def guest_name(untrusted_name: str) -> str:
    """Returns a valid guest name; raises Invalid."""
    if not NAME.fullmatch(untrusted_name):
        raise Invalid("NAME", "a guest's name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
    return untrusted_name


def guest_kind(untrusted_kind: str) -> str:
    """Returns a kind of guest, the first one for ""; raises Invalid."""
    if untrusted_kind and untrusted_kind not in GUEST_KINDS:
        raise Invalid("KIND", f"a guest's kind is one of {', '.join(GUEST_KINDS)}")
    return untrusted_kind or GUEST_KINDS[0]


def owner(untrusted_owner: str) -> str:
    """Returns a valid owner; raises Invalid."""
    if not 1 <= len(untrusted_owner) <= MAX_OWNER or not untrusted_owner.isprintable():
        raise Invalid("OWNER", f"a guest has an owner of 1-{MAX_OWNER} printable characters")
    return untrusted_owner


def attributes(untrusted_attributes: Mapping[str, str]) -> dict[str, str]:
    """Returns a guest's attributes, sorted; raises Invalid."""
    if len(untrusted_attributes) > MAX_ATTRIBUTES:
        raise Invalid("ATTRIBUTES", f"a guest has at most {MAX_ATTRIBUTES} attributes, these are {len(untrusted_attributes)}")
    for key, value in untrusted_attributes.items():
        if not _ATTRIBUTE_KEY.fullmatch(key):
            raise Invalid("ATTRIBUTE_KEY", f"an attribute's name is 1-{MAX_ATTRIBUTE_KEY} of A-Z a-z 0-9 . _ -")
        if len(value) > MAX_ATTRIBUTE_VALUE or not value.isprintable():
            raise Invalid("ATTRIBUTE_VALUE", f"the value of attribute {key} has at most {MAX_ATTRIBUTE_VALUE} printable characters")
    return dict(sorted(untrusted_attributes.items()))


def material_name(untrusted_name: str) -> str:
    """Returns a name that a material may have; raises Invalid."""
    if not 1 <= len(untrusted_name) <= MAX_MATERIAL_NAME or not untrusted_name.isprintable():
        raise Invalid("NAME", f"a material's name is 1-{MAX_MATERIAL_NAME} printable characters")
    return untrusted_name


def root(untrusted_root: bytes) -> bytes:
    if len(untrusted_root) != ROOT_SIZE:
        raise Invalid("ROOT", f"root is a raw Ed25519 public key of {ROOT_SIZE} bytes, this has {len(untrusted_root)}")
    return untrusted_root


def pin(untrusted_pin: bytes) -> bytes:
    if len(untrusted_pin) > MAX_PIN:
        raise Invalid("PIN", f"a PIN has at most {MAX_PIN} bytes")
    return untrusted_pin


def qmp_path(untrusted_path: str) -> str:
    """Returns a path that a QMP socket may have; raises Invalid."""
    if not untrusted_path.startswith("/") or not untrusted_path.isprintable():
        raise Invalid("QMP_PATH", "the path of a QMP socket is absolute: as in -qmp unix:PATH,server=on,wait=off")
    if len(os.fsencode(untrusted_path)) > MAX_UNIX_PATH:
        raise Invalid("QMP_PATH", f"the path of a QMP socket has at most {MAX_UNIX_PATH} bytes")
    return untrusted_path


def hybrid_path(untrusted_path: str) -> str:
    """Returns a path that a monitor's vsock device may have; raises Invalid."""
    if not untrusted_path.startswith("/") or untrusted_path.endswith("/") or not untrusted_path.isprintable():
        raise Invalid("HYBRID_PATH", "the path of a monitor's vsock is absolute: as its uds_path, seen from the host")
    if len(os.fsencode(untrusted_path)) > MAX_HYBRID_PATH:
        longest = f"{MAX_HYBRID_PATH} bytes: with _{VSOCK_PORT} it is a unix socket's"
        raise Invalid("HYBRID_PATH", f"the path of a monitor's vsock has at most {longest}")
    return untrusted_path


def bus(untrusted_bus: str) -> str:
    """Returns the name of a bus of QEMU, "" for none; raises Invalid."""
    if untrusted_bus and not _BUS.fullmatch(untrusted_bus):
        raise Invalid("BUS", f"a bus is named as in QEMU's id=: a letter, then letters, digits, - . _, at most {MAX_BUS} in all")
    return untrusted_bus


def memory(untrusted_memory: str) -> str:
    """Returns a size of guest memory as QEMU's -m takes it; raises Invalid."""
    if not _MEMORY.fullmatch(untrusted_memory):
        raise Invalid("MEMORY", "memory is a number with M or G, as in 512M or 4G")
    return untrusted_memory


def command_line(untrusted_text: str) -> str:
    if len(untrusted_text) > MAX_COMMAND_LINE:
        raise Invalid("COMMAND_LINE", f"a command line has at most {MAX_COMMAND_LINE} characters")
    return untrusted_text
