"""QEMU's connections, of which a successor of the process has what is left."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.connections import Connections
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from hsmvisord.tpm.stream import Busy
from support.host_process import wait_for
from support.tpm_guest import Guest, the_machine
from support.tpm_qemu import Qemu, exactly

HALF = bytes.fromhex("8001 0000000c 0000")
TOO_LONG = bytes.fromhex("8001 00010000 0000017b")


class Plugged:
    def __init__(self) -> None:
        machine = the_machine()
        machine.anew()
        self.managed = machine.managed
        self.announced: list[Record] = []
        self.busy, (ours, theirs) = Busy(), socket.socketpair()
        server = Server(self.managed, Seals(Blobs(bytes(32), bytes(16))), lambda text: None)
        self.connections = Connections(server, lambda record, descriptors: self.announced.append(record))
        self.connections.plug_in(7, self.busy, theirs)
        self.qemu = Qemu(ours)

    def connect(self) -> tuple[socket.socket, Guest]:
        guest = self.qemu.connect()
        assert self.qemu.commands is not None
        return self.qemu.commands, guest


@pytest.fixture
def plugged() -> Iterator[Plugged]:
    plugged = Plugged()
    yield plugged
    plugged.qemu.close()
    wait_for(lambda: plugged.connections.plug == 0)
    wait_for(lambda: any(isinstance(one, m.TpmGone) for one in plugged.announced))
    plugged.managed.switch_off()


def test_what_one_connection_has_begun_is_not_owed_to_the_next(plugged: Plugged) -> None:
    first, _ = plugged.connect()
    first.sendall(HALF)
    wait_for(lambda: plugged.busy.is_so)
    _, guest = plugged.connect()
    assert not plugged.busy.is_so
    plugged.qemu.start()
    assert guest.startup() == 0
    with pytest.raises((EOFError, ConnectionResetError)):
        exactly(first, 1)
    first.close()


@pytest.mark.parametrize("hands_over", [True, False], ids=["handed over", "told"])
def test_one_that_was_cut_off_is_not_handed_on(plugged: Plugged, hands_over: bool) -> None:
    commands, _ = plugged.connect()
    commands.sendall(TOO_LONG)
    with pytest.raises((EOFError, ConnectionResetError)):
        exactly(commands, 1)
    time.sleep(0.05)  # the end is seen a moment before the socket is closed on that side
    if hands_over:
        plug, descriptors = plugged.connections.hand_over()
        assert plug == 7 and len(descriptors) == 1 and descriptors[0] >= 0
        return
    plugged.connections.tell()
    told = plugged.announced[-1]
    assert isinstance(told, m.TpmPlugged) and told.descriptors == 1
