"""Which manager a command talks to, and as whom: options, the environment and the user's file in their order."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hsmvisor.cli.fleet import reach
from hsmvisor.cli.fleet.reach import DEFAULT_ADDRESS, ManagerOptions
from hsmvisor.cli.main import cli
from hsmvisor.client.managers import ManagerAt

FILE = 'address = "manager:8472"\nca = "file-ca.pem"\ncertificate = "file.pem"\nkey = "file.key"\ntoken_file = "file.token"\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MANAGER", "MANAGER_FILE", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY"):
        monkeypatch.delenv(f"HSMVISOR_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("ca.pem", "own.pem", "own.key", "own.token"):
        (tmp_path / name).touch()
    return tmp_path


def at(home: Path, *words: str, file: str = "", **environment: str) -> ManagerAt:
    """Returns what a command line, a file and an environment make of it."""
    if file:
        (home / "hsmvisor").mkdir(exist_ok=True)
        (home / "hsmvisor/manager.toml").write_text(file)
    found: list[ManagerAt] = []

    @click.command()
    @click.pass_context
    def look(ctx: click.Context) -> None:
        found.append(ManagerOptions.of(ctx.find_root()).at())

    root = click.Group("hsmvisor", params=cli.params, commands={"look": look})
    result = CliRunner().invoke(root, [*words, "look"], env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_by_default_it_is_the_local_one(home: Path) -> None:
    assert at(home) == ManagerAt(DEFAULT_ADDRESS)


def test_a_file_says_all_of_it(home: Path) -> None:
    directory = home / "hsmvisor"
    assert at(home, file=FILE) == ManagerAt(
        "manager:8472", directory / "file-ca.pem", directory / "file.pem", directory / "file.key", directory / "file.token"
    )


def test_the_environments_files_for_tls_are_a_hosts_where_the_managers_file_has_its_own(home: Path) -> None:
    ca = str(home / "ca.pem")
    assert at(home, file=FILE, HSMVISOR_TLS_CA=ca).ca == home / "hsmvisor/file-ca.pem"
    assert at(home, file='address = "manager:8472"', HSMVISOR_TLS_CA=ca).ca == home / "ca.pem"


def test_the_command_line_counts_most(home: Path) -> None:
    words = ("--manager", "other:1", "--tls-ca", str(home / "ca.pem"), "--token-file", str(home / "own.token"))
    assert at(home, *words, file=FILE) == ManagerAt("other:1", home / "ca.pem", token_file=home / "own.token")
    assert at(home, file=FILE, HSMVISOR_MANAGER="other:1").address == "other:1"


def test_on_a_socket_one_is_known_by_the_socket(home: Path) -> None:
    assert at(home, "--manager", "unix:/run/x", file=FILE) == ManagerAt("unix:/run/x")
    assert at(home, "--manager", "unix:/run/x", "--token-file", str(home / "own.token")).token_file == home / "own.token"
    local = 'address = "unix:/run/x"\ntoken_file = "t"\n'
    assert at(home, file=local).token_file == home / "hsmvisor/t"
    assert at(home, "--manager", "unix:/run/y", file=local).token_file is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--manager", "unix:/nowhere"], 6, "the manager cannot be reached"),
        (["--manager", "nowhere"], 2, "expected unix:/path or host:port"),
        (["--manager", "127.0.0.1:1"], 2, "TCP needs TLS"),
        (["--manager-file", "bad.toml"], 2, "adress is not known"),
        (["--token-file", "empty"], 2, "no access token"),
    ],
)
def test_what_is_wrong_with_it_is_said(words: list[str], code: int, said: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "bad.toml").write_text("adress = 'x'")
    (home / "empty").touch()
    result = CliRunner().invoke(cli, [*words, "fleet", "whoami"], prog_name="hsmvisor")
    assert (result.exit_code, said in result.output) == (code, True), result.output
    assert "hsmvisor fleet --help" in result.output


def test_names_that_cannot_be_asked_for_are_none(home: Path) -> None:
    from hsmvisor.cli.fleet.parameters import RESOURCE_NAME

    command = cli.commands["request"]
    root = cli.make_context("hsmvisor", ["--manager", "unix:/nowhere", "request"], resilient_parsing=True)
    ctx = command.make_context("request", [], parent=root, resilient_parsing=True)
    assert RESOURCE_NAME.shell_complete(ctx, click.Argument(["x"]), "") == []


def test_each_way_stands_in_the_help() -> None:
    assert cli.commands["fleet"].help is not None
    for word in (reach.DEFAULT_ADDRESS, "HSMVISOR_MANAGER", "--token-file", *(ManagerAt.__dataclass_fields__)):
        assert word in cli.commands["fleet"].help, word


@pytest.mark.parametrize("words", [["fleet", "host", "token"], ["fleet", "token", "create"]])
def test_no_secret_is_made_that_could_not_be_kept(words: list[str], home: Path) -> None:
    for out in (home / "nowhere/token", home):
        result = CliRunner().invoke(cli, ["--manager", "unix:/nowhere", *words, "--out", str(out)], prog_name="hsmvisor")
        assert result.exit_code == 2, result.output
