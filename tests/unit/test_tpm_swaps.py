"""A module's keys and their certificates change while the guest uses them: it has the old pair or the new one, whatever fails."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisord.tpm import wanted
from hsmvisord.tpm.engine import TpmFault, failure
from hsmvisord.tpm.managed import NotPlaced, Wanted
from hsmvisord.tpm.platform import FIRST
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Tpm2Error
from support.tpm_guest import DIGEST, HANDLE, HIERARCHY_CONTROL, INDEX, WAYS, Machine, new_p256, started_either_way, verify

machine = pytest.fixture(started_either_way, params=WAYS)


def test_a_hundred_swaps_while_the_guest_signs(machine: Machine) -> None:
    """It reads the public part before each use; every signature is that of the key of its time."""
    keys = {machine.deliver(): 0}
    by_name = {tpm2.name_of(machine.guest.public(HANDLE)): key for key in keys}
    over, signed, failed = threading.Event(), list[tuple[bytes, bytes, bytes]](), list[int]()

    def sign_on_and_on() -> None:
        while not over.is_set():
            before = machine.guest.public(HANDLE)
            result, signature = machine.guest.sign(HANDLE, DIGEST)
            if result:
                failed.append(result)
            signed.append((before, machine.guest.public(HANDLE), signature))

    thread = threading.Thread(target=sign_on_and_on)
    thread.start()
    for _ in range(100):
        key = machine.deliver()
        by_name[tpm2.name_of(machine.guest.public(HANDLE))] = key
    over.set()
    thread.join()
    assert not failed and len(signed) > 10
    for before, after, signature in signed:
        if before == after:
            verify(by_name[tpm2.name_of(before)], DIGEST, signature)


def test_a_swap_is_kept_once_and_whole(machine: Machine) -> None:
    machine.deliver()
    kept = len(machine.kept)
    second = machine.deliver()
    assert len(machine.kept) == kept + 1
    machine.anew(machine.kept[-1], {HANDLE: Wanted(second)})
    assert machine.guest.startup() == 0
    assert not machine.said
    verify(second, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


def test_what_is_not_wanted_goes(machine: Machine) -> None:
    first = new_p256()
    machine.managed.want({HANDLE: Wanted(first), HANDLE + 1: Wanted(new_p256())})
    machine.managed.want({HANDLE: Wanted(first)})
    assert machine.guest.handles(FIRST) == [HANDLE]
    assert machine.guest.sign(HANDLE + 1, DIGEST)[0]


def test_the_same_again_changes_nothing(machine: Machine) -> None:
    key, kept = machine.deliver(), len(machine.kept)
    machine.deliver(key)
    assert len(machine.kept) == kept


def test_a_state_that_cannot_be_kept(machine: Machine) -> None:
    """The guest has the key that it had, and it is what is kept."""
    before = machine.deliver()
    kept = machine.kept[-1]
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        machine.deliver()
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    machine.anew(kept, {HANDLE: Wanted(before)})
    assert machine.guest.startup() == 0
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


def test_a_guest_starts_although_its_keys_cannot_be_brought(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.managed.switch_off()
    machine.managed.switch_on()
    with monkeypatch.context() as patched:
        patched.setattr(machine.managed._commands, "_process", lambda command, locality: b"")
        assert machine.guest.startup() == 0
    assert "the keys of the TPM are not as they should be: TPM2_" in machine.said[-1]
    machine.reset()
    machine.deliver()


# ---- death ------------------------------------------------------------------------------------------------------------------

#: Certificates in two parts; the second key of a module stays as it is.
OLD, NEW = os.urandom(1500), os.urandom(1600)
BESIDE = {HANDLE + 1: Wanted(new_p256(), certificate=b"beside")}
SWAPS = {
    "swapped": ((new_p256(), OLD), (new_p256(), NEW)),
    "delivered": (None, (new_p256(), NEW)),
    "taken away": ((new_p256(), OLD), None),
    "at the owner's": ((new_p256(), OLD), (new_p256(), NEW)),
}
Pair = tuple[ec.EllipticCurvePrivateKey, bytes] | None


def pair_at(machine: Machine, handle: int) -> tuple[bytes | None, bytes | None]:
    """The Name that is there, and the certificate beside it."""
    there = handle in machine.guest.handles(handle & 0xFF800000)
    return tpm2.name_of(machine.guest.public(handle)) if there else None, machine.guest.nv(wanted.index_of(handle))


def expected(handle: int, pair: Pair) -> tuple[bytes | None, bytes | None]:
    return (wanted.name_of(handle, Wanted(pair[0])), pair[1]) if pair else (None, None)


def wants(handle: int, pair: Pair, earlier: Pair = None) -> dict[int, Wanted]:
    """`earlier`: of a generation that there still is."""
    names = frozenset([wanted.name_of(handle, Wanted(earlier[0]))] if earlier else [])
    return BESIDE | ({handle: Wanted(pair[0], certificate=pair[1], earlier=names)} if pair else {})


@pytest.mark.parametrize("swap", SWAPS)
def test_death_at_every_step_of_a_swap(machine: Machine, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever command is the last one: what was kept has the old key with the old certificate, or both new; and goes on to
    either."""
    old, new = SWAPS[swap]
    handle = 0x81000005 if swap == "at the owner's" else HANDLE
    machine.managed.want(wants(handle, old))
    begun = machine.kept[-1]
    for steps in itertools.count(0):
        machine.anew(begun, wants(handle, old))
        assert machine.guest.startup() == 0 and pair_at(machine, handle) == expected(handle, old)
        with monkeypatch.context() as patched:
            patched.setattr(machine.managed._commands, "_process", dying(machine, steps))
            try:
                machine.managed.want(wants(handle, new))
                died = False
            except Died:
                died = True
        kept = machine.kept[-1]
        machine.anew(kept, told=False)  # nobody mends what was kept
        assert machine.guest.startup() == 0
        assert pair_at(machine, handle) == expected(handle, old if died else new), steps
        assert pair_at(machine, HANDLE + 1)[1] == b"beside"
        for pair in (old, new):
            machine.anew(kept, wants(handle, pair))
            assert machine.guest.startup() == 0 and not machine.said
            assert pair_at(machine, handle) == expected(handle, pair)
        if not died:
            assert steps > 10
            return


@pytest.mark.parametrize("swap", SWAPS)
def test_whichever_command_fails_the_guest_has_a_whole_pair(machine: Machine, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it has loaded.  A second attempt goes well.  At the owner's handles an old key goes first."""
    old, new = SWAPS[swap]
    handle = 0x81000005 if swap == "at the owner's" else HANDLE
    for steps in itertools.count(0):
        machine.anew()
        assert machine.guest.startup() == 0
        machine.managed.want(wants(handle, old))
        loaded = [machine.guest.primary() for _ in range(3)]
        failing = Failing(machine, steps)
        with monkeypatch.context() as patched:
            patched.setattr(machine.managed._commands, "_process", failing)
            try:
                machine.managed.want(wants(handle, new, old))
                failed = False
            except (Tpm2Error, TpmFault):
                failed = True
        assert machine.guest.handles(tpm2.TRANSIENT) == loaded
        for one in loaded:
            machine.guest.flush(one)
        there = pair_at(machine, handle)
        allowed = [expected(handle, old), expected(handle, new)]
        if swap == "at the owner's":
            allowed.append((None, None))  # what a guest's owner may do as well
        assert there in allowed, steps
        if failed and new is not None and handle == HANDLE:
            assert there == expected(handle, old), steps
        machine.managed.want(wants(handle, new))
        assert pair_at(machine, handle) == expected(handle, new)
        if not failing.failed:
            assert steps > 10 and not failed
            return


def test_a_commit_that_fails_leaves_the_old_pair(machine: Machine) -> None:
    before, after = machine.deliver(certificate=OLD), new_p256()
    loaded, kept = machine.guest.primary(), machine.kept[-1]
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        machine.deliver(after, certificate=NEW)
    assert machine.guest.handles(tpm2.TRANSIENT) == [loaded] and machine.kept[-1] == kept
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    assert machine.guest.nv(INDEX) == OLD
    machine.refuses = False
    machine.reset()
    assert pair_at(machine, HANDLE) == expected(HANDLE, (after, NEW)) and not machine.said


# ---- a guest that leaves no room --------------------------------------------------------------------------------------------


NO_ROOM = "there is no room for its certificate: the guest has filled its TPM's NV memory"


def test_without_room_a_key_comes_without_its_certificate(machine: Machine) -> None:
    machine.deliver(certificate=b"small")
    machine.guest.fill()
    key = new_p256()
    with pytest.raises(NotPlaced, match=f"{HANDLE:#x}: {NO_ROOM}"):
        machine.deliver(key, certificate=NEW)
    assert pair_at(machine, HANDLE) == (expected(HANDLE, (key, b""))[0], None)
    machine.guest.nv_empty()
    machine.deliver(key, certificate=NEW)
    assert pair_at(machine, HANDLE) == expected(HANDLE, (key, NEW))


def test_without_room_for_another_key_an_earlier_pair_stays_while_there_is_one(machine: Machine) -> None:
    """One that was destroyed does not: not now, and not after the guest's next start."""
    before, another = machine.deliver(certificate=b"small"), {HANDLE + 7: Wanted(new_p256())}
    machine.guest.fill(with_keys=True)
    name = expected(HANDLE, (before, b""))[0]
    new = Wanted(new_p256(), certificate=b"new")
    with pytest.raises(Tpm2Error, match="0x14b"):  # TPM_RC_NV_SPACE
        machine.managed.want({HANDLE: replace(new, earlier=frozenset([name]))} | another)
    assert pair_at(machine, HANDLE) == expected(HANDLE, (before, b"small"))
    machine.reset()
    assert pair_at(machine, HANDLE) == expected(HANDLE, (before, b"small")) and "0x14b" in machine.said[-1]
    with pytest.raises(Tpm2Error, match="0x14b"):
        machine.managed.want({HANDLE: new} | another | {HANDLE + 8: Wanted(new_p256())})
    assert pair_at(machine, HANDLE) == (None, None)
    machine.reset()
    assert pair_at(machine, HANDLE) == (None, None)


def test_a_guest_keeps_no_key_by_leaving_no_room(machine: Machine) -> None:
    """One cannot come; another one is taken away nevertheless, and comes with no start back."""
    first, second = new_p256(), new_p256()
    machine.managed.want({HANDLE: Wanted(first, certificate=b"first"), HANDLE + 1: Wanted(second, certificate=b"second")})
    machine.guest.fill(with_keys=True)
    wanted = {HANDLE: Wanted(first, certificate=b"first")} | {HANDLE + n: Wanted(first) for n in (2, 3, 4)}
    with pytest.raises(Tpm2Error, match="0x14b"):
        machine.managed.want(wanted)
    assert pair_at(machine, HANDLE) == expected(HANDLE, (first, b"first"))
    assert pair_at(machine, HANDLE + 1) == (None, None)
    machine.reset()
    assert HANDLE + 1 not in machine.managed.names()


def test_an_older_state_without_room_brings_no_key_back(machine: Machine) -> None:
    old, new = new_p256(), new_p256()
    machine.managed.want({HANDLE: Wanted(old, certificate=b"old"), HANDLE + 1: Wanted(new, certificate=b"as it was")})
    machine.guest.fill()
    machine.anew(machine.kept[-1], {HANDLE: Wanted(new, certificate=NEW), HANDLE + 1: Wanted(new, certificate=b"as it was")})
    assert machine.guest.startup() == 0
    assert f"the keys of the TPM are not as they should be: {HANDLE:#x}: {NO_ROOM}" in machine.said
    assert pair_at(machine, HANDLE) == (expected(HANDLE, (new, b""))[0], None)
    assert pair_at(machine, HANDLE + 1) == expected(HANDLE + 1, (new, b"as it was"))


# ---- what cannot be taken away ----------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_taken_away_is_barred(machine: Machine) -> None:
    """The host's disk is full: the destroyed key stays in the TPM, and nobody reaches it, until it has gone."""
    other = new_p256()
    machine.managed.want({HANDLE: Wanted(new_p256()), HANDLE + 1: Wanted(other)})
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        machine.managed.want({HANDLE + 1: Wanted(other)})
    assert "keys that should be gone are barred, for they could not be taken away: no space" in machine.said
    assert machine.guest.sign(HANDLE, DIGEST)[0] == 0x18B
    assert machine.guest.say(tpm2.Code.READ_PUBLIC, (HANDLE,))[0] == 0x18B
    verify(other, DIGEST, machine.guest.sign(HANDLE + 1, DIGEST)[1])
    machine.refuses = False
    machine.managed.want({HANDLE + 1: Wanted(other)})
    assert machine.managed.names().keys() == {HANDLE + 1}
    key = machine.deliver()
    verify(key, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


@pytest.mark.parametrize("loaded", range(4))
def test_a_platform_that_is_switched_off_keeps_no_key_of_the_owners(machine: Machine, loaded: int) -> None:
    """Without its platform hierarchy nothing can be taken away: what should be gone is not reached."""
    handle, mine = 0x81000005, 0x81000001
    machine.guest.persist(mine)
    machine.managed.want({handle: Wanted(new_p256())})
    switched_off = PLATFORM.to_bytes(4, "big") + b"\0"
    machine.guest.good(HIERARCHY_CONTROL, (PLATFORM,), switched_off, EMPTY_PASSWORD)
    assert machine.guest.sign(handle, DIGEST)[0] == 0
    objects = [machine.guest.primary() for _ in range(loaded)]
    for _ in range(2):
        with pytest.raises(Tpm2Error):
            machine.managed.want({})
    assert machine.guest.handles(tpm2.TRANSIENT) == objects
    for one in objects:
        machine.guest.flush(one)
    assert machine.guest.sign(handle, DIGEST)[0] == 0x18B
    machine.guest.public(mine)
    machine.reset()
    assert machine.managed.names() == {} and machine.guest.handles(0x81000000) == [mine]


class Died(BaseException):
    pass


def dying(machine: Machine, steps: int) -> Callable[[bytes, int], bytes]:
    """Carries so many commands out."""
    left = iter(range(steps))

    def process(command: bytes, locality: int) -> bytes:
        if next(left, None) is None:
            raise Died
        return machine.managed.tpm.process(command, locality)

    return process


class Failing:
    """One command fails; those before and after are carried out."""

    def __init__(self, machine: Machine, steps: int) -> None:
        self._machine, self._left = machine, steps
        self.failed = False

    def __call__(self, command: bytes, locality: int) -> bytes:
        self._left -= 1
        if self._left == -1:
            self.failed = True
            return failure(0x922)  # TPM_RC_RETRY
        return self._machine.managed.tpm.process(command, locality)
