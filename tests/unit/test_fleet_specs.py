"""What is asked for by options and by files: the same becomes the same, and what is wrong is said where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.timestamp_pb2 import Timestamp
from hsmvisor.cli.context import CommandError
from hsmvisor.cli.fleet import asking, showing, waiting
from hsmvisor.cli.fleet.specs import Asked, read_requests
from hsmvisor.cli.main import cli
from hsmvisor.cli.parameters import duration, seconds
from hsmvisor.client.managers import BadManagerFile, ManagerAt, read_token
from hsmvisor_rpc.v1 import manager_pb2 as pb

FILE = b"""
[[request]]
material = "web"
owner = "ann"
names = ["dns:{name}.example.net", "ip:192.0.2.1"]
resources = ["rack/web-1"]
select = { env = "prod" }
source = "issuer"
key_type = "P-384"
authority = "acme"
profile = "peer"
usage = "any"
lifetime = "30d"
two_step = true
health = "http"
escrow = true
drain = "2h"
after_drain = "refuse"
on_expiry = "refuse"
measured = ["golden", "silver"]
renewal = { same_key = true, lead = 864000, cron = "0 3 * * 1", period = "7d", days = 3.5, signatures = 1000 }
[[request]]
material = "sign"
bare = true
mode = "follow"
renewal = { off = true }
"""
OPTIONS = [
    "web", "--owner", "ann", "--name", "dns:{name}.example.net", "--name", "ip:192.0.2.1", "--resource", "rack/web-1",
    "--select", "env=prod", "--source", "issuer", "--key-type", "P-384", "--authority", "acme", "--profile", "peer",
    "--usage", "any", "--lifetime", "30d", "--two-step", "--health", "http", "--escrow", "--drain", "2h", "--after-drain", "refuse",
    "--on-expiry", "refuse", "--measured", "golden", "--measured", "silver", "--same-key", "--renew-lead", "10d",
    "--cron", "0 3 * * 1", "--period", "7d", "--days", "3.5",
    "--signatures", "1000",
]  # fmt: skip


class Caught(Exception):
    pass


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What a command would ask the manager for."""
    found: list[Asked] = []
    real = asking.asked_of

    def stop(*arguments: Any) -> Any:
        found.extend(real(*arguments))
        raise Caught

    monkeypatch.setattr(asking, "asked_of", stop)
    return found


def run(*words: str, stdin: bytes = b"") -> Any:
    return CliRunner().invoke(cli, list(words), prog_name="hsmvisor", input=stdin)


@pytest.mark.parametrize("command", ["apply", "explain"])
def test_options_and_a_file_say_the_same(command: str, caught: list[Asked]) -> None:
    assert isinstance(run("request", command, *OPTIONS).exception, Caught)
    assert isinstance(run("request", command, "--file", "-", stdin=FILE).exception, Caught)
    options, file, bare = caught
    # what a file leaves out, the manager fills in; options say it
    options.spec.ClearField("mode")
    assert (options.spec, options.owner) == (file.spec, file.owner)
    assert bare.spec.bare and bare.spec.mode == "follow" and bare.spec.renewal.off and bare.owner == ""


def test_the_owner_of_the_command_line_is_that_of_requests_without_one(caught: list[Asked], tmp_path: Path) -> None:
    path = tmp_path / "requests.toml"
    path.write_bytes(FILE)
    assert isinstance(run("request", "apply", "--file", str(path), "--owner", "bob").exception, CommandError | Caught | SystemExit)
    assert [one.owner for one in caught] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--file", "-", "web"], "MATERIAL stands there instead"),
        (["--file", "-", "--lifetime", "3d"], "--lifetime stands there instead"),
        ([], "give MATERIAL, or --file"),
        (["web", "--lifetime", "a while"], "no duration"),
        (["web", "--lifetime", "99999999d"], "more than 49710 days"),
        (["web", "--name", "www.example.net"], "a name begins with dns:, ip:, uri:, email:"),
        (["web", "--name", "dns:"], "a name begins with"),
        (["web", "--select", "prod"], "NAME=VALUE"),
        (["web", "--days", "-1"], "--days"),
    ],
)
def test_wrong_options_are_said_before_anybody_is_asked(words: list[str], said: str) -> None:
    result = run("--manager", "unix:/nowhere", "request", "apply", *words, stdin=FILE)
    assert result.exit_code == 2 and said in result.output, result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no [[request]] table"),
        ("request = 1", "there is no [[request]] table"),
        ("[[requests]]\n", "requests is not known"),
        ("[[request]\n", "standard input: "),
        ("[[request]]\n", "request 1: material is missing"),
        ('[[request]]\nmaterial = "a"\nlifetime_seconds = 3\n', "request 1 (a): lifetime_seconds is not known"),
        ('[[request]]\nmaterial = "a"\nlifetime = "3 weeks"\n', "request 1 (a): lifetime is a duration"),
        ('[[request]]\nmaterial = "a"\nlifetime = -1\n', "lifetime is a duration"),
        ('[[request]]\nmaterial = "a"\nlifetime = true\n', "lifetime is a duration"),
        ('[[request]]\nmaterial = "a"\nnames = "dns:a"\n', "names is a list of texts"),
        ('[[request]]\nmaterial = "a"\nselect = { env = 1 }\n', "select is a table of texts"),
        ('[[request]]\nmaterial = "a"\ntwo_step = "yes"\n', "two_step is true or false"),
        ('[[request]]\nmaterial = "a"\nrenewal = "off"\n', "renewal is a table"),
        ('[[request]]\nmaterial = "a"\nrenewal = { signatures = 1.5 }\n', "renewal: signatures is a count"),
        ('[[request]]\nmaterial = "a"\nrenewal = { every = "1d" }\n', "renewal: every is not known"),
        ('[[request]]\nmaterial = "a"\nowner = 1\n', "owner is a text"),
        ('[[request]]\nmaterial = "a"\n[[request]]\nmaterial = "a"\n', "requests 1 and 2 are both for a"),
    ],
)
def test_wrong_files_are_said_where_they_are_wrong(text: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        read_requests(text.encode(), "-")
    assert said in raised.value.message


def test_durations_are_read_and_written() -> None:
    assert [seconds(text) for text in ("90", "90s", "30m", "12h", "30d")] == [90, 90, 1800, 43200, 2592000]
    assert [seconds(text) for text in ("", "d", "-1", "1w", "1.5h", "1 d", "٣d")] == [None] * 7
    assert [duration(value) for value in (0, 90, 1800, 43200, 2592000)] == ["0s", "90s", "30m", "12h", "30d"]


# ---- how far it is --------------------------------------------------------------------------------------------------


def line(stage: str, id: str = "l", **more: Any) -> pb.Line:
    return pb.Line(id=id, resource=f"rack/{id}", stage=stage, **more)


@pytest.mark.parametrize(
    ("lines", "above", "failed", "state"),
    [
        ([], None, {}, waiting.WAITING),
        ([line("serving", generation=1)], None, {}, waiting.DONE),
        ([line("serving", generation=1), line("delivering", "m")], None, {}, waiting.WORKING),
        ([line("serving", generation=1), line("denied", "m")], None, {}, waiting.DONE),
        ([line("ordering", failures=1)], None, {}, waiting.FAILING),
        ([line("ordering", failures=1)], None, {"l": 1}, waiting.WORKING),
        ([line("ordering", failures=2)], None, {"l": 1}, waiting.FAILING),
        ([line("unmeasured")], None, {}, waiting.FAILING),
        ([line("unmeasured")], None, {"l": 0}, waiting.WORKING),  # it was so before, and may be over
        # rotated: what serves has to be another one than before, and only chosen lines count
        ([line("serving", generation=1)], {"l": 1}, {}, waiting.WORKING),
        ([line("serving", generation=2)], {"l": 1}, {}, waiting.DONE),
        ([line("serving", generation=2), line("ordering", "m")], {"l": 1}, {}, waiting.DONE),
    ],
)
def test_how_far_a_request_is(lines: list[pb.Line], above: dict[str, int] | None, failed: dict[str, int], state: str) -> None:
    assert waiting.look_at(pb.MaterialRequest(lines=lines), above, failed).state == state


def test_the_reason_of_what_is_not_done_is_told() -> None:
    holding = pb.Holding(state="pending", why="its host is away")
    look = waiting.look_at(pb.MaterialRequest(lines=[line("delivering", holdings=[holding])]), None, {})
    assert look.why == ("rack/l: delivering: its host is away",)
    assert waiting.some([str(n) for n in range(7)]) == "0; 1; 2; 3; 4; and 2 more"


def test_a_request_is_shown_with_all_that_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (web, sign) = [one.spec for one in read_requests(FILE, "-")]
    web.authority = "acme"
    soon = Timestamp()
    soon.GetCurrentTime()
    soon.seconds += 3700
    shown = pb.MaterialRequest(
        id="5f", owner="ann", spec=web, state="active", summary="denied",
        lines=[line("ordering", failures=2, why="the authority is away", renew_at=soon,
                    generations=[pb.LineGeneration(number=1, state="failed", why="no")])],
        denials=[pb.Denial(resource="rack/db", action="request", why="no-bank: not here", policy_version=3)],
    )  # fmt: skip
    showing.show_request(shown)
    told = " ".join(capsys.readouterr().out.split())
    for word in (
        "all with env=prod", "one key for all, made by the issuer, kept (escrow)", "acme, profile peer, 30d", "in two steps",
        "health check http", "drain 2h", "boot measured as golden or silver",
        "the same key, 10d before the end", "by the schedule 0 3 * * 1 (UTC), each 7d, after 3.5 days",
        "after 1000 signatures", "ordering (2 times failed): the authority is away", "in 1 h 1 min", "no-bank: not here",
    ):  # fmt: skip
        assert word in told, word
    sign.key_type = "Ed25519"
    showing.show_request(pb.MaterialRequest(spec=sign))
    told = " ".join(capsys.readouterr().out.split())
    assert "none: a bare key" in told and "mode follow" in told and "renewal off" in told


# ---- how the manager is reached -------------------------------------------------------------------------------------


def test_a_managers_file(tmp_path: Path) -> None:
    path = tmp_path / "manager.toml"
    path.write_text('address = "manager:8472"\nca = "ca.pem"\ntoken_file = "/etc/token"\nroot = "ab"\n')
    at = ManagerAt.read(path)
    assert (at.address, at.ca, at.token_file, at.root) == ("manager:8472", tmp_path / "ca.pem", Path("/etc/token"), "ab")
    for text, said in (("adress = 'x'", "adress is not known; known are address, ca"), ("ca = 1", "ca is a text"), ("=", "toml")):
        path.write_text(text)
        with pytest.raises(BadManagerFile, match=said):
            ManagerAt.read(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"a b", b"\xff" * 10, b"a" * 5000])
def test_what_is_no_token_is_not_shown_to_anybody(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ValueError, match="no access token"):
        read_token(tmp_path / "token")
