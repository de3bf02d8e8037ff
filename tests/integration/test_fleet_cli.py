"""The commands for a fleet's manager against a real one, with a real host and its guests: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import pty
import select
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from support.command import Command
from support.fleet_processes import Manager, Member
from support.host_process import SOURCES, wait_for
from support.softhsm import TOKEN, make_key, make_token

pytestmark = [pytest.mark.real, pytest.mark.slow]
OK, FAILURE, USAGE, NOT_FOUND, REFUSED, NOT_PERMITTED, UNREACHABLE, TIMEOUT = range(8)


class Fleet:
    """A manager, a host that has joined it by commands alone, and guests of two owners; a command that talks to both."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.owners = directory, trustme.CA()
        (directory / "owners.pem").write_bytes(self.owners.cert_pem.bytes())
        settings = '[issuer]\nescrow = "file"\n[[clients]]\nsan = "ann.test"\nowner = "alice"\n'
        self.manager = Manager(settings)
        config = self.manager.config.read_text().replace("[tls]\n", f'[tls]\nclient_ca = "{directory}/owners.pem"\n')
        self.manager.config.write_text(config)
        self.manager.start()
        self.host = Member(self.manager)
        self.host.start()

    def close(self) -> None:
        self.host.__exit__(None, None, None)
        self.manager.clean()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HSMVISOR_MANAGER": f"unix:{self.manager.socket}",
            "HSMVISOR_HOST": f"unix:{self.host.socket}",
            "XDG_CONFIG_HOME": str(self.directory),
        }

    def __call__(self, *words: str | Path, code: int = OK, stdin: bytes = b"", **more: str) -> str:
        command = Command(f"unix:{self.host.socket}", self.directory / "authority")
        told = command(*words, code=code, stdin=stdin, **{**self.environment, **more})
        self.errors = command.errors
        return told

    def json(self, *words: str | Path) -> Any:
        return json.loads(self(*words, "--json"))

    def remote(self, token: Path | None = None, **more: str) -> dict[str, str]:
        """An environment in which the manager is reached by TLS: with a token, or with what `more` adds to manager.toml."""
        port = self.manager.join_port if token else self.manager.port
        lines = [f'address = "127.0.0.1:{port}"', f'ca = "{self.manager.state}/authorities.pem"']
        lines += [f'token_file = "{token}"'] if token else []
        lines += [f'{name} = "{value}"' for name, value in more.items()]
        (self.directory / "remote.toml").write_text("\n".join(lines))
        return {"HSMVISOR_MANAGER": "", "HSMVISOR_MANAGER_FILE": str(self.directory / "remote.toml")}

    def apply(self, material: str, *words: str | Path, code: int = OK) -> str:
        return self("request", "apply", material, "--owner", "alice", "--wait", *words, code=code)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        token = fleet.directory / "token"
        fleet("fleet", "host", "token", "--for", "rack", "--owner", "alice", "--owner", "bob", "--out", token)
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        fleet("host", "join", "--name", "rack", token)
        for name, owner in (("web-1", "alice"), ("web-2", "alice"), ("db-1", "bob")):
            fleet("guest", "add", name, "--owner", owner, "--attribute", "env=prod", "--attribute", f"domain={owner}.test")
        wait_for(lambda: len(fleet.json("fleet", "resources")["resources"]) == 3, 20, "the resources")
        yield fleet
    finally:
        fleet.close()


@dataclass
class Running:
    """A command that goes on, and the lines that it has printed."""

    process: subprocess.Popen[str]
    lines: list[str]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def start(fleet: Fleet, *words: str) -> Running:
    environment = os.environ | fleet.environment | {"PYTHONPATH": SOURCES}
    command = [sys.executable, "-m", "hsmvisor.cli.main", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    found: list[str] = []

    def follow() -> None:
        assert process.stdout is not None
        found.extend(iter(process.stdout.readline, ""))

    threading.Thread(target=follow, daemon=True).start()
    return Running(process, found)


# ---- the fleet ------------------------------------------------------------------------------------------------------


def test_the_fleet_as_it_is(fleet: Fleet) -> None:
    told = fleet("fleet", "status")
    assert fleet.manager.directory.name in told and "builtin" in told
    assert fleet.json("fleet", "status")["hosts"] == 1
    assert "hsmvisor_fleet_resources 3" in fleet("fleet", "metrics")
    assert fleet.json("fleet", "whoami")["roles"] == ["auditor", "operator", "owner"]
    assert fleet.json("fleet", "authorities")["authorities"][0]["default"]
    roots = x509.load_pem_x509_certificates(fleet("fleet", "authorities", "--pem").encode())
    assert [root.subject.rfc4514_string() for root in roots] == ["CN=builtin root"]


def test_hosts_are_shown_and_changed(fleet: Fleet) -> None:
    assert "alice, bob" in fleet("fleet", "hosts")
    assert fleet.json("fleet", "host", "show", "rack")["state"] == "joined"
    assert "is not trusted" in fleet("fleet", "host", "distrust", "rack")
    shown = fleet.json("fleet", "host", "show", "rack")
    assert not shown["trusted"] and shown["owners"] == ["alice", "bob"], "what was not said stays"
    fleet("fleet", "host", "trust", "rack")
    assert "already" not in fleet("fleet", "host", "trust", "rack"), "the same again is no error"
    assert "all owners" in fleet("fleet", "host", "owners", "rack", "--everybody")
    assert fleet.json("fleet", "host", "owners", "rack", "alice", "bob")["owners"] == ["alice", "bob"]
    fleet("fleet", "host", "owners", "rack", code=USAGE)
    fleet("fleet", "host", "show", "nobody", code=NOT_FOUND)
    assert "hsmvisor fleet hosts" in fleet.errors
    fleet("fleet", "host", "token", "--replace", code=USAGE)
    token = fleet("fleet", "host", "token", "--lifetime", "90s").strip()
    assert token.startswith("hsmvisor-join:") and "it counts until" in fleet.errors


def test_a_host_leaves_for_good(fleet: Fleet) -> None:
    with Member(fleet.manager) as second:
        second.join("second", fleet.manager.token("second"))
        second.register("guest")
        wait_for(lambda: "second/guest" in fleet("fleet", "resources", "--host", "second"), 20, "its guest")
        fleet("fleet", "host", "revoke", "second", stdin=b"n\n", code=FAILURE)
        assert "is revoked" in fleet("fleet", "host", "revoke", "second", "--yes", "--why", "stolen")
        assert "is revoked" in fleet("fleet", "host", "revoke", "second"), "asks nothing: it is so already"
        assert "stolen" in fleet("fleet", "events", "--kind", "host_revoked")
        told = fleet("fleet", "host", "remove", "second", "--revoke-certificates", "--yes")
        assert "is forgotten, with 1 guests, 0 certificates are revoked" in told
        assert "there is no host second" in fleet("fleet", "host", "remove", "second", "--yes")


def test_resources_are_found_by_what_they_are(fleet: Fleet) -> None:
    def ids(*words: str) -> list[str]:
        return [resource["id"] for resource in fleet.json("fleet", "resources", *words)["resources"]]

    assert ids() == ["rack/db-1", "rack/web-1", "rack/web-2"]
    assert ids("--attribute", "domain=bob.test", "--attribute", "env=prod") == ["rack/db-1"]
    assert ids("--owner", "alice", "--host", "rack") == ["rack/web-1", "rack/web-2"]
    assert "domain=bob.test" in fleet("fleet", "resource", "show", "db-1")
    fleet("fleet", "resource", "show", "rack/none", code=NOT_FOUND)


# ---- requests -------------------------------------------------------------------------------------------------------


def test_a_request_from_explanation_to_the_end(fleet: Fleet) -> None:
    words = ["--name", "dns:{name}.alice.test", "--select", "owner=alice", "--lifetime", "30d"]
    told = fleet("request", "explain", "life", "--owner", "alice", *words)
    assert "it is new" in told and "dns:web-2.alice.test" in told and "own-resources" in told
    assert "is asked for\n" in fleet.apply("life", *words)
    assert "2 serving" in fleet.errors
    assert "is asked for already" in fleet.apply("life", *words)
    assert "nothing changes" in fleet("request", "explain", "life", "--owner", "alice", *words)
    assert "is changed" in fleet.apply("life", *words, "--drain", "1h")
    shown = fleet.json("request", "show", "life")
    assert shown["summary"] == "done" and {line["resource"] for line in shown["lines"]} == {"rack/web-1", "rack/web-2"}
    assert "drain 1h" in fleet("request", "show", shown["id"])
    assert "life (active)" in fleet("fleet", "resources", "--owner", "alice")

    assert "generation 2 serves" in fleet("request", "rotate", "life", "--resource", "web-1", "--wait")
    assert {line["generation"] for line in fleet.json("request", "show", "life")["lines"]} == {1, 2}
    assert "generation 1 serves" in fleet("request", "roll-back", "life", "--resource", "web-1", "--why", "trial")
    assert "rolled back: trial" in fleet("request", "show", "life")
    fleet("request", "roll-back", "life", "--resource", "web-2", code=REFUSED)

    fleet("request", "revoke", "life", "--resource", "web-2", stdin=b"n\n", code=FAILURE)
    fleet("request", "revoke", "life", "--resource", "web-2", "--reason", "key_compromise", "--yes", "--why", "leaked")
    wait_for(lambda: "revoked" in fleet("request", "show", "life"), 20, "the revocation")
    assert fleet.json("fleet", "authorities")["authorities"][0]["revoked"] != "0"

    fleet("request", "cancel", "life", stdin=b"n\n", code=FAILURE)
    assert "is taken away" in fleet("request", "cancel", "life", "--yes")
    assert "is taken away" in fleet("request", "cancel", "life"), "asks nothing: it is so already"
    wait_for(lambda: "life" not in fleet("fleet", "resources"), 20, "that it is taken away")
    assert "life" not in fleet("request", "list") and "life" in fleet("request", "list", "--state", "cancelled")


def test_what_is_denied_is_said_with_its_rule(fleet: Fleet) -> None:
    fleet("request", "explain", "denied", "--owner", "alice", "--name", "dns:{name}.test", "--resource", "web-1", code=REFUSED)
    fleet.apply("denied", "--name", "dns:{name}.test", "--resource", "web-1", code=NOT_PERMITTED)
    assert "POLICY" in fleet.errors and "a name is not in that domain" in fleet.errors and "hsmvisor policy show" in fleet.errors
    # allowed on some: they get it, and the command says where not
    fleet.apply("some", "--name", "dns:{name}.{domain}", "--select", "env=prod", code=REFUSED)
    assert "some is denied on rack/db-1" in fleet.errors
    assert "some" in fleet("fleet", "resource", "show", "web-1")
    told = fleet("request", "show", "some")
    assert "no rule permits it" in told and "active, denied" in told
    assert "denied" in fleet("fleet", "events", "--kind", "denied", "--resource", "rack/db-1")
    fleet("request", "cancel", "some", "--yes")


def test_several_requests_of_a_file(fleet: Fleet, tmp_path: Path) -> None:
    text = b"".join(
        b'[[request]]\nmaterial = "%s"\nowner = "alice"\nbare = true\nresources = ["web-%d"]\nusage = "request-signing"\n' % row
        for row in ((b"first", 1), (b"second", 2))
    )
    (tmp_path / "requests.toml").write_bytes(text)
    assert "first: it is new" in fleet("request", "explain", "--file", tmp_path / "requests.toml")
    told = fleet("request", "apply", "--file", "-", "--wait", stdin=text)
    assert "first of alice is asked for" in told and told.count("serving") == 2
    assert len(json.loads(fleet("request", "apply", "--file", "-", "--json", stdin=text))["requests"]) == 2
    assert "asked for already" in fleet("request", "apply", "--file", tmp_path / "requests.toml")
    bad = text.replace(b"web-2", b"web-9")
    fleet("request", "apply", "--file", "-", stdin=bad, code=REFUSED)
    assert "request 2 (second): RESOURCE: there is no resource 'web-9'" in fleet.errors
    for name in ("first", "second"):
        fleet("request", "cancel", name, "--yes")


def test_two_steps_and_one_key_for_all(fleet: Fleet) -> None:
    words = [
        "--source",
        "issuer",
        "--name",
        "dns:api.alice.test",
        "--resource",
        "web-1",
        "--resource",
        "web-2",
        "--two-step",
        "--escrow",
    ]
    assert "all of them" in fleet.apply("shared", *words)
    assert "kept (escrow)" in fleet("request", "show", "shared")
    fleet("request", "activate", "shared", code=REFUSED)
    assert "no generation is staged" in fleet.errors
    assert "of rack/web-1 get new keys" in fleet("fleet", "resource", "rekey", "web-1", "--why", "a drill")
    wait_for(lambda: fleet.json("request", "show", "shared")["lines"][0]["generation"] >= 2, 20, "the new key")
    fleet("request", "cancel", "shared", "--keep", "--why", "moved")
    wait_for(lambda: fleet.json("request", "show", "shared")["lines"][0]["stage"] == "gone", 20, "the end of the line")
    holdings = fleet.json("fleet", "resource", "show", "web-2")["holdings"]
    assert [row["state"] for row in holdings if row["material"] == "shared"] == ["active"], "it stays"
    fleet("request", "cancel", "shared", "--yes")


def test_renewal_is_opted_out_of_and_in_to(fleet: Fleet) -> None:
    fleet.apply("rule", "--bare", "--resource", "web-1", "--usage", "any", "--no-renewal")
    assert "renewal: off" in fleet("request", "renewal", "rule")
    assert "after 3 days" in fleet("request", "renewal", "rule", "--on", "--days", "3", "--cron", "0 3 * * 1")
    told = fleet("request", "renewal", "rule", "--cron", "", "--period", "2h")
    assert "each 2h" in told and "after 3 days" in told and "schedule" not in told, "what is not given stays"
    fleet("request", "renewal", "rule", "--cron", "tomorrow", code=REFUSED)
    assert "five fields" in fleet.errors
    fleet("request", "renewal", "rule", "--on", "--no-renewal", code=USAGE)
    fleet("request", "cancel", "rule", "--yes")


def test_guests_that_come_later_and_guests_that_are_meant_no_more(fleet: Fleet) -> None:
    words = ("--name", "dns:{name}.alice.test", "--select", "role=late")

    def holders() -> list[str]:
        found = fleet.json("fleet", "resources", "--owner", "alice")["resources"]
        return [r["name"] for r in found if any(h["material"] == "moving" and h["state"] == "active" for h in r["holdings"])]

    fleet.apply("moving", *words)
    own = ("--attribute", "env=prod", "--attribute", "domain=alice.test")
    fleet("guest", "set", "web-2", *own, "--attribute", "role=late")
    wait_for(lambda: holders() == ["web-2"], 20, "the key of the guest that came later")
    assert "generation 2 serves" in fleet("request", "rotate", "moving", "--urgent", "--wait", "--why", "leaked")
    wait_for(lambda: "revoked" in fleet("request", "show", "moving"), 20, "the revocation")
    fleet("guest", "set", "web-2", *own)
    wait_for(lambda: holders() == [], 20, "that it is taken away")
    fleet("request", "cancel", "moving", "--yes")


def test_nobody_is_meant_yet(fleet: Fleet) -> None:
    told = fleet.apply("later", "--name", "dns:{name}.alice.test", "--select", "env=later")
    assert "those that come later get it" in told
    assert "waiting" in fleet("request", "list")
    fleet("request", "cancel", "later", "--yes")


# ---- keys of one's own ----------------------------------------------------------------------------------------------


def root_of(fleet: Fleet) -> Path:
    return fleet.manager.state / "fleet/root/root.pub"


def test_a_key_is_imported_sealed(fleet: Fleet, tmp_path: Path) -> None:
    fleet("material", "generate-test", tmp_path, "--name", "own.alice.test")
    told = fleet.apply("own", "--source", "imported", "--select", "owner=alice")
    assert "it waits for its key: hsmvisor request import own" in told
    files = ["--key-file", tmp_path / "key.pem", "--cert-file", tmp_path / "chain.pem"]
    assert "the imported key serves" in fleet("request", "import", "own", *files, "--root", root_of(fleet), "--wait")
    assert "believed" not in fleet.errors
    shown = fleet.json("request", "show", "own")
    assert {holding["state"] for holding in shown["lines"][0]["holdings"]} == {"active"}
    fleet("request", "import", "own", *files, "--root", "00" * 32, code=REFUSED)
    assert "issuer's key" in fleet.errors
    fleet("request", "import", "own", *files)
    assert "is believed as unix:" in fleet.errors
    fleet("request", "import", "own", "--cert-file", tmp_path / "chain.pem", code=USAGE)
    fleet("request", "import", "own", "--key-file", tmp_path / "chain.pem", code=REFUSED)
    fleet("request", "cancel", "own", "--yes")


def test_only_what_was_asked_for_as_imported_is_imported(fleet: Fleet, tmp_path: Path) -> None:
    fleet("material", "generate-test", tmp_path)
    fleet.apply("made", "--bare", "--resource", "web-1", "--usage", "any")
    fleet("request", "import", "made", "--key-file", tmp_path / "key.pem", code=REFUSED)
    assert "its source is module" in fleet.errors
    fleet("request", "cancel", "made", "--yes")


def test_a_key_of_a_key_store_is_imported_where_it_may_leave_it(fleet: Fleet, tmp_path: Path) -> None:
    token = make_token(tmp_path / "hsm")
    for label, extractable in (("mine", True), ("kept", False)):
        make_key(token, "secp256r1", label, sensitive=True, extractable=extractable)
    fleet.apply("stored", "--source", "imported", "--bare", "--usage", "any", "--resource", "web-1")
    words = ["request", "import", "stored", "--pkcs11", token.library, "--token", TOKEN, "--pin-file", token.pin_file]
    assert "the imported key serves" in fleet(*words, "--label", "mine", "--wait", **token.environment)
    fleet(*words, "--label", "kept", code=REFUSED, **token.environment)
    assert "CKA_EXTRACTABLE" in fleet.errors
    fleet(*words, code=USAGE, **token.environment)
    fleet("request", "cancel", "stored", "--yes")


# ---- from elsewhere -------------------------------------------------------------------------------------------------


def test_an_owner_with_a_token(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "alice.token"
    assert fleet("fleet", "token", "create", "--owner", "alice", "--group", "web", "--lifetime", "12h", "--out", out) == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    id = fleet.json("fleet", "token", "list")["tokens"][0]["id"]
    there = fleet.remote(out, root=root_of(fleet).read_text().strip())
    assert json.loads(fleet("fleet", "whoami", "--json", **there))["groups"] == ["web"]
    assert "db-1" not in fleet("fleet", "resources", **there)
    fleet("fleet", "status", code=NOT_PERMITTED, **there)
    fleet("request", "apply", "mine", "--bare", "--usage", "any", "--resource", "web-1", "--wait", **there)
    fleet(
        "request",
        "apply",
        "theirs",
        "--bare",
        "--usage",
        "any",
        "--owner",
        "bob",
        "--resource",
        "db-1",
        code=NOT_PERMITTED,
        **there,
    )
    assert "mine" in fleet("request", "show", "mine", **there)
    fleet("material", "generate-test", tmp_path, "--name", "own.alice.test")
    fleet("request", "apply", "brought", "--source", "imported", "--resource", "web-1", **there)
    fleet("request", "import", "brought", "--key-file", tmp_path / "key.pem", "--cert-file", tmp_path / "chain.pem", **there)
    assert "believed" not in fleet.errors, "the root of manager.toml was asked"
    fleet("fleet", "token", "revoke", id)
    assert "revoked" in fleet("fleet", "token", "list")
    fleet("fleet", "whoami", code=NOT_PERMITTED, **there)
    assert "TOKEN_REVOKED" in fleet.errors
    for name in ("mine", "brought"):
        fleet("request", "cancel", name, "--yes")


def test_an_owner_with_a_certificate(fleet: Fleet, tmp_path: Path) -> None:
    made = fleet.owners.issue_cert("ann.test")
    made.private_key_pem.write_to_path(tmp_path / "ann.key")
    made.cert_chain_pems[0].write_to_path(tmp_path / "ann.pem")
    there = fleet.remote(certificate=str(tmp_path / "ann.pem"), key=str(tmp_path / "ann.key"))
    assert json.loads(fleet("fleet", "whoami", "--json", **there))["owner"] == "alice"
    # the same on the command line, which counts more than a file
    words = ["--manager", f"127.0.0.1:{fleet.manager.port}", "--tls-ca", fleet.manager.state / "authorities.pem"]
    words += ["--tls-cert", tmp_path / "ann.pem", "--tls-key", tmp_path / "ann.key"]
    assert json.loads(fleet(*words, "fleet", "whoami", "--json", **there))["owner"] == "alice"
    fleet(*words[:2], "--tls-ca", fleet.directory / "owners.pem", "fleet", "whoami", code=UNREACHABLE)
    assert "does the CA (--tls-ca) fit the manager's certificate" in fleet.errors


def test_what_two_owners_call_the_same(fleet: Fleet) -> None:
    words = ("--bare", "--usage", "any", "--select", "env=prod", "--no-wait")
    for owner in ("alice", "bob"):
        fleet("request", "apply", "same", "--owner", owner, *words)
    fleet("request", "show", "same", code=USAGE)
    assert "several owners have a material same: alice, bob" in fleet.errors
    assert fleet.json("request", "show", "same", "--owner", "bob")["owner"] == "bob"
    for owner in ("alice", "bob"):
        fleet("request", "cancel", "same", "--owner", owner, "--yes")


# ---- policies and records -------------------------------------------------------------------------------------------


def test_policies_are_uploaded_shown_and_listed(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "fleet.cedar"
    before = int(fleet.json("policy", "list")["policies"][0]["version"])
    file.write_text(fleet("policy", "show"))
    assert f"counts already: version {before}" in fleet("policy", "upload", file)
    file.write_text(file.read_text() + "// changed\n")
    assert f"as version {before + 1}" in fleet("policy", "upload", file, "--comment", "a remark", "--instead-of", str(before))
    assert "a remark" in fleet("policy", "list") and "// changed" not in fleet("policy", "show", str(before))
    assert fleet("policy", "show") == file.read_text()
    file.write_text("permit (principal, action, resource);")
    fleet("policy", "upload", file, code=REFUSED)
    assert "hsmvisor policy check" in fleet.errors
    file.write_text(fleet("policy", "show") + "// again\n")
    fleet("policy", "upload", file, "--instead-of", str(before), code=REFUSED)
    assert "POLICY_VERSION" in fleet.errors
    fleet("policy", "show", "99", code=NOT_FOUND)


def test_the_audit_log_tells_who_did_what(fleet: Fleet) -> None:
    fleet("--why", "a drill", "fleet", "host", "owners", "rack", "alice", "bob")
    exported = fleet("fleet", "audit", "export")
    lines = [json.loads(line) for line in exported.splitlines()]
    assert any(line["kind"] == "fleet.update-host" and line["why"] == "a drill" for line in lines)
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(fleet("fleet", "audit", "export", "--after", "2", "--limit", "3").splitlines()) == 3


def test_events_are_followed_over_a_restart(fleet: Fleet) -> None:
    following = start(fleet, "fleet", "events", "--follow", "--limit", "1", "--json")
    try:
        wait_for(lambda: following.lines, 20, "the newest event")
        fleet("fleet", "token", "create", "--owner", "alice")
        wait_for(lambda: "token_created" in following.lines[-1], 20, "the first event")
        fleet.manager.stop()
        fleet.manager.start()
        fleet("fleet", "token", "create", "--owner", "alice")
        wait_for(lambda: sum("token_created" in line for line in following.lines) == 2, 20, "the second event")
        ids = [json.loads(line)["id"] for line in following.lines]
        assert ids == sorted(set(ids), key=int)
    finally:
        following.stop()
    wait_for(lambda: fleet.json("fleet", "host", "show", "rack")["away"] is False, 30, "the host")


# ---- on a terminal --------------------------------------------------------------------------------------------------


def test_on_a_terminal_it_waits_by_itself_and_shows_how_far_it_is(fleet: Fleet) -> None:
    words = ["request", "apply", "seen", "--owner", "alice", "--name", "dns:{name}.alice.test", "--select", "owner=alice"]
    master, slave = pty.openpty()
    environment = os.environ | fleet.environment | {"PYTHONPATH": SOURCES, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "hsmvisor.cli.main", *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait(10) == 0, seen
    assert b"seen: " in seen and b"serving" in seen and b"renewed at" in seen
    fleet("request", "cancel", "seen", "--yes")


def test_shells_complete_names(fleet: Fleet) -> None:
    def completed(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        told = fleet(_HSMVISOR_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
        return [line.partition(",")[2] for line in told.split()]

    fleet("request", "apply", "found", "--owner", "alice", "--bare", "--usage", "any", "--resource", "web-1", "--no-wait")
    assert completed("hsmvisor fleet host show ") == ["rack"]
    assert completed("hsmvisor fleet resource show rack/w") == ["rack/web-1", "rack/web-2"]
    assert "found" in completed("hsmvisor request show ")
    assert completed("hsmvisor request apply x --authority ") == ["builtin"]
    fleet("request", "cancel", "found", "--yes")
