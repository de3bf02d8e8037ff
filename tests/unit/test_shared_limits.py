"""Numbers that stand on both sides of the privilege boundary, which share no code but the protocol, are the same."""

from __future__ import annotations

from hsmvisor.host import limits as host
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, STREAM_KEYS_SIZE
from hsmvisord import limits as guest
from hsmvisord.transport.vsock import keys


def test_they_agree() -> None:
    assert host.VSOCK_PORT == guest.VSOCK_PORT
    assert keys.SIZE == STREAM_KEYS_SIZE
    assert 2 + guest.MAX_REGIONS + 2 * 2 <= MAX_DESCRIPTORS, "connection, keys, regions, kick and call of both rings"
