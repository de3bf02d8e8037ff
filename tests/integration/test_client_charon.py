"""strongSwan's IKE daemon authenticates itself with a key of either slot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import serialization
from support.certificates import Authority, chain_pem, key_id, new_key, private_pem
from support.charon import Charon, Network, section
from support.guest import stop
from support.own_slot import OURS_ALONE, USER, OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()
KINDS = {"rsa2048": "rsa:2048", "p256": "EC:prime256v1", "p384": "EC:secp384r1"}


@pytest.fixture
def network(own: OwnSlot) -> Iterator[Network]:
    network = Network.make(own.guest)
    yield network
    stop(network.process)


def peer(name: str, where: dict[str, str], certificate: dict[str, str], other: str, **more: str) -> str:
    local = section("local", auth="pubkey", id=name, **certificate)
    remote = section("remote", auth="pubkey", id=other)
    connection = section("peer", version="2", childless="force", local_addrs="127.0.0.1", **where, local=local, remote=remote)
    return section("connections", peer=connection) + "".join(more.values())


def furnish(own: OwnSlot, slot: int, kind: str) -> tuple[str, str]:
    """A key with a certificate for guest.example; returns its id and the PIN."""
    if slot == 0:
        key = new_key(kind)
        own.module.push("vpn", key, AUTHORITY.chain(key, "guest.example"))
        return key_id(key).hex(), "any"
    certificate = AUTHORITY.issue_for(own.generate(KINDS[kind], "vpn", "01"), "guest.example")
    path = own.guest.write("certificate.der", certificate.public_bytes(serialization.Encoding.DER))
    own.as_user("--write-object", path, "--type", "cert", "--label", "vpn", "--id", "01")
    return "01", USER


@OURS_ALONE
@pytest.mark.parametrize(("slot", "kind"), [(0, "rsa2048"), (0, "p256"), (1, "rsa2048"), (1, "p384")])
def test_a_key_of_the_module_authenticates(own: OwnSlot, network: Network, slot: int, kind: str) -> None:
    handle, pin = furnish(own, slot, kind)
    gate, guest = Charon(own.guest, network, "gate", 4500), Charon(own.guest, network, "guest", 4600, own.guest.library.path)
    key = new_key("p256")
    (gate.directory / "private/key.pem").write_bytes(private_pem(key))
    (gate.directory / "x509/gate.pem").write_bytes(chain_pem((AUTHORITY.issue(key, "gate.example"),)))
    for daemon in (gate, guest):
        (daemon.directory / "x509ca/root.pem").write_bytes(AUTHORITY.root_pem)
        (daemon.directory / "x509ca/intermediate.pem").write_bytes(chain_pem((AUTHORITY.intermediate,)))
    of_token = {"module": "hsmvisor", "slot": str(slot), "handle": handle}
    secrets = section("secrets", token=section("token-vpn", **of_token, pin=pin))
    where = {"local_port": "4600", "remote_addrs": "127.0.0.1", "remote_port": "4500"}
    certificate = {"cert": section("cert-vpn", **of_token)}
    try:
        gate.start(peer("gate.example", {}, {"certs": "gate.pem"}, "guest.example"))
        guest.start(peer("guest.example", where, certificate, "gate.example", secrets=secrets))
        said = guest.swanctl("--initiate", "--ike", "peer", "--timeout", "10")
        assert b"authentication of 'guest.example' (myself)" in said and b"initiate completed successfully" in said
        assert b"ESTABLISHED" in gate.swanctl("--list-sas")
    finally:
        for daemon in (gate, guest):
            daemon.stop()
