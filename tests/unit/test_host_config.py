"""The host's configuration: defaults that need no file, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import hsmvisor.host
import pytest
from hsmvisor.host.config import Allow, BadConfig, Config, load, parse
from hsmvisor.host.roles import Role

EXAMPLE = Path(hsmvisor.host.__file__).parent / "host.toml"


def test_no_file_is_needed() -> None:
    assert load(None) == Config() or Path("/etc/hsmvisor/host.toml").exists()
    assert parse("", "x") == Config()


def test_the_example_file_says_the_defaults_all_of_them() -> None:
    text = EXAMPLE.read_text()
    assert parse(text, "example") == Config()
    values = tomllib.loads(text)

    def compare(section: object, told: dict[str, object], where: str) -> None:
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                compare(value, told[field.name], f"{where}{field.name}.")  # type: ignore[arg-type]
            elif value != () or field.name in told:  # a list of tables is shown as a comment
                assert field.name in told, f"{where}{field.name} is not in the example"
            else:
                assert f"[[{where}{field.name}]]" in text, f"{where}{field.name} is not in the example"

    compare(Config(), values, "")


def test_the_commented_tables_of_the_example_are_good_too() -> None:
    text = EXAMPLE.read_text()
    lines = [line.removeprefix("#") if line.startswith(("#[", "#  ")) else line for line in text.splitlines()]
    config = parse("\n".join(lines), "example")
    assert config.control.allow and config.tls.clients and config.signed.keys


def test_values_are_taken_over() -> None:
    config = parse(
        """
        state_directory = "/srv/hsm"
        [control]
        socket_mode = 0o600
        [[control.allow]]
        uid = 1000
        roles = ["auditor", "manager"]
        [audit]
        checkpoint_seconds = 5
        """,
        "x",
    )
    assert config.state == Path("/srv/hsm")
    assert config.master_key == Path("/srv/hsm/master.key")
    assert config.control.allow == (Allow((Role.AUDITOR, Role.MANAGER), uid=1000),)
    assert config.audit.checkpoint_seconds == 5.0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("state_dir = 1", "unknown key state_dir"),
        ("[control]\nsokket = ''", "unknown key control.sokket"),
        ("state_directory = 1", "state_directory is of type str, not int"),
        ("state_directory = 'relative'", "state_directory is an absolute path"),
        ("control = 1", "control is a section"),
        ("[control]\nsocket_mode = 4096", "control.socket_mode is 0o000 to 0o777"),
        ("[control]\nsocket_mode = true", "control.socket_mode is of type int, not bool"),
        ("[control]\nallow = 1", "control.allow is a list"),
        ("[[control.allow]]\nroles = ['operator']", "names exactly one of user, uid, group, gid"),
        ("[[control.allow]]\nuid = 1\nuser = 'x'\nroles = []", "names exactly one of"),
        ("[[control.allow]]\nuid = 1\nroles = ['king']", "is one of operator, manager, auditor"),
        ("[[control.allow]]\nuid = 1", "control.allow[0].roles is missing"),
        ("[[tls.clients]]\nroles = []", "names exactly one of subject and san"),
        ("[[signed.keys]]\nname='a'\nkind='rsa'\nfile='f'\nroles=[]", "kind is hmac or ed25519"),
        ("[guests]\ndirectories = ['vm']", "guests.directories[0] is an absolute path"),
        ("[guests]\ndirectories = '/vm'", "guests.directories is a list"),
        ("[guests]\nvsock = 1", "guests.vsock is of type bool, not int"),
        ("[provider]\nkind = 'tpm'", "provider.kind is file"),
        ("[metrics]\naddress = '0.0.0.0:1'", "loopback"),
        ("[workers]\nuid_base = 0", "uid_base is at least 1000"),
        ("[log]\nlevel = 'loud'", "log.level"),
        ("[log", "host.toml"),
    ],
)
def test_an_error_names_the_file_and_the_key(text: str, what: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse(text, "host.toml")
    assert "host.toml" in caught.value.detail
    assert what in caught.value.detail


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match="UTF-8"):
        load(tmp_path / "bytes.toml")
