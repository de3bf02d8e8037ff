"""The manager's configuration: defaults that need no file, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import hsmvisor.manager
import pytest
from hsmvisor.manager import measures
from hsmvisor.manager.config import Acme, Allow, BadConfig, Builtin, Client, Command, Config, load, parse
from hsmvisor.manager.notify.channels import Mail, Webhook
from hsmvisor.manager.roles import Role
from hsmvisor.serving.config import differing
from hsmvisor_rpc.confine import capabilities
from support.configurations import demand_all_defaults, uncommented

EXAMPLE = Path(hsmvisor.manager.__file__).parent / "manager.toml"


def test_no_file_is_needed() -> None:
    assert load(None) == Config() or Path("/etc/hsmvisor/manager.toml").exists()
    assert parse("", "x") == Config()
    assert Config().all_authorities == (Builtin("builtin", default=True),)
    assert Config().database_url == "sqlite:////var/lib/hsmvisor-manager/manager.db"


def test_the_example_file_says_the_defaults_all_of_them() -> None:
    text = EXAMPLE.read_text()
    assert parse(text, "example") == Config()
    demand_all_defaults(text, Config())


def test_the_commented_tables_of_the_example_are_good_too() -> None:
    text = uncommented(EXAMPLE.read_text())
    text = text.replace("[tls] ", '[tls]\nclient_ca = "/ca.pem"\n', 1).replace('\nclient_ca = ""', "", 1)
    config = parse(text, "example")
    assert [row.kind for row in config.authorities] == ["builtin", "acme", "command"]
    assert config.clients and config.join_certificates and config.health and config.webhooks and config.mails
    assert [channel.name for channel in config.channels] == ["chat", "operators"]
    assert len(config.control.allow) == 2
    assert config.measurements["golden"].pcrs.keys() == {4, 7} and len(config.measurements["golden"].pcrs[7]) == 2


def test_the_example_shows_every_key_of_its_tables() -> None:
    text = EXAMPLE.read_text()
    for cls in (Allow, Client, Builtin, Acme, Command, Webhook, Mail):
        for field in dataclasses.fields(cls):
            assert re.search(rf"\b{field.name}\b", text), (cls, field.name)


def test_values_are_taken_over() -> None:
    config = parse(
        """
        state_directory = "/srv/fleet"
        [[control.allow]]
        uid = 1000
        roles = ["owner"]
        owner = "web"
        [tls]
        address = "0.0.0.0:8471"
        public = ["manager.example.net:443"]
        client_ca = "/ca.pem"
        [join]
        address = "[::]:8472"
        public = ["[2001:db8::1]:8472"]
        [[clients]]
        san = "ann.example.net"
        owner = "ann"
        """,
        "x",
    )
    assert config.fleet == Path("/srv/fleet/fleet")
    assert config.control.allow == (Allow((Role.OWNER,), uid=1000, owner="web"),)
    assert config.tls_addresses == ("manager.example.net:443",)
    assert config.served_names == ("manager.example.net", "2001:db8::1")
    assert config.clients[0].roles == (Role.OWNER,)


def test_a_password_comes_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("p@ss/word\n")
    secret.chmod(0o600)
    text = f'[database]\nurl = "postgresql://fleet@db.example.net/fleet"\npassword_file = "{secret}"\n'
    config = parse(text, "x")
    assert config.database_url == "postgresql://fleet:p%40ss%2Fword@db.example.net/fleet"
    assert config.database_file is None
    secret.chmod(0o644)
    with pytest.raises(BadConfig, match="others may read"):
        parse(text, "x")


ACME = '[[authorities]]\nname = "a"\nkind = "acme"\ndirectory = "https://acme.example.net/dir"\n'
BUILTIN = '[[authorities]]\nname = "b"\n'
TLS = '[tls]\naddress = "0.0.0.0:1"\nclient_ca = "/ca.pem"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nme = 1", "unknown key nme; known here: audit, authorities"),
        ('state_directory = "state"', "state_directory is an absolute path"),
        ('name = "a b"', "name is 1-64 of"),
        ("[tls]\naddress = 8471", "tls.address is of type str, not int"),
        ('[tls]\naddress = "somewhere"', "tls.address is HOST:PORT"),
        ('[join]\naddress = "0.0.0.0:1"', "join.address is of no use without tls.address"),
        (f'{TLS}[join]\naddress = "0.0.0.0:1"', "tls.address and join.address are different ones"),
        (f'{TLS}[pki]\naddress = "0.0.0.0:1"', "tls.address and pki.address are different ones"),
        ('[pki]\naddress = "x"', "pki.address is HOST:PORT"),
        (f'{ACME}http = "0.0.0.0:80"\n[pki]\naddress = "0.0.0.0:80"', r"pki.address and authorities\[0\].http are different ones"),
        ('[tls]\ncertificate = "/x"', "stand together"),
        ("measured = 1", "measured is of type dict, not int"),
        ("[measured]\ngolden = 1", "measured.golden is a table with pcrs alone"),
        ("[measured.golden]\npcr = 1", "measured.golden is a table with pcrs alone"),
        ('[measured."a b"]\npcrs.7 = "x"', "measured.a b: a name is 1-64 of"),
        ("[measured.golden.pcrs]", "measured.golden.pcrs: no PCR stands there, so every boot would do"),
        ('[measured.golden]\npcrs.24 = "x"', "measured.golden.pcrs.24: a PCR is 0 to 23"),
        ('[measured.golden]\npcrs.07 = "x"', "measured.golden.pcrs.07: a PCR is 0 to 23"),
        ('[measured.golden]\npcrs.7 = "ab"', "measured.golden.pcrs.7 is a SHA-256 value, 64 hexadecimal digits"),
        (f'[measured.golden]\npcrs.7 = "{"0" * 64}"', "measured.golden.pcrs.7: zeros are what a guest has that measured nothing"),
        ("[measured.golden]\npcrs.7 = []", "or a list of 1 to 64 of them"),
        ("[measured.golden]\npcrs.7 = 7", "measured.golden.pcrs.7 is a SHA-256 value"),
        ("\n".join(f"[measured.m{n}.pcrs]" for n in range(65)), "measured: 65 tables, at most 64"),
        ('[tls]\ncertificate = "/x"\nkey = "/y"', "tls.authorities goes with"),
        ('[tls]\nnames = ["under_score"]', r"tls.names\[0\]"),
        ('[tls]\nnames = ["uri:x:y"]', "is a host name or an address"),
        ('[tls]\npublic = ["nowhere"]', r"tls.public\[0\] is HOST:PORT"),
        ('[[clients]]\nsan = "a"\nowner = "a"', "tls.client_ca is missing"),
        (f'{TLS}[[clients]]\nowner = "a"', "exactly one of subject and san"),
        (f'{TLS}[[clients]]\nsan = "a"\nowner = ""', r"clients\[0\].owner is not empty"),
        (f'{TLS}[[clients]]\nsan = "a"\nowner = "a"\nroles = ["host"]', "a host has its own certificate"),
        (f'{TLS}[[clients]]\nsan = "a"\nowner = "a"\nroles = ["king"]', r"roles\[0\] is one of operator, owner, auditor, host"),
        (f'{TLS}[[join_certificates]]\nsan = "a"\nhost = "UP"', r"join_certificates\[0\].host is 1-64"),
        ('[[control.allow]]\nroles = ["owner"]', "exactly one of user, uid, group, gid"),
        ('[database]\nurl = "mysql://x"', "database.url is sqlite"),
        ('[database]\nurl = "sqlite:///x.db"', "by an absolute path"),
        ('[database]\npassword_file = "/x"', "which is missing"),
        ('[database]\nurl = "postgresql://u:p@h/n"\npassword_file = "/x"', "without a password"),
        ('[[authorities]]\nname = "x"\nkind = "magic"', r"authorities\[0\].kind is one of builtin, acme, command, not 'magic'"),
        ('[[authorities]]\nkind = "command"\nname = "x"', r"authorities\[0\].command is missing"),
        ('[[authorities]]\nkind = "command"\nname = "x"\ncommand = ["ca"]', "a program's absolute path"),
        ('[[authorities]]\nname = "x"\ndirectory = "https://a"', r"unknown key authorities\[0\].directory"),
        ('[[authorities]]\nname = "fleet"', "that is the manager's own authority"),
        (BUILTIN + BUILTIN, "each name stands once"),
        (BUILTIN + ACME + 'http = "0.0.0.0:80"', "one of several is the default"),
        (f'{BUILTIN}default = true\n{ACME}default = true\nhttp = "0.0.0.0:80"', "one is the default, not b and a"),
        (ACME, "says how names are shown to be ours"),
        (ACME + 'http = "80"', r"authorities\[0\].http is HOST:PORT"),
        (ACME + 'http = "0.0.0.0:80"\nhttp_hook = ["/x"]', "or by a program"),
        (BUILTIN + 'library = "/x.so"', "library, token and pin_file stand together"),
        (BUILTIN + "orders_per_second = -1", "not negative"),
        (BUILTIN + '[[authorities.profiles]]\nname = "p"\nuses = ["flying"]', "'flying' is none of server"),
        (BUILTIN + '[[authorities.profiles]]\nname = "host"\nuses = ["server"]', "that profile is for hosts"),
        (BUILTIN + '[[authorities.profiles]]\nname = "p"\nuses = ["server"]\nlongest = 5', "in this order"),
        ('[issuer]\nescrow = "cloud"', "issuer.escrow is file, pkcs11 or empty"),
        ('[issuer]\nescrow = "pkcs11"', "say where the escrow's key is"),
        ('[issuer]\nfile = "/x"', 'is for escrow = "file"'),
        ('[issuer]\nenvironment = ["A=1", "NAME"]', r"issuer.environment\[1\] is NAME=VALUE"),
        ('[[health]]\nname = "h"\ncommand = []', r"health\[0\].command"),
        ('[[webhooks]]\nname = "chat"', r"webhooks\[0\].url is missing"),
        ('[[mails]]\nname = "x"\nhost = "h"\nsender = "s"\nto = []', r"mails\[0\].sender is an address"),
        ("[renewal]\nworkers = 0", "renewal.workers is 1 to 256"),
        ("[audit]\nrotate_bytes = 1", "audit.rotate_bytes is at least 65536"),
        ('[log]\nlevel = "loud"', "log.level is debug"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said) as caught:
        parse(text, "the file")
    assert "the file: " in caught.value.detail


def test_profiles_are_added_to_those_there_are_but_for_the_one_of_hosts() -> None:
    row = parse(BUILTIN + '[[authorities.profiles]]\nname = "db"\nuses = ["server", "1.3.6.1.5.5.7.3.17"]', "x").authorities[0]
    assert isinstance(row, Builtin)
    found = row.all_profiles()
    assert {"server", "client", "db"} <= set(found) and "host" not in found
    assert [use.dotted_string for use in found["db"].uses] == ["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.17"]


@pytest.mark.parametrize("text", [ACME + 'http = "0.0.0.0:80"', '[pki]\naddress = "0.0.0.0:80"'])
def test_a_port_below_1024_needs_one_capability_more(text: str) -> None:
    assert measures.wanted(parse(text, "x")) - measures.wanted(Config()) == {capabilities.NET_BIND_SERVICE}


def test_what_waits_for_a_restart_is_all_but_who_may_call() -> None:
    before = parse("", "x")
    callers = '[[control.allow]]\nuid = 1\nroles = ["owner"]\n' + f'{TLS}[[clients]]\nsan = "a"\nowner = "a"\n'
    after = parse(f'writes = ["/srv"]\n[pki]\naddress = "0.0.0.0:80"\n{callers}', "x")
    assert differing(before.without_callers(), after.without_callers()) == ["writes", "tls", "pki"]
    moved = parse("[control]\nsocket_mode = 0o600", "x")
    assert differing(before.without_callers(), moved.without_callers()) == ["control"]
