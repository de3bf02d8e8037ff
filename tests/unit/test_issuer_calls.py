"""What the manager and its issuer say to each other: encodings, and every limit at and one past."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from cryptography.x509.oid import NameOID
from hsmvisor.manager.ca import names
from hsmvisor.manager.issuer import calls, keys, limits
from hsmvisor.manager.issuer.calls import (
    Answer,
    Call,
    Envelopes,
    Forget,
    Hello,
    Make,
    OverLimit,
    Ready,
    Reseal,
    SealTo,
    Take,
    Targets,
    Trouble,
    Whole,
)
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor.manager.issuer.work import Work
from hsmvisor_rpc.sealed.canonical import MAX_RECORD, MalformedRecord, Record
from hsmvisor_rpc.sealed.envelope import RecipientKey
from support.certificates import new_key, pkcs8
from support.issuing import Target, many, seal_to, targets

MAKE = Make("P-256", ("dns:a.example",), "line", 1, 1)
TAKE = Take("request", b"envelope", b"key", (b"certificate",), "line", 1, 1)
RESEAL = Reseal(b"wrapped", "line", 1, 1)
TO = Target(1).seal_to


@pytest.mark.parametrize(
    "record",
    [
        MAKE,
        TAKE,
        RESEAL,
        TO,
        Hello(),
        Ready(b"r" * 1216, "file", "", False, "[]"),
        Targets((b"a", b"b")),
        Envelopes((b"a", b"")),
        Answer(b"p", b"c", (b"1", b"2"), b"w"),
        Trouble("bad", "because"),
        Forget(7),
    ],
    ids=lambda record: record.TYPE,
)
def test_records_come_back(record: Record) -> None:
    encoded = record.encode()
    assert type(record).decode(encoded) == record
    for broken in (encoded[:-1], encoded + b"\0", b"x" + encoded):
        with pytest.raises(MalformedRecord):
            type(record).decode(broken)


@pytest.mark.parametrize(
    ("call", "field", "most"),
    [
        (MAKE, "key_type", "x" * limits.MAX_NAME),
        (MAKE, "names", ("x",) * limits.MAX_NAMES),
        (MAKE, "line", "x" * limits.MAX_ID),
        (TAKE, "request", "x" * limits.MAX_ID),
        (TAKE, "envelope", bytes(limits.MAX_ENVELOPE)),
        (TAKE, "public_key", bytes(limits.MAX_SPKI)),
        (TAKE, "certificates", (b"x",) * limits.MAX_GIVEN),
        (RESEAL, "wrapped", bytes(limits.MAX_WRAPPED)),
    ],
)
def test_lengths_and_counts(call: Call, field: str, most: str | bytes | tuple[str | bytes, ...]) -> None:
    calls.check(replace(call, **{field: most}))
    with pytest.raises(OverLimit):
        calls.check(replace(call, **{field: most + most[:1]}))  # type: ignore[operator]


@pytest.mark.parametrize("call", [MAKE, TAKE, RESEAL], ids=lambda call: call.TYPE)
@pytest.mark.parametrize(("field", "most"), [("generation", limits.MAX_NUMBER), ("portions", 20)])
def test_numbers(call: Call, field: str, most: int) -> None:
    calls.check(replace(call, **{field: most}))
    for over in (most + 1, -1):
        with pytest.raises(OverLimit):
            calls.check(replace(call, **{field: over}))


def test_items_are_bounded_too() -> None:
    calls.check(replace(MAKE, names=("x" * limits.MAX_NAME_TEXT,)))
    calls.check(replace(TAKE, certificates=(bytes(limits.MAX_CERTIFICATE),)))
    with pytest.raises(OverLimit):
        calls.check(replace(MAKE, names=("x" * (limits.MAX_NAME_TEXT + 1),)))
    with pytest.raises(OverLimit):
        calls.check(replace(TAKE, certificates=(bytes(limits.MAX_CERTIFICATE + 1),)))
    with pytest.raises(OverLimit, match="of a line"):
        calls.check(replace(RESEAL, line=""))


@pytest.mark.parametrize(
    "wrong",
    [
        {"host_id": bytes(31)},
        {"host_id": bytes(33)},
        {"module_id": bytes(15)},
        {"module_id": bytes(17)},
        {"recipient": bytes(1215)},
        {"recipient": bytes(1217)},
        {"material": ""},
        {"material": "x" * (limits.MAX_NAME + 1)},
        {"generation": -1},
        {"generation": limits.MAX_NUMBER + 1},
        {"expires_at": limits.MAX_NUMBER + 1},
    ],
    ids=str,
)
def test_targets_are_checked(wrong: dict[str, object]) -> None:
    calls.check_target(replace(TO, material="x" * limits.MAX_NAME, generation=limits.MAX_NUMBER, expires_at=limits.MAX_NUMBER))
    with pytest.raises(OverLimit):
        calls.check_target(replace(TO, **wrong))


@pytest.mark.parametrize("number", [0, 1, 999, 1000, 1001, 20_000])
def test_targets_come_in_portions(number: int) -> None:
    whole = Whole(replace(MAKE, portions=calls.count(number)))
    wanted = many(number)
    for portion in calls.portions(wanted):
        assert not whole.complete and len(portion.encode()) < MAX_RECORD
        whole.add(portion)
    assert whole.complete and whole.targets == [one.encode() for one in wanted]
    with pytest.raises(MalformedRecord):
        whole.add(Targets((b"x",)))


def test_portions_are_bounded() -> None:
    for size in (0, limits.PORTION + 1):
        with pytest.raises(MalformedRecord):
            Whole(MAKE).add(Targets((b"x",) * size))
    Whole(MAKE).add(Targets((b"x",) * limits.PORTION))


def carried_out(call: Call, to: list[SealTo]) -> list[Record]:
    said: list[Record] = []
    Work(RecipientKey(), None).carry_out(Whole(call, [one.encode() for one in to]), said.append)
    return said


@pytest.mark.parametrize("number", [limits.PORTION, limits.PORTION + 1])
def test_answers_come_in_portions(number: int) -> None:
    *portions, answer = carried_out(replace(MAKE, line=""), many(number))
    assert [len(one.envelopes) for one in portions if isinstance(one, Envelopes)] == [1000, 1][: number - 999]
    assert isinstance(answer, Answer) and max(len(one.encode()) for one in portions) < MAX_RECORD


def test_the_largest_answer_fits_its_frames() -> None:
    """Envelopes of the largest key that modules could be given: portions end by their bytes."""
    most = limits.PORTION_BYTES + limits.MAX_ENVELOPE + 4 * limits.PORTION + 1024
    assert most < MAX_RECORD


def test_a_recipient_that_is_no_key_is_told() -> None:
    with pytest.raises(BadKey, match="module 00000000000000000000000000000001: its recipient key"):
        carried_out(replace(MAKE, line=""), [replace(TO, recipient=b"\xff" * 1216)])


@pytest.mark.parametrize("key_type", keys.KEY_TYPES)
def test_keys_fit_their_envelopes_and_requests(key_type: str) -> None:
    modules = targets(2)
    envelopes, answer = carried_out(Make(key_type, ("dns:a.example", "ip:192.0.2.1"), "", 0, 1), seal_to(modules))
    assert isinstance(envelopes, Envelopes) and isinstance(answer, Answer)
    opened = [one.opened(envelope) for one, envelope in zip(modules, envelopes.envelopes, strict=True)]
    csr = x509.load_der_x509_csr(answer.csr)
    assert csr.is_signature_valid and answer.wrapped == b""
    assert (
        {keys.spki(one) for one in opened}
        == {answer.public_key}
        == {csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)}
    )


@pytest.mark.parametrize(
    ("asked", "common"),
    [
        (["dns:" + "a" * 60 + ".example", "dns:b.example"], "b.example"),
        (["dns:" + "a" * 56 + ".example"], "a" * 56 + ".example"),
        (["ip:192.0.2.1", "dns:a.example"], "a.example"),
        (["uri:urn:x", "email:a@example.org"], None),
    ],
    ids=str,
)
def test_the_common_name_is_the_first_host_name_that_fits(asked: list[str], common: str | None) -> None:
    wanted = names.parse_all(asked)
    csr = x509.load_der_x509_csr(keys.request(keys.make("P-256"), wanted))
    assert [one.value for one in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ([common] if common else [])
    extension = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.of_extension(extension.value) == wanted and extension.critical == (common is None)


def test_a_bare_key_has_an_empty_request() -> None:
    csr = x509.load_der_x509_csr(keys.request(keys.make("Ed25519"), ()))
    assert not list(csr.subject) and not list(csr.extensions)


@pytest.mark.parametrize(
    ("kind", "why"), [("rsa1024", "RSA key of 1024 bits"), ("secp256k1", "curve secp256k1"), ("mldsa44", "type that is not taken")]
)
def test_keys_that_are_not_taken(kind: str, why: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP256K1()) if kind == "secp256k1" else new_key(kind)
    with pytest.raises(BadKey, match=why):
        keys.load(pkcs8(made))


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa2048", "ed25519", "ed448"])
def test_keys_that_are_taken(kind: str) -> None:
    encoded = pkcs8(new_key(kind))
    assert keys.pkcs8(keys.load(encoded)) == encoded
    assert load_der_private_key(encoded, None)


def test_a_key_of_an_unknown_type_is_not_made() -> None:
    with pytest.raises(BadKey, match="P-256, P-384"):
        keys.make("DSA")
