"""C_SeedRandom: seeds are mixed in, bounded, and weaken nothing."""

from __future__ import annotations

import pytest
from hsmvisord import limits
from hsmvisord.token.seeds import Seeds
from hsmvisord.wire.calls import Call
from support.own_keys import OwnGuest, OwnToken
from support.wire_client import Refused


@pytest.fixture
def guest() -> OwnGuest:
    return OwnToken().guest().begin()


def test_seeds_are_mixed_in_and_weaken_nothing() -> None:
    asked: list[int] = []

    def generator(size: int) -> bytes:
        asked.append(size)
        return bytes(size)  # the worst that there is

    seeds, other = Seeds(), Seeds()
    assert seeds.mixed(generator, 40) == bytes(40) and asked == [40], "without a seed it is the generator's"
    seeds.add(b"seed")
    first = seeds.mixed(generator, 40)
    assert len(first) == 40 and first != bytes(40) and asked[1:] == [40, 32]
    other.add(b"seed")
    assert other.mixed(generator, 40) == first, "of the seeds and the generator alone"
    seeds.add(b"more")
    other.add(b"less")
    assert len({first, seeds.mixed(generator, 40), other.mixed(generator, 40)}) == 3
    assert seeds.mixed(generator, 0) == b"" and len(seeds.mixed(generator, 1)) == 1


def test_seeds_and_their_limit(guest: OwnGuest) -> None:
    for seed in (b"", b"seed", bytes(limits.MAX_RANDOM), None):
        assert guest.call(Call.SEED_RANDOM, guest.session, seed) == ()
    with pytest.raises(Refused, match="CKR_ARGUMENTS_BAD"):
        guest.call(Call.SEED_RANDOM, guest.session, bytes(limits.MAX_RANDOM + 1))
    with pytest.raises(Refused, match="CKR_SESSION_HANDLE_INVALID"):
        guest.call(Call.SEED_RANDOM, 999, b"seed")
    (one,), (two,) = (guest.call(Call.GENERATE_RANDOM, guest.session, limits.MAX_RANDOM) for _ in range(2))
    assert len(one) == len(two) == limits.MAX_RANDOM and one != two
