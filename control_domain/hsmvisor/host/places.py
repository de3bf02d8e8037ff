"""Where things lie in the runtime directory, and the sockets and notes that are made there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from hsmvisor.host.config import Config
from hsmvisor.serving import directories
from hsmvisor.serving.sockets import listen

_SUCCESSOR = ".next"


@dataclass(frozen=True)
class Places:
    runtime: Path
    of: str = "workers"  #: whose control sockets and notes

    @property
    def of_tpms(self) -> Places:
        """The same, with those of TPMs' processes."""
        return replace(self, of="tpms")

    @property
    def private(self) -> Path:
        return self.runtime / "private"

    @property
    def workers(self) -> Path:
        return self.runtime / self.of

    @property
    def modules(self) -> Path:
        return self.runtime / "modules"

    def control(self, module_id: bytes, successor: bool = False) -> Path:
        return self.workers / f"{module_id.hex()}{_SUCCESSOR * successor}.sock"

    def note(self, module_id: bytes, successor: bool = False) -> Path:
        return self.workers / f"{module_id.hex()}{_SUCCESSOR * successor}.json"

    def guest(self, name: str) -> Path:
        return self.modules / name / "pkcs11.sock"

    def device(self, name: str) -> Path:
        """Where the guest's QEMU plugs the module in."""
        return self.modules / name / "vhost.sock"

    def usb(self, name: str) -> Path:
        """Where the guest's QEMU has the module as a USB device (usbredir)."""
        return self.modules / name / "usb.sock"

    def tpm(self, name: str) -> Path:
        """Where the guest's QEMU has the module as a TPM."""
        return self.modules / name / "tpm.sock"

    def tss(self, name: str) -> tuple[Path, Path]:
        """Where the TSS has it, without a machine: commands, and control at that path with .ctrl (tcti-swtpm)."""
        return self.modules / name / "tss.sock", self.modules / name / "tss.sock.ctrl"

    def some_worker_serves(self) -> bool:
        """Says whether an earlier service has left one that lives."""
        for path in self.workers.glob("*.json"):
            if (noted := noted_process(path)) is not None:
                os.close(noted[1])
                return True
        return False

    def make(self) -> None:
        """Makes the directories; raises Broken."""
        # guests' programs walk through runtime and modules; nobody but us into the others
        for path in (self.runtime, self.modules):
            directories.make(path, 0o755)
        for path in (self.workers, self.of_tpms.workers, self.private):
            directories.make(path, 0o700)


def listen_for_guests(places: Places, name: str, config: Config) -> socket.socket:
    return _listen_for(places.guest(name), config)


def listen_for_device(places: Places, name: str, config: Config) -> socket.socket:
    return _listen_for(places.device(name), config)


def listen_for_usb(places: Places, name: str, config: Config) -> socket.socket:
    return _listen_for(places.usb(name), config)


def listen_for_tpm(places: Places, name: str, config: Config) -> tuple[socket.socket, socket.socket, socket.socket]:
    """For QEMU; for the TSS' commands and control."""
    paths = (places.tpm(name), *places.tss(name))
    made: list[socket.socket] = []
    try:
        for path in paths:
            made.append(_listen_for(path, config))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made[0], made[1], made[2]


def _listen_for(path: Path, config: Config) -> socket.socket:
    path.parent.mkdir(mode=0o755, exist_ok=True)
    path.parent.chmod(0o755)
    return listen(path, config.guests.socket_mode, config.guests.socket_group, config.guests.backlog)


def remove(places: Places, module_id: bytes, name: str) -> None:
    """Removes what stands in the runtime directory for a module."""
    forget(places, module_id)
    places.guest(name).unlink(missing_ok=True)
    places.device(name).unlink(missing_ok=True)
    places.usb(name).unlink(missing_ok=True)
    forget_tpm(places, name)
    with contextlib.suppress(OSError):
        places.guest(name).parent.rmdir()


def forget_tpm(places: Places, name: str) -> None:
    """Removes where a guest's side finds a TPM."""
    for path in (places.tpm(name), *places.tss(name)):
        path.unlink(missing_ok=True)


def forget(places: Places, module_id: bytes, successor: bool = False) -> None:
    """Removes what stands there for a module's worker, or its TPM's process."""
    places.control(module_id, successor).unlink(missing_ok=True)
    places.note(module_id, successor).unlink(missing_ok=True)


def succeed(places: Places, module_id: bytes) -> None:
    """The successor's socket and note take the place of its predecessor's."""
    places.control(module_id, True).rename(places.control(module_id))
    places.note(module_id, True).rename(places.note(module_id))


# ---- who is who after a restart of the service ----------------------------------------------------------------------


def start_time(pid: int) -> int:
    """Returns when a process began, in clock ticks since boot (proc(5), field 22 of stat); 0 = there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[19])


def children_of(parent: int) -> list[int]:
    """Returns the pids of a process's living children (proc(5), field 4 of stat)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] not in (b"Z", b"X"):
                found.append(int(entry.name))
    return found


def write_note(path: Path, pid: int) -> None:
    """Notes the worker's process so that the next supervisor knows it again; whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"pid": pid, "start_time": start_time(pid)}))
    new.rename(path)


def noted_process(path: Path) -> tuple[int, int] | None:
    """Returns pid and pidfd of the process in a note if it still lives, not another one under its number."""
    try:
        values = json.loads(path.read_bytes())
        pid, began = int(values["pid"]), int(values["start_time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if began == 0 or start_time(pid) != began:
        os.close(pidfd)
        return None
    return pid, pidfd
