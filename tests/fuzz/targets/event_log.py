"""What a guest says of its boot: the log of what was measured, and an attestation of the PCRs, with the TPM's certificates.

An input is a log, unless it begins as an encoded record does (certificates or an attestation, as they came) or as a TPMS_ATTEST
does (which a TPM's key has then signed, and a host has certified that key: whoever has taken over a TPM's process can have that).
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, replace

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor.attestation.event_log import MAX_EVENTS, BadLog, Log, compare, compared, parse, replay
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor_rpc.sealed.attestation import Attestation, TpmIdentity
from hsmvisor_rpc.sealed.canonical import MAGIC, MalformedRecord, record_type
from hsmvisor_rpc.sealed.endorsement import TpmCertificates, verify_certificates
from hsmvisor_rpc.sealed.refusal import Refusal
from support import attesting as a
from support import event_logs as e
from support.certificates import spki

INVARIANT = (
    "a log is events or BadLog, and what is told of an event is printable and short; it leads to what hashing its digests in order "
    "gives, the same with room behind it, and differs from no PCR that it leads to; only an attestation as host and TPM signed it "
    "is verified, with the nonce and the PCRs that were asked for; only certificates that say what the host's authority signed are "
    "verified; nothing else than BadLog and Refusal is raised"
)
MAX_LENGTH = 4000
RECORDS = (TpmIdentity, Attestation, TpmCertificates)
QUOTE = b"\xffTCG"


def run(data: bytes) -> None:
    if data.startswith(MAGIC) and _type(data) == TpmCertificates.TYPE:
        certificates(data)
    elif data.startswith(MAGIC):
        as_it_came(data)
    elif data.startswith(QUOTE):
        well_signed(data)
    else:
        a_log(data)


def _type(data: bytes) -> str:
    try:
        return record_type(data)
    except MalformedRecord:
        return ""


def certificates(data: bytes) -> None:
    try:
        found = verify_certificates(data, CERTIFIED)
    except Refusal:
        return
    for der, issued in zip(astuple(found), astuple(CERTIFICATES), strict=True):
        said, signed = (x509.load_der_x509_certificate(one).tbs_certificate_bytes for one in (der, issued))
        assert said == signed, "another one than was signed"


def as_it_came(data: bytes) -> None:
    try:
        found = a.verify(data)
    except Refusal:
        return
    assert found.identity == a.IDENTITY and found.pcrs == dict(zip(a.PCRS, a.VALUES, strict=True))
    assert data == ATTESTATION, "another one than was signed"


def well_signed(attest: bytes) -> None:
    try:
        found = a.verify(a.attestation(attest))
    except Refusal:
        return
    signer = attest[8 : 8 + int.from_bytes(attest[6:8], "big")]
    quote, clock = a.Quote(signer=signer).encode(), 8 + len(signer) + 2 + len(a.NONCE)  # TPMS_CLOCK_INFO, and firmwareVersion
    assert attest[:clock] + attest[clock + 25 :] == quote[:clock] + quote[clock + 25 :]
    assert found.clock == int.from_bytes(attest[clock : clock + 8], "big")


def a_log(data: bytes) -> None:
    try:
        log = parse(data)
    except BadLog as error:
        assert str(error).isprintable() and len(str(error)) < 200
        return
    assert len(log.events) <= MAX_EVENTS
    for event in log.events:
        told = event.type + event.description
        assert told.isascii() and told.isprintable() and 0 < len(event.description) <= 200
    led = replay(log)
    assert led == folded(log)
    began = {pcr: bytes(31) + bytes([log.locality if pcr == 0 else 0]) for pcr in range(8)}
    pcrs = began | led
    assert compare(log, pcrs) == []
    bent = {pcr: bytes(32)[1:] + b"\5" for pcr in pcrs}
    assert compare(log, bent) == compared(log, pcrs)
    if data[-1:] not in (b"\0", b"\xff"):
        assert parse(data + bytes(40)) == parse(data + b"\xff" * 40) == log


def folded(log: Log) -> dict[int, bytes]:
    found = {}
    for pcr in {event.pcr for event in log.events}:
        value = b"\xff" * 32 if 17 <= pcr <= 22 else bytes(31) + bytes([log.locality if pcr == 0 else 0])
        for event in log.events:
            if event.pcr == pcr:
                value = hashlib.sha256(value + event.digest).digest()
        found[pcr] = value
    return found


ATTESTATION = a.attestation()
_CA = TpmCa(HostIdentity(b"h" * 32))  #: of attesting's host
#: Endorsement keys that can be had again, unlike a new RSA key; nobody has their private parts.
_MODULUS = int.from_bytes(b"".join(hashlib.sha512(bytes([part])).digest() for part in range(4))) | 1 << 2047 | 1
_RSA = rsa.RSAPublicNumbers(65537, _MODULUS).public_key()
_KEYS = (_RSA.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), spki(a.KEY))
CERTIFIED = replace(a.IDENTITY, endorsement_keys=_KEYS, authority_key=_CA.public)
CERTIFICATES = TpmCertificates(*astuple(_CA.issue(CERTIFIED.name, CERTIFIED.module_id, *_KEYS)), _CA.certificate)


def seeds() -> dict[str, bytes]:
    a_file = b"\x04\x04\x06\x00a\x00\x7f\xff\x04\x00"
    events = {
        "separators": b"".join(e.event(pcr, e.SEPARATOR, bytes(4)) for pcr in range(8)),
        "locality": e.started_at(3) + e.event(0, e.ACTION, b"text"),
        "variable": e.event(7, 0x80000001, bytes(16) + b"\2" + bytes(7) + b"\1" + bytes(7) + b"d\0b\0\1"),
        "tag": e.event(9, e.EVENT_TAG, b"\7\0\0\0\5\0\0\0hello") + e.event(9, e.EVENT_TAG, b"\7\0\0\0\4\0\0\0h\0i\0"),
        "image": e.event(4, 0x80000003, bytes(24) + len(a_file).to_bytes(8, "little") + a_file),
        "blob": e.event(0, 0x8000000A, b"\3DXE" + bytes(16)) + e.event(0, 0x08, b"1\0.\0"),
        "said": e.event(0xFFFFFFFF, e.NO_ACTION, b"SP800-155 Event\0"),
        "dynamic": e.event(17, 0x77777777, b"x") + b"\xff" * 9,
    }
    both = e.event(4, e.IPL, b"MBR", {algorithm: e.HASHES[algorithm](b"MBR").digest() for algorithm in (e.SHA1, e.SHA256)})
    return {name: e.begun() + data for name, data in events.items()} | {
        "two banks": e.begun(e.SHA1, e.SHA256) + both,
        "vendor": e.first(e.spec_id(vendor=b"who")) + bytes(3),
        "TPM 1.2": e.first(b"MBR", e.IPL),
        "attestation": ATTESTATION,
        "certificates": CERTIFICATES.encode(),
        "quote": a.Quote().encode(),
        "quote of nothing": a.Quote(selections=()).encode(),
    }
