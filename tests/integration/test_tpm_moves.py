"""A machine takes its TPM along to another host: with its authority's permission, once, and nothing else is taken there."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest
from cryptography import x509
from hsmvisor_rpc.sealed.attestation import verify_attestation
from hsmvisor_rpc.sealed.commands import MOVE_IDENT, MOVE_KEY
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD
from hsmvisord.wire.tpm_control import Command
from support.certificates import new_key
from support.command import Command as Program
from support.host import Host, Module, wait_for
from support.tpm_guest import PCR_EXTEND, Guest, verify
from support.tpm_host import FIRST, create, machine, plugged
from support.tpm_qemu import Qemu

WEB, OTHER, OLD = new_key("p256"), new_key("p256"), new_key("p256")
DIGEST = hashlib.sha256(b"message").digest()
NUMBERS = itertools.count()
PERMANENT, VOLATILE = 1, 2
TAKEN = 0


@dataclass
class Ends:
    """A module on each of two hosts, of the same authority, with the same key for their guest."""

    here: Module
    there: Module

    def move(self, key: bytes | None = None, ident: bytes | None = None) -> None:
        key = os.urandom(MOVE_KEY) if key is None else key
        ident = ident or os.urandom(MOVE_IDENT)
        for module, leaves in ((self.there, False), (self.here, True)):
            module.host.pusher.move_tpm(module.name, leaves, ident, key)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with Host() as first:
        second = Host()
        second.authority, second.process.root_public = first.authority, first.process.root_public
        with second:
            yield first, second


@pytest.fixture
def ends(hosts: tuple[Host, Host]) -> Iterator[Ends]:
    name = f"moved-{next(NUMBERS)}"
    ends = Ends(*(create(host, name, h0="web") for host in hosts))
    for module in (ends.here, ends.there):
        module.push("web", WEB)
    yield ends
    ends.here.destroy()
    ends.there.destroy()


@contextmanager
def arriving(module: Module) -> Iterator[tuple[Qemu, Guest]]:
    """A QEMU that waits for its machine (migrate incoming)."""
    qemu = plugged(module)
    try:
        guest = qemu.connect()
        for command, body in ((Command.STOP, b""), (Command.SET_BUFFER_SIZE, struct.pack(">I", 3968)), (Command.STOP, b"")):
            qemu.good(command, body)
        yield qemu, guest
    finally:
        qemu.close()
        wait_for(lambda: not module.status().tpm.peer, what="the end of QEMU")


def state(qemu: Qemu) -> dict[int, tuple[int, bytes]]:
    return {kind: qemu.blob(kind) for kind in (PERMANENT, VOLATILE)}


def brings(qemu: Qemu, found: dict[int, tuple[int, bytes]]) -> list[int]:
    """Returns what each is answered."""
    return [qemu.set_blob(kind, flags, data) for kind, (flags, data) in found.items()]


def goes_on(qemu: Qemu) -> None:
    qemu.good(Command.INIT, struct.pack(">I", 1))
    qemu.good(Command.SET_LOCALITY, bytes(4))


def measured(guest: Guest) -> None:
    guest.good(PCR_EXTEND, (7,), (1).to_bytes(4, "big") + (0x0B).to_bytes(2, "big") + DIGEST, EMPTY_PASSWORD)


def pcr(guest: Guest) -> bytes:
    return guest.good(0x17E, (), struct.pack(">IHB3s", 1, 0x0B, 3, b"\x80\0\0"))[-32:]


def signs(guest: Guest) -> None:
    result, signature = guest.sign(FIRST, DIGEST)
    assert result == 0
    verify(WEB, DIGEST, signature)


def test_a_machine_moves(ends: Ends) -> None:
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        measured(guest)
        primary, session = guest.primary(), guest.session()
        name, extended = guest.public(primary), pcr(guest)
        signs(guest)
        ends.move()
        found = state(qemu)
        with arriving(ends.there) as (other, moved):
            assert brings(other, found) == [TAKEN, TAKEN]
            goes_on(other)
            signs(moved)
            assert (moved.public(primary), pcr(moved)) == (name, extended)
            moved.flush(primary)
            moved.flush(session)
            attested(ends.there)
            qemu.good(Command.SHUTDOWN)
            ends.there.push("web", OTHER)
            wait_for(lambda: _signs_with_other(moved), what="the other key")
    with arriving(ends.there) as (again, _):
        assert TAKEN not in brings(again, found), "the same comes no second time"


def attested(module: Module) -> None:
    """Its new host vouches for its keys, which came along."""
    nonce, modules = os.urandom(32), module.host.process.modules
    answer = modules.AttestTpm(pb.AttestTpmRequest(name=module.name, nonce=nonce), timeout=10)
    found = verify_attestation(answer.attestation, module.host.key, module.status().module_id, nonce)
    assert found.pcrs[7] == hashlib.sha256(bytes(32) + DIGEST).digest()
    identity = modules.GetTpmIdentity(pb.GetTpmIdentityRequest(name=module.name), timeout=10)
    authority = x509.load_der_x509_certificate(identity.ca_certificate)
    for der in identity.endorsement_certificates:
        x509.load_der_x509_certificate(der).verify_directly_issued_by(authority)


def _signs_with_other(guest: Guest) -> bool:
    result, signature = guest.sign(FIRST, DIGEST)
    try:
        verify(OTHER, DIGEST, signature)
    except Exception:
        return False
    return result == 0


def test_what_is_not_taken(ends: Ends) -> None:
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        unpermitted = state(qemu)
        ends.move()
        earlier = state(qemu)
        ends.move()
        found = state(qemu)
        with arriving(ends.there) as (other, moved):
            assert TAKEN not in brings(other, unpermitted), "sealed by its own host"
            assert TAKEN not in brings(other, earlier), "of another move"
            for kind, (flags, data) in found.items():
                assert flags == t.ENCRYPTED
                bent = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
                for which, how, what in ((kind, flags, bent), (kind, 0, data), (kind, 0, bytes(1600)), (3 - kind, flags, data)):
                    assert other.set_blob(which, how, what) != TAKEN
            assert brings(other, found) == [TAKEN, TAKEN], "what was refused has changed nothing"
            goes_on(other)
            signs(moved)


def test_an_older_state_of_the_same_move(ends: Ends) -> None:
    """An attempt that was given up has had its one capture; for another one both ends are told anew."""
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        ends.move()
        older = state(qemu)
        measured(guest)
        newer = state(qemu)
        with arriving(ends.there) as (other, moved):
            assert TAKEN not in brings(other, newer), "the permission was used"
            ends.move()
            found = state(qemu)
            assert TAKEN not in brings(other, older)
            assert brings(other, {PERMANENT: found[PERMANENT], VOLATILE: older[VOLATILE]})[1] != TAKEN
            assert brings(other, found) == [TAKEN, TAKEN]
            goes_on(other)
            assert pcr(moved) == pcr(guest) != bytes(32)


def test_one_that_stays(ends: Ends) -> None:
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        ends.move()
        ends.move(key=b"")
        found = state(qemu)
        with arriving(ends.there) as (other, _):
            assert TAKEN not in brings(other, found)
        signs(guest)
    with arriving(ends.here) as (back, again):
        assert brings(back, found) == [TAKEN, TAKEN], "its own host takes its snapshot"
        goes_on(back)
        signs(again)


def test_a_key_that_is_not_wanted_any_more(ends: Ends) -> None:
    """An older state brings no key back: what the module there wants is what its TPM has."""
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        ends.move()
        found = state(qemu)
        ends.there.push("web", OTHER)
        with arriving(ends.there) as (other, moved):
            assert brings(other, found) == [TAKEN, TAKEN]
            goes_on(other)
            assert _signs_with_other(moved)
            asked = pb.SetTokenPresentRequest(request_id=os.urandom(8).hex(), name=ends.there.name, present=False)
            ends.there.host.process.modules.SetTokenPresent(asked, timeout=10)
            wait_for(lambda: moved.handles(FIRST) == [], what="the end of the key")


def test_who_may_permit_it(ends: Ends) -> None:
    bare = ends.here.host.create(f"bare-{next(NUMBERS)}")
    with pytest.raises(grpc.RpcError, match="no TPM"):
        bare.host.pusher.move_tpm(bare.name, True, bytes(MOVE_IDENT), bytes(MOVE_KEY))
    for ident, key in (
        (bytes(15), bytes(MOVE_KEY)),
        (bytes(MOVE_IDENT), bytes(31)),
        (bytes(17), b""),
        (bytes(MOVE_IDENT), bytes(33)),
    ):
        with pytest.raises(grpc.RpcError, match="a move has"):
            ends.here.host.pusher.move_tpm(ends.here.name, True, ident, key)
    bare.destroy()


def test_the_command(ends: Ends) -> None:
    here, there = (f"unix:{module.host.process.socket}" for module in (ends.here, ends.there))
    hsmvisor = Program(here, ends.here.host.authority.directory)
    with machine(ends.here) as (qemu, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        assert "may go to" in hsmvisor("module", "move-tpm", ends.here.name, "--to", there)
        with arriving(ends.there) as (other, moved):
            assert brings(other, state(qemu)) == [TAKEN, TAKEN]
            goes_on(other)
            signs(moved)
        assert "does not go" in hsmvisor("module", "move-tpm", ends.here.name, "--to", there, "--cancel")
