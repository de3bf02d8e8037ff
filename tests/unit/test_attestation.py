"""Attestations: what a real TPM quotes is verified, and what differs from it in anything is refused, for the right reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor_rpc.sealed.attestation import MAX_ATTESTATION, Attestation, TpmIdentity, verify_attestation
from hsmvisor_rpc.sealed.commands import Signed, fingerprint, raw_public, sign
from hsmvisor_rpc.sealed.identity import ModuleIdentity
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import Attributes
from support.attesting import HOST, HOST_KEY, IDENTITY, KEY, MODULE, NONCE, PCRS, VALUES, Quote, attestation, verify
from support.certificates import spki
from support.tpm_guest import OWNER, Machine, started

P384, OTHER = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
RSA, OTHER_HOST = rsa.generate_private_key(65537, 2048), Ed25519PrivateKey.generate()
DIGEST = hashlib.sha256(b"measured").digest()


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from started()


# ---- of a real TPM ----------------------------------------------------------------------------------------------------------


class Host:
    """A host whose module has the TPM of this process."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.identity = HostIdentity(os.urandom(32))
        self.module_id = os.urandom(16)

    def attest(self, nonce: bytes, *pcrs: int) -> bytes:
        quoted = self.machine.managed.quote(nonce, pcrs)
        keys = self.machine.managed.endorsement_keys()
        of = TpmIdentity(self.identity.host_id, self.module_id, "web-1", quoted.key, keys, TpmCa(self.identity).public)
        return Attestation(self.identity.certify_tpm(of), quoted.attest, quoted.signature, pcrs, quoted.values).encode()


@pytest.mark.parametrize("pcrs", [(7,), (0, 23), tuple(range(8)), tuple(range(24))])
@pytest.mark.parametrize("size", [8, 32, 64])
def test_what_a_tpm_quotes_is_verified(machine: Machine, pcrs: tuple[int, ...], size: int) -> None:
    host, nonce = Host(machine), os.urandom(size)
    machine.guest.extend(7, DIGEST)
    found = verify_attestation(host.attest(nonce, *pcrs), host.identity.public, host.module_id, nonce)
    began = {pcr: (b"\xff" if 17 <= pcr <= 22 else b"\0") * 32 for pcr in pcrs}
    extended = {7: hashlib.sha256(bytes(32) + DIGEST).digest()} if 7 in pcrs else {}
    assert found.pcrs == began | extended
    assert found.identity.module_id == host.module_id
    assert found.identity.endorsement_keys == machine.managed.endorsement_keys()


def test_resets_restarts_and_the_clock(machine: Machine) -> None:
    host = Host(machine)

    def seen() -> tuple[int, int, int]:
        nonce = os.urandom(16)
        found = verify_attestation(host.attest(nonce, 0), host.identity.public, host.module_id, nonce)
        return found.resets, found.restarts, found.clock

    resets, restarts, clock = seen()
    machine.guest.shutdown(tpm2.STATE)
    machine.managed.switch_off()
    machine.managed.switch_on()
    assert machine.guest.startup(tpm2.STATE) == 0
    woken = seen()
    assert woken[:2] == (resets, restarts + 1)
    machine.guest.shutdown()
    machine.reset()
    assert seen()[:2] == (resets + 1, 0)
    assert woken[2] >= clock


def test_an_old_quote_of_the_same_tpm(machine: Machine) -> None:
    host, nonce = Host(machine), os.urandom(32)
    old = host.attest(nonce, 7)
    machine.guest.extend(7, DIGEST)
    assert refusal(old, host.identity.public, host.module_id, os.urandom(32)) is Reason.REPLAY
    bent = replace(Attestation.decode(old), values=(hashlib.sha256(bytes(32) + DIGEST).digest(),)).encode()
    assert refusal(bent, host.identity.public, host.module_id, nonce) is Reason.ALTERED


def test_a_quote_by_a_key_of_the_guests(machine: Machine) -> None:
    """A good quote of the same TPM, by a restricted key like the module's own, but the owner's."""
    host, nonce = Host(machine), os.urandom(32)
    made = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.SENSITIVE_DATA_ORIGIN | Attributes.USER_WITH_AUTH
    scheme = b"".join(map(_u16, (tpm2.NULL_ALGORITHM, tpm2.ECDSA, tpm2.SHA256, tpm2.CURVES["secp256r1"], tpm2.NULL_ALGORITHM)))
    made |= Attributes.RESTRICTED | Attributes.SIGN | Attributes.NO_DA
    template = tpm2.template(tpm2.ECC, made, scheme, tpm2.sized(b"") * 2)
    handle, public = machine.guest.made(OWNER, template)
    parameters = tpm2.sized(nonce) + _u16(tpm2.NULL_ALGORITHM) + tpm2.selection([7])
    answer = machine.guest.good(tpm2.Code.QUOTE, (handle,), parameters, tpm2.EMPTY_PASSWORD)[4:]
    size = int.from_bytes(answer[:2], "big")
    attest, signature = answer[2 : 2 + size], answer[2 + size : -5]
    good = Attestation.decode(host.attest(nonce, 7))
    forged = replace(good, attest=attest, signature=tpm2.ecdsa_signature(signature)).encode()
    assert refusal(forged, host.identity.public, host.module_id, nonce) is Reason.ALTERED
    with pytest.raises(Refusal, match="not signed by the TPM's attestation key"):
        verify_attestation(forged, host.identity.public, host.module_id, nonce)
    theirs = replace(verified(good, host, nonce), attestation_key=tpm2.subject_public_key_info(public))
    certified = replace(Attestation.decode(forged), identity=host.identity.certify_tpm(theirs))
    assert verified(certified, host, nonce) == theirs, "it is good in everything else"


def verified(made: Attestation, host: Host, nonce: bytes) -> TpmIdentity:
    return verify_attestation(made.encode(), host.identity.public, host.module_id, nonce).identity


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


# ---- of a key of ours: each part wrong --------------------------------------------------------------------------------------


def refusal(data: bytes, host_key: bytes = HOST_KEY, module_id: bytes = MODULE, nonce: bytes = NONCE) -> Reason:
    with pytest.raises(Refusal) as refused:
        verify_attestation(data, host_key, module_id, nonce)
    return refused.value.reason


def quote(**changes: Any) -> bytes:
    return attestation(replace(Quote(), **changes).encode())


def test_a_good_one() -> None:
    found = verify(attestation())
    assert found.pcrs == dict(zip(PCRS, VALUES, strict=True))
    assert found.identity == IDENTITY
    assert (found.clock, found.resets, found.restarts) == (123456, 5, 2)
    assert verify(quote(safe=0, signer=b"", clock=2**64 - 1)).clock == 2**64 - 1


def of_host(**changes: Any) -> bytes:
    return attestation(identified=replace(IDENTITY, **changes))


def with_key(key: Any, algorithm: Any = SHA256) -> bytes:
    attest = Quote().encode()
    signature = key.sign(attest, ec.ECDSA(algorithm()))
    return attestation(attest, identified=replace(IDENTITY, attestation_key=spki(key)), signature=signature)


SIGNED = sign(IDENTITY, HOST)
MODULE_IDENTITY = ModuleIdentity(fingerprint(HOST_KEY), MODULE, "web-1", b"", b"", 1)
WRONG = {
    "not a record": (b"", Reason.MALFORMED, "not an hsmvisor record"),
    "another record": (MODULE_IDENTITY.encode(), Reason.MALFORMED, "expected a record of type tpm-attestation"),
    "too large": (attestation() + bytes(MAX_ATTESTATION), Reason.TOO_LARGE, "at most 16384 bytes"),
    "something behind it": (attestation() + b"x", Reason.MALFORMED, "1 bytes too many"),
    "no identity": (attestation(identity=b""), Reason.MALFORMED, "not an hsmvisor record"),
    "another host's identity": (attestation(host=OTHER_HOST), Reason.WRONG_HOST, "not signed by the pinned host key"),
    "an identity that is not signed": (
        attestation(identity=Signed(SIGNED.payload, bytes(64)).encode()),
        Reason.WRONG_HOST,
        "not signed by the pinned host key",
    ),
    "an identity of a module": (
        attestation(identified=MODULE_IDENTITY),
        Reason.MALFORMED,
        "expected a record of type tpm-identity",
    ),
    "an identity that names another host": (of_host(host_id=bytes(32)), Reason.WRONG_HOST, "names another host"),
    "another module": (of_host(module_id=b"n" * 16), Reason.WRONG_MODULE, "another module's TPM"),
    "a part of the module's id": (of_host(module_id=MODULE[:-1]), Reason.WRONG_MODULE, "another module's TPM"),
    "no attestation key": (of_host(attestation_key=b""), Reason.MALFORMED, "the attestation key is none"),
    "an attestation key with more": (of_host(attestation_key=spki(KEY) + b"\0"), Reason.MALFORMED, "is none"),
    "an algorithm that nobody has": (
        of_host(attestation_key=bytes.fromhex("300c300706052a0304050603 0100")),
        Reason.MALFORMED,
        "the attestation key is none",
    ),
    "an RSA key": (of_host(attestation_key=spki(RSA)), Reason.UNSUPPORTED_KEY, "on P-256"),
    "an Ed25519 key": (of_host(attestation_key=spki(HOST)), Reason.UNSUPPORTED_KEY, "on P-256"),
    "P-384": (with_key(P384), Reason.UNSUPPORTED_KEY, "on P-256"),
    "SHA-384": (with_key(KEY, SHA384), Reason.ALTERED, "not signed by"),
    "another key": (attestation(key=OTHER), Reason.ALTERED, "not signed by the TPM's attestation key"),
    "no signature": (attestation(signature=b""), Reason.ALTERED, "not signed by"),
    "a raw signature": (attestation(signature=bytes(64)), Reason.ALTERED, "not signed by"),
    "another quote": (attestation(attest=b"", signature=KEY.sign(b"x", ec.ECDSA(SHA256()))), Reason.ALTERED, "not signed by"),
    "not made in a TPM": (quote(magic=0xFF544348), Reason.MALFORMED, "is no quote"),
    "certified, not quoted": (quote(kind=0x8017), Reason.MALFORMED, "is no quote"),
    "an empty quote": (attestation(b""), Reason.MALFORMED, "ends early"),
    "a quote that is cut": (attestation(Quote().encode()[:-1]), Reason.MALFORMED, "ends early"),
    "a quote with more": (quote(rest=b"\0"), Reason.MALFORMED, "something follows the quote"),
    "another nonce": (quote(nonce=bytes(32)), Reason.REPLAY, "another nonce"),
    "a part of the nonce": (quote(nonce=NONCE[:-1]), Reason.REPLAY, "another nonce"),
    "no nonce": (quote(nonce=b""), Reason.REPLAY, "another nonce"),
    "safe, or what": (quote(safe=2), Reason.MALFORMED, "TPMI_YES_NO"),
    "no bank": (quote(selections=()), Reason.MALFORMED, "ends early"),
    "SHA-1": (quote(selections=((4, b"\x91\0\x80"),)), Reason.MALFORMED, "of other PCRs"),
    "two banks": (quote(selections=((0xB, b"\x91\0\x80"), (4, b"\x91\0\x80"))), Reason.MALFORMED, ""),
    "more PCRs than told": (quote(selections=((0xB, b"\xff\0\x80"),)), Reason.MALFORMED, "of other PCRs"),
    "fewer PCRs than told": (quote(selections=((0xB, b"\x90\0\x80"),)), Reason.MALFORMED, "of other PCRs"),
    "a short selection": (quote(selections=((0xB, b"\x91\0"),)), Reason.MALFORMED, "of other PCRs"),
    "a long selection": (quote(selections=((0xB, b"\x91\0\x80\0"),)), Reason.MALFORMED, "of other PCRs"),
    "another digest": (quote(digest=bytes(32)), Reason.ALTERED, "not those that were quoted"),
    "no PCRs": (attestation(pcrs=(), values=()), Reason.MALFORMED, "PCRs are 0 to 23"),
    "PCR 24": (attestation(pcrs=(0, 4, 7, 24)), Reason.MALFORMED, "PCRs are 0 to 23"),
    "a huge PCR": (attestation(pcrs=(0, 4, 7, 2**64 - 1)), Reason.MALFORMED, "PCRs are 0 to 23"),
    "PCRs in another order": (attestation(pcrs=(4, 0, 7, 23)), Reason.MALFORMED, "ascending"),
    "a PCR twice": (attestation(pcrs=(0, 4, 4, 23)), Reason.MALFORMED, "each once"),
    "other PCRs than quoted": (attestation(pcrs=(0, 4, 8, 23)), Reason.MALFORMED, "of other PCRs"),
    "values in another order": (attestation(values=VALUES[::-1]), Reason.ALTERED, "not those that were quoted"),
    "a value too few": (attestation(values=VALUES[:-1]), Reason.MALFORMED, "one value of 32 bytes"),
    "a value too many": (attestation(values=(*VALUES, bytes(32))), Reason.MALFORMED, "one value of 32 bytes"),
    "values cut elsewhere": (
        attestation(values=(VALUES[0] + VALUES[1][:1], VALUES[1][1:], *VALUES[2:])),
        Reason.MALFORMED,
        "one value of 32 bytes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    data, reason, detail = WRONG[name]
    with pytest.raises(Refusal) as refused:
        verify(data)
    assert refused.value.reason is reason
    assert detail in refused.value.detail


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"host_key": raw_public(OTHER_HOST.public_key())}, Reason.WRONG_HOST),
        ({"host_key": b""}, Reason.WRONG_HOST),
        ({"module_id": b"n" * 16}, Reason.WRONG_MODULE),
        ({"module_id": b""}, Reason.WRONG_MODULE),
        ({"nonce": bytes(32)}, Reason.REPLAY),
        ({"nonce": b""}, Reason.REPLAY),
    ],
)
def test_whoever_asked_for_another(expected: dict[str, bytes], reason: Reason) -> None:
    assert refusal(attestation(), **expected) is reason


def test_no_bit_can_be_another() -> None:
    data = attestation()
    for place in range(len(data)):
        for bit in (0x01, 0x80):
            bent = bytearray(data)
            bent[place] ^= bit
            refusal(bytes(bent))


def test_no_part_is_enough() -> None:
    data = attestation()
    for end in range(len(data)):
        assert refusal(data[:end]) is Reason.MALFORMED


def test_a_host_certifies_with_its_key_alone() -> None:
    """What HostIdentity signs is what is verified; an identity of a module is none of its TPM, and the other way round."""
    host = HostIdentity(b"h" * 32)
    assert host.certify_tpm(IDENTITY) == SIGNED.encode()
    swapped = attestation(identity=host.certify(MODULE, "web-1", b"", b"", 1))
    assert refusal(swapped) is Reason.MALFORMED
