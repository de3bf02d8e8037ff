"""A host and a front-end that connects to it: the device outlives workers and the service, whatever happens at the same time."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hsmvisor.host import happenings
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import limits
from support.fake_frontend import FakeFrontEnd
from support.fake_guest import Guest, GuestStream
from support.host_process import HostProcess, new_id, wait_for


@pytest.fixture
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        host.create("web-1")
        yield host


def connected(host: HostProcess) -> FakeFrontEnd:
    front = FakeFrontEnd()
    front.sock.close()
    front.sock = socket.socket(socket.AF_UNIX)
    front.sock.settimeout(10)
    front.sock.connect(str(host.run / "modules" / "web-1" / "vhost.sock"))
    (front.cid,) = wait_for(lambda: [note["detail"]["cid"] for note in notes(host, "device-plugged")], what="the note")
    return front


def booted(front: FakeFrontEnd) -> Guest:
    front.begin()
    front.load_driver(0)
    front.start((0, 0))
    front.settled()
    return Guest(front)


def reset(stream: GuestStream) -> None:
    stream.until(lambda: stream.state == "gone")


def notes(host: HostProcess, kind: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in host.audit_lines()]
    return [note for note in told if note["kind"] == f"module.{kind}"]


def test_workers_and_services_come_and_go(host: HostProcess) -> None:
    front = connected(host)
    guest = booted(front)
    stream = guest.connect(limits.VSOCK_PORT)
    assert stream.state == "open"
    pid = host.serving("web-1").pid
    host.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=new_id(), name="web-1"))
    assert host.serving("web-1", pid).pid != pid
    assert guest.connect(limits.VSOCK_PORT).state == "open"
    assert stream.state == "open"
    os.kill(host.serving("web-1").pid, signal.SIGKILL)
    reset(stream)
    stream = guest.connect(limits.VSOCK_PORT)
    pid = host.serving("web-1").pid
    host.stop(signal.SIGKILL)
    host.restart()
    assert host.serving("web-1").pid == pid
    assert guest.connect(limits.VSOCK_PORT).state == "open"
    assert stream.state == "open"
    os.kill(pid, signal.SIGKILL)  # what the worker gave back is what the next one needs
    reset(stream)
    assert guest.connect(limits.VSOCK_PORT).state == "open"
    front.close()
    wait_for(lambda: notes(host, "device-unplugged"), what="the note")


def test_who_connects_again_and_again_does_not_fill_the_disk(host: HostProcess) -> None:
    front = connected(host)
    for _ in range(3 * int(happenings._DEVICE_BURST)):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(host.run / "modules" / "web-1" / "vhost.sock"))
            other.settimeout(5)
            assert other.recv(1) == b""
    count = len(notes(host, "device-refused"))
    assert 0.5 * happenings._DEVICE_BURST < count < 1.2 * happenings._DEVICE_BURST
    front.close()
