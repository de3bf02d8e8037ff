"""The control API takes anything and changes nothing that it refuses; the long run is `scripts/fuzz control`."""

from __future__ import annotations

import pytest
from fuzz.control import ControlFuzzer
from support.host import Host

CALLS = 400


@pytest.mark.slow
def test_any_request_is_answered_or_refused_precisely(shared_host: Host) -> None:
    fuzzer = ControlFuzzer(shared_host, seed=1)
    try:
        fuzzer.run(CALLS)
    finally:
        fuzzer.clean()
    assert len(fuzzer.codes) >= 4, fuzzer.codes  # among them what was carried out
