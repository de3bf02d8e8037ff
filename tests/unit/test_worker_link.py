"""The worker's end of the internal protocol: descriptors belong to the request that they came with, whatever becomes of it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, Kind, encode_frame
from hsmvisor_rpc.internal.phases import Phase
from hsmvisord.confined.link import Link
from support.bare_worker import Peer


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[tuple[Link, Path]]:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        link = Link(listener.dup(), os.getuid())
        threading.Thread(target=link.run, daemon=True).start()
        yield link, path


def attached(link: Link, path: Path) -> Peer:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.settimeout(5)
    peer = Peer(sock)
    peer.send(Frame(1, Kind.REQUEST, m.Attach(m.PROTOCOL, 0).encode()), [])
    assert isinstance(link.requests.get(timeout=5).message, m.Attach)
    return peer


def same(descriptor: int, file: int) -> bool:
    return os.path.sameopenfile(descriptor, file)


def test_those_of_a_refused_request_are_not_the_next_ones(linked: tuple[Link, Path]) -> None:
    link, path = linked
    peer = attached(link, path)
    wrong, right = os.memfd_create("wrong"), os.memfd_create("right")
    before = len(os.listdir("/proc/self/fd"))
    link.phase = Phase.LEAVING
    assert isinstance(peer.ask(m.PlugDevice(1, 3, b"", 2), [wrong, wrong]), m.Error)
    link.phase = Phase.SERVING
    assert len(os.listdir("/proc/self/fd")) == before
    peer.send(Frame(9, Kind.REQUEST, m.HandOver(0).encode()), [right])
    incoming = link.requests.get(timeout=5)
    assert len(incoming.descriptors) == 1
    assert same(incoming.descriptors[0], right)
    for descriptor in (wrong, right, *incoming.descriptors):
        os.close(descriptor)
    peer.sock.close()


def test_those_of_half_a_request_are_not_the_next_supervisors(linked: tuple[Link, Path]) -> None:
    link, path = linked
    peer = attached(link, path)
    wrong, right = os.memfd_create("wrong"), os.memfd_create("right")
    socket.send_fds(peer.sock, [encode_frame(Frame(2, Kind.REQUEST, m.HandOver(0).encode()))[:-1]], [wrong])
    peer.sock.close()
    peer = attached(link, path)
    link.phase = Phase.SERVING
    peer.send(Frame(9, Kind.REQUEST, m.HandOver(0).encode()), [right])
    incoming = link.requests.get(timeout=5)
    assert same(incoming.descriptors[0], right)
    for descriptor in (wrong, right, *incoming.descriptors):
        os.close(descriptor)
    peer.sock.close()
