"""A module's device in the supervisor: what workers say of it and give back is checked, and no descriptor stays."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hsmvisor.host import device as host_device
from hsmvisor.host import limits
from hsmvisor.host.config import Config
from hsmvisor.host.device import Device
from hsmvisor.host.places import Places
from hsmvisor.host.worker import ProcessFault, WorkerProcess
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import STREAM_KEYS_SIZE


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


def keys(size: int = STREAM_KEYS_SIZE, sealed: bool = True) -> int:
    descriptor = os.memfd_create("keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if sealed:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, host_device._SEALS)
    return descriptor


def end(kind: int = socket.SOCK_STREAM, family: int = socket.AF_UNIX) -> int:
    """A socket that listens to nobody."""
    return socket.socket(family, kind).detach()


def listening() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return sock.detach()


class FakeWorker:
    """Gives back what it is told to, and meanwhile says what it is told to."""

    def __init__(self, state: m.DeviceState, descriptors: Sequence[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.state, self.descriptors, self.meanwhile = state, list(descriptors), meanwhile
        self.plugged_in: list[tuple[m.PlugDevice, int]] = []

    async def plugged(self, within: float) -> tuple[m.DeviceState, list[int]]:
        await asyncio.sleep(0)
        self.meanwhile()
        return self.state, self.descriptors

    async def plug(self, plug: m.PlugDevice, descriptors: Sequence[int], within: float) -> None:
        self.plugged_in.append((plug, len(descriptors)))


class Host:
    def __init__(self, directory: Path) -> None:
        self.happened: list[str] = []
        (directory / "modules").mkdir(exist_ok=True)
        self.device = Device(Places(directory), Config(), "web-1", 1, lambda kind, detail: self.happened.append(kind))

    async def adopt(self, worker: FakeWorker) -> None:
        await self.device.adopt(cast(WorkerProcess, worker), 1)

    async def close(self) -> None:
        self.device.close()
        await asyncio.sleep(0)
        await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.parametrize(
    ("plug", "size", "count", "make"),
    [
        (1, 0, 1, lambda: [end()]),
        (1, 0, 3, lambda: [end(), keys()]),
        (1, 0, 2, lambda: [keys(), keys()]),
        (1, 0, 2, lambda: [end(family=socket.AF_INET), keys()]),
        (1, 0, 2, lambda: [end(socket.SOCK_DGRAM), keys()]),
        (1, 0, 2, lambda: [listening(), keys()]),
        (1, 0, 2, lambda: [end(), end()]),
        (1, 0, 2, lambda: [end(), keys(sealed=False)]),
        (1, 0, 2, lambda: [end(), keys(STREAM_KEYS_SIZE - 1)]),
        (0, 0, 2, lambda: [end(), keys()]),
        (2**32 + 1, 0, 2, lambda: [end(), keys()]),
        (1, limits.MAX_DEVICE_STATE + 1, 2, lambda: [end(), keys()]),
    ],
    ids=[
        "one",
        "less",
        "no socket",
        "inet",
        "datagrams",
        "listener",
        "no memory",
        "unsealed",
        "short",
        "plug 0",
        "large plug",
        "large",
    ],
)
def test_what_cannot_be_is_not_adopted(plug: int, size: int, count: int, make: Any, tmp_path: Path) -> None:
    async def run() -> None:
        host, before = Host(tmp_path), opened()
        with pytest.raises(ProcessFault, match="not what it was given"):
            await host.adopt(FakeWorker(m.DeviceState(plug, b"x" * size, count), make()))
        assert not host.device.plugged
        assert opened() <= before

    asyncio.run(run())


@pytest.mark.parametrize("plug", [1, 2**32])
def test_what_can_be_is(plug: int, tmp_path: Path) -> None:
    async def run() -> None:
        host, before = Host(tmp_path), opened()
        state = m.DeviceState(plug, b"x" * limits.MAX_DEVICE_STATE, 3)
        await host.adopt(FakeWorker(state, [end(), keys(), keys()]))
        assert host.device.plugged
        assert opened() == before + 3
        next_one = FakeWorker(state, [])
        host.device.serve(cast(WorkerProcess, next_one), 1)
        await asyncio.sleep(0.01)
        assert [(p.plug, p.descriptors, count) for p, count in next_one.plugged_in] == [(plug, 3, 3)]
        await host.close()
        assert opened() <= before

    asyncio.run(run())


def test_what_is_told_during_adoption_is_newer(tmp_path: Path) -> None:
    async def run() -> None:
        host, before = Host(tmp_path), opened()
        newer = m.DeviceState(5, b"newer", 1)
        await host.adopt(
            FakeWorker(m.DeviceState(5, b"older", 3), [end(), keys(), keys()], lambda: host.device.told(newer, [keys()]))
        )
        assert host.device._state == newer
        assert opened() == before + 3
        await host.close()
        await host.adopt(FakeWorker(m.DeviceState(0, b"", 0), [], lambda: host.device.told(newer, [keys()])))
        assert not host.device.plugged
        assert opened() <= before

    asyncio.run(run())


def test_a_front_end_that_goes_during_adoption_leaves_room_for_another(tmp_path: Path) -> None:
    async def run() -> None:
        host, before = Host(tmp_path), opened()
        gone = m.DeviceGone(5, "gone")
        await host.adopt(FakeWorker(m.DeviceState(5, b"", 2), [end(), keys()], lambda: host.device.told(gone, [])))
        assert not host.device.plugged
        assert host.happened == ["device-unplugged"]
        assert opened() <= before

    asyncio.run(run())


def test_many_states_leave_the_descriptors_of_the_last(tmp_path: Path) -> None:
    async def run() -> None:
        host = Host(tmp_path)
        await host.adopt(FakeWorker(m.DeviceState(5, b"", 2), [end(), keys()]))
        before = opened()
        for _ in range(100):
            host.device.told(m.DeviceState(5, b"x", 2), [keys(), keys()])
            host.device.told(m.DeviceState(4, b"x", 1), [keys()])
        assert opened() == before + 2
        await host.close()

    asyncio.run(run())


def test_one_that_goes_before_it_is_given_is_not_given(tmp_path: Path) -> None:
    async def run() -> None:
        host = Host(tmp_path)
        worker = FakeWorker(m.DeviceState(0, b"", 0), [])
        host.device.serve(cast(WorkerProcess, worker), 1)
        ours, front = socket.socketpair()
        with front:
            host.device._arrived(ours)
            assert host.device.plugged
            host.device.told(m.DeviceGone(1, "gone"), [])
            await asyncio.sleep(0.01)
            assert worker.plugged_in == []
        assert host.happened == ["device-plugged", "device-unplugged"]
        await host.close()

    asyncio.run(run())
