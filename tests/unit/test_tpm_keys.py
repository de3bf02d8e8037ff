"""The module's keys in its guest's TPM: what the guest may do with them (what it may not: test_tpm_attacks.py)."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hsmvisord.tpm.managed import NotPlaced, Wanted
from hsmvisord.tpm.platform import FIRST, PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code, sized
from support import tpm_guest as g
from support.tpm_guest import DIGEST, HANDLE, WAYS, Guest, Machine, new_p256, started_either_way, verify

ENDS = (0x81000000, 0x8100FFFF, 0x81800000, 0x8180FFFF)

machine = pytest.fixture(started_either_way, params=WAYS)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


KEYS: dict[str, PrivateKey] = {
    "P-256": new_p256(),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
    "RSA-2048": rsa.generate_private_key(65537, 2048),
    "RSA-3072": rsa.generate_private_key(65537, 3072),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_guest_signs(machine: Machine, name: str) -> None:
    key = machine.deliver(KEYS[name])
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
    """What was at the handle is not wanted any more."""
    machine.deliver()
    with pytest.raises(NotPlaced, match="a curve that TPMs do not have"):
        machine.managed.want({HANDLE: Wanted(ec.generate_private_key(kind))})
    assert machine.managed.names() == {} and machine.guest.sign(HANDLE, DIGEST)[0] == 0x18B


@pytest.mark.parametrize("handle", [0x80000000, 0x81000000 - 1, 0x81010000, FIRST - 1, FIRST + 0x10000, 0x81FFFFFF, 0x82000000])
def test_handles_that_no_key_may_have(machine: Machine, handle: int) -> None:
    key = machine.deliver()
    with pytest.raises(NotPlaced, match=f"{handle:#x}: no handle for a key: 0x81800000 to 0x8180ffff, 0x81000000 to 0x8100ffff"):
        machine.managed.want({handle: Wanted(new_p256()), HANDLE: Wanted(key)})
    assert machine.managed.names().keys() == {HANDLE}


def test_the_first_and_the_last_handles(machine: Machine) -> None:
    machine.managed.want({handle: Wanted(new_p256()) for handle in ENDS})
    assert set(machine.managed.names()) == set(ENDS)


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
        key = machine.deliver()
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
    machine.deliver()
    machine.managed.want({})
    assert guest.public(0x81000001) == public


def test_a_guest_without_firmware_has_no_platform_hierarchy(
    machine: Machine, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has its password, the module neither."""
    monkeypatch.setattr(machine.managed, "_firmware", False)
    for _ in range(2):
        machine.reset()
        assert guest.say(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"mine"), EMPTY_PASSWORD)[0] == 0x9A2
        assert guest.say(Code.CHANGE_EPS, (PLATFORM,), b"", EMPTY_PASSWORD)[0] == 0x9A2
        machine.deliver()
        assert guest.sign(HANDLE, DIGEST)[0] == 0 and not machine.said
