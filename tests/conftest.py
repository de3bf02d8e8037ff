"""What integration tests share: one host service for the session, a fresh module for each test, both client libraries."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.guest import Guest, Library
    from support.host import Host, Module
    from support.own_slot import OwnSlot
    from support.postgres import Postgres
    from support.scenarios import Play

_numbers = itertools.count(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a job in the background; programs would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ours", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("ours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from support import counts

    items[:], left = counts.chosen(items)
    if left:
        config.hook.pytest_deselected(items=left)


def _skipped(config: pytest.Config) -> int:
    """How many tests were skipped although nothing may be missing: root may do all, and scripts/setup --dev installs all."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    excused = os.geteuid() != 0 or "HSMVISOR_TEST_LIBRARY" in os.environ  # a library with a sanitizer lacks a few properties
    return 0 if excused or reporter is None else len(reporter.stats.get("skipped", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := _skipped(config):
        terminalreporter.write_line(f"a test that is skipped shows nothing: {count} skipped, so the run has failed", red=True)


@pytest.fixture(scope="session")
def shared_host() -> Iterator[Host]:
    """A host service whose modules tests make for themselves; a test that stops or kills it starts its own instead."""
    from support.host import Host

    with Host() as host:
        yield host


@pytest.fixture(scope="session")
def new_module(shared_host: Host) -> Callable[..., Module]:
    def make(prefix: str = "guest", **settings: object) -> Module:
        return shared_host.create(f"{prefix}-{next(_numbers)}", **settings)

    return make


@pytest.fixture
def module(new_module: Callable[..., Module]) -> Iterator[Module]:
    module = new_module()
    yield module
    module.destroy()


@pytest.fixture(params=["ours", "p11-kit"])
def library(request: pytest.FixtureRequest) -> Library:
    from support.guest import library

    return library(request.param)


@pytest.fixture
def guest(library: Library, module: Module, tmp_path: Path) -> Guest:
    """A guest whose programs reach `module` through `library`."""
    from support.guest import Guest

    return Guest(library, module.address, tmp_path)


@pytest.fixture
def own(library: Library, new_module: Callable[..., Module], tmp_path: Path) -> Iterator[OwnSlot]:
    """A guest whose programs reach slot 1 of a module through `library`: the token is initialized and the user has a PIN."""
    from support.guest import Guest
    from support.own_slot import OwnSlot

    module = new_module("own", guest_token=True)
    yield OwnSlot(Guest(library, module.address, tmp_path), module).prepare()
    module.destroy()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Modules whose tests stop it have one of their own."""
    from support.postgres import Postgres

    with contextlib.closing(Postgres()) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """A new database of each kind."""
    from support.databases import new_url

    return new_url(request.param, request)


@pytest.fixture(params=["sqlite", "postgresql"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Plays a scenario with a manager that has no process, on each database: support/scenarios.py."""
    from support.scenarios import played

    url = request.getfixturevalue("postgres").database() if request.param == "postgresql" else ""
    return lambda scenario, **options: played(tmp_path, url, scenario, **options)
