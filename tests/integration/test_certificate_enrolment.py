"""A real host joins a real manager with a certificate that it had before, in the place of a one-time secret."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from hsmvisor_rpc.v1 import hsmvisor_pb2 as host_pb
from support.command import Command
from support.fleet_processes import Manager, Member
from support.host_process import wait_for

pytestmark = pytest.mark.real
OK, REFUSED, NOT_PERMITTED, UNREACHABLE = 0, 4, 5, 6


class Enrolment:
    """A manager that lets `rack.test` join as host `rack`, and a host with files of certificates."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.machines = directory, trustme.CA()
        self.machines.cert_pem.write_to_path(directory / "machines.pem")
        self.manager = Manager('[[join_certificates]]\nsan = "rack.test"\nhost = "rack"\n')
        config = self.manager.config.read_text().replace("[tls]\n", f'[tls]\nclient_ca = "{directory}/machines.pem"\n')
        self.manager.config.write_text(config)
        self.manager.start()
        self.host = Member(self.manager).start()

    def close(self) -> None:
        self.host.__exit__(None, None, None)
        self.manager.clean()

    def certificate(self, name: str, authority: trustme.CA | None = None) -> tuple[Path, Path]:
        """Returns the files of certificate and key."""
        made = (authority or self.machines).issue_cert(name)
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        certificate.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return certificate, key

    def join(self, certificate: tuple[Path, Path], name: str = "rack", code: int = OK) -> str:
        """Returns what the command says."""
        command = Command(f"unix:{self.host.socket}", self.directory / "authority")
        shown = ("--certificate", certificate[0], "--key", certificate[1])
        manager = ("--address", f"127.0.0.1:{self.manager.port}", "--manager-ca", self.manager.state / "authorities.pem")
        return command("host", "join", "--name", name, *shown, *manager, code=code) + command.errors

    @property
    def link(self) -> host_pb.ManagerLink:
        return self.host.host.GetHost(host_pb.GetHostRequest(), timeout=10).manager

    def events(self, kind: str) -> list[str]:
        return [json.loads(event.detail)["name"] for event in self.manager.events(kind)]


@pytest.fixture
def enrolment(tmp_path: Path) -> Iterator[Enrolment]:
    with contextlib.closing(Enrolment(tmp_path)) as made:
        yield made


def test_a_host_joins_with_a_certificate_and_is_served(enrolment: Enrolment) -> None:
    certificate, key = enrolment.certificate("rack.test")
    assert "joined as rack" in enrolment.join((certificate, key))
    wait_for(lambda: enrolment.link.connected, 20, "the connection")
    assert enrolment.events("host_joined") == ["rack"]
    secret = key.read_bytes().splitlines()[2]
    files = [path for path in enrolment.host.state.rglob("*") if path.is_file()]
    assert len(files) > 3 and not [path for path in files if secret in path.read_bytes()]

    enrolment.host.register("web-1", env="prod")
    asked = enrolment.manager.apply(material="tls", names=["dns:{name}.example.net"], selector={"env": "prod"})
    wait_for(lambda: enrolment.manager.request(asked.id).summary == "done", 30, "the material")
    certificate.unlink(), key.unlink()
    enrolment.host.restart()
    wait_for(lambda: enrolment.link.connected, 20, "the connection: with an identity that the manager issued")
    assert enrolment.host.get("web-1").name == "web-1"


def test_certificates_that_do_not_count(enrolment: Enrolment) -> None:
    configured = enrolment.certificate("rack.test")
    assert "this certificate is for host rack" in enrolment.join(configured, "other", code=NOT_PERMITTED)
    assert "no join token fits" in enrolment.join(enrolment.certificate("other.test"), code=NOT_PERMITTED)
    stranger = enrolment.certificate("rack.test", trustme.CA())
    assert "cannot be reached" in enrolment.join(stranger, code=UNREACHABLE)
    assert enrolment.events("host_joined") == [] and not enrolment.link.host_name
    assert "joined as rack" in enrolment.join(enrolment.certificate("rack.test"))


def test_another_host_does_not_take_the_name_with_the_same_certificate(enrolment: Enrolment) -> None:
    """The certificate says who may join as `rack`; a host that has joined is its key, which nobody takes the place of."""
    certificate = enrolment.certificate("rack.test")
    enrolment.join(certificate)
    first = enrolment.host
    with Member(enrolment.manager) as enrolment.host:
        assert "another host has joined as rack" in enrolment.join(certificate, code=REFUSED)
        assert not enrolment.link.host_name
    enrolment.host = first
    wait_for(lambda: enrolment.link.connected, 20, "the connection of the first")
    assert enrolment.link.host_name == "rack" and enrolment.events("host_refused") == ["rack"]
