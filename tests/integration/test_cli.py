"""The command line against a real host service: what it prints for people and programs, and its exit codes."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import other_user
from support.certificates import Authority, chain_pem, new_key, pkcs8, private_pem
from support.guest import REPOSITORY
from support.host import Host

pytestmark = [pytest.mark.real, pytest.mark.slow]
_numbers = itertools.count(1)
OK, FAILURE, USAGE, NOT_FOUND, REFUSED, NOT_PERMITTED, UNREACHABLE = range(7)


class Cli:
    def __init__(self, host: Host, directory: Path) -> None:
        self.host, self.directory = host, directory
        self.address = f"unix:{host.process.socket}"

    def __call__(self, *words: str | Path, code: int = OK, stdin: bytes = b"", **more: str) -> str:
        sources = os.pathsep.join(str(REPOSITORY / d) for d in ("daemon", "control_domain", "proto"))
        environment = os.environ | {
            "HSMVISOR_HOST": self.address,
            "HSMVISOR_AUTHORITY": str(self.directory / "authority"),
            "PYTHONPATH": sources,
            **more,
        }
        command = [sys.executable, "-m", "hsmvisor.cli.main", *map(str, words)]
        done = subprocess.run(command, capture_output=True, input=stdin, env=environment, timeout=60, check=False)
        self.errors = done.stderr.decode()
        assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout.decode()}{self.errors}"
        assert "Traceback" not in self.errors
        return done.stdout.decode()

    def json(self, *words: str | Path) -> Any:
        return json.loads(self("--json", *words))

    def write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


@pytest.fixture
def cli(shared_host: Host, tmp_path: Path) -> Cli:
    return Cli(shared_host, tmp_path)


@pytest.fixture
def module(cli: Cli, request: pytest.FixtureRequest) -> str:
    name = f"cli-{next(_numbers)}"
    cli("module", "create", name)
    request.addfinalizer(lambda: cli("module", "destroy", name, "--yes"))
    return name


def test_a_modules_life(cli: Cli) -> None:
    assert "made an authority" in cli("module", "create", "cli-life")
    assert "serves at unix:path=" in cli("module", "create", "cli-life"), "idempotent"
    assert "cli-life" in cli("module", "list")
    shown = cli("module", "show", "cli-life")
    assert "serving" in shown and "seccomp" in shown
    listed = cli.json("module", "list")["modules"]
    assert "serving" in {m["state"] for m in listed if m["name"] == "cli-life"}
    assert cli("module", "env", "cli-life").count("export ") == 2
    assert cli.json("module", "stats", "cli-life")["connections"] == 0
    cli("module", "destroy", "cli-life", stdin=b"n\n", code=FAILURE)
    cli("module", "destroy", "cli-life", "--yes")
    cli("module", "show", "cli-life", code=NOT_FOUND)
    assert "hsmvisor module list" in cli.errors


def test_push_list_and_the_steps_of_a_generation(cli: Cli, module: str) -> None:
    authority = Authority()
    for number in (1, 2):
        key = new_key("p256")
        key_file, chain = cli.write("key.pem", private_pem(key)), cli.write("chain.pem", chain_pem(authority.chain(key)[::-1]))
        assert f"generation {number}" in cli("material", "push", module, "tls", "--key", key_file, "--cert", chain)
    states = {g["number"]: g["state"] for g in cli.json("material", "show", module, "tls")["generations"]}
    assert states == {1: "retiring", 2: "current"}
    cli("material", "roll-back", module, "tls", "1")
    cli("material", "roll-back", module, "tls", "1", code=REFUSED)
    assert "WRONG_STATE" in cli.errors
    cli("material", "retire", module, "tls", "2", "--drain", "2h", "--after-drain", "refuse")
    cli("material", "destroy", module, "tls", "2", "--yes")
    listed = cli("material", "list", module)
    assert "destroyed" in listed and "current" in listed
    renewed = cli.write("renewed.pem", chain_pem(authority.chain(new_key("p256"))))
    cli("material", "push", module, "tls", "--cert", renewed, code=NOT_FOUND)
    assert "UNKNOWN_GENERATION" in cli.errors


def test_staging_alone_and_pkcs12(cli: Cli, module: str) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12

    key, authority = new_key("rsa2048"), Authority()
    leaf, middle = authority.chain(key)
    made = pkcs12.serialize_key_and_certificates(
        b"x", key, leaf, [middle, authority.root], BestAvailableEncryption(b"secret words")
    )  # type: ignore[arg-type]
    bundle, words = cli.write("bundle.p12", made), cli.write("words", b"secret words\n")
    cli("material", "push", module, "mail", "--key", bundle, "--passphrase-file", words, "--no-activate", "--profile", "decrypt")
    (generation,) = cli.json("material", "show", module, "mail")["generations"]
    assert generation["state"] == "staged" and len(generation["certificates"]) == 2
    cli("material", "push", module, "mail", "--key", bundle, code=REFUSED)
    cli("material", "activate", module, "mail", "1")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda cli, key, chain: (cli.write("k", b"no key"), chain), "not a private key"),
        (lambda cli, key, chain: (key, cli.write("c", b"no certificate")), "certificate"),
        (lambda cli, key, chain: (cli.write("k", private_pem(new_key("p256"))), chain), "no certificate is of this private key"),
    ],
)
def test_files_that_do_not_fit(cli: Cli, module: str, make: Callable[..., tuple[Path, Path]], says: str) -> None:
    key = new_key("p256")
    good_key, good_chain = cli.write("key.pem", private_pem(key)), cli.write("chain.pem", chain_pem(Authority().chain(key)))
    key_file, chain_file = make(cli, good_key, good_chain)
    cli("material", "push", module, "tls", "--key", key_file, "--cert", chain_file, code=REFUSED)
    assert says in cli.errors
    assert cli.json("material", "list", module)["materials"] == []


def test_nothing_that_is_printed_holds_a_key(cli: Cli, module: str) -> None:
    key = new_key("p256")
    key_file = cli.write("key.pem", private_pem(key))
    printed = cli("--json", "material", "push", module, "bare", "--key", key_file, "--self-signed") + cli.errors
    printed += cli("--json", "material", "list", module) + cli("--json", "module", "show", module)
    secret = pkcs8(key)
    assert not any(secret[i : i + 12].hex() in printed for i in range(len(secret) - 12))
    lines = private_pem(key).decode().splitlines()[1:-1]
    assert not any(line[4:40] in printed for line in lines)


def test_pin_and_token(cli: Cli, module: str) -> None:
    pin = cli.write("pin", b"123456\n")
    assert "is set" in cli("module", "set-pin", module, "--pin-file", pin)
    assert cli.json("module", "show", module)["pin_set"] is True
    assert "taken away" in cli("module", "set-pin", module, "--clear")
    cli("module", "set-pin", module, "--pin-file", cli.write("pin", b"1"), code=REFUSED)
    assert "detached" in cli("module", "token", module, "detach")
    assert cli.json("module", "show", module)["token_present"] is False
    cli("module", "token", module, "attach")


def test_identity_enrolment_and_pinning(cli: Cli, module: str) -> None:
    identity = cli.json("module", "identity", module)
    assert identity["host_id"] == next(iter(cli.json("authority", "show")["hosts"].values()))
    secret = cli("host", "new-secret").strip()
    cli("host", "forget")
    cli("host", "enrol", "--secret-file", "-", stdin=b"wrong secret\n", code=NOT_PERMITTED)
    assert identity["host_id"] in cli("host", "enrol", "--secret-file", "-", stdin=secret.encode())
    cli("host", "enrol", "--secret-file", "-", stdin=secret.encode(), code=NOT_PERMITTED)
    stranger = json.dumps({cli.address: "00" * 32}).encode()
    cli.write("authority/hosts.json", stranger)
    cli("module", "identity", module, code=REFUSED)
    assert "WRONG_HOST" in cli.errors


def test_another_authority_does_not_command(cli: Cli, module: str) -> None:
    other = str(cli.directory / "other")
    cli("authority", "init", HSMVISOR_AUTHORITY=other)
    cli("authority", "init", code=REFUSED, HSMVISOR_AUTHORITY=other)
    key = cli.write("key.pem", private_pem(new_key("p256")))
    cli("material", "push", module, "tls", "--key", key, code=REFUSED, HSMVISOR_AUTHORITY=other)
    assert "obeys another authority" in cli.errors
    cli("authority", "change-root", module, "--to", other)
    cli("material", "push", module, "tls", "--key", key, code=REFUSED)
    cli("material", "push", module, "tls", "--key", key, HSMVISOR_AUTHORITY=other)


def test_audit_export_and_verify(cli: Cli, module: str) -> None:
    assert module in cli("audit", "export", "--module", module)
    log = cli.host.process.state / "audit.log"
    cli("module", "identity", module)
    assert "whole" in cli("audit", "verify", log)
    copy = cli.write("audit.log", log.read_bytes().replace(b"module", b"modula", 1))
    cli("audit", "verify", copy, code=FAILURE)
    exported = cli.write("exported", cli("audit", "export").encode())
    assert "whole" in cli("audit", "verify", "--exported", exported)
    assert "cut off" in cli("audit", "verify", exported, code=FAILURE)
    lines = exported.read_bytes().splitlines(keepends=True)
    assert "removed" in cli("audit", "verify", "--exported", cli.write("gap", b"".join(lines[:3] + lines[4:])), code=FAILURE)


def test_host_metrics_and_doctor(cli: Cli, module: str) -> None:
    assert "operator" in cli("host", "show")
    assert module in cli("host", "metrics")
    findings = json.loads(subprocess_output(cli, "--json", "doctor"))
    assert {"seccomp", "Landlock", "clock"} <= {f["check"] for f in findings}
    assert all(f["result"] == "ok" or f["do"] for f in findings)


def subprocess_output(cli: Cli, *words: str) -> str:
    """The doctor's exit code depends on the machine."""
    try:
        return cli(*words)
    except AssertionError:
        return cli(*words, code=FAILURE)


def test_the_doctor_follows_a_configuration(cli: Cli) -> None:
    findings = {
        f["check"]: f for f in json.loads(subprocess_output(cli, "--json", "doctor", "--config", str(cli.host.process.config)))
    }
    assert findings["state"]["found"] == str(cli.host.process.state) and findings["service"]["result"] == "ok"
    assert findings["packages"]["result"] == "ok"
    settings = '[tls]\naddress = "127.0.0.1:1"\ncertificate = "/nowhere.crt"\n'
    cli("doctor", "--config", cli.write("host.toml", settings.encode()), code=FAILURE)
    findings = {f["check"]: f for f in json.loads(cli("doctor", "--json", "--config", cli.directory / "host.toml", code=FAILURE))}
    assert findings["tls certificate"]["result"] == "fail"
    cli.write("host.toml", b"[guests]\nvsock = true\n")
    findings = {
        f["check"]: f for f in json.loads(subprocess_output(cli, "--json", "doctor", "--config", str(cli.directory / "host.toml")))
    }
    assert (findings["vsock"]["result"] == "ok") == Path("/dev/vhost-vsock").exists(), findings["vsock"]
    cli("doctor", "--config", cli.write("host.toml", b"nonsense"), code=FAILURE)


def test_a_module_that_exists_differently_is_not_passed_off_as_made(cli: Cli, module: str) -> None:
    cli("module", "create", module, "--max-sessions", "9", code=REFUSED)
    assert "hsmvisor module settings" in cli.errors
    cli("module", "settings", module, "--max-sessions", "9")
    cli("module", "create", module, "--max-sessions", "9")
    cli("module", "create", module, "--root", "11" * 32, code=REFUSED)
    cli("module", "create", module, "--root", "zz", code=USAGE)
    cli("module", "create", module, "--root", "11", code=USAGE)


def test_a_push_that_is_repeated_does_nothing(cli: Cli, module: str) -> None:
    key = new_key("p256")
    chain = Authority().chain(key)
    files = ("--key", cli.write("key.pem", private_pem(key)), "--cert", cli.write("chain.pem", chain_pem(chain)))
    assert "generation 1" in cli("material", "push", module, "tls", *files, "--no-activate")
    assert "staged already" in cli("material", "push", module, "tls", *files, "--no-activate")
    assert "generation 1 (EC P-256) is current" in cli("material", "push", module, "tls", *files), "gone on with"
    assert "generation 1 (EC P-256) is current already" in cli("material", "push", module, "tls", *files)
    assert cli.json("material", "push", module, "tls", *files)["generation"] == 1
    assert "generation 2" in cli("material", "push", module, "tls", *files, "--on-expiry", "refuse"), "something is different"
    assert "generation 3" in cli("material", "push", module, "tls", *files, "--on-expiry", "refuse", "--again")
    bare = (*files[:2], "--self-signed")
    cli("material", "push", module, "bare", *bare)
    assert "already" in cli("material", "push", module, "bare", *bare)


def test_json_behind_any_command_and_in_errors(cli: Cli, module: str) -> None:
    assert json.loads(cli("module", "list", "--json"))["modules"]
    assert json.loads(cli("host", "show", "--json"))["host_key"]
    cli("module", "show", "nobody", "--json", code=NOT_FOUND)
    error = json.loads(cli.errors)["error"]
    assert (error["reason"], error["exit_code"]) == ("MODULE", NOT_FOUND) and error["hint"]


def test_events_come_as_lines_and_end_with_ctrl_c(cli: Cli) -> None:
    after = int(time.time() * 1e6)  # of a host that does much what was long before may be kept no more
    cli("module", "create", "cli-events")
    words = ("events", "--after", str(after), "--module", "cli-events", "--json")
    command = [sys.executable, "-m", "hsmvisor.cli.main", "--host", cli.address, *words]
    sources = os.pathsep.join(str(REPOSITORY / d) for d in ("daemon", "control_domain", "proto"))
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=os.environ | {"PYTHONPATH": sources}) as process:
        assert process.stdout and process.stderr
        event = json.loads(process.stdout.readline())
        assert {"id", "kind", "at"} <= set(event) and event["module"] == "cli-events"
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
    cli("module", "destroy", "cli-events", "--yes")


def test_a_reason_goes_into_the_audit_log(cli: Cli, module: str) -> None:
    cli("--why", "ticket 4711 ä", "module", "settings", module, "--max-sessions", "5")
    line = json.loads(cli("audit", "export", "--module", module).splitlines()[-1])
    assert (line["kind"], line["why"]) == ("module.update", "ticket 4711 ?")


@pytest.mark.parametrize(
    ("file", "option", "says"),
    [
        (b"no key", "--sign-key", "hexadecimal"),
        (b"no certificate", "--tls-ca", "not a certificate in PEM"),
        (chain_pem((Authority().issue(new_key("p256"), lifetime=dt.timedelta(minutes=-1)),)), "--tls-ca", "expired at"),
    ],
)
def test_files_of_the_connection_that_cannot_be_used(cli: Cli, file: bytes, option: str, says: str) -> None:
    cli("--host", "localhost:1", option, cli.write("file", file), "module", "list", code=USAGE)
    assert says in cli.errors


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_who_may_not_use_the_socket_is_told_so(cli: Cli) -> None:
    words = ("hsmvisor.cli.main", "--host", cli.address, "module", "list")
    program = (
        f"import os, runpy, sys; os.setgid(65534); os.setuid(65534); sys.argv = {list(words)!r}; "
        "runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    python, sources = other_user.python()
    done = subprocess.run([python, "-c", program], env=os.environ | {"PYTHONPATH": sources}, capture_output=True, timeout=60)
    assert (done.returncode, b"Permission denied" in done.stderr) == (NOT_PERMITTED, True), done.stderr


def test_unreachable_and_wrong_usage(cli: Cli) -> None:
    cli.address = f"unix:{cli.directory}/nobody.sock"
    cli("module", "list", code=UNREACHABLE)
    assert "is hsmvisor-host running" in cli.errors
    cli("module", "explode", code=USAGE)
    cli("--host", "example.org:1", "module", "list", code=USAGE)
    cli("material", "push", "m", "n", code=USAGE)


def test_help_and_completion(cli: Cli) -> None:
    assert "Exit codes" in cli("--help")
    for group in ("module", "material", "host", "authority", "audit"):
        assert "Commands:" in cli(group, "--help")
    for shell in ("bash", "zsh", "fish"):
        assert "_HSMVISOR_COMPLETE" in cli("completion", shell)
    completed = cli(_HSMVISOR_COMPLETE="bash_complete", COMP_WORDS="hsmvisor material pu", COMP_CWORD="2")
    assert completed == "plain,push\n"
