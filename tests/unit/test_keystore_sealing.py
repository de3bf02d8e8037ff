"""The stored state: opens as it was, and any change, mixture or loss of a record is found."""

from __future__ import annotations

import pytest
from hsmvisord.keystore import persistence
from hsmvisord.keystore.vault import UnsealError, Vault
from support.certificates import new_key
from support.keystores import MODULE, Bench


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.push(1, chained=True)
    bench.push(1, new_key("rsa2048"), material="rsa")
    bench.push(2, chained=True)
    bench.keystore.set_pin(b"123456", persistence_cause())
    return bench


def persistence_cause():  # type: ignore[no-untyped-def]
    from hsmvisord.keystore.keystore import Cause

    return Cause()


def opens(bench: Bench, stored: dict[str, bytes], version: int | None = None, vault: Vault | None = None) -> None:
    persistence.load(stored, vault or bench.vault, bench.provider, bench.version if version is None else version)


def test_a_restart_brings_everything_back(bench: Bench) -> None:
    state, recipient = bench.keystore.state, bench.keystore.recipient_public
    bench.restart()
    again = bench.keystore.state
    assert bench.keystore.recipient_public == recipient
    assert again.materials == state.materials
    assert again.certificates == state.certificates
    assert {h: k.private.public.spki for h, k in again.keys.items()} == {h: k.private.public.spki for h, k in state.keys.items()}
    assert (again.pin, again.sequence, again.next_handle, again.next_activation) == (
        state.pin,
        state.sequence,
        state.next_handle,
        state.next_activation,
    )
    bench.push(3, chained=True)


def test_no_record_shows_a_key(bench: Bench) -> None:
    for key in bench.keystore.state.keys.values():
        der = key.private.pkcs8()
        windows = {der[i : i + 16] for i in range(len(der) - 16)}
        for name, blob in bench.stored.items():
            assert not any(blob[i : i + 16] in windows for i in range(len(blob) - 16)), name


def test_every_changed_record_is_found(bench: Bench) -> None:
    opens(bench, bench.stored)
    for name, blob in bench.stored.items():
        for position in (0, 7, 8, len(blob) // 2, len(blob) - 1):
            changed = bytearray(blob)
            changed[position] ^= 0x80
            with pytest.raises(UnsealError):
                opens(bench, bench.stored | {name: bytes(changed)})


def test_every_missing_record_is_found(bench: Bench) -> None:
    for name in bench.stored:
        with pytest.raises(UnsealError):
            opens(bench, {n: b for n, b in bench.stored.items() if n != name})


def test_truncated_records(bench: Bench) -> None:
    for name, blob in bench.stored.items():
        for size in (0, 7, 19, len(blob) - 1):
            with pytest.raises(UnsealError):
                opens(bench, bench.stored | {name: blob[:size]})


def test_records_of_another_time_do_not_mix(bench: Bench) -> None:
    old, version = dict(bench.stored), bench.version
    bench.execute("roll-back", "tls", 1)
    with pytest.raises(UnsealError):
        opens(bench, bench.stored | {"material/tls": old["material/tls"]})
    with pytest.raises(UnsealError):
        opens(bench, old | {"meta": bench.stored["meta"]})
    with pytest.raises(UnsealError):
        opens(bench, old)  # whole, but not what the host acknowledged last
    opens(bench, old, version)


def test_swapped_records(bench: Bench) -> None:
    keys = [name for name in bench.stored if name.startswith("key/")]
    swapped = bench.stored | {keys[0]: bench.stored[keys[1]], keys[1]: bench.stored[keys[0]]}
    with pytest.raises(UnsealError):
        opens(bench, swapped)


def test_another_key_or_module(bench: Bench) -> None:
    with pytest.raises(UnsealError):
        opens(bench, bench.stored, vault=Vault(MODULE, b"x" * 32))
    with pytest.raises(UnsealError):
        opens(bench, bench.stored, vault=Vault(b"x" * 16, b"k" * 32))


def test_a_strange_record_is_found(bench: Bench) -> None:
    with pytest.raises(UnsealError):
        opens(bench, bench.stored | {"key/999": bench.vault.seal("key/999", 1, b"")})


def test_reprs_show_no_secret(bench: Bench) -> None:
    text = repr(bench.keystore.state) + repr(bench.vault)
    for key in bench.keystore.state.keys.values():
        assert key.private.pkcs8()[40:56].hex() not in text
        assert repr(key.private.pkcs8()[40:48])[2:-1] not in text
    assert "verifier" not in text
