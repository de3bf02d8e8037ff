"""Each thing that a module refuses, with its reason; and nothing has changed afterwards."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x448, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.commands import ChangeRoot, Retire, Signer, raw_public
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisord.crypto.profiles import PROFILES
from hsmvisord.keystore.keystore import StorageError
from support.certificates import Authority, new_key
from support.keystores import DAY, NOW, Bench, signed_by


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(bench: Bench, reason: Reason, act: Callable[[], object]) -> str:
    state, stored = bench.keystore.state, dict(bench.stored)
    with pytest.raises(Refusal) as caught:
        act()
    assert caught.value.reason is reason, caught.value
    assert bench.keystore.state is state
    assert bench.stored == stored
    return caught.value.detail


def test_wrong_module(bench: Bench) -> None:
    refused(bench, Reason.WRONG_MODULE, lambda: bench.execute("activate", module_id=b"x" * 16))


def test_wrong_host(bench: Bench) -> None:
    refused(bench, Reason.WRONG_HOST, lambda: bench.execute("activate", host_id=b"x" * 32))


def test_unknown_manager(bench: Bench) -> None:
    bench.signer = signed_by(Ed25519PrivateKey.generate())
    refused(bench, Reason.UNKNOWN_MANAGER, lambda: bench.execute("activate"))
    bench.signer = Signer(Ed25519PrivateKey.generate())
    refused(bench, Reason.UNKNOWN_MANAGER, lambda: bench.execute("activate"))


def test_certificate_of_another_signer(bench: Bench) -> None:
    bench.signer = Signer(Ed25519PrivateKey.generate(), bench.signer.certificate)
    refused(bench, Reason.ALTERED, lambda: bench.execute("activate"))


def test_signer_expired_and_not_yet_valid(bench: Bench) -> None:
    bench.signer = signed_by(bench.root, not_after=NOW)
    refused(bench, Reason.EXPIRED, lambda: bench.execute("activate"))
    bench.signer = signed_by(bench.root, not_before=NOW + limits.MAX_CLOCK_SKEW + 1)
    refused(bench, Reason.NOT_YET_VALID, lambda: bench.execute("activate"))


def test_command_expired_at_the_second(bench: Bench) -> None:
    refused(bench, Reason.EXPIRED, lambda: bench.execute("activate", issued_at=NOW - 10, expires_at=NOW))
    refused(bench, Reason.UNKNOWN_MATERIAL, lambda: bench.execute("activate", issued_at=NOW - 10, expires_at=NOW + 1))


def test_command_from_the_future(bench: Bench) -> None:
    late = NOW + limits.MAX_CLOCK_SKEW
    refused(bench, Reason.UNKNOWN_MATERIAL, lambda: bench.execute("activate", issued_at=late, expires_at=late + 1))
    refused(bench, Reason.NOT_YET_VALID, lambda: bench.execute("activate", issued_at=late + 1, expires_at=late + 2))


def test_command_that_lives_too_long(bench: Bench) -> None:
    most = NOW + limits.MAX_COMMAND_LIFETIME
    refused(bench, Reason.UNKNOWN_MATERIAL, lambda: bench.execute("activate", expires_at=most))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("activate", expires_at=most + 1))


def test_replay_and_lower_sequence(bench: Bench) -> None:
    first = bench.signer.sign(bench.command("stage", body=bench.body(new_key("p256"))))
    bench.send(first)
    refused(bench, Reason.REPLAY, lambda: bench.send(first))
    bench.execute("activate")
    refused(bench, Reason.STALE_SEQUENCE, lambda: bench.send(first))


def test_every_altered_byte(bench: Bench) -> None:
    signed = bench.signer.sign(bench.command("stage", body=bench.body(new_key("p256"))))
    state = bench.keystore.state
    for position in range(0, len(signed), 7):
        changed = bytearray(signed)
        changed[position] ^= 1
        with pytest.raises(Refusal):
            bench.send(bytes(changed))
    assert bench.keystore.state is state
    bench.send(signed)


def test_lower_and_equal_generation(bench: Bench) -> None:
    bench.push(5)
    refused(bench, Reason.STALE_GENERATION, lambda: bench.stage(5))
    refused(bench, Reason.STALE_GENERATION, lambda: bench.stage(4))


def test_envelope_for_another_generation_or_material(bench: Bench) -> None:
    key = new_key("p256")
    refused(bench, Reason.ALTERED, lambda: bench.execute("stage", "tls", 2, bench.body(key, generation=1)))
    refused(bench, Reason.ALTERED, lambda: bench.execute("stage", "tls", 1, bench.body(key, material="other")))
    refused(bench, Reason.ALTERED, lambda: bench.execute("stage", "tls", 1, bench.body(key), expires_at=NOW + 601))


def test_envelope_with_a_flipped_bit(bench: Bench) -> None:
    body = bench.body(new_key("p256"))
    broken = bytearray(body.envelope)
    broken[-1] ^= 1
    again = type(body)(**{**vars(body), "envelope": bytes(broken)})
    refused(bench, Reason.ALTERED, lambda: bench.execute("stage", body=again))


def test_key_that_does_not_match(bench: Bench) -> None:
    key, other = new_key("p256"), new_key("p256")
    chain = bench.authority.chain(other)
    refused(bench, Reason.KEY_MISMATCH, lambda: bench.execute("stage", body=bench.body(key, chain)))
    lying = bench.body(key)
    lying = type(lying)(**{**vars(lying), "public_key": bench.body(other).public_key})
    refused(bench, Reason.KEY_MISMATCH, lambda: bench.execute("stage", body=lying))


def test_broken_chain_order(bench: Bench) -> None:
    key = new_key("p256")
    leaf, middle = bench.authority.chain(key)
    refused(bench, Reason.KEY_MISMATCH, lambda: bench.execute("stage", body=bench.body(key, (middle, leaf))))
    foreign = Authority().intermediate
    refused(bench, Reason.BAD_CHAIN, lambda: bench.execute("stage", body=bench.body(key, (leaf, foreign))))
    refused(bench, Reason.BAD_CHAIN, lambda: bench.execute("stage", body=bench.body(key, (leaf, middle, middle))))


def test_expired_certificate(bench: Bench) -> None:
    key = new_key("p256")
    leaf = bench.authority.issue(key, lifetime=dt.timedelta(seconds=1))
    bench.now = leaf.not_valid_after_utc.timestamp()
    bench.signer = signed_by(bench.root, not_after=int(bench.now) + DAY)
    refused(bench, Reason.EXPIRED, lambda: bench.execute("stage", body=bench.body(key, (leaf,))))


def test_unsupported_keys(bench: Bench) -> None:
    small = rsa.generate_private_key(65537, 1024)
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.execute("stage", body=bench.body(small)))
    koblitz = ec.generate_private_key(ec.SECP256K1())
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.execute("stage", body=bench.body(koblitz)))
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.execute("stage", body=bench.body(x448.X448PrivateKey.generate())))


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("mode", ["pin", "follow"])
def test_keys_that_can_do_nothing(bench: Bench, profile: str, mode: str) -> None:
    """X25519 agrees, and does nothing else; what follows generations signs, and does nothing else."""
    key = x25519.X25519PrivateKey.generate()
    if mode == "pin" and PROFILES[profile].derive:
        bench.stage(1, key, profile=profile)
    elif mode == "follow" and profile == "decrypt":
        refused(bench, Reason.MALFORMED, lambda: bench.stage(1, key, profile=profile, mode=mode))
    else:
        refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.stage(1, key, profile=profile, mode=mode))


def test_a_renewal_leaves_a_key_its_use(bench: Bench) -> None:
    """What a certificate alone brings counts at once for the key that is there."""
    key = x25519.X25519PrivateKey.generate()
    bench.stage(1, key, profile="decrypt", chained=True)
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.stage(2, key, profile="tls", chained=True, renew=True))
    bench.stage(2, key, profile="any", chained=True, renew=True)


def test_a_key_that_signs_nothing_signs_no_certificate_of_its_own(bench: Bench) -> None:
    key = x25519.X25519PrivateKey.generate()
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.stage(1, key, profile="decrypt", self_signed=True))


@pytest.mark.parametrize("kind", ["Ed25519", "ML-DSA-44"])
def test_a_key_that_is_made_has_a_use(bench: Bench, kind: str) -> None:
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.generate(1, key_type=kind, profile="decrypt"))


def test_oversized_input(bench: Bench) -> None:
    refused(bench, Reason.TOO_LARGE, lambda: bench.send(b"x" * (limits.MAX_SIGNED + 1)))
    refused(bench, Reason.MALFORMED, lambda: bench.send(b"x" * limits.MAX_SIGNED))
    key = new_key("p256")
    leaf, middle = bench.authority.chain(key)
    many = (leaf, *[middle] * limits.MAX_CERTIFICATES)
    refused(bench, Reason.TOO_LARGE, lambda: bench.execute("stage", body=bench.body(key, many)))
    refused(
        bench, Reason.TOO_LARGE, lambda: bench.execute("stage", body=bench.body(key, alias_id=b"i" * (limits.MAX_ALIAS_ID + 1)))
    )
    bench.stage(1, key, alias_id=b"i" * limits.MAX_ALIAS_ID)


@pytest.mark.parametrize("size", [0, limits.MAX_NAME + 1])
def test_names(bench: Bench, size: int) -> None:
    name = "n" * size
    refused(bench, Reason.MALFORMED, lambda: bench.execute("stage", name, 1, bench.body(new_key("p256"), material=name)))


@pytest.mark.parametrize("word", ["mode", "profile", "after_drain", "on_expiry"])
def test_unknown_words(bench: Bench, word: str) -> None:
    refused(bench, Reason.MALFORMED, lambda: bench.execute("stage", body=bench.body(new_key("p256"), **{word: "nonsense"})))


def test_follow_is_for_bare_keys_of_one_kind(bench: Bench) -> None:
    key = new_key("p256")
    chain = bench.authority.chain(key)
    refused(bench, Reason.MALFORMED, lambda: bench.execute("stage", body=bench.body(key, chain, mode="follow")))
    bench.push(1, mode="follow")
    refused(bench, Reason.UNSUPPORTED_KEY, lambda: bench.stage(2, new_key("rsa2048"), mode="follow"))
    refused(bench, Reason.WRONG_STATE, lambda: bench.stage(2, mode="pin"))


def test_limit_of_generations(bench: Bench) -> None:
    for number in range(1, limits.MAX_GENERATIONS + 1):
        bench.stage(number)
    refused(bench, Reason.LIMIT, lambda: bench.stage(limits.MAX_GENERATIONS + 1))
    bench.execute("destroy", "tls", 1)
    bench.stage(limits.MAX_GENERATIONS + 1)


def test_limit_of_materials(bench: Bench) -> None:
    key = new_key("p256")
    for number in range(limits.MAX_MATERIALS):
        bench.stage(1, key, f"m{number}")
    refused(bench, Reason.LIMIT, lambda: bench.stage(1, key, "one more"))


def test_unknown_material_generation_and_action(bench: Bench) -> None:
    bench.stage(1)
    refused(bench, Reason.UNKNOWN_MATERIAL, lambda: bench.execute("activate", "nope"))
    refused(bench, Reason.UNKNOWN_GENERATION, lambda: bench.execute("activate", "tls", 2))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("explode"))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("retire", "tls", 1, Retire(0, "nonsense")))
    refused(bench, Reason.MALFORMED, lambda: bench.execute("stage", "tls", 2, b"not a record"))


def test_only_the_root_changes_the_root(bench: Bench) -> None:
    new = Ed25519PrivateKey.generate()
    body = ChangeRoot(raw_public(new.public_key()))
    refused(bench, Reason.UNKNOWN_MANAGER, lambda: bench.execute("change-root", "", 0, body))
    bench.send(Signer(bench.root).sign(bench.command("change-root", "", 0, body)))
    refused(bench, Reason.UNKNOWN_MANAGER, lambda: bench.execute("stage", body=bench.body(new_key("p256"))))
    bench.signer = signed_by(new)
    bench.push(1)


def test_a_full_disk_changes_nothing(bench: Bench) -> None:
    bench.push(1)
    state = bench.keystore.state
    bench.full = True
    with pytest.raises(StorageError):
        bench.stage(2)
    assert bench.keystore.state is state
    bench.full = False
    bench.stage(2)
