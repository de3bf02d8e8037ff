"""Numbers that stand on both sides of the privilege boundary, which share no code but the protocol, are the same."""

from __future__ import annotations

from hsmvisor.host import limits as host
from hsmvisor.manager import limits as manager
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, STREAM_KEYS_SIZE
from hsmvisord import limits as guest
from hsmvisord.transport.vsock import keys


def test_they_agree() -> None:
    assert host.VSOCK_PORT == guest.VSOCK_PORT
    assert keys.SIZE == STREAM_KEYS_SIZE
    assert 2 + guest.MAX_REGIONS + 2 * 2 <= MAX_DESCRIPTORS, "connection, keys, regions, kick and call of both rings"


def test_a_manager_takes_what_a_host_tells() -> None:
    assert host.MAX_GUESTS <= manager.MAX_GUESTS
    assert host.MAX_REPORTED <= manager.MAX_REPORTED
    assert host.MAX_RESULTS <= manager.MAX_RESULTS
    assert manager.MAX_COMMANDS <= host.MAX_COMMANDS
    assert host.MAX_REPORTED_MATERIALS <= manager.MAX_MATERIALS
    assert host.MAX_REPORTED_GENERATIONS <= manager.MAX_GENERATIONS
    names = (host.MAX_OWNER, host.MAX_ATTRIBUTES, host.MAX_ATTRIBUTE_KEY, host.MAX_ATTRIBUTE_VALUE)
    assert names == (manager.MAX_OWNER, manager.MAX_ATTRIBUTES, manager.MAX_KEY, manager.MAX_VALUE)
