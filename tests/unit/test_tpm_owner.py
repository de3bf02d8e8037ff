"""Keys at the owner's handles: they come whatever password the guest sets, and it may take them away, and no more than that
(test_tpm_attacks.py)."""

from __future__ import annotations

import struct

import pytest
from hsmvisord.tpm.managed import NotPlaced, Wanted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Authorization, Code, sized
from support import tpm_guest as g
from support.tpm_guest import DIGEST, HANDLE, LOCKOUT, OWNER, WAYS, Guest, Machine, new_p256, started_either_way, verify

MINE, SRK = 0x81000007, 0x81000001
PASSWORD = Authorization(password=b"the owner's")

machine = pytest.fixture(started_either_way, params=WAYS)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def evict(guest: Guest, handle: int, authorization: Authorization = EMPTY_PASSWORD) -> int:
    return guest.say(Code.EVICT_CONTROL, (OWNER, handle), struct.pack(">I", handle), authorization)[0]


def occupy(guest: Guest, handle: int) -> bytes:
    """A primary key of the guest's own there; its TPMT_PUBLIC."""
    primary = guest.primary()
    guest.good(Code.EVICT_CONTROL, (OWNER, primary), struct.pack(">I", handle), EMPTY_PASSWORD)
    guest.flush(primary)
    return guest.public(handle)


def own_policy(guest: Guest, authorization: Authorization = EMPTY_PASSWORD) -> None:
    guest.good(Code.SET_PRIMARY_POLICY, (OWNER,), sized(b"p" * 32) + struct.pack(">H", tpm2.SHA256), authorization)


def test_it_comes_whatever_password_the_owner_has(machine: Machine, guest: Guest) -> None:
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (OWNER,), sized(b"the owner's"), EMPTY_PASSWORD)
    for _ in range(2):
        key = machine.deliver(handle=MINE, certificate=b"beside")
        verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])
    machine.reset()
    verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])
    assert machine.managed.names() == {MINE: tpm2.name_of(guest.public(MINE))} and not machine.said


def test_it_is_there_again_after_a_clear_before_the_next_command(machine: Machine, guest: Guest) -> None:
    """TPM2_Clear takes the owner's objects, its password and its policy."""
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (OWNER,), sized(b"the owner's"), EMPTY_PASSWORD)
    own_policy(guest, PASSWORD)
    theirs = occupy_with_password(guest)
    with pytest.raises(NotPlaced):
        machine.deliver(handle=MINE)
    guest.good(Code.CLEAR, (LOCKOUT,), b"", EMPTY_PASSWORD)
    assert theirs not in guest.handles(0x81000000) and MINE in guest.handles(0x81000000)
    assert guest.sign(MINE, DIGEST)[0] == 0
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (OWNER,), sized(b"the owner's"), EMPTY_PASSWORD)
    verify(machine.deliver(handle=MINE), DIGEST, guest.sign(MINE, DIGEST)[1])
    assert not machine.said


def occupy_with_password(guest: Guest) -> int:
    sensitive = sized(sized(b"") + sized(b""))
    parameters = sensitive + sized(tpm2.parent_template(b"u" * 32)) + sized(b"") + struct.pack(">I", 0)
    primary = int.from_bytes(guest.good(Code.CREATE_PRIMARY, (OWNER,), parameters, PASSWORD)[:4], "big")
    guest.good(Code.EVICT_CONTROL, (OWNER, primary), struct.pack(">I", SRK), PASSWORD)
    guest.flush(primary)
    return SRK


def test_an_owner_that_changes_the_policy_keeps_its_own_keys_out_alone(machine: Machine, guest: Guest) -> None:
    own_policy(guest)
    platforms, owners = new_p256(), new_p256()
    with pytest.raises(NotPlaced, match="0x81000007: TPM2_CREATE_PRIMARY: 0x99d"):
        machine.managed.want({HANDLE: Wanted(platforms), MINE: Wanted(owners, certificate=b"beside")})
    verify(platforms, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert guest.handles(0x81000000) == [HANDLE] and guest.handles(0x01000000) == [], "no certificate without its key"
    machine.reset()
    assert machine.said and "0x81000007: TPM2_CREATE_PRIMARY: 0x99d" in machine.said[-1]
    verify(platforms, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    guest.good(Code.CLEAR, (LOCKOUT,), b"", EMPTY_PASSWORD)
    verify(owners, DIGEST, guest.sign(MINE, DIGEST)[1])


def test_an_owner_that_changes_the_policy_keeps_no_old_key(machine: Machine, guest: Guest) -> None:
    machine.deliver(handle=MINE, certificate=b"old")
    own_policy(guest)
    with pytest.raises(NotPlaced):
        machine.deliver(handle=MINE, certificate=b"new")
    assert guest.sign(MINE, DIGEST)[0] and guest.handles(0x81000000) == guest.handles(0x01000000) == []
    machine.managed.want({})


def test_what_its_owner_takes_away_comes_back(machine: Machine, guest: Guest) -> None:
    key = machine.deliver(handle=MINE)
    assert evict(guest, MINE) == 0 and guest.sign(MINE, DIGEST)[0]
    machine.deliver(key, MINE)
    verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])
    assert evict(guest, MINE) == 0
    machine.reset()
    verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])


def test_nothing_of_the_guests_own_is_overwritten(machine: Machine, guest: Guest) -> None:
    theirs = occupy(guest, SRK)
    other = new_p256()
    with pytest.raises(NotPlaced, match="0x81000001: something of the guest's own is there"):
        machine.managed.want({SRK: Wanted(new_p256()), MINE: Wanted(other)})
    assert guest.public(SRK) == theirs and machine.managed.names().keys() == {MINE}
    machine.managed.want({})
    assert guest.handles(0x81000000) == [SRK] and guest.public(SRK) == theirs


def test_it_comes_when_the_guest_makes_room(machine: Machine, guest: Guest) -> None:
    occupy(guest, MINE)
    key = new_p256()
    with pytest.raises(NotPlaced):
        machine.deliver(key, MINE)
    assert evict(guest, MINE) == 0
    machine.reset()
    verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])


def test_what_the_guest_puts_there_instead_stays(machine: Machine, guest: Guest) -> None:
    key = machine.deliver(handle=MINE)
    assert evict(guest, MINE) == 0
    theirs = occupy(guest, MINE)
    with pytest.raises(NotPlaced):
        machine.deliver(key, MINE)
    assert guest.public(MINE) == theirs


def test_a_hierarchy_that_was_off_hides_no_key(machine: Machine, guest: Guest) -> None:
    """What cannot be seen cannot be taken away; so it goes as soon as the hierarchy is on again."""
    machine.deliver(handle=MINE)
    guest.good(g.HIERARCHY_CONTROL, (OWNER,), struct.pack(">IB", OWNER, 0), EMPTY_PASSWORD)
    assert guest.sign(MINE, DIGEST)[0]
    machine.managed.want({})
    guest.good(g.HIERARCHY_CONTROL, (PLATFORM,), struct.pack(">IB", OWNER, 1), EMPTY_PASSWORD)
    assert guest.handles(0x81000000) == [] and guest.sign(MINE, DIGEST)[0]
    assert len(machine.said) == 1 and "TPM2_CREATE_PRIMARY: 0x185" in machine.said[0], "while it was off, and wanted"


def test_it_comes_when_the_hierarchy_is_on_again(machine: Machine, guest: Guest) -> None:
    guest.good(g.HIERARCHY_CONTROL, (OWNER,), struct.pack(">IB", OWNER, 0), EMPTY_PASSWORD)
    key = new_p256()
    with pytest.raises(NotPlaced):
        machine.deliver(key, MINE)
    guest.good(g.HIERARCHY_CONTROL, (PLATFORM,), struct.pack(">IB", OWNER, 1), EMPTY_PASSWORD)
    verify(key, DIGEST, guest.sign(MINE, DIGEST)[1])
