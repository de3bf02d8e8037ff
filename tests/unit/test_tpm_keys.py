"""The module's keys in its guest's TPM: what the guest may do with them, and what it may not; swaps while it signs."""

from __future__ import annotations

import hashlib
import itertools
import struct
import threading
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hsmvisord.tpm import library
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, Wanted
from hsmvisord.tpm.platform import FIRST, LAST, PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code, sized
from support import tpm_guest as g
from support.tpm_guest import Guest, Machine, the_machine, verify

HANDLE = 0x81800001
DIGEST = hashlib.sha256(b"what a guest has to sign").digest()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Started by its guest."""
    machine = the_machine()
    machine.anew()
    assert machine.guest.startup() == 0
    yield machine
    machine.managed.switch_off()


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def new_p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def deliver(machine: Machine, key: PrivateKey | None = None, handle: int = HANDLE) -> PrivateKey:
    key = key or new_p256()
    machine.managed.want({handle: Wanted(key)})
    return key


KEYS: dict[str, PrivateKey] = {
    "P-256": new_p256(),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
    "RSA-2048": rsa.generate_private_key(65537, 2048),
    "RSA-3072": rsa.generate_private_key(65537, 3072),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_guest_signs(machine: Machine, name: str) -> None:
    key = deliver(machine, KEYS[name])
    result, signature = machine.guest.sign(HANDLE, DIGEST, g.RSASSA if isinstance(key, rsa.RSAPrivateKey) else g.ECDSA)
    assert result == 0
    verify(key, DIGEST, signature)
    assert machine.managed.names() == {HANDLE: tpm2.name_of(machine.guest.public(HANDLE))}


def test_a_key_for_decryption_signs_nothing(machine: Machine) -> None:
    machine.managed.want({HANDLE: Wanted(KEYS["RSA-2048"], decrypt=True)})
    key = KEYS["RSA-2048"]
    assert isinstance(key, rsa.RSAPrivateKey)
    assert machine.guest.sign(HANDLE, DIGEST, g.RSASSA)[0]
    numbers = key.public_key().public_numbers()
    sealed = pow(int.from_bytes(b"\0\2" + b"r" * 200 + b"\0secret".rjust(54, b"r"), "big"), numbers.e, numbers.n).to_bytes(
        256, "big"
    )
    answer = machine.guest.good(g.RSA_DECRYPT, (HANDLE,), sized(sealed) + struct.pack(">H", 0x0015) + sized(b""), EMPTY_PASSWORD)
    assert b"secret" in answer


@pytest.mark.parametrize("kind", [ec.SECP256K1(), ec.BrainpoolP256R1()], ids=lambda curve: curve.name)
def test_curves_that_tpms_do_not_have(machine: Machine, kind: ec.EllipticCurve) -> None:
    before = deliver(machine)
    with pytest.raises(KeyError):
        machine.managed.want({HANDLE: Wanted(ec.generate_private_key(kind))})
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


@pytest.mark.parametrize("handle", [FIRST - 1, LAST + 1, 0x81000001, 0x80000000])
def test_handles_that_are_not_the_platforms(machine: Machine, handle: int) -> None:
    with pytest.raises(ValueError, match="is no handle of the platform"):
        machine.managed.want({handle: Wanted(new_p256())})
    assert machine.managed.names() == {}


def test_the_first_and_the_last_handle(machine: Machine) -> None:
    machine.managed.want({handle: Wanted(new_p256()) for handle in (FIRST, LAST)})
    assert set(machine.managed.names()) == {FIRST, LAST}


# ---- swaps --------------------------------------------------------------------------------------------------------------


def test_a_hundred_swaps_while_the_guest_signs(machine: Machine) -> None:
    """It reads the public part before each use; every signature is that of the key of its time."""
    keys = {deliver(machine): 0}
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
        key = deliver(machine)
        by_name[tpm2.name_of(machine.guest.public(HANDLE))] = key
    over.set()
    thread.join()
    assert not failed and len(signed) > 10
    for before, after, signature in signed:
        if before == after:
            verify(by_name[tpm2.name_of(before)], DIGEST, signature)


def test_a_swap_is_kept_once_and_whole(machine: Machine) -> None:
    deliver(machine)
    kept = len(machine.kept)
    second = deliver(machine)
    assert len(machine.kept) == kept + 1
    machine.anew(machine.kept[-1])
    machine.managed._wanted = {HANDLE: Wanted(second)}
    assert machine.guest.startup() == 0
    assert not machine.said
    verify(second, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


@pytest.mark.parametrize("first", [False, True], ids=["swapped", "delivered"])
def test_death_at_every_step_of_a_swap(machine: Machine, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever command is the last one: what was kept has the old key, or the new one."""
    old, new = new_p256(), new_p256()
    for steps in itertools.count(1):
        machine.anew()
        machine.managed.want({} if first else {HANDLE: Wanted(old)}) if machine.guest.startup() == 0 else None
        kept, left = machine.kept[-1], iter(range(steps))

        def process(command: bytes, locality: int, left: Iterator[int] = left) -> bytes:
            if next(left, None) is None:
                raise Died
            return machine.managed.tpm.process(command, locality)

        with monkeypatch.context() as patched:
            patched.setattr(machine.managed._platform, "_process", process)
            try:
                machine.managed.want({HANDLE: Wanted(new)})
                died = False
            except Died:
                died = True
        if died:
            assert machine.kept[-1] == kept, "nothing of it was kept"
        for wanted in (old, new):
            machine.anew(machine.kept[-1])
            machine.managed._wanted = {HANDLE: Wanted(wanted)}
            assert machine.guest.startup() == 0 and not machine.said
            verify(wanted, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
        if not died:
            assert steps > 10
            return


class Died(BaseException):
    pass


def test_what_is_not_wanted_goes(machine: Machine) -> None:
    first = new_p256()
    machine.managed.want({HANDLE: Wanted(first), HANDLE + 1: Wanted(new_p256())})
    machine.managed.want({HANDLE: Wanted(first)})
    assert machine.guest.handles(FIRST) == [HANDLE]
    assert machine.guest.sign(HANDLE + 1, DIGEST)[0]


def test_the_same_again_changes_nothing(machine: Machine) -> None:
    key, kept = deliver(machine), len(machine.kept)
    deliver(machine, key)
    assert len(machine.kept) == kept


def test_a_state_that_cannot_be_kept(machine: Machine) -> None:
    """The guest has the key that it had, and it is what is kept."""
    before = deliver(machine)
    kept = machine.kept[-1]
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        deliver(machine)
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    machine.anew(kept)
    machine.managed._wanted = {HANDLE: Wanted(before)}
    assert machine.guest.startup() == 0
    verify(before, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])


def test_a_guest_starts_although_its_keys_cannot_be_brought(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.managed.switch_off()
    machine.managed.switch_on()
    with monkeypatch.context() as patched:
        patched.setattr(machine.managed._platform, "_process", lambda command, locality: b"")
        assert machine.guest.startup() == 0
    assert "the keys of the TPM are not as they should be: TPM2_" in machine.said[-1]
    machine.reset()
    deliver(machine)


# ---- the guest's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(), (0,), (1,), (2,), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("sessions", [0, 3])
def test_what_the_guest_has_loaded_stays_where_it_was(machine: Machine, gone: tuple[int, ...], sessions: int) -> None:
    guest = machine.guest
    objects = [guest.primary() for _ in range(3)]
    for at in gone:
        guest.flush(objects[at])
    started = [guest.session() for _ in range(sessions)]
    before = {handle: guest.public(handle) for handle in guest.handles(tpm2.TRANSIENT)}
    assert len(before) == 3 - len(gone)
    for _ in range(2):
        key = deliver(machine)
        assert {handle: guest.public(handle) for handle in guest.handles(tpm2.TRANSIENT)} == before
        assert guest.handles(tpm2.LOADED_SESSION) == started
    for handle in before:
        guest.flush(handle)  # a persistent key that is used takes a place too
    verify(key, DIGEST, guest.sign(HANDLE, DIGEST)[1])


def test_its_own_persistent_keys_are_its_own(machine: Machine) -> None:
    guest = machine.guest
    primary = guest.primary()
    guest.good(Code.EVICT_CONTROL, (g.OWNER, primary), struct.pack(">I", 0x81000001), EMPTY_PASSWORD)
    public = guest.public(0x81000001)
    deliver(machine)
    machine.managed.want({})
    assert guest.public(0x81000001) == public


# ---- attacks --------------------------------------------------------------------------------------------------------------


def test_a_guest_takes_no_key_away(machine: Machine, guest: Guest) -> None:
    deliver(machine)
    persistent = struct.pack(">I", HANDLE)
    assert guest.say(Code.EVICT_CONTROL, (g.OWNER, HANDLE), persistent, EMPTY_PASSWORD)[0] == 0x285
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    assert guest.say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), persistent, EMPTY_PASSWORD)[0] == 0x9A2
    guest.good(0x126, (g.LOCKOUT,), b"", EMPTY_PASSWORD)  # TPM2_Clear
    assert guest.sign(HANDLE, DIGEST)[0] == 0
    deliver(machine)  # and the module may as before


def test_a_guest_brings_no_key_back(machine: Machine, guest: Guest) -> None:
    """By another authorization the key would be wrapped anew for the guest, and could be loaded after it was taken away."""
    deliver(machine)
    assert guest.say(g.OBJECT_CHANGE_AUTH, (HANDLE, HANDLE), sized(b"mine"), EMPTY_PASSWORD)[0]
    parent = guest.primary()
    assert guest.say(g.OBJECT_CHANGE_AUTH, (HANDLE, parent), sized(b"mine"), EMPTY_PASSWORD)[0]
    assert guest.say(g.DUPLICATE, (HANDLE, parent), sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM), EMPTY_PASSWORD)[0]
    assert guest.say(Code.CONTEXT_SAVE, (HANDLE,))[0]


@pytest.mark.parametrize("locality", range(5))
def test_no_locality_of_a_guest_fulfils_the_policy(machine: Machine, locality: int) -> None:
    deliver(machine)
    guest = Guest(lambda command: machine.managed.process(command, locality))
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    parameters = sized(bytes(16)) + sized(b"") + struct.pack(">BHH", tpm2.POLICY_SESSION, tpm2.NULL_ALGORITHM, tpm2.SHA256)
    session = int.from_bytes(guest.good(Code.START_AUTH_SESSION, (tpm2.NULL, tpm2.NULL), parameters)[:4], "big")
    guest.say(Code.POLICY_LOCALITY, (session,), bytes([200]))
    result, _ = guest.say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), struct.pack(">I", HANDLE), tpm2.Authorization(session))
    assert result and machine.managed.names().keys() == {HANDLE}


# ---- sleep, and other states ------------------------------------------------------------------------------------------------


def test_nothing_is_done_while_the_guest_sleeps(machine: Machine, guest: Guest) -> None:
    first, second = deliver(machine), new_p256()
    assert guest.shutdown(tpm2.STATE) == 0
    with pytest.raises(Asleep):
        deliver(machine, second)
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0, "it wakes as it slept"
    verify(second, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert first is not second and not machine.said


def test_before_the_first_start(machine: Machine) -> None:
    machine.anew()
    with pytest.raises(Asleep):
        deliver(machine)
    assert machine.guest.startup() == 0
    assert machine.managed.names().keys() == {HANDLE}


def test_an_older_state_brings_no_key_back(machine: Machine) -> None:
    deliver(machine)
    older = machine.kept[-1]
    newer = deliver(machine)
    machine.anew(older)
    machine.managed._wanted = {HANDLE: Wanted(newer)}
    assert machine.guest.startup() == 0
    verify(newer, DIGEST, machine.guest.sign(HANDLE, DIGEST)[1])
    machine.anew(older)
    assert machine.guest.startup() == 0 and machine.managed.names() == {}


def test_one_that_goes_on_elsewhere_has_what_is_wanted_there(machine: Machine) -> None:
    deliver(machine)
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
