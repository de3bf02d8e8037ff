"""Keys that a module makes at its manager's command: the request that comes out, the certificate that is put to it, refusals."""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.commands import KEY_TYPES, Certify
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisord import ck
from hsmvisord.crypto import generation
from hsmvisord.keystore.keystore import StorageError
from hsmvisord.keystore.records import RequestRecord
from hsmvisord.keystore.vault import UnsealError
from hsmvisord.worker.reports import material_report
from support.certificates import chain_der, new_key
from support.keystores import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(bench: Bench, reason: Reason, act: Callable[[], object]) -> str:
    state, stored = bench.keystore.state, dict(bench.stored)
    with pytest.raises(Refusal) as caught:
        act()
    assert caught.value.reason is reason, caught.value
    assert bench.keystore.state is state and bench.stored == stored
    return caught.value.detail


def spki_of(request: x509.CertificateSigningRequest) -> bytes:
    return request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


# ---- the key and its request --------------------------------------------------------------------------------------------


def test_each_type_that_a_command_can_name_is_made_and_delivered_too() -> None:
    assert set(KEY_TYPES) == set(generation.BY_NAME)


@pytest.mark.parametrize("key_type", [t for t in KEY_TYPES if t not in ("RSA-3072", "RSA-4096")])
def test_a_key_is_made_with_its_request(bench: Bench, key_type: str) -> None:
    request = bench.generate(key_type=key_type)
    assert request.is_signature_valid and bench.state_of(1) == "staged"
    (key,) = bench.keystore.state.keys.values()
    assert spki_of(request) == key.private.public.spki
    assert key.private.kind.name.removeprefix("EC ").replace(" ", "-") == key_type
    bench.restart()
    assert spki_of(bench.request_of(1)) == spki_of(request)
    assert bench.keystore.state.keys[key.handle].private.public.spki == spki_of(request), "the stored key is that of the request"
    bench.execute("certify", "tls", 1, bench.to_certify())
    bench.execute("activate")
    assert bench.state_of(1) == "current"


def test_openssl_reads_the_request(bench: Bench) -> None:
    names = ("dns:www.example.net", "dns:*.example.net", "ip:192.0.2.7", "uri:spiffe://fleet/web-1", "email:root@example.net")
    der = bench.generate(names=names).public_bytes(Encoding.DER)
    command = ["openssl", "req", "-inform", "DER", "-verify", "-noout", "-text"]
    said = subprocess.run(command, input=der, capture_output=True, check=True)
    text = said.stdout.decode()
    assert "verify OK" in (said.stderr + said.stdout).decode()
    assert "Subject: CN = www.example.net" in text
    for shown in ("DNS:www.example.net", "DNS:*.example.net", "IP Address:192.0.2.7", "URI:spiffe://fleet/web-1", "email:root@"):
        assert shown in text


def test_the_subject_is_the_first_host_name_that_fits(bench: Bench) -> None:
    long = "dns:" + "a" * 60 + ".example.net"
    assert bench.generate(1, names=(long, "dns:b.example")).subject.rfc4514_string() == "CN=b.example"
    request = bench.generate(2, names=(long,))
    assert not request.subject and request.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    fits = "a" * 59 + ".test"
    assert bench.generate(3, names=(f"dns:{fits}",)).subject.rfc4514_string() == f"CN={fits}" and len(fits) == 64
    bare = bench.generate(4, names=())
    assert not bare.subject and not list(bare.extensions) and bare.is_signature_valid


def test_it_is_sealed_before_the_request_leaves(bench: Bench) -> None:
    bench.full = True
    state = bench.keystore.state
    with pytest.raises(StorageError):
        bench.generate()
    assert bench.keystore.state is state
    bench.full = False
    bench.generate()
    assert sorted(name.split("/")[0] for name in bench.stored) == ["key", "material", "meta", "request"]


def test_a_destroyed_key_takes_its_request_along(bench: Bench) -> None:
    bench.generate()
    bench.execute("destroy")
    assert {name.split("/")[0] for name in bench.stored} == {"material", "meta"}
    bench.restart()
    assert bench.state_of(1) == "destroyed"


def test_a_request_without_its_key_is_no_state(bench: Bench) -> None:
    bench.generate()
    (key,) = bench.keystore.state.keys.values()
    assert key.request is not None
    name = f"request/{key.handle}"
    version = int.from_bytes(bench.stored[name][:8], "big")
    bench.stored[name] = bench.vault.seal(name, version, RequestRecord(key.handle + 1, key.request.der).encode())
    with pytest.raises(UnsealError):
        bench.restart()


def test_the_report_has_the_request_of_made_keys_alone(bench: Bench) -> None:
    bench.stage(1)
    bench.generate(2)
    state = bench.keystore.state
    told = material_report(state, state.materials["tls"], {}, Counter())
    assert [bool(g["csr"]) for g in told["generations"]] == [False, True]


# ---- what clients see ---------------------------------------------------------------------------------------------------


def attributes(bench: Bench, cls: int) -> dict[int, Any]:
    token = bench.token()
    (found,) = token.index.view(token.watermark).find(((ck.CKA_CLASS, cls),))
    return found.attributes


@pytest.mark.parametrize("cls", [ck.CKO_PRIVATE_KEY, ck.CKO_PUBLIC_KEY])
def test_it_says_that_it_was_made_here_and_is_protected_as_a_delivered_one(bench: Bench, cls: int) -> None:
    bench.generate()
    bench.execute("certify", "tls", 1, bench.to_certify())
    bench.execute("activate")
    made = attributes(bench, cls)
    other = Bench()
    other.push(1, chained=True)
    delivered = attributes(other, cls)
    assert made.keys() == delivered.keys()
    assert (made[ck.CKA_LOCAL], made[ck.CKA_KEY_GEN_MECHANISM]) == (True, ck.CKM_EC_KEY_PAIR_GEN)
    assert (delivered[ck.CKA_LOCAL], delivered[ck.CKA_KEY_GEN_MECHANISM]) == (False, ck.CK_UNAVAILABLE_INFORMATION)
    of_key = {ck.CKA_ID, ck.CKA_EC_POINT, ck.CKA_PUBLIC_KEY_INFO, ck.CKA_SUBJECT, ck.CKA_UNIQUE_ID}
    told = {ck.CKA_LOCAL, ck.CKA_KEY_GEN_MECHANISM, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE}
    same = made.keys() - of_key - told - {ck.CKA_START_DATE, ck.CKA_END_DATE}
    assert {kind: made[kind] for kind in same} == {kind: delivered[kind] for kind in same}
    if cls == ck.CKO_PRIVATE_KEY:
        assert (made[ck.CKA_SENSITIVE], made[ck.CKA_EXTRACTABLE]) == (True, False)
        assert (made[ck.CKA_ALWAYS_SENSITIVE], made[ck.CKA_NEVER_EXTRACTABLE]) == (True, True)


def test_staged_is_invisible_certified_or_not(bench: Bench) -> None:
    bench.generate()
    token = bench.token()
    assert token.index.view(token.watermark).find(()) == ()
    bench.execute("certify", "tls", 1, bench.to_certify())
    token = bench.token()
    assert token.index.view(token.watermark).find(()) == ()


def test_a_renewal_keeps_the_key(bench: Bench) -> None:
    bench.generate()
    bench.execute("certify", "tls", 1, bench.to_certify())
    bench.execute("activate")
    key = bench.keystore.state.keys
    chain = bench.to_certify().certificates
    body = bench.body(new_key("p256"), generation=2, renew=True, public_key=spki_of(bench.request_of(1)))
    bench.execute("stage", "tls", 2, replace(body, certificates=chain))
    bench.execute("activate", "tls", 2)
    assert bench.keystore.state.keys == key
    assert spki_of(bench.request_of(2)) == spki_of(bench.request_of(1)), "its request is still there, for the renewal after that"


def test_it_may_follow_and_may_be_self_signed(bench: Bench) -> None:
    bench.generate(1, "sign", mode="follow")
    bench.execute("activate", "sign", 1)
    bench.generate(2, "sign", mode="follow")
    bench.execute("activate", "sign", 2)
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.generate(3, "sign", mode="follow", key_type="Ed25519"))
    refused(bench, Reason.MALFORMED, lambda: bench.generate(3, "sign", mode="follow", self_signed=True))
    bench.generate(3, "sign", mode="follow")
    refused(bench, Reason.WRONG_STATE, lambda: bench.execute("certify", "sign", 3, bench.to_certify(3, "sign")))
    bench.generate(1, "java", self_signed=True)
    refused(bench, Reason.WRONG_STATE, lambda: bench.execute("certify", "java", 1, bench.to_certify(1, "java")))


# ---- certify ------------------------------------------------------------------------------------------------------------


def test_certificates_come_once(bench: Bench) -> None:
    bench.generate()
    bench.execute("certify", "tls", 1, bench.to_certify())
    found = bench.keystore.state.materials["tls"].generation(1)
    assert found is not None and found.leaf and len(found.intermediates) == 1
    assert "already" in refused(bench, Reason.WRONG_STATE, lambda: bench.execute("certify", "tls", 1, bench.to_certify()))
    bench.generate(2)
    bench.execute("certify", "tls", 2, bench.to_certify(2))
    second = bench.keystore.state.materials["tls"].generation(2)
    assert second is not None and second.intermediates == found.intermediates, "an intermediate is there once"
    bench.restart()
    assert bench.keystore.state.materials["tls"].generation(2) == second


def test_a_delivered_bare_key_gets_a_certificate_too(bench: Bench) -> None:
    bench.stage(1)
    bench.execute("certify", "tls", 1, bench.to_certify())
    bench.execute("activate")


def test_a_chain_is_checked_as_that_of_a_delivery(bench: Bench) -> None:
    bench.generate()
    leaf, middle = bench.to_certify().certificates

    def certify(*certificates: bytes) -> None:
        bench.execute("certify", "tls", 1, Certify(certificates))

    refused(bench, Reason.MALFORMED, lambda: certify())
    refused(bench, Reason.MALFORMED, lambda: certify(b"no certificate"))
    refused(bench, Reason.KEY_MISMATCH, lambda: certify(middle, leaf))
    refused(bench, Reason.KEY_MISMATCH, lambda: certify(*chain_der(bench.authority.chain(new_key("p256")))))
    refused(bench, Reason.BAD_CHAIN, lambda: certify(leaf, middle, middle))
    refused(bench, Reason.TOO_LARGE, lambda: certify(leaf, *[middle] * limits.MAX_CERTIFICATES))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("certify", "tls", 1, b"not a record"))
    refused(bench, Reason.UNKNOWN_GENERATION, lambda: bench.execute("certify", "tls", 2, Certify((leaf, middle))))
    refused(bench, Reason.UNKNOWN_MATERIAL, lambda: bench.execute("certify", "nope", 1, Certify((leaf, middle))))
    bench.now += 40 * 86400
    with pytest.raises(Refusal):
        certify(leaf, middle)
    bench.now -= 40 * 86400
    certify(leaf, middle)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["mode", "profile", "after_drain", "on_expiry"])
def test_unknown_words(bench: Bench, word: str) -> None:
    refused(bench, Reason.MALFORMED, lambda: bench.generate(**{word: "nonsense"}))


@pytest.mark.parametrize("key_type", ["", "p-256", "RSA-1024", "RSA-2047", "P-192", "X25519", "ML-KEM-768"])
def test_unknown_types(bench: Bench, key_type: str) -> None:
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.generate(key_type=key_type))


@pytest.mark.parametrize(
    "name",
    [
        "www.example.net", "dns:", "dns:WWW.example.net", "dns:www.example.net.", "dns:a_b.example", "dns:*", "dns:192.0.2.7",
        "dns:www.example.net\0", "dns:b\u00fccher.example", "ip:192.0.2.07", "ip:2001:DB8::1", "ip:fe80::1%eth0",
        "ip:www.example.net", "uri:nothing", "uri:http://a b", "email:nobody", "email:a@*.example.net", "srv:x",
        "dns:" + "a." * 127 + "example", "uri:http://h/" + "x" * limits.MAX_NAME_TEXT,
    ],
)  # fmt: skip
def test_names_that_cannot_be(bench: Bench, name: str) -> None:
    refused(bench, Reason.MALFORMED, lambda: bench.generate(names=("dns:www.example.net", name)))


def test_names_at_their_limits(bench: Bench) -> None:
    most = tuple(f"dns:n{n}.example.net" for n in range(limits.MAX_NAMES))
    refused(bench, Reason.TOO_LARGE, lambda: bench.generate(names=(*most, "dns:one.more")))
    refused(bench, Reason.MALFORMED, lambda: bench.generate(names=(most[0], most[0])))
    found = bench.generate(names=most).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert len(list(found.value)) == limits.MAX_NAMES
    long = [f"uri:http://h{n}/".ljust(limits.MAX_NAMES_TEXT // 8, "x") for n in range(8)]
    refused(bench, Reason.TOO_LARGE, lambda: bench.generate(2, names=(*long[:-1], long[-1] + "x")))
    bench.generate(2, names=tuple(long))


def test_what_every_generation_is_held_to(bench: Bench) -> None:
    bench.push(5)
    refused(bench, Reason.STALE_GENERATION, lambda: bench.generate(5))
    refused(bench, Reason.WRONG_STATE, lambda: bench.generate(6, mode="follow"))
    refused(bench, Reason.TOO_LARGE, lambda: bench.generate(6, alias_id=b"i" * (limits.MAX_ALIAS_ID + 1)))
    refused(bench, Reason.TOO_LARGE, lambda: bench.generate(6, drain_seconds=limits.MAX_DRAIN + 1))
    refused(bench, Reason.MALFORMED, lambda: bench.generate(6, "n" * (limits.MAX_NAME + 1)))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("generate", "tls", 6, b"not a record"))
    for number in range(6, 5 + limits.MAX_GENERATIONS):
        bench.generate(number)
    refused(bench, Reason.LIMIT, lambda: bench.generate(5 + limits.MAX_GENERATIONS))


def test_a_repeated_command_is_a_replay(bench: Bench) -> None:
    signed = bench.signer.sign(bench.command("generate", body=bench.to_make()))
    bench.send(signed)
    refused(bench, Reason.REPLAY, lambda: bench.send(signed))


def test_nothing_is_made_where_it_could_not_be_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.provider, "generate_pair", lambda *_, **__: pytest.fail("a key was made"))
    bench.keystore.freeze()
    with pytest.raises(StorageError):
        bench.generate()


# ---- what takes long ----------------------------------------------------------------------------------------------------


def test_guests_go_on_while_a_key_is_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keystore is not locked meanwhile; what changes in that time stays, and is checked anew."""
    begun, go_on = threading.Event(), threading.Event()
    real = bench.provider.generate_pair

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return real(*arguments, **options)

    monkeypatch.setattr(bench.provider, "generate_pair", slow)
    failures: list[Refusal] = []

    def run(generation: int) -> None:
        try:
            bench.generate(generation)
        except Refusal as refusal:
            failures.append(refusal)

    thread = threading.Thread(target=run, args=(1,))
    thread.start()
    assert begun.wait(10)
    bench.keystore.set_token_present(False)
    go_on.set()
    thread.join()
    assert not failures and bench.state_of(1) == "staged" and not bench.keystore.state.token_present

    begun.clear(), go_on.clear()
    thread = threading.Thread(target=run, args=(2,))
    thread.start()
    assert begun.wait(10)
    bench.stage(3)
    go_on.set()
    thread.join()
    assert [f.reason for f in failures] == [Reason.REPLAY], "another command took its sequence number"
    assert bench.keystore.state.materials["tls"].generation(2) is None


def test_it_waits_for_the_rsa_key_of_a_guest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisord.limits.RSA_WAIT", 0.05)
    with generation.making_rsa():
        refused(bench, Reason.LIMIT, lambda: bench.generate(key_type="RSA-2048"))
        bench.generate(1, "ec")
    monkeypatch.setattr("hsmvisord.limits.RSA_WAIT", 10)
    holding = threading.Event()

    def hold() -> None:
        with generation.making_rsa():
            holding.set()
            threading.Event().wait(0.3)

    guest = threading.Thread(target=hold)
    guest.start()
    assert holding.wait(10)
    bench.generate(key_type="RSA-2048")
    guest.join()
