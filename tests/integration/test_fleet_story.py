"""The whole story: an owner asks once, and from then on nobody acts.

Two hosts, four modules, nginx in each guest with its key in its module; an ACME authority (pebble) whose certificates hold two
minutes, and clients that connect all the time.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.fleet_processes import Manager, Member
from support.guest import Guest, free_port, library, stop, wait_for
from support.load import TlsLoad
from support.nginx import Nginx, client_context
from support.pebble import Pebble
from support.rotation import HSMVISOR_GUEST

pytestmark = [pytest.mark.slow, pytest.mark.real]

RENEWALS = 3
SECONDS = 120  #: that a certificate holds
GUESTS = {"web-1": 0, "web-2": 0, "web-3": 1, "web-4": 1}  #: on which host


class Web:
    """A guest that serves TLS."""

    def __init__(self, name: str, address: str, directory: Path, root_pem: bytes) -> None:
        self.name = name
        directory.mkdir()
        self.guest = Guest(library("ours"), address, directory)
        self.certificate = directory / "tls.pem"
        reload = f"test ! -s {directory}/nginx.pid || kill -HUP $(cat {directory}/nginx.pid)"
        sync = [HSMVISOR_GUEST, "sync", "--label", "tls", "--out", self.certificate, "--chain", "--reload", reload]
        self.sync = self.guest.start(*sync, output=directory / "sync.log")
        wait_for(self.certificate.exists, f"the first certificate of {name}", 60)
        uri = f"pkcs11:token={name};object=tls;type=private"
        self.nginx = Nginx(self.guest, [(self.certificate, uri)], workers=2)
        self.load = TlsLoad(self.nginx.port, client_context(root_pem), threads=1, name=f"{name}.example.net", pause=0.2)

    def serials(self) -> list[int]:
        """Those that clients have met, in that order."""
        return [x509.load_der_x509_certificate(leaf).serial_number for leaf in dict.fromkeys(leaf for _, leaf in self.load.done)]

    def stop(self) -> None:
        self.load.stop()
        self.nginx.stop()
        stop(self.sync)


@pytest.fixture
def responder_port() -> int:
    return free_port()


@pytest.fixture
def pebble(tmp_path: Path, responder_port: int) -> Iterator[Pebble]:
    directory = tmp_path / "pebble"
    directory.mkdir()
    with contextlib.closing(Pebble(directory, responder_port, SECONDS)) as server:
        yield server.start()


@pytest.mark.timeout(SECONDS * RENEWALS + 300)
def test_an_owner_asks_once_and_nobody_acts(tmp_path: Path, pebble: Pebble, responder_port: int) -> None:
    settings = (
        f'[[authorities]]\nname = "acme"\nkind = "acme"\ndefault = true\ndirectory = "{pebble.url}"\n'
        f'ca_file = "{pebble.ca_file}"\nhttp = "127.0.0.1:{responder_port}"\n'
    )
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(Manager(settings))
        hosts = [stack.enter_context(Member(manager)) for _ in range(2)]
        for number, host in enumerate(hosts):
            host.join(f"host-{number}", manager.token(f"host-{number}"))
        asked = manager.apply(material="tls", names=["dns:{name}.example.net"], selector={"env": "prod"})
        assert asked.state == "active" and not asked.lines

        # from here on nobody acts: guests appear
        began = time.monotonic()
        addresses = {name: hosts[on].register(name, env="prod") for name, on in GUESTS.items()}
        root = pebble.root()
        webs = []
        for name, address in addresses.items():
            web = Web(name, address, tmp_path / name, root)
            stack.callback(web.stop)
            webs.append(web)
        wait_for(lambda: all(len(web.serials()) > RENEWALS for web in webs), "the renewals", SECONDS * RENEWALS + 60)
        lived = time.monotonic() - began

        shown = manager.request(asked.id)
        assert shown.summary == "done", shown
        for web in webs:
            web.load.stop()
            assert web.load.failures == [], web.load.failures[:3]
            assert len(web.load.done) > 50
        assert lived > SECONDS  # the first certificates are over
        assert len(shown.lines) == len(GUESTS)
        for line in shown.lines:
            assert line.generation > RENEWALS and not line.failures
            leaf = next(g for g in line.generations if g.number == line.generation).certificates[0]
            name = line.resource.partition("/")[2]
            certificate = x509.load_der_x509_certificate(leaf)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.DNSName) == [f"{name}.example.net"]
            assert certificate.public_bytes(Encoding.DER) in {g.certificates[0] for g in line.generations if g.certificates}
        issued = [json.loads(event.detail) for event in manager.events("issued")]
        assert all(told["control_shown"] or told["control_known"] for told in issued)  # how it was known whose the names are
        kinds = {event.kind for event in manager.events()}
        assert {"resource_appeared", "issued", "delivered", "rotated"} <= kinds
        assert not kinds & {"failed", "denied", "expired"}
