"""The command line, walked: each command and each option explains itself, and each command answers programs too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from hsmvisor.cli import context
from hsmvisor.cli.context import Context
from hsmvisor.cli.main import cli
from hsmvisor_rpc.v1 import hsmvisor_pb2, manager_pb2


def walk(command: click.Command, path: str = "hsmvisor") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, f"{path} {name}")


COMMANDS = dict(walk(cli))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", COMMANDS)
def test_it_explains_itself(path: str) -> None:
    command = COMMANDS[path]
    assert command.help and len(command.help) > 12
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.opts
    if not isinstance(command, click.Group):
        assert any("--json" in option.opts for option in command.params)


def test_the_exit_codes_are_those_of_the_help() -> None:
    assert cli.help is not None
    said = cli.help[cli.help.index("Exit codes:") :].removeprefix("Exit codes: ").rstrip(".\n ").split(", ")
    names = ["FAILURE", "USAGE", "NOT_FOUND", "REFUSED", "NOT_PERMITTED", "UNREACHABLE", "TIMEOUT"]
    assert [int(word.split()[0]) for word in said] == [0, *(getattr(context, name) for name in names)]


def test_it_offers_what_the_api_offers() -> None:
    """Each method of the control API is called somewhere in the commands or in what they use."""
    import inspect

    from hsmvisor.authority import pusher
    from hsmvisor.cli import backups, devices, guests, hosts, materials, modules, tpms
    from hsmvisor.client import enrol

    where = (context, backups, devices, guests, hosts, materials, modules, tpms, pusher, enrol)
    text = "".join(inspect.getsource(module) for module in where)
    missing = [
        method.name
        for service in hsmvisor_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if f".{method.name}(" not in text
    ]
    assert missing == []


def test_it_offers_what_managers_offer() -> None:
    """All but what hosts call."""
    import inspect

    from hsmvisor.cli.fleet import asking, finding, hosts, importing, overview, policies, records, requests, resources, tokens
    from hsmvisor.cli.fleet import waiting as waits

    where = (asking, finding, hosts, importing, overview, policies, records, requests, resources, tokens, waits)
    text = "".join(inspect.getsource(module) for module in where)
    missing = [
        f"{service.name}.{method.name}"
        for service in manager_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if service.name != "HostLink" and not re.search(rf"\.{method.name}\b", text)
    ]
    assert missing == []


def texts() -> Iterator[tuple[Path, str]]:
    """All that people are told: documents and pages, and the texts of programs."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "control_domain").rglob("*.md"), *(ROOT / "control_domain").rglob("*.html")):
        yield path, path.read_text()
    for path in (*(ROOT / "control_domain").rglob("*.py"), *(ROOT / "daemon").rglob("*.py")):
        found = ast.walk(ast.parse(path.read_text()))
        yield path, "\n".join(one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_commands_that_people_are_told_of_are_there() -> None:
    """What begins with `hsmvisor` and some command's name names one; other words after it are prose."""
    names = {word for path in COMMANDS for word in path.split()[1:]} - {"test"}  # "hsmvisor test CA" is a certificate's name
    wrong = []
    for path, text in texts():
        for match in re.finditer(r"(?<![\w./-])hsmvisor((?: [a-z][a-z-]*)+)", text):
            words, known = match[1].split(), "hsmvisor"
            if words[0] in names:
                while words and isinstance(COMMANDS.get(known), click.Group):
                    known = f"{known} {words.pop(0)}"
                if known not in COMMANDS:
                    wrong.append(f"{path.relative_to(ROOT)}: {known}")
    assert wrong == []


@pytest.mark.parametrize("path", [path for path in COMMANDS if path.startswith(("hsmvisor fleet", "hsmvisor request"))])
def test_commands_for_a_manager_show_an_example(path: str) -> None:
    command = COMMANDS[path]
    if not isinstance(command, click.Group):
        words = path.removeprefix("hsmvisor ")
        assert command.help is not None and "Example: hsmvisor" in command.help and words in command.help


def test_what_takes_long_says_what_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(context, "PATIENCE", 0.01)
    shown = Context("unix:/nowhere", 1, False, Path("/nowhere"), None, None, None)
    with shown.patience("digging"):
        time.sleep(0.3)
    assert "digging ..." in capsys.readouterr().err
    shown.json = True
    with shown.patience("digging"):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")
