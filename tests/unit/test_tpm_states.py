"""A TPM over its guest's starts, sleep and moves: what is wanted in it is so again before the guest's next command."""

from __future__ import annotations

import struct

import pytest
from hsmvisord.tpm import library
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, State, Wanted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, Code, Tpm2Error
from support import tpm_guest as g
from support.tpm_guest import DIGEST, HANDLE, INDEX, WAYS, Guest, Machine, new_p256, started_either_way, verify

machine = pytest.fixture(started_either_way, params=WAYS)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def test_nothing_is_done_while_the_guest_sleeps(machine: Machine, guest: Guest) -> None:
    first, second = machine.deliver(), new_p256()
    assert guest.shutdown(tpm2.STATE) == 0
    with pytest.raises(Asleep):
        machine.deliver(second)
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0, "it wakes as it slept"
    verify(second, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert first is not second and not machine.said


def test_before_the_first_start(machine: Machine) -> None:
    machine.anew()
    with pytest.raises(Asleep):
        machine.deliver()
    assert machine.guest.startup() == 0
    assert machine.managed.names().keys() == {HANDLE}


def test_an_older_state_brings_no_key_back(machine: Machine) -> None:
    machine.deliver()
    older = machine.kept[-1]
    newer = machine.deliver()
    machine.anew(older, {HANDLE: Wanted(newer)})
    assert machine.guest.startup() == 0
    verify(newer, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    machine.anew(older)
    assert machine.guest.startup() == 0 and machine.managed.names() == {}


def test_one_that_goes_on_elsewhere_has_what_is_wanted_there(machine: Machine) -> None:
    machine.deliver()
    primary = machine.guest.primary()
    public = machine.guest.public(primary)
    states = {kind: machine.managed.tpm.state(kind) for kind in (library.PERMANENT, library.VOLATILE)}
    machine.managed.switch_off()
    newer = new_p256()
    machine.managed._wanted = {HANDLE: Wanted(newer)}
    for kind, data in states.items():
        machine.managed.set_state(kind, data)
    machine.managed.switch_on()
    assert machine.guest.public(primary) == public, "the guest notices nothing"
    verify(newer, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    with pytest.raises(TpmFault):
        machine.managed.set_state(library.PERMANENT, states[library.PERMANENT])


# ---- before it is said what is wanted -----------------------------------------------------------------------------------------


def test_nothing_is_taken_away_before_it_is_known_what_is_wanted(machine: Machine) -> None:
    key = machine.deliver(certificate=b"beside")
    machine.anew(machine.kept[-1], told=False)
    managed, guest = machine.managed, machine.guest
    assert not managed.told and guest.startup() == 0
    for _ in range(2):
        verify(key, DIGEST, guest.sign(HANDLE, DIGEST)[1])
        assert guest.nv(INDEX) == b"beside" and not managed.told
        machine.reset()
    managed.want({})
    assert managed.told and managed.names() == {} and guest.nv(INDEX) is None


def test_no_state_is_taken_before_it_is_known_what_is_wanted(machine: Machine) -> None:
    machine.deliver()
    states = {kind: machine.managed.tpm.state(kind) for kind in (library.PERMANENT, library.VOLATILE)}
    machine.anew(told=False)
    managed = machine.managed
    managed.switch_off()
    with pytest.raises(TpmFault, match="which keys are wanted is not known yet"):
        managed.set_state(library.PERMANENT, states[library.PERMANENT])
    with pytest.raises(Asleep):
        managed.want({})
    for kind, data in states.items():
        managed.set_state(kind, data)
    managed.switch_on()
    assert managed.names() == {}


def test_a_first_want_that_fails_is_what_is_wanted(machine: Machine) -> None:
    """What is not wanted goes although what is wanted cannot come."""
    machine.deliver()
    machine.guest.fill(with_keys=True)
    machine.anew(machine.kept[-1], told=False)
    assert machine.guest.startup() == 0
    with pytest.raises(Tpm2Error, match="0x14b"):
        machine.managed.want({HANDLE + n: Wanted(new_p256()) for n in (1, 2, 3)})
    assert machine.managed.told and machine.managed.names() == {}
    machine.reset()
    assert machine.guest.sign(HANDLE, DIGEST)[0]


# ---- a guest that only says that it sleeps --------------------------------------------------------------------------------------


def test_who_says_that_it_sleeps_keeps_no_old_key(machine: Machine, guest: Guest) -> None:
    """A TPM works on after Shutdown(STATE): the next command that may use a key finds what is wanted."""
    machine.deliver()
    guest.shutdown(tpm2.STATE)
    newer = new_p256()
    with pytest.raises(Asleep):
        machine.deliver(newer)
    verify(newer, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    guest.shutdown(tpm2.STATE)
    with pytest.raises(Asleep):
        machine.managed.want({})
    assert guest.sign(HANDLE, DIGEST)[0]
    assert not machine.said


def test_nor_as_a_second_handle(machine: Machine, guest: Guest) -> None:
    """TPM2_Certify, TPM2_GetTime and TPM2_GetCommandAuditDigest name the key that signs behind another one."""
    for code, before in ((0x148, (0x80000000,)), (0x14C, (g.ENDORSEMENT,)), (0x133, (g.ENDORSEMENT,))):
        machine.managed.want({HANDLE: Wanted(new_p256()), HANDLE + 1: Wanted(new_p256())})
        guest.shutdown(tpm2.STATE)
        with pytest.raises(Asleep):
            machine.managed.want({HANDLE + 1: Wanted(new_p256())})
        guest.say(code, (*before, HANDLE))
        assert machine.managed.state is State.AWAKE and machine.managed.names().keys() == {HANDLE + 1}
        machine.reset()


def test_who_sleeps_and_asks_other_things_wakes_as_it_slept(machine: Machine, guest: Guest) -> None:
    machine.deliver()
    guest.shutdown(tpm2.STATE)
    newer = new_p256()
    with pytest.raises(Asleep):
        machine.deliver(newer)
    guest.good(Code.PCR_READ, (), tpm2.selection([0]))
    guest.handles(tpm2.TRANSIENT)
    assert guest.nv_define(0x01500000, 8) == 0  # that is kept, and is nothing that its sleep depends on
    assert machine.managed.state is State.ASLEEP
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0
    verify(newer, DIGEST, guest.sign(HANDLE, DIGEST)[1])


@pytest.mark.parametrize("what", ["cleared", "extended", "switched"])
def test_who_changes_its_tpm_is_awake(machine: Machine, guest: Guest, what: str) -> None:
    """Its sleep is over, for it could not wake any more."""
    machine.deliver()
    guest.shutdown(tpm2.STATE)
    newer = new_p256()
    with pytest.raises(Asleep):
        machine.deliver(newer, 0x81000001)
    if what == "cleared":
        guest.good(Code.CLEAR, (g.LOCKOUT,), b"", EMPTY_PASSWORD)
    elif what == "extended":
        guest.extend(0, b"e" * 32)
    else:
        guest.good(g.HIERARCHY_CONTROL, (g.ENDORSEMENT,), struct.pack(">IB", g.ENDORSEMENT, 0), EMPTY_PASSWORD)
    assert machine.managed.state is State.AWAKE
    assert machine.managed.names().keys() == {0x81000001} and not machine.said
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) != 0


@pytest.mark.parametrize("sleeps", [False, True])
def test_one_that_moves_in_its_sleep_wakes_elsewhere(machine: Machine, guest: Guest, sleeps: bool) -> None:
    """As long as it uses no key; else it would have what is not wanted any more."""
    machine.deliver()
    guest.extend(7, b"e" * 32)
    guest.shutdown(tpm2.STATE)
    states = {kind: machine.managed.tpm.state(kind) for kind in (library.PERMANENT, library.VOLATILE)}
    newer = new_p256()
    machine.anew(keys={HANDLE: Wanted(newer)})
    machine.managed.switch_off()
    for kind, data in states.items():
        machine.managed.set_state(kind, data)
    machine.managed.switch_on()
    assert machine.managed.state is State.ASLEEP
    if sleeps:
        machine.managed.switch_off()
        machine.managed.switch_on()
        assert guest.startup(tpm2.STATE) == 0
    verify(newer, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert not machine.said


def test_one_that_moves_before_it_was_started(machine: Machine) -> None:
    machine.managed.switch_off()
    machine.managed.switch_on()
    states = {kind: machine.managed.tpm.state(kind) for kind in (library.PERMANENT, library.VOLATILE)}
    key = new_p256()
    machine.anew(keys={HANDLE: Wanted(key)})
    machine.managed.switch_off()
    for kind, data in states.items():
        machine.managed.set_state(kind, data)
    machine.managed.switch_on()
    assert machine.managed.state is State.ON and machine.guest.startup() == 0
    verify(key, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    assert not machine.said


def test_power_cuts_lock_no_guest_out(machine: Machine, guest: Guest) -> None:
    """Each counts as a wrong password, where something was used that these lock (part 1, 19.8)."""
    attributes = tpm2.Attributes.FIXED_TPM | tpm2.Attributes.FIXED_PARENT | tpm2.Attributes.SENSITIVE_DATA_ORIGIN
    attributes |= tpm2.Attributes.USER_WITH_AUTH | tpm2.Attributes.SIGN
    none = tpm2.NULL_ALGORITHM
    parameters = struct.pack(">HHHH", none, none, tpm2.CURVES["secp256r1"], none)
    template = tpm2.template(tpm2.ECC, attributes, parameters, struct.pack(">HH", 0, 0))
    for _ in range(10):
        handle, _public = guest.made(g.OWNER, template)
        results = [guest.sign(handle, DIGEST)[0] for _again in range(2)]
        assert results in ([0, 0], [0x922, 0]), "TPM_RC_RETRY: it has noted that from now on a power cut counts"
        machine.reset()
