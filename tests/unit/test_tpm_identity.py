"""Who a TPM is: endorsement keys as everybody makes them, their certificates where everybody looks, and an attestation key."""

from __future__ import annotations

import datetime
import hashlib
import os
import struct

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hsmvisord import limits
from hsmvisord.tpm import library
from hsmvisord.tpm.managed import Asleep
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Authorization, Code, sized
from support import tpm_guest as g
from support.tpm_guest import ENDORSEMENT, HANDLE, LOCKOUT, OWNER, Guest, Machine, new_p256, started

#: EK Credential Profile, annex B: the policy of the default templates, and those, as they are written there.
POLICY_A = "837197674484B3F81A90CC8D46A5D724FD52D76E06520B64F2A1DA1B331469AA"
L_1 = bytes.fromhex(f"0001 000B 000300B2 0020 {POLICY_A} 0006 0080 0043 0010 0800 00000000 0100" + "00" * 256)
L_2 = bytes.fromhex(f"0023 000B 000300B2 0020 {POLICY_A} 0006 0080 0043 0010 0003 0010" + ("0020" + "00" * 32) * 2)
TEMPLATES = {"RSA-2048": L_1, "P-256": L_2}
INDICES = (0x01C00002, 0x01C0000A, 0x01C08000)
CHANGE_EPS = 0x124

CA = new_p256()

machine = pytest.fixture(started)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def certificate(key: bytes, padding: int = 0) -> bytes:
    """DER, of a SubjectPublicKeyInfo."""
    public = load_der_public_key(key)
    assert isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    name, now = x509.Name([]), datetime.datetime(2025, 1, 1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    filling = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), bytes(padding))
    return builder.add_extension(filling, False).sign(CA, SHA256()).public_bytes(Encoding.DER)


def certificates(machine: Machine, padding: int = 0) -> tuple[bytes, bytes, bytes]:
    one, other = machine.managed.endorsement_keys()
    return certificate(one, padding), certificate(other), b"of the platform" * 100


def in_nv(guest: Guest) -> tuple[bytes | None, ...]:
    return tuple(guest.nv(index) for index in INDICES)


# ---- keys -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1], ids=list(TEMPLATES))
def test_a_guest_makes_the_same_endorsement_key(machine: Machine, guest: Guest, at: int) -> None:
    _, public = guest.made(ENDORSEMENT, list(TEMPLATES.values())[at])
    assert tpm2.subject_public_key_info(public) == machine.managed.endorsement_keys()[at]


def test_keys_are_known_whatever_the_tpm_is_at(machine: Machine) -> None:
    """And asking leaves no trace: neither in what is kept nor in what the guest has."""
    managed, guest = machine.managed, machine.guest
    managed.switch_off()

    def asked() -> tuple[tuple[bytes, bytes], bytes]:
        managed._identity = None
        before, kept = managed.tpm.permanent, len(machine.kept)
        on, volatile = managed.tpm.on, managed.tpm.state(library.VOLATILE) if managed.tpm.on else b""
        found = managed.endorsement_keys(), managed.attestation_key()
        assert (managed.tpm.permanent, len(machine.kept), managed.tpm.on) == (before, kept, on)
        assert not on or len(managed.tpm.state(library.VOLATILE)) == len(volatile)
        return found

    off = asked()
    managed.switch_on()
    assert asked() == off
    assert guest.startup() == 0
    loaded = {guest.primary(): None for _ in range(3)} | {guest.session(): None for _ in range(3)}
    guest.extend(7, b"d" * 32)
    for hierarchy in (OWNER, ENDORSEMENT, LOCKOUT, PLATFORM):
        guest.good(Code.HIERARCHY_CHANGE_AUTH, (hierarchy,), sized(b"the guest's"), EMPTY_PASSWORD)
    before = guest.good(Code.PCR_READ, (), tpm2.selection([7]))
    assert asked() == off, "with passwords for all hierarchies"
    assert set(guest.handles(tpm2.TRANSIENT) + guest.handles(tpm2.LOADED_SESSION)) == set(loaded)
    assert guest.good(Code.PCR_READ, (), tpm2.selection([7])) == before
    guest.shutdown(tpm2.STATE)
    assert asked() == off
    managed.switch_off()
    managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0, "it wakes as it slept"
    assert guest.good(Code.PCR_READ, (), tpm2.selection([7]))[4:] == before[4:]


def test_each_tpm_has_its_own_and_keeps_them(machine: Machine) -> None:
    managed = machine.managed
    found = {*managed.endorsement_keys(), managed.attestation_key()}
    machine.guest.good(Code.CLEAR, (LOCKOUT,), b"", EMPTY_PASSWORD)
    machine.anew(machine.kept[-1])
    assert {*managed.endorsement_keys(), managed.attestation_key()} == found
    machine.anew()
    assert not {*managed.endorsement_keys(), managed.attestation_key()} & found and len(found) == 3


def test_a_guest_that_changes_the_endorsement_seed_is_another(machine: Machine, guest: Guest) -> None:
    managed = machine.managed
    managed.certify(*certificates(machine))
    before, attesting = managed.endorsement_keys(), managed.attestation_key()
    guest.good(CHANGE_EPS, (PLATFORM,), b"", EMPTY_PASSWORD)
    after = managed.endorsement_keys()
    assert not set(before) & set(after) and managed.attestation_key() == attesting
    assert managed.certificates() == (), "they are of other keys"
    managed.certify(*certificates(machine))
    assert len(managed.certificates()) == 3
    assert tpm2.subject_public_key_info(guest.made(ENDORSEMENT, L_2)[1]) == after[1]


def test_a_manufactured_tpm_has_one_bank(machine: Machine, guest: Guest) -> None:
    answer = guest.good(Code.GET_CAPABILITY, (), struct.pack(">III", 5, 0, 1))  # TPM_CAP_PCRS
    rows = [answer[9 + 6 * at : 15 + 6 * at] for at in range(int.from_bytes(answer[5:9], "big"))]
    assert {row for row in rows if any(row[3:])} == {bytes.fromhex("000b 03 ffffff")}


# ---- certificates -----------------------------------------------------------------------------------------------------------


def test_certificates_are_where_guests_look(machine: Machine, guest: Guest) -> None:
    made, kept = certificates(machine), len(machine.kept)
    assert machine.managed.certificates() == ()
    machine.managed.certify(*made)
    assert len(machine.kept) == kept + 1, "one commit"
    assert in_nv(guest) == made == machine.managed.certificates()
    assert {guest.nv_attributes(index) for index in INDICES} == {0x62072801}, "as swtpm_setup's"
    machine.managed.certify(*made)
    assert len(machine.kept) == kept + 1, "they are there already"
    guest.good(Code.CLEAR, (LOCKOUT,), b"", EMPTY_PASSWORD)
    assert in_nv(guest) == made


def test_at_manufacture_before_any_guest(machine: Machine) -> None:
    managed = machine.managed
    managed.switch_off()
    managed.tpm.permanent, managed._identity = b"", None
    del machine.kept[:]
    managed.manufacture()
    made = certificates(machine)
    assert len(machine.kept) == 1 and not managed.tpm.on
    managed.certify(*made)
    assert len(machine.kept) == 2 and not managed.tpm.on and managed.certificates() == made
    managed.switch_on()
    assert machine.guest.startup() == 0 and in_nv(machine.guest) == made


def test_death_between_leaves_one_that_is_completed(machine: Machine) -> None:
    """What was kept first is a TPM without certificates, which says so."""
    machine.anew(machine.kept[0])
    assert machine.managed.certificates() == ()
    machine.managed.switch_off()
    made = certificates(machine)
    machine.refuses = True
    with pytest.raises(OSError, match="no space"):
        machine.managed.certify(*made)
    assert machine.managed.certificates() == () and not machine.kept
    machine.refuses = False
    machine.managed.certify(*made)
    machine.anew(machine.kept[-1])
    assert machine.managed.certificates() == made


def test_newer_certificates_take_the_place(machine: Machine, guest: Guest) -> None:
    machine.managed.certify(*certificates(machine))
    newer, kept = certificates(machine, padding=1000), len(machine.kept)
    machine.managed.certify(*newer)
    assert in_nv(guest) == newer and len(machine.kept) == kept + 1


def test_what_is_no_certificate_of_its_keys(machine: Machine) -> None:
    managed, kept = machine.managed, len(machine.kept)
    one, other, platform = certificates(machine)
    another = certificate(spki(new_p256()))
    large = bytes(limits.MAX_TPM_CERTIFICATE + 1)
    for wrong in [
        (other, one, platform),
        (one, another, platform),
        (another, other, platform),
        (b"no DER", other, platform),
        (one, other, b""),
        (one, other, large),
        (large, other, platform),
    ]:
        with pytest.raises(ValueError, match="certificate"):
            managed.certify(*wrong)
    assert len(machine.kept) == kept and managed.certificates() == () and in_nv(machine.guest) == (None,) * 3


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("index", INDICES, ids=hex)
def test_a_guest_changes_none(machine: Machine, guest: Guest, index: int) -> None:
    machine.managed.certify(*certificates(machine))
    before = in_nv(guest)
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    for hierarchy in (OWNER, PLATFORM):
        assert guest.say(Code.NV_UNDEFINE_SPACE, (hierarchy, index), b"", EMPTY_PASSWORD)[0]
    for authority in (OWNER, PLATFORM, index):
        assert guest.say(Code.NV_WRITE, (authority, index), sized(b"mine") + bytes(2), EMPTY_PASSWORD)[0]
    assert in_nv(guest) == before


def test_a_guest_occupies_no_place(machine: Machine, guest: Guest) -> None:
    for index in INDICES:
        assert guest.nv_define(index, 8) == 0
    made = certificates(machine)
    machine.managed.certify(*made)
    assert in_nv(guest) == made


def test_not_while_the_guest_sleeps(machine: Machine, guest: Guest) -> None:
    made = certificates(machine)
    guest.shutdown(tpm2.STATE)
    with pytest.raises(Asleep):
        machine.managed.certify(*made)
    machine.managed.switch_off()
    with pytest.raises(Asleep):
        machine.managed.certify(*made)  # it would not wake any more
    machine.managed.switch_on()
    assert guest.startup(tpm2.STATE) == 0 and in_nv(guest) == (None,) * 3
    machine.managed.certify(*made)
    assert in_nv(guest) == made


def test_wanted_keys_leave_them_alone(machine: Machine, guest: Guest) -> None:
    made = certificates(machine)
    machine.managed.certify(*made)
    machine.deliver(certificate=b"beside")
    machine.managed.want({})
    assert in_nv(guest) == made and HANDLE not in guest.handles(0x81000000)


# ---- credentials ------------------------------------------------------------------------------------------------------------


def by_endorsement(guest: Guest) -> Authorization:
    """A session that fulfils the endorsement key's policy, once."""
    session = guest.session(tpm2.POLICY_SESSION)
    guest.good(g.POLICY_SECRET, (ENDORSEMENT, session), sized(b"") * 3 + struct.pack(">i", 0), EMPTY_PASSWORD)
    return Authorization(session)


def attestation_key(guest: Guest, parent: int) -> tuple[int, bytes]:
    """The guest's own, under its endorsement key: its handle and its Name."""
    wanted = tpm2.template(
        tpm2.ECC,
        tpm2.Attributes(0x50472),  # fixed, made here, by its password, no dictionary attacks, restricted, signs
        struct.pack(">HHHHH", tpm2.NULL_ALGORITHM, tpm2.ECDSA, tpm2.SHA256, 3, tpm2.NULL_ALGORITHM),
        sized(b"") * 2,
    )
    parameters = sized(sized(b"") * 2) + sized(wanted) + sized(b"") + struct.pack(">I", 0)
    parts = tpm2.Parts(guest.good(Code.CREATE, (parent,), parameters, by_endorsement(guest)), "TPM2_Create")
    parts.number()
    private, public = parts.sized(), parts.sized()
    loaded = guest.good(Code.LOAD, (parent,), sized(private) + sized(public), by_endorsement(guest))
    return int.from_bytes(loaded[:4], "big"), tpm2.name_of(public)


@pytest.mark.parametrize("at", [0, 1], ids=list(TEMPLATES))
def test_a_credential_for_a_guests_key(machine: Machine, guest: Guest, at: int) -> None:
    """An authority that has nothing but the certificate, and the Name of the guest's key, hands a secret to this TPM alone."""
    machine.managed.certify(*certificates(machine))
    der = guest.nv(INDICES[at])
    assert der is not None
    certified = x509.load_der_x509_certificate(der).public_key()
    assert isinstance(certified, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    endorsement, _ = guest.made(ENDORSEMENT, list(TEMPLATES.values())[at])
    key, name = attestation_key(guest, endorsement)
    secret = os.urandom(32)

    def activate(name: bytes) -> tuple[int, bytes]:
        blob, encrypted = g.make_credential(certified, name, secret)
        both = g.Several(all=(EMPTY_PASSWORD, by_endorsement(guest)))
        return guest.say(g.ACTIVATE_CREDENTIAL, (key, endorsement), sized(blob) + sized(encrypted), both)

    result, answer = activate(name)
    assert result == 0 and answer[6:38] == secret
    assert activate(b"\0\x0b" + hashlib.sha256(b"another key").digest())[0]


# ---- as it is made ----------------------------------------------------------------------------------------------------------


def test_each_is_made_as_the_other_but_for_its_seeds(machine: Machine, guest: Guest) -> None:
    """Banks, counters of wrong passwords, handles, indices, hierarchies: all that a TPM says of itself."""
    made = []
    for _ in range(2):
        machine.anew()
        assert guest.startup() == 0
        told = [
            guest.good(Code.GET_CAPABILITY, (), struct.pack(">III", capability, first, 254))
            for capability, first in ((5, 0), (6, 0x200), (1, 0x01000000), (1, 0x81000000), (6, 0x100), (0, 0), (2, 0))
        ]
        made.append((told, machine.managed.endorsement_keys()))
    (first, keys), (second, others) = made
    assert [bytes(one) for one in first] == [bytes(one) for one in second]
    assert not set(keys) & set(others)
    variable = first[1]
    values = dict(struct.iter_unpack(">II", variable[9 : 9 + 8 * int.from_bytes(variable[5:9], "big")]))
    assert tuple(values[0x20E + at] for at in (1, 2, 3)) == limits.TPM_LOCKOUT  # TPM_PT_MAX_AUTH_FAIL, _INTERVAL, _RECOVERY
    assert values[0x20E] == 0, "and none is counted yet"
