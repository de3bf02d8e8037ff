"""hsmvisor policy: what it says of files that are right, of those that are not, and of cases that do not hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hsmvisor.cli.main import cli

POLICIES = """
@id("web-team")
permit(principal in Group::"web", action, resource) when { context.within.contains("example.net") };
@id("no-bank")
@reason("names of the bank are its own team's")
forbid(principal, action, resource) when { context.touches.contains("bank.example.net") };
"""
CASE = """
[[case]]
name = "the web team has its names"
act = "request"
owner = { name = "ann", groups = ["web"] }
resource = { name = "web-1" }
material = { name = "web", names = ["web.example.net"] }
expect = "allow"
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "fleet.cedar").write_text(POLICIES)
    (tmp_path / "cases.toml").write_text(CASE)
    return str(tmp_path / "fleet.cedar"), str(tmp_path / "cases.toml")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["policy", *arguments], prog_name="hsmvisor")


def test_files_that_are_right(files: tuple[str, str]) -> None:
    policies, cases = files
    told = run("check", policies)
    assert told.exit_code == 0 and told.output == f"{policies}: 2 rules, well made\n"
    tested = run("test", policies, cases)
    assert tested.exit_code == 0 and "1 of 1 cases hold, 1 of 2 rules are met" in tested.output
    assert "no case meets: no-bank" in tested.output and "permitted by web-team" in tested.output
    assert run("test", "--all-rules", policies, cases).exit_code == 1
    row = {"case": "the web team has its names", "decision": "allow", "why": "permitted by web-team", "failure": ""}
    assert json.loads(run("test", "--json", policies, cases).output) == {"cases": [row], "unmet": ["no-bank"]}


def test_cases_that_do_not_hold(files: tuple[str, str]) -> None:
    policies, cases = files
    Path(cases).write_text(CASE.replace("web.example.net", "a.bank.example.net"))
    told = run("test", policies, cases)
    assert told.exit_code == 1
    assert "FAILED  the web team has its names: expected allow: forbidden by no-bank: names of the bank" in told.output


def test_files_that_are_not_right(files: tuple[str, str]) -> None:
    policies, cases = files
    Path(policies).write_text('@id("x") permit(principal, action, resource) when { resource.nme == "x" };')
    told = run("check", policies)
    assert told.exit_code == 4 and "nme" in told.output and "see hsmvisor policy schema" in told.output
    Path(policies).write_text(POLICIES)
    Path(cases).write_text("[[case]]")
    told = run("test", policies, cases)
    assert told.exit_code == 4 and "case 1: 'expect' is missing" in told.output
    Path(cases).write_bytes(b"\xff")
    assert "not UTF-8 text" in run("test", policies, cases).output
    assert run("check", "/nowhere").exit_code == 2


def test_the_schema_is_what_policies_are_checked_against() -> None:
    told = run("schema")
    assert told.exit_code == 0 and 'action "request"' in told.output and "context.wildcards" in told.output


def test_an_installation_without_the_manager(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hsmvisor.manager.policy.engine", raising=False)
    monkeypatch.setitem(sys.modules, "cedarpy", None)
    told = run("check", files[0])
    assert told.exit_code == 1 and "install hsmvisor with the extra [manager]" in told.output
