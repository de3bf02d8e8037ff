"""Certificates beside a module's keys, in the TPM's NV memory: anybody reads them, the guest changes none."""

from __future__ import annotations

import os
import struct

import pytest
from hsmvisord import limits
from hsmvisord.tpm.managed import NotPlaced, Wanted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Authorization, Code, sized
from support import tpm_guest as g
from support.tpm_guest import DIGEST, HANDLE, INDEX, OWNER, Guest, Machine, new_p256, started, verify

MOST = limits.MAX_TPM_CERTIFICATE
UNDEFINE_SPECIAL, NV_CHANGE_AUTH, NV_EXTEND, NV_INCREMENT, NV_SET_BITS = 0x11F, 0x13B, 0x136, 0x134, 0x135
PLACES = {0x81800000: 0x01400000, 0x8180FFFF: 0x0140FFFF, 0x81000000: 0x01410000, 0x8100FFFF: 0x0141FFFF}

machine = pytest.fixture(started)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, MOST - 1, MOST])
def test_a_guest_reads_it_whole(machine: Machine, size: int) -> None:
    der = os.urandom(size)
    machine.deliver(certificate=der)
    assert machine.guest.nv(INDEX) == der
    assert machine.guest.nv_attributes(INDEX) == 0x62072801, "as swtpm_setup's, written and locked"


@pytest.mark.parametrize("handle", PLACES, ids=hex)
def test_where_it_is(machine: Machine, handle: int) -> None:
    machine.deliver(handle=handle, certificate=b"beside")
    assert machine.guest.nv(PLACES[handle]) == b"beside"
    assert machine.guest.handles(0x01000000) == [PLACES[handle]]


def test_the_owner_reads_it_too(machine: Machine, guest: Guest) -> None:
    machine.deliver(certificate=b"beside")
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (OWNER,), sized(b"the owner's"), EMPTY_PASSWORD)
    answer = guest.good(Code.NV_READ, (OWNER, INDEX), struct.pack(">HH", 6, 0), Authorization(password=b"the owner's"))
    assert answer[6:12] == b"beside"


def test_one_that_is_too_long_does_not_come(machine: Machine) -> None:
    """Its key does, and none beside it that is of another.  The limit is that of libtpms."""
    assert machine.guest.nv_define(0x01800000, MOST) == 0 and machine.guest.nv_define(0x01800001, MOST + 1) == 0x2D5
    machine.deliver(certificate=b"before")
    newer = new_p256()
    with pytest.raises(NotPlaced, match=f"0x81800001: its certificate has {MOST + 1} bytes, a TPM's at most {MOST}"):
        machine.deliver(newer, certificate=bytes(MOST + 1))
    assert machine.guest.nv(INDEX) is None
    verify(newer, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


def test_it_changes_with_its_key_in_one_commit(machine: Machine) -> None:
    machine.deliver(certificate=os.urandom(1500))
    kept, newer = len(machine.kept), os.urandom(2000)
    key = machine.deliver(certificate=newer)
    assert len(machine.kept) == kept + 1
    machine.anew(machine.kept[-1], told=False)
    assert machine.guest.startup() == 0 and machine.guest.nv(INDEX) == newer
    verify(key, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


def test_it_changes_alone(machine: Machine) -> None:
    key = machine.deliver(certificate=b"of 2024")
    public, kept = machine.guest.public(HANDLE), len(machine.kept)
    machine.deliver(key, certificate=b"of 2025")
    assert machine.guest.public(HANDLE) == public and len(machine.kept) == kept + 1
    assert machine.guest.nv(INDEX) == b"of 2025"


def test_the_same_again_writes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    key, said = machine.deliver(certificate=b"beside"), list[int]()
    kept = len(machine.kept)

    def process(command: bytes, locality: int) -> bytes:
        said.append(tpm2.HEAD.unpack_from(command)[2])
        return machine.managed.tpm.process(command, locality)

    monkeypatch.setattr(machine.managed._commands, "_process", process)
    machine.deliver(key, certificate=b"beside")
    assert len(machine.kept) == kept and Code.NV_READ in said
    assert not {Code.NV_DEFINE_SPACE, Code.NV_WRITE, Code.NV_WRITE_LOCK, Code.IMPORT, Code.EVICT_CONTROL} & set(said)


def test_it_goes_with_its_key_or_alone(machine: Machine) -> None:
    first, second = (Wanted(new_p256(), certificate=b"%d" % at) for at in range(2))
    machine.managed.want({HANDLE: first, HANDLE + 1: second})
    machine.managed.want({HANDLE: first})
    assert (machine.guest.nv(INDEX), machine.guest.nv(INDEX + 1)) == (b"0", None)
    machine.managed.want({HANDLE: Wanted(first.key)})
    assert machine.guest.nv(INDEX) is None and machine.managed.names().keys() == {HANDLE}


def test_an_older_state_brings_none_back(machine: Machine) -> None:
    key = machine.deliver(certificate=b"older")
    older = machine.kept[-1]
    machine.anew(older, {HANDLE: Wanted(key, certificate=b"newer")})
    assert machine.guest.startup() == 0 and machine.guest.nv(INDEX) == b"newer"
    machine.anew(older)
    assert machine.guest.startup() == 0 and machine.guest.nv(INDEX) is None


def test_as_many_as_the_module_may_have(machine: Machine) -> None:
    """Handles of more than one answer of the TPM."""
    ders = {HANDLE + at: Wanted(new_p256(), certificate=os.urandom(900)) for at in range(8)}
    machine.managed.want(ders)
    assert {handle: machine.guest.nv(INDEX + handle - HANDLE) for handle in ders} == {
        handle: one.certificate for handle, one in ders.items()
    }
    machine.reset()
    assert machine.managed.names().keys() == ders.keys() and not machine.said


# ---- the guest's own, and attacks ---------------------------------------------------------------------------------------------


def test_a_guests_own_indices_are_its_own(machine: Machine, guest: Guest) -> None:
    for index in (0x01500000, 0x01400009, 0x01C00002):
        assert guest.nv_define(index, 8) == 0
        guest.good(Code.NV_WRITE, (index, index), sized(b"its  own") + bytes(2), EMPTY_PASSWORD)
    machine.deliver(certificate=b"beside")
    machine.managed.want({})
    assert {guest.nv(index) for index in (0x01500000, 0x01400009, 0x01C00002)} == {b"its  own"}


@pytest.mark.parametrize("said", [b"beside", b"not it"])
def test_a_guest_keeps_no_place_occupied(machine: Machine, guest: Guest, said: bytes) -> None:
    """What says the same is not ours, for the guest could change it later."""
    assert guest.nv_define(INDEX, 6) == 0
    guest.good(Code.NV_WRITE, (INDEX, INDEX), sized(said) + bytes(2), EMPTY_PASSWORD)
    machine.deliver(certificate=b"beside")
    assert guest.nv(INDEX) == b"beside" and guest.nv_attributes(INDEX) == 0x62072801


ATTACKS = {
    "undefined by the owner": (Code.NV_UNDEFINE_SPACE, (OWNER, INDEX), b""),
    "undefined by the platform": (Code.NV_UNDEFINE_SPACE, (PLATFORM, INDEX), b""),
    "written by the owner": (Code.NV_WRITE, (OWNER, INDEX), sized(b"mine") + bytes(2)),
    "written by itself": (Code.NV_WRITE, (INDEX, INDEX), sized(b"mine") + bytes(2)),
    "written by the platform": (Code.NV_WRITE, (PLATFORM, INDEX), sized(b"mine") + bytes(2)),
    "extended": (NV_EXTEND, (INDEX, INDEX), sized(b"mine")),
    "incremented": (NV_INCREMENT, (INDEX, INDEX), b""),
    "bits set": (NV_SET_BITS, (INDEX, INDEX), bytes(7) + b"\1"),
    "another authorization": (NV_CHANGE_AUTH, (INDEX,), sized(b"mine")),
    "read-locked": (0x14F, (INDEX, INDEX), b""),
    "another one defined": (
        Code.NV_DEFINE_SPACE,
        (OWNER,),
        sized(b"") + sized(struct.pack(">IHI", INDEX, tpm2.SHA256, 0x60006) + sized(b"") + struct.pack(">H", 8)),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_guest_changes_none(machine: Machine, guest: Guest, attack: str) -> None:
    machine.deliver(certificate=b"beside")
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    code, handles, parameters = ATTACKS[attack]
    assert guest.say(code, handles, parameters, EMPTY_PASSWORD)[0]
    assert guest.nv(INDEX) == b"beside" and guest.nv_attributes(INDEX) == 0x62072801


def test_nor_by_the_special_way_to_undefine(machine: Machine, guest: Guest) -> None:
    machine.deliver(certificate=b"beside")
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    session = guest.session(tpm2.POLICY_SESSION)
    guest.say(Code.POLICY_LOCALITY, (session,), bytes([200]))
    both = g.Several(all=(Authorization(session), EMPTY_PASSWORD))
    assert guest.say(UNDEFINE_SPECIAL, (INDEX, PLATFORM), b"", both)[0]
    assert guest.nv(INDEX) == b"beside"


def test_none_goes_when_the_guest_clears_its_tpm(machine: Machine, guest: Guest) -> None:
    machine.deliver(certificate=b"beside")
    assert guest.nv_define(0x01500000, 8) == 0
    guest.good(Code.CLEAR, (g.LOCKOUT,), b"", EMPTY_PASSWORD)
    assert guest.nv(INDEX) == b"beside" and guest.nv(0x01500000) is None, "only the owner's went"
