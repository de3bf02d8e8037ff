"""A USB bus for libhsmvisor-pkcs11.so on a machine that has none: directories as sysfs and /dev have them, and a libusb of our own.

The library is built for it: where one looks for devices is fixed in it, and the one that is installed cannot be told another place.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hsmvisord.limits import USB_CHANNELS as CHANNELS
from hsmvisord.wire.usb_descriptors import Descriptors, Identity
from support.cryptoki import REPOSITORY

SHIM = REPOSITORY / "pkcs11_shim"
_FLOCK = struct.Struct("hhqqi4x")  #: fcntl(2): type, whence, start, length, pid

PROLOGUE = '''
import ctypes, os, signal, subprocess, sys, threading, time
from ctypes import byref, c_ulong
from pathlib import Path
from hsmvisord import ck
from support.cryptoki import CkInitializeArgs, Cryptoki
from support.scripted_module import KEY, signature
p11 = Cryptoki()

def threads(wanted=None):
    """Waits a little for what is wanted: one that was joined may be listed a moment longer."""
    end = time.monotonic() + 3
    while True:
        found = []
        for task in Path("/proc/self/task").iterdir():
            try:
                found.append((task / "comm").read_text().strip())
            except OSError:
                pass
        if wanted is None or sorted(found) == wanted or time.monotonic() > end:
            return sorted(found)
        time.sleep(0.01)

ALONE, CARRIED = ["python"], ["hsmvisor-usb", "python"]

def signs(session, data=b"x"):
    assert p11.sign_init(session, KEY) == 0
    assert p11.sign(session, data) == (0, signature(data))
'''


# ---- what is built ---------------------------------------------------------------------------------------------------------


def _run(*command: str | Path) -> None:
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert made.returncode == 0, made.stdout


@dataclass(frozen=True)
class Built:
    """`library` finds its libusb by LD_LIBRARY_PATH, in one of these directories, and its devices below `root`."""

    root: Path
    library: Path
    libusb: Path  #: as Debian 12's: contexts that find no devices by themselves are the process's affair
    newer: Path  #: as 1.0.27


def build(directory: Path, sanitizer: str = "") -> Built:
    """Builds both; takes some seconds."""
    library, root = directory / "libhsmvisor-pkcs11.so", directory / "usb"
    where = f"""-DUSB_DEVICES='"{root}/devices"' -DUSB_NODES='"{root}/bus"'"""
    sanitize = [f"SANITIZE={sanitizer}"] if sanitizer else []
    _run("make", "-s", "-C", SHIM, f"BUILD={directory}", f"CFLAGS=-O1 -g {where}", *sanitize, library)
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{SHIM}/src"]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    built = Built(root, library, directory / "1.0.26", directory / "1.0.27")
    for path, more in ((built.libusb, []), (built.newer, ["-DNEWER"])):
        path.mkdir()
        source = REPOSITORY / "tests/support/fake_libusb.c"
        _run("cc", *flags, *more, "-Wl,-soname,libusb-1.0.so.0", "-o", path / "libusb-1.0.so.0", source, "-pthread")
    return built


@functools.cache
def built() -> Built:
    """The one of this run of the tests."""
    directory = Path(tempfile.mkdtemp(prefix="hsmu."))
    directory.chmod(0o755)
    atexit.register(shutil.rmtree, directory)
    return build(directory)


# ---- descriptors (USB 2.0, 9.6) ----------------------------------------------------------------------------------------------


def interface(number: int, alternate: int, kind: tuple[int, int, int], endpoints: Sequence[bytes] = ()) -> bytes:
    return bytes((9, 4, number, alternate, len(endpoints), *kind, 0)) + b"".join(endpoints)


def endpoint(address: int, attributes: int = 2, size: int = 512) -> bytes:
    return struct.pack("<BBBBHB", 7, 5, address, attributes, size, 0)


CHANNEL = (0xFF, 0x48, 0x01)
CCID = interface(0, 0, (0x0B, 0, 0), [endpoint(0x81), endpoint(0x01), endpoint(0x82, 3, 8)])


def channel(number: int) -> bytes:
    both = [endpoint(0x80 | (2 + number)), endpoint(2 + number)]
    return interface(number, 0, CHANNEL) + interface(number, 1, CHANNEL, both)


def configuration(interfaces: bytes, count: int) -> bytes:
    return struct.pack("<BBHBBBBB", 9, 2, 9 + len(interfaces), count, 1, 0, 0x80, 50) + interfaces


def device(configurations: bytes, count: int = 1) -> bytes:
    return struct.pack("<BBHBBBBHHHBBBB", 18, 1, 0x200, 0, 0, 0, 64, 0x1209, 1, 0x100, 1, 2, 3, count) + configurations


def with_channels(count: int) -> bytes:
    return device(configuration(CCID + b"".join(channel(n) for n in range(1, count + 1)), count + 1))


def module_descriptors() -> bytes:
    """What a module tells of itself."""
    described = Descriptors(Identity(0x1209, 0x0001, "VSM-1"))
    return described.device + described.configuration


# ---- the bus ---------------------------------------------------------------------------------------------------------------


@dataclass
class UsbBus:
    """One at a time for a library: it begins with a mouse alone."""

    made: Built = field(default_factory=built)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        shutil.rmtree(self.made.root, ignore_errors=True)
        self.devices.mkdir(parents=True)
        (self.nodes / "001").mkdir(parents=True)
        self.plug("a mouse", "", device(configuration(interface(0, 0, (3, 1, 2), [endpoint(0x81, 3, 8)]), 1)), "1-7")
        (self.devices / "1-7:1.0").mkdir()

    @property
    def devices(self) -> Path:
        return self.made.root / "devices"

    @property
    def nodes(self) -> Path:
        return self.made.root / "bus"

    def plug(self, serial: str | None, socket: Path | str, descriptors: bytes | None = None, port: str = "1-1") -> Path:
        """Adds a device with the next number, whose channels lead to the module at `socket`; returns its node."""
        number = next(self._numbers)
        node = self.nodes / f"001/{number:03}"
        node.write_text(str(socket))
        new = self.devices / f".{port}"
        new.mkdir()
        (new / "descriptors").write_bytes(module_descriptors() if descriptors is None else descriptors)
        (new / "busnum").write_text("1\n")
        (new / "devnum").write_text(f"{number}\n")
        if serial is not None:
            (new / "serial").write_text(f"{serial}\n")
        new.rename(self.devices / port)
        return node

    def unplug(self, port: str = "1-1") -> None:
        number = int((self.devices / port / "devnum").read_text())
        (self.nodes / f"001/{number:03}").unlink()
        shutil.rmtree(self.devices / port)

    def environment(self, address: str = "usb:", libusb: Path | None = None) -> dict[str, str]:
        """For programs that use the library."""
        path = os.pathsep.join(str(REPOSITORY / name) for name in ("tests", "daemon", "proto"))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HSMVISOR_PKCS11")}
        return inherited | {
            "PYTHONPATH": path,
            "HSMVISOR_TEST_LIBRARY": str(self.made.library),
            "HSMVISOR_PKCS11_ADDRESS": address,
            "LD_LIBRARY_PATH": str(libusb or self.made.libusb),
        }

    def run(self, script: str, address: str = "usb:", libusb: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of its own with `p11` at hand."""
        program = PROLOGUE + textwrap.dedent(script)
        environment = self.environment(address, libusb) | more
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def start(self, script: str, address: str = "usb:") -> subprocess.Popen[str]:
        """The same while the test goes on."""
        command, pipe = [sys.executable, "-c", PROLOGUE + textwrap.dedent(script)], subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(address), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def good(self, script: str, address: str = "usb:", libusb: Path | None = None, **more: str) -> str:
        result = self.run(script, address, libusb, **more)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


# ---- claims ----------------------------------------------------------------------------------------------------------------


def claimed(node: Path) -> set[int]:
    """Which interfaces of a device some process has claimed."""
    found = set()
    with node.open("rb") as file:
        for number in range(1, CHANNELS + 1):
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
            if _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                found.add(number)
    return found


@contextlib.contextmanager
def claim(node: Path, interfaces: Sequence[int]) -> Iterator[None]:
    """Claims interfaces as other processes would."""
    with node.open("r+b") as file:
        for number in interfaces:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        yield
