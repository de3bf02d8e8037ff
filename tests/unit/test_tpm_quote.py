"""What a module attests of its guest's boot: signed by its TPM, of one moment, whatever the guest has loaded."""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from hsmvisord.tpm.endorsement import ATTESTATION_KEY
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, Quoted
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, OWNER, PLATFORM, Code, sized
from support import tpm_guest as g
from support.tpm_guest import HANDLE, Guest, Machine, started

NONCE = b"who asked"
ALL = tuple(range(24))
CERTIFY = 0x148

machine = pytest.fixture(started)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


@dataclass
class Attest:
    nonce: bytes
    resets: int
    restarts: int
    selection: bytes
    digest: bytes


def parsed(attest: bytes) -> Attest:
    """TPMS_ATTEST of a quote (part 2, 10.12.12)."""
    parts = tpm2.Parts(attest, "TPMS_ATTEST")
    assert parts.take(6) == bytes.fromhex("ff544347 8018")
    parts.sized()
    nonce = parts.sized()
    parts.take(8)
    resets, restarts = parts.number(), parts.number()
    parts.take(1 + 8)
    selection, digest = parts.take(10), parts.sized()
    assert parts.rest() == b""
    return Attest(nonce, resets, restarts, selection, digest)


def verify(quoted: Quoted, key: bytes) -> Attest:
    """Fails unless the key signed it, and the values are those of the digest."""
    public = load_der_public_key(key)
    assert isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"
    public.verify(quoted.signature, quoted.attest, ec.ECDSA(SHA256()))
    with pytest.raises(InvalidSignature):
        public.verify(quoted.signature, quoted.attest + b"x", ec.ECDSA(SHA256()))
    found = parsed(quoted.attest)
    assert found.digest == hashlib.sha256(b"".join(quoted.values)).digest()
    return found


def extended(*digests: bytes) -> bytes:
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


@pytest.mark.parametrize("pcrs", [(0,), (23,), (0, 2, 4, 7), tuple(range(8)), tuple(range(9)), ALL], ids=len)
def test_a_quote(machine: Machine, guest: Guest, pcrs: tuple[int, ...]) -> None:
    guest.extend(4, b"a" * 32)
    guest.extend(4, b"b" * 32)
    quoted = machine.managed.quote(NONCE, pcrs)
    found = verify(quoted, machine.managed.attestation_key())
    assert found.nonce == NONCE and quoted.key == machine.managed.attestation_key()
    assert found.selection == struct.pack(">IHB", 1, 11, 3) + sum(1 << pcr for pcr in pcrs).to_bytes(3, "little")
    assert len(quoted.values) == len(pcrs)
    expected = {pcr: b"\xff" * 32 if 17 <= pcr <= 22 else bytes(32) for pcr in ALL} | {4: extended(b"a" * 32, b"b" * 32)}
    assert quoted.values == tuple(expected[pcr] for pcr in pcrs)


def test_values_are_ascending_whatever_was_asked(machine: Machine, guest: Guest) -> None:
    guest.extend(9, b"a" * 32)
    quoted = machine.managed.quote(NONCE, (9, 0))
    verify(quoted, machine.managed.attestation_key())
    assert quoted.values == (bytes(32), extended(b"a" * 32))


@pytest.mark.parametrize("nonce", [b"", b"n" * 7, b"n" * 65], ids=len)
def test_nonces_that_are_refused(machine: Machine, nonce: bytes) -> None:
    with pytest.raises(ValueError, match=f"a nonce has 8 to 64 bytes: {len(nonce)}"):
        machine.managed.quote(nonce, (0,))


@pytest.mark.parametrize("size", [8, 64])
def test_nonces_that_are_not(machine: Machine, size: int) -> None:
    assert parsed(machine.managed.quote(b"n" * size, (0,)).attest).nonce == b"n" * size


@pytest.mark.parametrize("pcrs", [(), (0, 0), (24,), (-1,), (*ALL, 0), (1 << 40,)], ids=str)
def test_pcrs_that_there_are_not(machine: Machine, pcrs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="PCRs are 1 to 24 different ones of 0 to 23"):
        machine.managed.quote(NONCE, pcrs)


@pytest.mark.parametrize("objects", [0, 2, 3])
def test_what_the_guest_has_loaded_stays(machine: Machine, guest: Guest, objects: int) -> None:
    machine.deliver()
    for hierarchy in (OWNER, g.ENDORSEMENT, PLATFORM):
        guest.good(Code.HIERARCHY_CHANGE_AUTH, (hierarchy,), sized(b""), EMPTY_PASSWORD)
    loaded = {handle: guest.public(handle) for handle in [guest.primary() for _ in range(objects)]}
    sessions = [guest.session() for _ in range(3)]
    kept = len(machine.kept)
    verify(machine.managed.quote(NONCE, ALL), machine.managed.attestation_key())
    assert {handle: guest.public(handle) for handle in guest.handles(tpm2.TRANSIENT)} == loaded
    assert guest.handles(tpm2.LOADED_SESSION) == sessions and len(machine.kept) == kept


def test_whatever_passwords_the_guest_sets(machine: Machine, guest: Guest) -> None:
    for hierarchy in (OWNER, g.ENDORSEMENT, g.LOCKOUT, PLATFORM):
        guest.good(Code.HIERARCHY_CHANGE_AUTH, (hierarchy,), sized(b"the guest's"), EMPTY_PASSWORD)
    verify(machine.managed.quote(NONCE, ALL), machine.managed.attestation_key())


def test_values_and_signature_are_of_one_moment(machine: Machine, guest: Guest) -> None:
    """A guest extends on and on."""
    over = threading.Event()

    def extend_on_and_on() -> None:
        while not over.is_set():
            for pcr in (0, 8, 15):
                guest.extend(pcr, b"e" * 32)

    key = machine.managed.attestation_key()
    thread = threading.Thread(target=extend_on_and_on)
    thread.start()
    try:
        seen = [verify(machine.managed.quote(NONCE, tuple(range(16))), key).digest for _ in range(20)]
    finally:
        over.set()
        thread.join()
    assert len(set(seen)) > 1


def test_a_reset_is_counted(machine: Machine) -> None:
    first = parsed(machine.managed.quote(NONCE, (0,)).attest)
    machine.reset()
    second = parsed(machine.managed.quote(NONCE, (0,)).attest)
    assert (second.resets, second.restarts) != (first.resets, first.restarts)


def test_not_before_it_was_started_nor_in_its_sleep(machine: Machine, guest: Guest) -> None:
    def refused() -> None:
        with pytest.raises(Asleep):
            machine.managed.quote(NONCE, (0,))

    guest.shutdown(tpm2.STATE)
    refused()
    machine.managed.switch_off()
    refused()
    machine.managed.switch_on()
    refused()
    assert guest.startup(tpm2.STATE) == 0
    verify(machine.managed.quote(NONCE, ALL), machine.managed.attestation_key())


def test_a_bank_for_another_hash(machine: Machine, guest: Guest) -> None:
    """Firmware, which has the platform's hierarchy, may choose another one."""
    guest.good(Code.PCR_ALLOCATE, (PLATFORM,), tpm2.banks({tpm2.SHA1}), EMPTY_PASSWORD)
    guest.shutdown()
    machine.reset()
    with pytest.raises(TpmFault, match="a bank of PCRs that is not for SHA-256"):
        machine.managed.quote(NONCE, ALL)
    machine.deliver()
    assert guest.sign(HANDLE, g.DIGEST)[0] == 0, "and nothing else is amiss"


def test_the_attestation_key_signs_nothing_from_outside(machine: Machine, guest: Guest) -> None:
    """Not even for firmware that has the hierarchy: it is restricted."""
    handle, public = guest.made(PLATFORM, ATTESTATION_KEY)
    assert tpm2.subject_public_key_info(public) == machine.managed.attestation_key()
    forged = hashlib.sha256(machine.managed.quote(NONCE, (0,)).attest).digest()
    assert guest.sign(handle, forged)[0] == 0x3E0  # TPM_RC_TICKET: it did not make what this is the digest of
    assert guest.say(g.OBJECT_CHANGE_AUTH, (handle, PLATFORM), sized(b"mine"), EMPTY_PASSWORD)[0]
    assert guest.say(g.DUPLICATE, (handle, tpm2.NULL), sized(b"") + struct.pack(">H", 0x10), EMPTY_PASSWORD)[0]


def test_no_other_hierarchy_has_the_attestation_key(machine: Machine, guest: Guest) -> None:
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    for hierarchy in (OWNER, g.ENDORSEMENT, tpm2.NULL):
        handle, public = guest.made(hierarchy, ATTESTATION_KEY)
        assert tpm2.subject_public_key_info(public) != machine.managed.attestation_key()
        guest.flush(handle)
    parameters = sized(sized(b"") * 2) + sized(ATTESTATION_KEY) + sized(b"") + bytes(4)
    assert guest.say(Code.CREATE_PRIMARY, (PLATFORM,), parameters, EMPTY_PASSWORD)[0] == 0x9A2
