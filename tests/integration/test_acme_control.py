"""How control of a name is shown to an ACME authority that really looks: by a hook for http-01; and when it is not asked again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from hsmvisor.manager.ca.acme.authority import AcmeCa
from hsmvisor.manager.ca.acme.challenges import HTTP, Hook
from hsmvisor.manager.ca.interface import Issued, Later, Order
from support.certificates import new_key
from support.fleet import Clock, Fleet
from support.fleet_processes import Manager
from support.host_process import wait_for
from support.light_fleet import LightFleet
from support.light_host import shared_recipient
from support.orders import order
from support.pebble import Pebble
from support.scenarios import WEB, held, names_of, played

CHALLENGES = ".well-known/acme-challenge"


@pytest.fixture(scope="module")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    (root / CHALLENGES).mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def pebble(web_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    """It looks at a web server that somebody else runs, and asks nobody again who has shown control of a name."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(web_root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with contextlib.closing(Pebble(tmp_path_factory.mktemp("pebble"), web.server_port, reuse=100)) as server:
            yield server.start()
        web.shutdown()


class HookProgram:
    """Puts challenges where the web server finds them, and remembers how it was called."""

    def __init__(self, directory: Path, web_root: Path, content: str = '"$5"', before: str = "") -> None:
        self.path, self._log = directory / "http-hook", directory / "hook.log"
        self.path.write_text(
            f'#!/bin/sh\nset -e\necho "$@" >> {self._log}\n{before}\nfile="{web_root}/{CHALLENGES}/$4"\n'
            f'case "$1" in\npresent) printf %s {content} > "$file" ;;\nremove) rm "$file" ;;\nesac\n'
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split() for line in self._log.read_text().splitlines()] if self._log.exists() else []


def authority(pebble: Pebble, directory: Path, program: HookProgram, seconds: float = 30) -> AcmeCa:
    hook = Hook(HTTP, [str(program.path)], seconds)
    return AcmeCa(pebble.url, directory / "account.pem", [hook], ca_file=str(pebble.ca_file))


def issue(ca: AcmeCa, wanted: Order) -> Issued:
    async def keep(text: str) -> None:
        return

    return asyncio.run(ca.issue(wanted, keep))


def test_a_hook_publishes_what_the_authority_looks_for(pebble: Pebble, web_root: Path, tmp_path: Path) -> None:
    program = HookProgram(tmp_path, web_root)
    issued = issue(authority(pebble, tmp_path, program), order(new_key("p256"), "one.example.net", "two.example.net"))
    assert set(names_of(x509.load_der_x509_certificate(issued.chain[0]))) == {"one.example.net", "two.example.net"}
    assert issued.shown == ("one.example.net", "two.example.net") and not issued.known
    presented = [call[1:] for call in program.calls if call[0] == "present"]
    assert {(kind, name) for kind, name, _, _ in presented} == {(HTTP, "one.example.net"), (HTTP, "two.example.net")}
    assert all(content.startswith(f"{token}.") for _, _, token, content in presented)
    assert sorted(presented) == sorted(call[1:] for call in program.calls if call[0] == "remove")
    assert not list((web_root / CHALLENGES).iterdir())


def test_a_hook_that_publishes_something_else(pebble: Pebble, web_root: Path, tmp_path: Path) -> None:
    program = HookProgram(tmp_path, web_root, content="nonsense")
    with pytest.raises(Later, match=r"does not believe it: wrong\.example\.net"):
        issue(authority(pebble, tmp_path, program), order(new_key("p256"), "wrong.example.net"))
    assert [call[0] for call in program.calls] == ["present", "remove"]
    assert not list((web_root / CHALLENGES).iterdir())


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("echo the web server is away >&2; exit 3", r"broken\.example\.net: .*http-hook ended with 3: the web server is away$"),
        ("exec sleep 20", r"broken\.example\.net: .*http-hook took longer than 1 seconds$"),
    ],
)
def test_a_hook_that_cannot(pebble: Pebble, web_root: Path, tmp_path: Path, before: str, said: str) -> None:
    with pytest.raises(Later, match=said):
        issue(
            authority(pebble, tmp_path, HookProgram(tmp_path, web_root, before=before), seconds=1),
            order(new_key("p256"), "broken.example.net"),
        )


def test_control_that_was_shown_before_is_not_asked_for_again_and_that_is_recorded(
    pebble: Pebble, web_root: Path, tmp_path: Path
) -> None:
    program = HookProgram(tmp_path, web_root)

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("known", env="prod")
        await fleet.settle()
        await fleet.ask(**WEB | {"lifetime": 0}, resources=("h1/known",))
        await fleet.settle()
        assert held(guest) == 1 and [call[0] for call in program.calls] == ["present", "remove"]
        await fleet.pass_(2000, step=60)
        assert held(guest) == 2 and len(program.calls) == 2
        told = [(event.detail["control_shown"], event.detail["control_known"]) for event in await fleet.events("issued")]
        assert told == [(["known.example.net"], []), ([], ["known.example.net"])]

    played(tmp_path, "", scenario, authorities={"acme": authority(pebble, tmp_path, program)}, clock=Clock(time.time()))


@pytest.mark.real
def test_a_manager_runs_the_hook_of_its_configuration_which_writes_where_that_says(
    pebble: Pebble, web_root: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    program = HookProgram(tmp_path, web_root, before=f"touch {elsewhere} || true")
    manager = Manager(
        f'[[authorities]]\nname = "acme"\nkind = "acme"\ndefault = true\ndirectory = "{pebble.url}"\n'
        f'ca_file = "{pebble.ca_file}"\nhttp_hook = ["{program.path}"]\n'
    )
    config = manager.config.read_text().replace("[database]\n", f'writes = ["{web_root}", "{tmp_path}"]\n[database]\n')
    manager.config.write_text(config)
    with manager:

        async def served() -> None:
            fleet = LightFleet(manager.token, shared_recipient())
            await fleet.add("host-1", ["hooked"], env="prod")
            manager.apply(material="tls", names=["dns:{name}.example.net"], resources=["host-1/hooked"])
            await asyncio.to_thread(wait_for, lambda: fleet.holding("tls", 1), 30, "the material")
            await fleet.close()

        asyncio.run(served())
        (issued,) = manager.events("issued")
        assert json.loads(issued.detail)["control_shown"] == ["hooked.example.net"]
    assert [call[:3] for call in program.calls] == [[verb, HTTP, "hooked.example.net"] for verb in ("present", "remove")]
    assert not elsewhere.exists()
