"""A module of a virtual machine whose monitor speaks the hybrid vsock convention (Firecracker, Cloud Hypervisor).

The monitor is configured with a path P.  For each connection of its guest to (CID 2, port N) it connects to the unix socket P_N,
and the stream begins at once.  Nothing in it says who the guest is: the path does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from hsmvisor.host import limits
from hsmvisor.host.config import Config
from hsmvisor.host.intake import Intake, Passing
from hsmvisor.serving.errors import WrongState
from hsmvisor.serving.sockets import group_id


class Hybrid:
    """Listens at one P_N at a time, and has `passing` bring what comes to the worker."""

    def __init__(self, config: Config, passing: Passing) -> None:
        self._config, self._passing = config, passing
        self._intake: Intake | None = None
        self._socket = (0, 0)  #: device and inode
        self.path = ""  #: P, while it listens

    def listen(self, path: str) -> None:
        """Takes the guest of the monitor with `path` from now on; no change if it does already.  Raises ServiceError."""
        if self.path == path:
            with contextlib.suppress(OSError):
                if _identity(os.lstat(socket_of(path))) == self._socket:
                    return
        self.close()
        listener, self._socket = _listen(socket_of(path), self._config)
        self._intake = Intake(listener, lambda sock, _: self._passing.pass_on(sock, peer_of(path)))
        self.path = path

    def close(self) -> None:
        """Takes nobody any more; what was passed on stays."""
        if self._intake is None:
            return
        self._intake.close()
        with contextlib.suppress(OSError):
            place = socket_of(self.path)
            if _identity(os.lstat(place)) == self._socket:
                os.unlink(place)
        self._intake, self.path = None, ""


def socket_of(path: str) -> str:
    """Returns where the monitor connects to for its guest's connections to our port."""
    return f"{path}_{limits.VSOCK_PORT}"


def peer_of(path: str) -> str:
    """Returns as whom the module sees the guest."""
    return f"hybrid path={path}"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _listen(path: str, config: Config) -> tuple[socket.socket, tuple[int, int]]:
    """Returns the listening socket, and which file it is.  Raises ServiceError.

    The directory may be the monitor's, which may be in its guest's hands: every step is on a directory that is held open, and
    nothing follows a link there.
    """
    directory, name = os.path.split(path)
    group = group_id(config.guests.socket_group) if config.guests.socket_group else -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        held = _hold(directory, config)
        try:
            _make_room(held, name, path)
            sock.bind(f"/proc/self/fd/{held}/{name}")
            made = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held)
        finally:
            os.close(held)
        try:
            found = os.fstat(made)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                raise WrongState("HYBRID_PATH", f"{path} was replaced while it was made", "see who else writes there")
            os.chmod(f"/proc/self/fd/{made}", config.guests.socket_mode)
            if group >= 0:
                os.chown(f"/proc/self/fd/{made}", -1, group)
        finally:
            os.close(made)
        sock.listen(config.guests.backlog)
    except OSError as error:
        sock.close()
        hint = "name its directory in guests.directories, and under systemd in ReadWritePaths=; then start the service again"
        raise WrongState("HYBRID_PATH", f"{path}: {error.strerror}", hint) from None
    except BaseException:
        sock.close()
        raise
    return sock, _identity(found)


def _hold(directory: str, config: Config) -> int:
    """Returns a descriptor of a directory where the configuration lets us make sockets.  Raises ServiceError, OSError."""
    try:
        held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        hint = "make it first; the virtual machine's monitor and the host service both use it"
        raise WrongState("HYBRID_PATH", f"there is no directory {directory}", hint) from None
    real = Path(os.readlink(f"/proc/self/fd/{held}"))
    allowed = [Path(allowed).resolve() for allowed in config.guests.directories]
    if not any(real.is_relative_to(one) for one in allowed):
        os.close(held)
        where = ", ".join(map(str, allowed)) or "none"
        hint = f"name it in guests.directories of the host's configuration (now: {where}), and start the service again"
        raise WrongState("HYBRID_PATH", f"the host service may make no socket in {directory}", hint)
    return held


def _make_room(held: int, name: str, path: str) -> None:
    """Removes a socket at which nobody listens any more.  Raises WrongState, OSError."""
    try:
        found = os.stat(name, dir_fd=held, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise WrongState("HYBRID_PATH", f"{path} is there already, and is no socket", "remove it, or give the monitor another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(f"/proc/self/fd/{held}/{name}")
    if result not in (errno.ECONNREFUSED, errno.ENOENT):
        raise WrongState("HYBRID_TAKEN", f"another service listens at {path}", "stop it, or give the monitor another path")
    os.unlink(name, dir_fd=held)
