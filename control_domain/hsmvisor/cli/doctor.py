"""hsmvisor doctor: is this machine ready to be a host?  Works without a running service."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from cryptography import x509
from hsmvisor.cli import doctor_hsm
from hsmvisor.cli.context import FAILURE, Command, Context, pass_context, table
from hsmvisor.cli.finding import FAIL, OK, WARN, Finding
from hsmvisor.host import config as configuration
from hsmvisor.host import swap
from hsmvisor.host.config import Config
from hsmvisor.serving.errors import Broken
from hsmvisor_rpc.confine import capabilities, landlock

BUILT = 1_767_225_600  #: 2026-01-01: a clock before this is wrong
MIN_FILES = 4096
MIN_CRYPTOGRAPHY = 50  #: the first that signs without the interpreter's lock for every kind of key
MIN_LOCKED = 1 << 30  #: bytes; as in hsmvisord/memory.py
SOON = 14 * 86400  #: seconds before a certificate's end from which on it is worth a word


def _seccomp() -> Finding:
    text = Path("/proc/self/status").read_text()
    if "Seccomp:" not in text:
        return Finding("seccomp", FAIL, "not in this kernel", "use a kernel with CONFIG_SECCOMP_FILTER")
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return Finding("seccomp", FAIL, "libseccomp.so.2 is missing", "apt install libseccomp2")
    return Finding("seccomp", OK, "kernel and library")


def _landlock() -> Finding:
    abi = landlock.abi()
    if abi < 1:
        return Finding("Landlock", WARN, "not in this kernel", "workers run without it; Debian 12's kernel has it")
    return Finding("Landlock", OK, f"ABI {abi}")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "Python", OK if sys.version_info >= (3, 11) else FAIL, version, "" if sys.version_info >= (3, 11) else "3.11 or newer"
    )


def _libcrypto() -> Finding:
    try:
        ctypes.CDLL("libcrypto.so.3")
    except OSError:
        return Finding("libcrypto", FAIL, "libcrypto.so.3 is missing", "apt install libssl3")
    return Finding("libcrypto", OK, "libcrypto.so.3")


def _libtpms() -> Finding:
    try:
        ctypes.CDLL("libtpms.so.0")
    except OSError:
        return Finding("libtpms", WARN, "libtpms.so.0 is missing", "apt install libtpms0, if modules are to be TPMs")
    return Finding("libtpms", OK, "libtpms.so.0")


def _clock() -> Finding:
    if time.time() < BUILT:
        return Finding("clock", FAIL, time.strftime("%Y-%m-%d %H:%M"), "set the clock: certificates and commands have times")
    if not Path("/run/systemd/timesync/synchronized").exists() and not shutil.which("chronyc") and not shutil.which("ntpq"):
        return Finding("clock", WARN, "no time synchronisation seen", "apt install systemd-timesyncd")
    return Finding("clock", OK, "plausible, synchronised")


def _packages() -> Finding:
    wanted = [re.match(r"[\w.-]+", row) for row in importlib.metadata.requires("hsmvisor") or () if "extra ==" not in row]
    missing = []
    for found in filter(None, wanted):
        try:
            importlib.metadata.version(found[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(found[0])
    if missing:
        return Finding("packages", FAIL, f"not installed: {', '.join(missing)}", "pip install hsmvisor again, in this environment")
    version = importlib.metadata.version("cryptography")
    if int(version.partition(".")[0]) < MIN_CRYPTOGRAPHY:
        return Finding("packages", FAIL, f"cryptography {version}", f"pip install 'cryptography >= {MIN_CRYPTOGRAPHY}'")
    return Finding("packages", OK, f"all that it needs; cryptography {version}")


def _configuration(path: Path | None) -> tuple[Finding, Config]:
    """A configuration that cannot be used is a finding, and the rest looks at the defaults."""
    try:
        found = configuration.load(path)
    except Broken as error:
        return Finding("configuration", FAIL, error.detail, "mend it; hsmvisor-host --check looks again"), Config()
    shown = path or configuration.DEFAULT_PATH
    return Finding("configuration", OK, str(shown) if shown.exists() else "all defaults (no file is needed)"), found


def _certificate(name: str, path: str) -> Finding:
    try:
        first = x509.load_pem_x509_certificates(Path(path).read_bytes())[0]
    except (OSError, ValueError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a certificate in PEM"
        return Finding(name, FAIL, f"{path}: {why}", f"see the section [{name.split()[0]}] of the configuration")
    left = first.not_valid_after_utc.timestamp() - time.time()
    until = f"{path} is valid until {first.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    return Finding(name, FAIL if left <= 0 else WARN if left < SOON else OK, until, "renew it" if left < SOON else "")


def _directory(place: Path, name: str) -> Finding:
    path = str(place)
    if not place.exists():
        parent = next(p for p in place.parents if p.exists())
        good = os.access(parent, os.W_OK)
        return Finding(
            name,
            OK if good else WARN,
            f"{path} is made at the first start",
            "" if good else "start hsmvisor-host as root, or give it directories of its own (--config)",
        )
    mode = place.stat().st_mode & 0o777
    if name == "state" and mode & 0o077:
        return Finding(name, FAIL, f"{path} has mode {mode:o}", f"chmod 700 {path}")
    if not os.access(place, os.W_OK):
        return Finding(name, WARN, f"{path} is not yours to write", "run as root to see what the service sees")
    free = shutil.disk_usage(place).free
    if name == "state" and free < 100 * 2**20:
        return Finding(name, FAIL, f"{free // 2**20} MiB free in {path}", "make room: changes are refused when the disk is full")
    return Finding(name, OK, path)


def _files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
        return Finding("open files", WARN, f"limit {hard}", "LimitNOFILE=65536 in the unit")
    return Finding("open files", OK, f"limit {hard}")


def _swap() -> Finding:
    if used := swap.areas():
        return Finding("swap", WARN, ", ".join(used), "encrypt swap (random key), or keep all of the host out by MemorySwapMax=0")
    return Finding("swap", OK, "none")


def _swap_control() -> Finding:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if controllers.exists() and "memory" in controllers.read_text().split():
        return Finding("swap control", OK, "cgroup v2 with memory")
    return Finding(
        "swap control", WARN, "no memory in cgroup v2", "workers lock their heaps and stacks; what else they have may be swapped"
    )


def _locked_memory() -> Finding:
    """What a service started from here would have: as root it may raise the limit, or lock without one."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    held = capabilities.permitted()
    if hard == resource.RLIM_INFINITY or hard >= MIN_LOCKED or capabilities.SYS_RESOURCE in held:
        return Finding("locked memory", OK, "enough for every worker")
    if capabilities.IPC_LOCK in held:
        return Finding(
            "locked memory", OK, f"limit {hard >> 10} KiB, and CAP_IPC_LOCK: what a worker's heap grows beyond its room is not"
        )
    return Finding(
        "locked memory",
        WARN,
        f"limit {hard >> 10} KiB",
        "LimitMEMLOCK=infinity in the unit, or ulimit -l: or else keys may be swapped",
    )


def _core_dumps() -> Finding:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return Finding("core dumps", OK, f"workers make none (pattern here: {pattern or 'none'})")


def _vsock(config: Config) -> Finding:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        lacking = "" if Path("/dev/vhost-vsock").exists() else "no /dev/vhost-vsock"
    except OSError:
        lacking = "no AF_VSOCK in this kernel"
    if not lacking:
        return Finding("vsock", OK, f"AF_VSOCK and /dev/vhost-vsock; guests.vsock is {'on' if config.guests.vsock else 'off'}")
    if config.guests.vsock:
        return Finding("vsock", WARN, f"{lacking}, and guests.vsock is on", "modprobe vhost_vsock, or set guests.vsock = false")
    return Finding("vsock", OK, f"{lacking}: needed for guests.vsock alone, which is off")


def _privilege() -> Finding:
    if os.geteuid() == 0:
        return Finding("privilege", OK, "root: workers get users of their own")
    return Finding("privilege", WARN, f"uid {os.geteuid()}", "as root each worker gets a user of its own")


def _service(address: str) -> Finding:
    if not address.startswith("unix:"):
        return Finding("service", OK, f"{address} (not looked at)")
    path = address.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except FileNotFoundError:
            return Finding("service", WARN, f"no socket {path}", "start it: systemctl start hsmvisor-host, or hsmvisor-host itself")
        except PermissionError:
            return Finding("service", WARN, f"{path} is not for you", "use it as root or as a member of control.socket_group")
        except OSError as error:
            return Finding(
                "service", FAIL, f"{path}: {error.strerror}", "systemctl status hsmvisor-host; are you allowed to use it?"
            )
    return Finding("service", OK, f"listens on {path}")


def _checks(address: str, config: Config) -> Iterator[Callable[[], Finding]]:
    yield from (_python, _packages, _seccomp, _landlock, _libcrypto, _libtpms, _privilege, _clock, _files)
    yield from (_locked_memory, _swap, _swap_control, _core_dumps)
    yield lambda: _vsock(config)
    yield lambda: _directory(config.state, "state")
    yield lambda: _directory(config.runtime, "runtime")
    for name, section in (("tls", config.tls), ("signed", config.signed)):
        if section.address and not section.address.startswith("unix:"):
            yield lambda name=name, path=section.certificate: _certificate(f"{name} certificate", path)  # type: ignore[misc]
    for hsm in config.hsms:
        yield lambda hsm=hsm: doctor_hsm.examine(hsm)  # type: ignore[misc]
    yield lambda: _service(address)


def examine(address: str, path: Path | None = None) -> list[Finding]:
    """`address` "": where the configuration says that the service listens."""
    first, config = _configuration(path)
    findings = [first]
    for check in _checks(address or f"unix:{config.control_socket}", config):
        try:
            findings.append(check())
        except OSError as error:
            findings.append(Finding(getattr(check, "__name__", "check").strip("_"), WARN, str(error)))
    return findings


@click.command(cls=Command)
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="Of hsmvisor-host; default /etc/hsmvisor/host.toml if there is one."
)
@pass_context
def doctor(ctx: Context, path: Path | None) -> None:
    """Check this machine: kernel, packages, permissions, clock, limits, sockets; and say what to do.

    Works without a running service. Exit code 1: something keeps the service from working; warnings do not count.
    """
    findings = examine("" if path else ctx.host, path)
    rows = [(f.check, f.result, f.found, f.do) for f in findings]
    ctx.result([vars(f) for f in findings], lambda: table(("check", "", "found", "to do"), rows))
    if any(f.result == FAIL for f in findings):
        sys.exit(FAILURE)
