"""A module's cryptoprocessor among its settings, on both sides; what the doctor finds of an HSM; how long failures rest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hsmvisor.cli import doctor_hsm
from hsmvisor.cli.finding import FAIL, OK, WARN
from hsmvisor.host import convert, pauses
from hsmvisor.host.config import Hsm
from hsmvisor.host.settings import Settings
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.worker.settings import parse_settings
from support.host_hsm import HostHsm
from support.softhsm import PIN, SO_PIN, TOKEN

SOFT, RACK = Settings(), Settings(cryptoprocessor="rack")


# ---- settings -----------------------------------------------------------------------------------------------------------


def test_software_is_what_names_nothing() -> None:
    assert Settings(cryptoprocessor="software").beginning() == SOFT.beginning() == SOFT
    assert RACK.beginning() == RACK
    assert convert.settings(convert.settings_message(RACK)) == RACK
    assert Settings.decode(RACK.encode()) == RACK
    assert Settings.decode('{"log_signatures": true}').cryptoprocessor == "", "as a release before wrote it"


@pytest.mark.parametrize("name", ["Rack", "-", "a" * 65, "ra ck", "räck"])
def test_a_cryptoprocessor_has_an_hsms_name(name: str) -> None:
    with pytest.raises(Invalid, match="CRYPTOPROCESSOR"):
        convert.settings(pb.ModuleSettings(cryptoprocessor=name))
    assert convert.settings(pb.ModuleSettings(cryptoprocessor="a" * 64)).cryptoprocessor == "a" * 64


@pytest.mark.parametrize(
    ("now", "named", "result"),
    [
        ("", "", ""),
        ("", "software", ""),
        ("", "rack", None),
        ("rack", "", "rack"),
        ("rack", "rack", "rack"),
        ("rack", "software", None),
        ("rack", "two", None),
    ],
)
def test_an_update_keeps_the_cryptoprocessor(now: str, named: str, result: str | None) -> None:
    before, wanted = Settings(cryptoprocessor=now), Settings(max_sessions=7, cryptoprocessor=named)
    if result is None:
        with pytest.raises(Invalid, match=f"is {now or 'software'} for good, not {named}"):
            wanted.beside(before)
    else:
        assert wanted.beside(before) == Settings(max_sessions=7, cryptoprocessor=result)


def test_the_worker_is_told() -> None:
    assert parse_settings(RACK.encode()).cryptoprocessor == "rack"
    assert parse_settings(SOFT.encode()).cryptoprocessor == parse_settings("{}").cryptoprocessor == ""
    assert "cryptoprocessor" in json.loads(SOFT.encode())


# ---- pauses -------------------------------------------------------------------------------------------------------------


def test_failures_rest_ever_longer_up_to_a_limit() -> None:
    waits = [pauses.after(n) for n in range(12)]
    assert waits == sorted(waits)
    assert waits[:4] == [0, 0.05, 0.2, 0.5] and waits[4] >= 10 and waits[-1] == pauses.after(1000) == 300


# ---- the doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> HostHsm:
    return HostHsm(tmp_path_factory.mktemp("hsm"))


def row(soft: HostHsm, **changes: object) -> Hsm:
    values: dict[str, object] = {
        "name": "rack",
        "library": str(soft.library),
        "token": soft.label,
        "pin_file": str(soft.pin_file),
        "environment": tuple(f"{key}={value}" for key, value in soft.at.environment.items()),
        "writes": (str(soft.tokens),),
    }
    return Hsm(**(values | changes))  # type: ignore[arg-type]


def test_the_doctor_sees_the_token_and_does_not_log_in(soft: HostHsm) -> None:
    soft.enter("wrong")
    found = doctor_hsm.examine(row(soft))
    soft.enter()
    assert (found.check, found.result) == ("HSM rack", OK)
    assert f"token {TOKEN!r}" in found.found
    assert soft.objects() == []


@pytest.mark.parametrize(
    ("changes", "result", "told"),
    [
        ({"token": "other"}, FAIL, "no token 'other'; there is 'rack-7'"),
        ({"library": "/none.so"}, FAIL, "no library /none.so"),
        ({"library": "/etc/passwd"}, FAIL, "/etc/passwd: "),
        ({"pin_file": "/none"}, FAIL, "no PIN file /none"),
        ({"user": "no-such-user"}, FAIL, "there is no user no-such-user"),
        ({"writes": ("/none",)}, WARN, "no /none, which its library shall change"),
        ({"environment": ("SOFTHSM2_CONF=/none",)}, FAIL, ""),
    ],
)
def test_the_doctor_names_what_is_in_the_way(soft: HostHsm, changes: dict[str, object], result: str, told: str) -> None:
    found = doctor_hsm.examine(row(soft, **changes))
    assert (found.check, found.result) == ("HSM rack", result)
    assert told in found.found and found.do


def test_two_tokens_of_one_label_are_one_too_many(tmp_path: Path) -> None:
    soft = HostHsm(tmp_path / "two")
    command = ["softhsm2-util", "--init-token", "--free", "--label", TOKEN, "--so-pin", SO_PIN, "--pin", PIN]
    subprocess.run(command, env=soft.environment, check=True, capture_output=True, timeout=30)
    assert f"2 tokens are named {TOKEN!r}" in doctor_hsm.examine(row(soft)).found


def test_a_library_that_says_nothing_is_given_up(soft: HostHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_hsm, "_WITHIN", 0.01)
    assert "tells no tokens within" in doctor_hsm.examine(row(soft)).found
