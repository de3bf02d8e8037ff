"""A process hands its TPM over to a successor: what the guest has loaded, its PCRs and its sleep go on there; nothing goes on here.

One process has one TPM: the successor here is the same one, made anew of what was handed over alone.
"""

from __future__ import annotations

import os
import struct

import pytest
from hsmvisord.tpm import library
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, State, Wanted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, OWNER, Code, sized
from support.tpm_guest import DIGEST, HANDLE, INDEX, Guest, HmacSession, Machine, new_p256, started, verify

machine = pytest.fixture(started)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def succeed(machine: Machine, told: bool = False) -> State:
    """A successor, which nobody has told yet which keys are wanted; returns what it is at."""
    volatile, awake, barred = machine.managed.freeze()
    kept = machine.managed.tpm.permanent
    assert not machine.kept or machine.kept[-1] == kept, "what was kept is all there is"
    machine.anew(kept, told=told)
    machine.managed.switch_off()
    machine.managed.resume(volatile, awake, barred)
    return machine.managed.state


def test_what_is_barred_stays_so_until_it_is_known_what_is_wanted(machine: Machine, guest: Guest) -> None:
    other = new_p256()
    machine.managed.want({HANDLE: Wanted(new_p256()), 0x81000005: Wanted(other)})
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        machine.managed.want({0x81000005: Wanted(other)})
    succeed(machine)
    for handle in (HANDLE, 0x81000005):
        assert guest.sign(handle, DIGEST)[0] == 0x18B, "nobody has said which"
    machine.managed.want({0x81000005: Wanted(other)})
    assert guest.sign(HANDLE, DIGEST)[0] == 0x18B
    verify(other, DIGEST, guest.sign(0x81000005, DIGEST)[1])


def test_what_the_guest_has_goes_on(machine: Machine, guest: Guest) -> None:
    key = machine.deliver(certificate=b"beside")
    session = HmacSession(guest)
    policy = guest.session(tpm2.POLICY_SESSION)
    objects = {handle: guest.public(handle) for handle in [guest.primary() for _ in range(2)]}
    guest.extend(7, b"e" * 32)
    saved = guest.good(Code.CONTEXT_SAVE, (min(objects),))
    pcr = guest.good(Code.PCR_READ, (), tpm2.selection([7]))
    for _ in range(3):
        assert succeed(machine) is State.AWAKE
        assert {handle: guest.public(handle) for handle in guest.handles(tpm2.TRANSIENT)} == objects
        assert guest.handles(tpm2.LOADED_SESSION) == [session.handle, policy]
        assert guest.good(Code.PCR_READ, (), tpm2.selection([7])) == pcr
        result, signature = session.sign(HANDLE, tpm2.name_of(guest.public(HANDLE)), DIGEST)
        assert result == 0 and guest.nv(INDEX) == b"beside"
        verify(key, DIGEST, signature)
    guest.flush(min(objects))
    assert guest.good(Code.CONTEXT_LOAD, (), saved)
    assert not machine.said and not machine.kept


def test_the_successor_is_told_and_swaps(machine: Machine, guest: Guest) -> None:
    first = machine.deliver(certificate=b"first")
    succeed(machine)
    assert not machine.managed.told
    verify(first, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    second = machine.deliver(certificate=b"second")
    verify(second, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert guest.nv(INDEX) == b"second"
    machine.reset()
    verify(second, DIGEST, guest.sign(HANDLE, DIGEST)[1])


def test_it_attests_as_before(machine: Machine, guest: Guest) -> None:
    guest.extend(4, b"e" * 32)
    before = machine.managed.quote(b"who asked", tuple(range(24)))
    succeed(machine)
    after = machine.managed.quote(b"who asked", tuple(range(24)))
    assert (after.values, after.key) == (before.values, before.key)
    assert machine.managed.attestation_key() == before.key


def test_a_change_that_was_not_a_commit_is_in_neither(machine: Machine, guest: Guest) -> None:
    """What the guest was told is there is what was kept."""
    assert guest.nv_define(0x01500000, 8) == 0
    machine.refuses = True
    result, _ = guest.say(Code.NV_WRITE, (0x01500000, 0x01500000), sized(b"unwanted") + bytes(2), EMPTY_PASSWORD)
    assert result
    machine.refuses = False
    machine.reset()
    guest.good(Code.NV_WRITE, (0x01500000, 0x01500000), sized(b"as it is") + bytes(2), EMPTY_PASSWORD)
    succeed(machine)
    assert guest.nv(0x01500000) == b"as it is"


def test_the_guests_sleep_goes_on(machine: Machine, guest: Guest) -> None:
    machine.deliver()
    guest.extend(7, b"e" * 32)
    pcr = guest.good(Code.PCR_READ, (), tpm2.selection([7]))
    guest.shutdown(tpm2.STATE)
    assert succeed(machine) is State.ASLEEP
    newer = new_p256()
    with pytest.raises(Asleep):
        machine.deliver(newer)
    assert succeed(machine) is State.ASLEEP
    with pytest.raises(Asleep):
        machine.deliver(newer)
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0 and guest.good(Code.PCR_READ, (), tpm2.selection([7]))[4:] == pcr[4:]
    verify(newer, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert not machine.said


def test_one_that_was_not_started_is_started_there(machine: Machine, guest: Guest) -> None:
    machine.reset()
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert succeed(machine) is State.ON
    with pytest.raises(Asleep):
        machine.deliver()
    assert guest.startup() == 0
    assert guest.sign(HANDLE, DIGEST)[0] == 0 and not machine.said


def test_one_that_is_off_is_off_there(machine: Machine, guest: Guest) -> None:
    machine.managed.switch_off()
    assert succeed(machine) is State.OFF and not machine.managed.tpm.on
    machine.managed.switch_on()
    assert guest.startup() == 0


def test_after_it_nothing_is_answered_or_kept(machine: Machine, guest: Guest) -> None:
    managed, key = machine.managed, machine.deliver()
    certificates = b"a", b"b", b"c"
    managed.freeze()
    kept = len(machine.kept)
    for what in (
        lambda: guest.sign(HANDLE, DIGEST),
        lambda: guest.startup(),
        lambda: managed.want({HANDLE: Wanted(key)}),
        lambda: managed.want({}),
        managed.names,
        managed.manufacture,
        managed.switch_on,
        managed.switch_off,
        managed.freeze,
        managed.endorsement_keys,
        managed.attestation_key,
        managed.certificates,
        lambda: managed.certify(*certificates),
        lambda: managed.quote(b"who asked", (0,)),
        lambda: managed.blob(library.PERMANENT),
        lambda: managed.set_state(library.PERMANENT, b""),
        lambda: managed.resume(b"", True),
    ):
        with pytest.raises(TpmFault, match="a successor has this TPM"):
            what()
    assert len(machine.kept) == kept


def test_not_between_a_state_that_was_brought_and_its_machines_start(machine: Machine, guest: Guest) -> None:
    """No successor would have it; and this one goes on."""
    states = {kind: machine.managed.tpm.state(kind) for kind in (library.PERMANENT, library.VOLATILE)}
    machine.managed.switch_off()
    for kind, data in states.items():
        machine.managed.set_state(kind, data)
        with pytest.raises(TpmFault, match="a machine has yet to go on"):
            machine.managed.freeze()
    machine.managed.switch_on()
    assert machine.managed.state is State.AWAKE
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (OWNER,), sized(b"x"), EMPTY_PASSWORD)
    machine.managed.freeze()


@pytest.mark.parametrize("size", [1, 100, 9000])
def test_a_volatile_state_that_is_none(machine: Machine, guest: Guest, size: int) -> None:
    machine.managed.switch_off()
    with pytest.raises(TpmFault):
        machine.managed.resume(os.urandom(size), True)
    machine.managed.switch_on()
    assert guest.startup() == 0
    assert guest.say(Code.GET_CAPABILITY, (), struct.pack(">III", 1, 0, 1))[0] == 0
