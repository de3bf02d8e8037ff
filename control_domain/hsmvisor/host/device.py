"""A module as a virtual machine's device: the socket where the machine's front-end connects, and the descriptors that outlive a
worker.

The supervisor never reads a byte of that connection: the worker speaks vhost-user.  It keeps what the worker tells it of the
device, so that the next worker goes on where the last one ended and the guest notes nothing but lost streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable

from hsmvisor.host import limits, places
from hsmvisor.host.config import Config
from hsmvisor.host.intake import Intake
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.places import Places
from hsmvisor.host.pluggable import Pluggable, unix_peer
from hsmvisor.host.worker import ProcessFault, WorkerProcess
from hsmvisor.serving import errors
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import STREAM_KEYS_SIZE

_MAX_PLUG = 2**32  #: connections of one module
_MAX_EARLY = 16  #: notifications while a worker is being adopted; each may hold descriptors
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_log = logging.getLogger(__name__)

Happened = Callable[[str, dict[str, object]], None]


class Device(Pluggable):
    """`happened` is told "device-plugged", "device-unplugged" and "device-refused", with what is known."""

    def __init__(self, where: Places, config: Config, name: str, number: int, happened: Happened) -> None:
        super().__init__()
        self.name, self.path, self.cid = name, where.device(name), limits.FIRST_CID + number
        self._where, self._config, self._happened = where, config, happened
        self._intake: Intake | None = None
        self._connection: socket.socket | None = None
        self._keys = -1  #: memfd: the keys of live streams, which the worker writes
        self._plug = 0  #: counts connections
        self._taken = 0  #: the last one that a worker has taken
        self._state: m.DeviceState | None = None
        self._descriptors: list[int] = []  #: of `_state`
        self._worker: WorkerProcess | None = None
        self._within = 0.0
        self._early: list[tuple[m.DeviceState | m.DeviceGone, list[int]]] | None = None  #: told while it is being adopted

    @property
    def plugged(self) -> bool:
        """Says whether a front-end is connected."""
        return self._connection is not None

    # ---- the socket ---------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Takes front-ends from now on.  Raises OSError, ServiceError."""
        if self._intake is None:
            listener = places.listen_for_device(self._where, self.name, self._config)
            self._intake = Intake(listener, lambda connection, _: self._arrived(connection))

    def _arrived(self, connection: socket.socket) -> None:
        peer: dict[str, object] = {"peer": unix_peer(connection)}
        if self._connection is not None:
            connection.close()
            self._happened("device-refused", {**peer, "why": "the module is the device of another virtual machine"})
            return
        self._connection, self._keys = connection, _new_keys()
        self._plug += 1
        self._happened("device-plugged", {**peer, "cid": self.cid})
        self._told_change()
        self._give()

    # ---- the worker ---------------------------------------------------------------------------------------------

    def serve(self, worker: WorkerProcess, within: float) -> None:
        """A new worker serves: it becomes the device, if there is one."""
        self._worker, self._within = worker, within
        self._give()

    def succeeded(self, worker: WorkerProcess, within: float) -> None:
        """Another worker has taken the device over from the one before, if that had it."""
        self._worker, self._within = worker, within
        if self._taken != self._plug:
            self._give()

    async def adopt(self, worker: WorkerProcess, within: float) -> None:
        """Learns what device an earlier supervisor's worker is.  Raises LinkClosed, TimeoutError, ProcessFault."""
        self._worker, self._within = worker, within
        self._early = []
        try:
            state, descriptors = await worker.plugged(within)
            if descriptors:
                self._connection, self._keys = _returned(state, descriptors)
                self._plug = self._taken = state.plug
                self._state, self._descriptors = state, descriptors[2:]
                self._told_change()
        except PeerError:
            return  # of a release without devices
        finally:
            early, self._early = self._early, None
            for record, more in early:
                self.told(record, more)

    def _give(self) -> None:
        if self._connection is not None and self._worker is not None:
            self._run(self._plug_in(self._worker, self._plug))

    async def _plug_in(self, worker: WorkerProcess, plug: int) -> None:
        if self._connection is None or plug != self._plug:
            return  # it has gone meanwhile
        descriptors = [self._connection.fileno(), self._keys, *self._descriptors]
        state = self._state.state if self._state else b""
        try:
            await worker.plug(m.PlugDevice(plug, self.cid, state, len(descriptors)), descriptors, self._within)
            self._taken = plug
        except PeerError as error:
            if error.error.reason != m.REASON_PHASE:  # else its successor takes it
                self._unplug(plug, error.error.detail)
        except (LinkClosed, TimeoutError, OSError, errors.ServiceError):
            _log.warning("module %s: its worker did not take the device; the next one will", self.name)

    def told(self, record: m.DeviceState | m.DeviceGone, descriptors: list[int]) -> None:
        """What the worker says of it; the descriptors are ours."""
        if self._early is not None and len(self._early) < _MAX_EARLY:
            self._early.append((record, descriptors))
        elif record.plug != self._plug or self._connection is None:
            _close(descriptors)
        elif isinstance(record, m.DeviceState):
            _close(self._descriptors)
            self._state, self._descriptors = record, descriptors
        else:
            self._unplug(record.plug, record.why)

    def _unplug(self, plug: int, why: str) -> None:
        if plug == self._plug and self._connection is not None:
            self._drop()
            self._happened("device-unplugged", {"why": why})
            self._told_change()

    # ---- the end ------------------------------------------------------------------------------------------------

    def lost_worker(self) -> None:
        self._worker = None

    def close(self) -> None:
        """Lets go of everything; the front-end is not told by that as long as a worker has the connection."""
        self._worker = None
        if self._intake is not None:
            self._intake.close()
            self._intake = None
        self._drop()
        self._told_change()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            _close([self._keys])
            self._connection, self._keys = None, -1
        if self._descriptors:  # elsewhere: the last descriptor of a guest's memory frees it, which takes long
            asyncio.get_running_loop().run_in_executor(None, _close, self._descriptors)
        self._state, self._descriptors = None, []


def _new_keys() -> int:
    """Memory for the keys of live streams, which can neither grow nor shrink."""
    descriptor = os.memfd_create("stream-keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, STREAM_KEYS_SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def _returned(state: m.DeviceState, descriptors: list[int]) -> tuple[socket.socket, int]:
    """Returns connection and keys that a worker gave back, if they can be what it was given; else closes all descriptors and raises
    ProcessFault."""
    sound = len(descriptors) == state.descriptors >= 2 and 0 < state.plug <= _MAX_PLUG
    connection = None
    try:
        if sound and len(state.state) <= limits.MAX_DEVICE_STATE:
            connection = socket.socket(fileno=descriptors[0])
            sound = (connection.family, connection.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
            sound = sound and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
            sound = sound and fcntl.fcntl(descriptors[1], fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if sound and os.fstat(descriptors[1]).st_size == STREAM_KEYS_SIZE:
                return connection, descriptors[1]
    except OSError:
        pass
    if connection is not None:
        connection.detach()
    _close(descriptors)
    raise ProcessFault("what it gave back of its device is not what it was given")


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()
