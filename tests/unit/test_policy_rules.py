"""A module's policy: at each edge and one past it, on the host's side and on the worker's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from hsmvisor.host import limits as host_limits
from hsmvisor.host import settings as host_settings
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.internal import mechanisms as shared
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.crypto.mechanisms import GUEST_TABLE, LEGACY, mechanism_list
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.token.policy import EVERYTHING, Policing, Policy
from hsmvisord.worker.settings import parse_settings
from hsmvisord.worker.violations import PAUSE, Violations


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def kind(key: Any) -> KeyKind:
    encoded = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return SoftwareProvider().load_private_key(encoded).kind


P256, P384 = kind(ec.generate_private_key(ec.SECP256R1())), kind(ec.generate_private_key(ec.SECP384R1()))
ED25519, RSA2048 = kind(ed25519.Ed25519PrivateKey.generate()), kind(rsa.generate_private_key(65537, 2048))
X25519 = kind(x25519.X25519PrivateKey.generate())


def policing(**policy: Any) -> tuple[Policing, list[tuple[str, int, str]], Clock]:
    told: list[tuple[str, int, str]] = []
    clock = Clock()
    return Policing(Policy(**policy), clock, lambda *what: told.append(what)), told, clock


def refused(rv: int, act: Any, *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        act(*arguments)
    assert caught.value.rv == rv


def test_the_shared_names_are_the_tokens() -> None:
    with_keys = {ck.mechanism_name(mechanism).removeprefix("CKM_") for mechanism, row in GUEST_TABLE.items() if row.key_types}
    assert set(shared.NAMES) == with_keys
    assert len(shared.NAMES) == len(with_keys)


@pytest.mark.parametrize("text", ["ECDSA-SHA256", "ecdsa_sha256", "CKM_ECDSA_SHA256"])
def test_names_as_people_write_them(text: str) -> None:
    assert shared.named(text) == "ECDSA_SHA256"


def test_without_a_policy_all_is_allowed() -> None:
    free, told, _ = policing()
    for mechanism in mechanism_list(1):
        assert free.offers(mechanism) == (mechanism not in LEGACY)
    for _ in range(1000):
        free.check(ck.CKM_ECDSA, P256)
        free.admit(ck.CKM_ECDSA, P256)
    assert told == []


def test_mechanisms_outside_of_the_policy() -> None:
    strict, told, _ = policing(mechanisms=frozenset({ck.CKM_ECDSA}))
    strict.check(ck.CKM_ECDSA, P256)
    refused(ck.CKR_MECHANISM_INVALID, strict.check, ck.CKM_ECDSA_SHA256, P256)
    assert told == [("mechanism", ck.CKM_ECDSA_SHA256, "EC P-256")]
    assert strict.offers(ck.CKM_ECDSA) and strict.offers(ck.CKM_SHA256) and not strict.offers(ck.CKM_RSA_PKCS)


@pytest.mark.parametrize(
    ("policy", "key", "fits"),
    [
        ({"min_rsa_bits": 2048}, RSA2048, True),
        ({"min_rsa_bits": 2049}, RSA2048, False),
        ({"min_rsa_bits": 4096}, P256, True),
        ({"min_ec_bits": 256}, P256, True),
        ({"min_ec_bits": 257}, P256, False),
        ({"min_ec_bits": 384}, P384, True),
        ({"min_ec_bits": 256}, ED25519, True),
        ({"min_ec_bits": 257}, ED25519, False),
        ({"min_ec_bits": 256}, X25519, True),
        ({"min_ec_bits": 257}, X25519, False),
        ({"min_ec_bits": 521}, RSA2048, True),
    ],
)
def test_sizes_of_keys(policy: dict[str, int], key: KeyKind, fits: bool) -> None:
    strict, told, _ = policing(**policy)
    mechanisms = {ck.CKK_RSA: ck.CKM_RSA_PKCS, ck.CKK_EC: ck.CKM_ECDSA, ck.CKK_EC_EDWARDS: ck.CKM_EDDSA}
    mechanism = mechanisms.get(key.key_type, ck.CKM_ECDH1_DERIVE)
    if fits:
        strict.check(mechanism, key)
    else:
        refused(ck.CKR_KEY_SIZE_RANGE, strict.check, mechanism, key)
    assert told == ([] if fits else [("key size", mechanism, key.name)])


def test_the_rate_at_its_limit_and_one_past_it() -> None:
    slow, told, clock = policing(rate=10, burst=3)
    for _ in range(3):
        slow.admit(ck.CKM_ECDSA, P256)
    refused(ck.CKR_FUNCTION_REJECTED, slow.admit, ck.CKM_ECDSA, P256)
    clock.now += 0.09
    refused(ck.CKR_FUNCTION_REJECTED, slow.admit, ck.CKM_ECDSA, P256)
    clock.now += 0.02
    slow.admit(ck.CKM_ECDSA, P256)
    refused(ck.CKR_FUNCTION_REJECTED, slow.admit, ck.CKM_ECDSA, P256)
    clock.now += 3600
    for _ in range(3):
        slow.admit(ck.CKM_ECDSA, P256)
    refused(ck.CKR_FUNCTION_REJECTED, slow.admit, ck.CKM_ECDSA, P256)
    assert told == [("rate", ck.CKM_ECDSA, "EC P-256")] * 4


def test_without_a_burst_a_second_at_once() -> None:
    slow, _, _ = policing(rate=5)
    for _ in range(5):
        slow.admit(ck.CKM_ECDSA, P256)
    refused(ck.CKR_FUNCTION_REJECTED, slow.admit, ck.CKM_ECDSA, P256)


def test_violations_are_told_at_once_and_then_counted() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    clock, woken = Clock(), list[int]()
    violations = Violations(lambda name, **report: told.append((name, report)), clock, lambda: woken.append(1))
    violations.refused("rate", ck.CKM_ECDSA, "EC P-256")
    assert woken == [1]
    violations.count()
    first = {"what": "rate", "mechanism": "CKM_ECDSA", "key": "EC P-256", "count": 1}
    assert told == [("policy-refused", first)]
    for _ in range(50):
        violations.refused("rate", ck.CKM_ECDSA, "EC P-256")
    violations.count()
    assert len(told) == 1
    violations.refused("mechanism", ck.CKM_ECDSA, "EC P-256")
    violations.count()
    assert told[1][1]["what"] == "mechanism", "another kind does not wait"
    clock.now += PAUSE
    violations.count()
    violations.count()
    assert told[2:] == [("policy-refused", first | {"count": 50})]


# ---- settings, on both sides --------------------------------------------------------------------------------------------


def test_both_sides_have_one_limit() -> None:
    assert host_limits.MOST_IN_POLICY == limits.MOST_IN_POLICY


def test_what_the_host_stores_is_what_the_worker_reads() -> None:
    given = host_settings.Policy(("sha256-rsa-pkcs", "CKM_ECDSA", "ECDSA"), 3072, 384, 100, 200)
    stored = host_settings.Settings(max_sessions=5, policy=given).check()
    assert stored.policy.mechanisms == ("ECDSA", "SHA256_RSA_PKCS")
    assert host_settings.Settings.decode(stored.encode()) == stored
    wanted = Policy(frozenset({ck.CKM_ECDSA, ck.CKM_SHA256_RSA_PKCS}), 3072, 384, 100, 200)
    assert parse_settings(stored.encode()).policy == wanted


def test_legacy_is_stored_and_read() -> None:
    stored = host_settings.Settings(policy=host_settings.Policy(("DES3_CBC", "DSA"), legacy=True)).check()
    assert host_settings.Settings.decode(stored.encode()) == stored
    assert parse_settings(stored.encode()).policy == Policy(frozenset({ck.CKM_DES3_CBC, ck.CKM_DSA}), legacy=True)
    before = '{"policy": {"mechanisms": [], "min_pin": 6}}'
    assert not host_settings.Settings.decode(before).policy.legacy and not parse_settings(before).policy.legacy
    assert set(shared.LEGACY) == {ck.mechanism_name(mechanism).removeprefix("CKM_") for mechanism in LEGACY}


def test_old_mechanisms_and_keys_are_there_with_legacy_alone() -> None:
    without, told, _ = policing()
    for mechanism in LEGACY:
        refused(ck.CKR_MECHANISM_INVALID, without.check_legacy, mechanism)
    assert told == [("mechanism", mechanism, "") for mechanism in LEGACY]
    old = [
        KeyKind("RSA 512", ck.CKK_RSA, 512, b""),
        KeyKind("EC P-192", ck.CKK_EC, 192, b""),
        KeyKind("DSA", ck.CKK_DSA, 2048, b""),
    ]
    for key, rv in zip(old, (ck.CKR_KEY_SIZE_RANGE, ck.CKR_CURVE_NOT_SUPPORTED, ck.CKR_ATTRIBUTE_VALUE_INVALID), strict=True):
        refused(rv, without.check_key, key)
        refused(rv, without.check, ck.CKM_ECDSA, key)
    refused(ck.CKR_CURVE_NOT_SUPPORTED, without.check_key, P256, True)
    without.check_key(P256)
    without.check_legacy(ck.CKM_ECDSA)
    with_it, told, _ = policing(legacy=True)
    for mechanism in LEGACY:
        assert with_it.offers(mechanism)
        with_it.check_legacy(mechanism)
    for key in old:
        with_it.check_key(key)
        with_it.check(ck.CKM_ECDSA, key)
    with_it.check_key(P256, True)
    assert told == []
    narrow, _, _ = policing(legacy=True, mechanisms=frozenset({ck.CKM_DSA}), min_rsa_bits=2048)
    assert narrow.offers(ck.CKM_DSA) and not narrow.offers(ck.CKM_DES3_CBC)
    refused(ck.CKR_KEY_SIZE_RANGE, narrow.check, ck.CKM_DSA, KeyKind("DSA", ck.CKK_DSA, 1024, b""))
    narrow.check(ck.CKM_DSA, old[2])


def test_settings_of_before_have_no_policy() -> None:
    old = '{"log_signatures": false, "max_sessions": 0, "max_connections": 0}'
    assert host_settings.Settings.decode(old).policy == host_settings.EVERYTHING
    assert parse_settings(old).policy == EVERYTHING


@pytest.mark.parametrize("name", ["min_rsa_bits", "min_ec_bits", "rate", "burst"])
def test_numbers_at_their_limit_and_one_past_it(name: str) -> None:
    most = limits.MOST_IN_POLICY
    values = {"rate": most, name: most}
    host_settings.Settings(policy=host_settings.Policy(**values)).check()
    parse_settings(json.dumps({"policy": values}))
    for wrong in (most + 1, -1):
        with pytest.raises(Invalid, match=name):
            host_settings.Settings(policy=host_settings.Policy(**values | {name: wrong})).check()
        with pytest.raises(ValueError, match=name):
            parse_settings(json.dumps({"policy": values | {name: wrong}}))


@pytest.mark.parametrize(
    "policy", [{"burst": 1}, {"mechanisms": ["NO_SUCH"]}, {"mechanisms": ["SHA256"]}, {"unheard": 1}, ["rate"], {"mechanisms": [1]}]
)
def test_policies_that_cannot_be(policy: Any) -> None:
    with pytest.raises((ValueError, AttributeError)):
        parse_settings(json.dumps({"policy": policy}))


def test_what_the_host_says_of_them() -> None:
    with pytest.raises(Invalid, match="a burst needs a rate"):
        host_settings.Settings(policy=host_settings.Policy(burst=1)).check()
    every = shared.NAMES
    host_settings.Settings(policy=host_settings.Policy(every, legacy=True)).check()
    with pytest.raises(Invalid, match="is a mechanism of legacy"):
        host_settings.Settings(policy=host_settings.Policy(("DES3_CBC",))).check()
    with pytest.raises(Invalid, match=f"there are {len(every)} mechanisms"):
        host_settings.Settings(policy=host_settings.Policy((*every, "ECDSA"))).check()
    with pytest.raises(Invalid, match="'NO_SUCH' is not a mechanism"):
        host_settings.Settings(policy=host_settings.Policy(("NO_SUCH",))).check()
