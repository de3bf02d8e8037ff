"""A guest's kernel that imports its USB device over vsock: the connection is given up to the supervisor, and only so often."""

from __future__ import annotations

import socket

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisord import limits
from hsmvisord.worker.plug import Plug


def test_only_so_many_imports_are_given_up_at_once_and_each_with_its_connection() -> None:
    came: list[socket.socket] = []
    taken: list[socket.socket] = []

    def announce(record: Record, descriptors: list[int]) -> None:
        assert record == m.UsbCame()
        (descriptor,) = descriptors
        came.append(socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM))

    plug = Plug(lambda sock, peer: taken.append(sock), announce)
    ours = [plug._accept(limits.USBIP_PORT, "vsock") for _ in range(limits.USB_IMPORT_BURST)]
    assert plug._accept(limits.USBIP_PORT, "vsock") is None  # one more
    assert plug._accept(limits.USBIP_PORT + 1, "vsock") is None  # no such port
    for end, other in zip(ours, came, strict=True):
        assert end is not None
        end.sendall(b"import")
        assert other.recv(6) == b"import"
    ours.append(plug._accept(limits.VSOCK_PORT, "vsock"))  # the library's connections are not counted
    assert len(taken) == 1
    for sock in (*ours, *came, *taken):
        assert sock is not None
        sock.close()
