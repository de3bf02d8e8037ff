"""A guest that has the platform hierarchy's password: what is the module's there it does not get."""

from __future__ import annotations

import struct

import pytest
from hsmvisord.tpm import endorsement, guard
from hsmvisord.tpm.certificates import ATTRIBUTES
from hsmvisord.tpm.wanted import Wanted, index_of
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Authorization, Code, sized
from support.tpm_guest import DIGEST, HANDLE, OWNER, WAYS, Guest, Machine, new_p256, started_either_way, verify

machine = pytest.fixture(started_either_way, params=WAYS)
CERTIFICATE = bytes(700)
POLICY_DELETE = 1 << 10
MINE = Authorization(password=b"mine")


@pytest.fixture
def guest(machine: Machine) -> Guest:
    """Its firmware has never heard of TPMs; it takes the password, as SeaBIOS and OVMF do."""
    machine.deliver(certificate=CERTIFICATE)
    machine.guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"mine"), EMPTY_PASSWORD)
    return machine.guest


def everything_as_it_should_be(machine: Machine, guest: Guest) -> None:
    """A next key comes, and none stays that should be gone."""
    key = machine.deliver(certificate=CERTIFICATE)
    verify(key, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert guest.nv(index_of(HANDLE)) == CERTIFICATE
    machine.managed.quote(bytes(32), (7,))
    machine.managed.want({})
    assert guest.sign(HANDLE, DIGEST)[0] == 0x18B and guest.nv(index_of(HANDLE)) is None


def test_it_does_not_keep_the_module_out(machine: Machine, guest: Guest) -> None:
    for policy, algorithm in ((b"", tpm2.NULL_ALGORITHM), (bytes(32), tpm2.SHA256)):
        parameters = sized(policy) + struct.pack(">H", algorithm)
        assert guest.say(Code.SET_PRIMARY_POLICY, (PLATFORM,), parameters, MINE)[0] == guard.RC_HIERARCHY
    everything_as_it_should_be(machine, guest)


def test_it_changes_no_seed_of_the_platforms(machine: Machine, guest: Guest) -> None:
    """With the seed the policy would go by which the module has the hierarchy, and all its keys."""
    assert guest.say(Code.CHANGE_PPS, (PLATFORM,), b"", MINE)[0] == guard.RC_HIERARCHY
    everything_as_it_should_be(machine, guest)


def test_it_takes_no_key_away_and_brings_none(machine: Machine, guest: Guest) -> None:
    for handle in (HANDLE, guest.primary()):
        assert guest.say(Code.EVICT_CONTROL, (PLATFORM, handle), struct.pack(">I", HANDLE), MINE)[0] == guard.RC_HIERARCHY
    everything_as_it_should_be(machine, guest)


def test_it_deletes_no_certificate(machine: Machine, guest: Guest) -> None:
    machine.managed.certificates()
    for index in (index_of(HANDLE), index_of(0x81000005), *endorsement.INDICES):
        assert guest.say(Code.NV_UNDEFINE_SPACE, (PLATFORM, index), b"", MINE)[0] == guard.RC_HIERARCHY
    everything_as_it_should_be(machine, guest)


def define(
    index: int, attributes: int, password: bytes = b"", authorization: Authorization | None = MINE, by: int = PLATFORM
) -> bytes:
    public = struct.pack(">IHI", index, tpm2.SHA256, attributes) + sized(b"") + struct.pack(">H", 10)
    return tpm2.command(Code.NV_DEFINE_SPACE, (by,), sized(password) + sized(public), authorization)


@pytest.mark.parametrize("password", [b"", b"x", bytes(32)])
@pytest.mark.parametrize("attributes", [ATTRIBUTES, ATTRIBUTES | POLICY_DELETE])
def test_it_makes_no_index_of_the_modules(machine: Machine, guest: Guest, password: bytes, attributes: int) -> None:
    """Of one that cannot be read, or never be deleted, the module could not do what it has to."""
    for index in (index_of(HANDLE + 1), index_of(0x81000005), *endorsement.INDICES):
        answer = guest.process(define(index, attributes, password))
        assert tpm2.HEAD.unpack_from(answer)[2] == guard.RC_HIERARCHY
    assert guest.process(define(0x01800001, attributes, password))[6:10] in (bytes(4), b"\0\0\2\x82")
    everything_as_it_should_be(machine, guest)


def test_an_index_with_a_password_is_none_of_the_modules(machine: Machine, guest: Guest) -> None:
    """In a state of before."""
    index = index_of(HANDLE + 1)
    for command in (
        define(index, ATTRIBUTES, b"x"),
        tpm2.command(Code.NV_WRITE, (PLATFORM, index), sized(bytes(10)) + b"\0\0", MINE),
        tpm2.command(Code.NV_WRITE_LOCK, (PLATFORM, index), b"", MINE),
    ):
        assert tpm2.HEAD.unpack_from(machine.managed.tpm.process(command))[2] == 0
    key = new_p256()
    machine.managed.want({HANDLE + 1: Wanted(key, certificate=CERTIFICATE)})
    assert guest.nv(index) == CERTIFICATE and machine.managed.names().keys() == {HANDLE + 1}
    everything_as_it_should_be(machine, guest)


def test_an_owner_makes_indices_wherever_it_likes_and_the_module_has_them(machine: Machine, guest: Guest) -> None:
    index = index_of(HANDLE + 1)
    assert guest.nv_define(index, 8) == 0
    machine.managed.want({HANDLE + 1: Wanted(new_p256(), certificate=CERTIFICATE)})
    assert guest.nv(index) == CERTIFICATE
    everything_as_it_should_be(machine, guest)


@pytest.mark.parametrize("size", range(10, len(define(index_of(HANDLE), ATTRIBUTES, b"x"))))
def test_a_definition_that_ends_early_makes_none(guest: Guest, size: int) -> None:
    command = bytearray(define(index_of(HANDLE + 1), ATTRIBUTES, b"x")[:size])
    for length in (size, len(define(index_of(HANDLE + 1), ATTRIBUTES, b"x"))):
        command[2:6] = struct.pack(">I", length)
        assert tpm2.HEAD.unpack_from(guest.process(bytes(command)))[2] != 0


def test_what_is_the_guests_it_may(machine: Machine, guest: Guest) -> None:
    """As firmware and operating systems do."""
    primary = guest.primary()
    guest.good(Code.EVICT_CONTROL, (OWNER, primary), struct.pack(">I", 0x81000001), EMPTY_PASSWORD)
    guest.good(Code.EVICT_CONTROL, (OWNER, 0x81000001), struct.pack(">I", 0x81000001), EMPTY_PASSWORD)
    assert guest.nv_define(0x01800001, 8) == 0
    guest.good(Code.NV_UNDEFINE_SPACE, (PLATFORM, 0x01800001), b"", MINE)
    guest.good(Code.SET_PRIMARY_POLICY, (OWNER,), sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM), EMPTY_PASSWORD)
    guest.good(Code.CHANGE_EPS, (PLATFORM,), b"", MINE)
    everything_as_it_should_be(machine, guest)


def test_nobody_gets_it_without_a_machine(machine: Machine) -> None:
    machine.managed.switch_off()
    machine.managed.switch_on(machine=False)
    assert machine.guest.startup() == 0
    assert machine.guest.say(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"mine"), EMPTY_PASSWORD)[0] == 0x9A2
    everything_as_it_should_be(machine, machine.guest)
    machine.reset()
    machine.guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"mine"), EMPTY_PASSWORD)


@pytest.mark.parametrize("size", [0, 6, 9, 10, 13, 14, 17, 18])
def test_a_command_that_ends_early_is_the_tpms_to_refuse(guest: Guest, size: int) -> None:
    whole = tpm2.command(Code.NV_UNDEFINE_SPACE, (PLATFORM, index_of(HANDLE)), b"", MINE)
    answer = guest.process(whole[:size])
    assert tpm2.HEAD.unpack_from(answer)[2] != 0
    assert guest.nv(index_of(HANDLE)) == CERTIFICATE


def test_barred_is_whoever_is_named_first_or_second(machine: Machine) -> None:
    machine.deliver(new_p256())
    machine.managed._barred = guard.Handles()
    listed = struct.pack(">III", tpm2.HANDLES, 0x81800000, 10)
    assert machine.guest.say(Code.GET_CAPABILITY, (), listed)[0] == 0, "that is no handle"
    first = tpm2.command(Code.READ_PUBLIC, (HANDLE,))
    second = tpm2.command(Code.START_AUTH_SESSION, (tpm2.NULL, HANDLE))
    for command in (first, second):
        assert tpm2.HEAD.unpack(machine.managed.process(command)) == (tpm2.NO_SESSIONS, 10, guard.RC_HANDLE)
