"""Workers that an earlier supervisor left: what they give back is checked, and those of no use are ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Collection
from pathlib import Path

from hsmvisor.host import places
from hsmvisor.host.link import Link, LinkClosed, PeerError
from hsmvisor.host.places import Places
from hsmvisor.host.worker import ProcessFault, WorkerProcess
from hsmvisor.serving.errors import StorageUnavailable
from hsmvisor_rpc.internal import messages as m

_log = logging.getLogger(__name__)


def returned_listener(descriptors: list[int], path: str) -> socket.socket:
    """Returns the guest listener that a worker gave back; raises ProcessFault when it is not the one that it was given."""
    if len(descriptors) != 1:
        raise ProcessFault("it gave no guest listener back")
    sock = socket.socket(fileno=descriptors[0])
    try:
        sound = sock.family == socket.AF_UNIX and sock.getsockname() == path
        sound = sound and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1 and os.path.exists(path)
    except OSError:
        sound = False
    if not sound:
        sock.close()
        raise ProcessFault("what it gave back is not its guest listener")
    return sock


async def end_stranger(where: Places, module_id: bytes, successor: bool = False) -> None:
    """Ends a worker of which nothing is noted: who answers at its control socket is known by the kernel's word."""
    path = where.control(module_id, successor)
    noted = places.noted_process(where.note(module_id, successor))
    worker: WorkerProcess | None = None
    if noted is not None:
        worker = WorkerProcess("", *noted, None)
    elif path.exists():
        worker = await _answering(path)
    if worker is not None:
        _log.warning("worker %d of no module that is kept is ended", worker.pid)
        worker.kill()
        await worker.ended()
        worker.leave()
    if successor:
        places.forget(where, module_id, True)


async def _answering(path: os.PathLike[str]) -> WorkerProcess | None:
    """Returns the process that listens at a control socket, if one does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        return None
    link = Link(sock, lambda violation: None)
    with contextlib.suppress(LinkClosed, PeerError, TimeoutError):
        await link.ask(m.Attach(m.PROTOCOL, 0), m.Attached, within=1, take=1)
    pid = link.sender_pid
    try:
        return WorkerProcess("", pid, os.pidfd_open(pid), None) if pid else None
    except OSError:
        return None
    finally:
        link.close()


async def end_all(where: Places, drain: float) -> int:
    """Drains and ends every worker that answers or is noted; returns how many there were."""
    found = [(view, path) for view in (where, where.of_tpms) for path in sorted(view.workers.glob("*.sock"))]
    return sum(await asyncio.gather(*(_end_one(view, path, drain) for view, path in found)))


async def _end_one(where: Places, path: Path, drain: float) -> int:
    try:
        module_id = bytes.fromhex(path.stem)
    except ValueError:
        return 0
    await end_stranger(where, module_id, successor=True)
    noted = places.noted_process(where.note(module_id))
    worker = WorkerProcess("", *noted, None) if noted is not None else await _answering(path)
    if worker is not None:
        with contextlib.suppress(OSError):
            worker.connect(path, _store_nothing, lambda event: None)
        await worker.shut_down(drain)
        worker.leave()
    places.forget(where, module_id)
    return int(worker is not None)


async def _store_nothing(change: m.StoreState) -> None:
    raise StorageUnavailable("STORAGE", "the host service does not run")


def end_orphans(known: Collection[int]) -> None:
    """Ends the workers that a launcher forked and died before it told of them: they are our children now, and nobody's."""
    for pid in places.children_of(os.getpid()):
        if pid not in known:
            _log.warning("worker %d of a launcher that died is ended", pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
