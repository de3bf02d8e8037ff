"""The host's configuration: defaults that need no file, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import hsmvisor.host
import pytest
from hsmvisor.host import measures
from hsmvisor.host.config import Allow, BadConfig, Config, Hsm, load, parse
from hsmvisor.host.roles import Role
from hsmvisor.serving.config import differing
from support.configurations import demand_all_defaults, uncommented

EXAMPLE = Path(hsmvisor.host.__file__).parent / "host.toml"


def test_no_file_is_needed() -> None:
    assert load(None) == Config() or Path("/etc/hsmvisor/host.toml").exists()
    assert parse("", "x") == Config()


def test_the_example_file_says_the_defaults_all_of_them() -> None:
    text = EXAMPLE.read_text()
    assert parse(text, "example") == Config()
    demand_all_defaults(text, Config())


def test_the_commented_tables_of_the_example_are_good_too() -> None:
    config = parse(uncommented(EXAMPLE.read_text()), "example")
    assert config.control.allow and config.tls.clients and config.signed.keys and config.hsms


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


def test_what_waits_for_a_restart_is_all_but_who_may_call() -> None:
    callers = "[[control.allow]]\nuid = 1\nroles = ['auditor']\n[[tls.clients]]\nsan = 'a'\nroles = []\n[signed]\nskew_seconds = 9"
    assert differing(Config().without_callers(), parse(callers, "x").without_callers()) == []
    moved = parse("[signed]\naddress = '0.0.0.0:8470'\n[control]\nsocket_mode = 0o600", "x")
    assert differing(Config().without_callers(), moved.without_callers()) == ["control", "signed"]


def hsm(**changes: object) -> str:
    values: dict[str, object] = {"name": "rack", "library": "/lib/p11.so", "token": "prod", "pin_file": "/etc/pin"} | changes
    return "[[hsms]]\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items()) + "\n"


def test_an_hsm_needs_a_name_a_library_a_token_and_a_pin_file() -> None:
    (found,) = parse(hsm(), "x").hsms
    assert found == Hsm("rack", "/lib/p11.so", "prod", "/etc/pin")
    more = hsm(name="two", user="hsm", environment=["A=1", "B="], writes=["/dev/hsm0"]) + "network = true\n"
    config = parse(hsm() + more, "x")
    assert config.hsms[1] == Hsm("two", "/lib/p11.so", "prod", "/etc/pin", "hsm", ("A=1", "B="), ("/dev/hsm0",), True)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602])
def test_the_file_of_an_hsms_pin_is_nobody_elses(tmp_path: Path, mode: int) -> None:
    pin = tmp_path / "pin"
    pin.write_text("1234")
    pin.chmod(mode)
    with pytest.raises(BadConfig, match=f"others may read {pin}: chmod 600 it"):
        parse(hsm(pin_file=str(pin)), "x")
    pin.chmod(0o600)
    assert parse(hsm(pin_file=str(pin)), "x").hsms


def test_what_libraries_of_hsms_change_is_open_to_their_helpers(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    config = parse(hsm(writes=[str(tmp_path / "tokens"), str(tmp_path / "none")]), "x")
    assert measures._for_hsms(config) == {str(tmp_path / "tokens")}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (hsm(name=""), "hsms[0].name is 1-64 of"),
        (hsm(name="Rack"), "hsms[0].name is 1-64 of"),
        (hsm(name="software"), "hsms[0].name is not 'software'"),
        (hsm(library="p11.so"), "hsms[0].library is an absolute path"),
        (hsm(token=""), "hsms[0].token is a label of 1-32 bytes"),
        (hsm(token="x" * 33), "hsms[0].token is a label of 1-32 bytes"),
        (hsm(pin_file="pin"), "hsms[0].pin_file is an absolute path"),
        (hsm(environment=["NAME"]), "hsms[0].environment[0] is NAME=VALUE"),
        (hsm(environment=["A=1", "1A=2"]), "hsms[0].environment[1] is NAME=VALUE"),
        (hsm(environment="A=1"), "hsms[0].environment is a list"),
        (hsm(writes=["tokens"]), "hsms[0].writes[0] is an absolute path"),
        (hsm(pin="1234"), "unknown key hsms[0].pin"),
        (hsm() + hsm(), "hsms: each name stands once"),
        ("[[hsms]]\nname = 'rack'", "hsms[0].library is missing"),
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
        ("[provider]\nkind = 'hsm'", "provider.kind is file"),
        ("[metrics]\naddress = '0.0.0.0:1'", "loopback"),
        ("[metrics]\naddress = '127.0.0.1:x'", "metrics.address is HOST:PORT"),
        ("[tls]\naddress = '8470'", "tls.address is HOST:PORT"),
        ("[signed]\naddress = '0.0.0.0:65536'", "signed.address is HOST:PORT"),
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
