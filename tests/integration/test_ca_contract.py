"""The contract of certification authorities: the same tests on all plugs, each with what it really talks to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import verification
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.acme.authority import AcmeCa
from hsmvisor.manager.ca.acme.challenges import DNS, HTTP, Hook, HttpServer
from hsmvisor.manager.ca.builtin.authority import open_authority
from hsmvisor.manager.ca.builtin.keys import FileKeys
from hsmvisor.manager.ca.builtin.token_keys import TokenKeys
from hsmvisor.manager.ca.command import CommandCa
from hsmvisor.manager.ca.interface import Ca, Later, Order, Reason, Refused
from hsmvisor.manager.store.database import Database
from support import ca_program, softhsm
from support.certificates import new_key
from support.orders import order
from support.pebble import Pebble

KINDS = ["builtin", "builtin-postgresql", "builtin-token", "command", "acme-http", "acme-dns"]


@dataclass
class Plug:
    ca: Ca
    root: Callable[[], bytes]  #: PEM
    again: Callable[[], Awaitable[Ca]]  #: as after a restart of the manager
    kept: dict[str, str] = field(default_factory=dict)

    async def issue(self, order: Order) -> tuple[bytes, ...]:
        async def keep(text: str) -> None:
            self.kept[order.id] = text

        return (await self.ca.issue(replace(order, kept=self.kept.get(order.id, "")), keep)).chain


@pytest.fixture(scope="module")
def responder() -> Iterator[HttpServer]:
    server = HttpServer("127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory, responder: HttpServer) -> Iterator[Pebble]:
    with contextlib.closing(Pebble(tmp_path_factory.mktemp("pebble"), responder.port)) as server:
        yield server.start()


@contextlib.asynccontextmanager
async def plug(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Plug]:
    directory: Path = request.getfixturevalue("tmp_path")
    if kind.startswith("builtin"):
        url = request.getfixturevalue("postgres").database() if kind == "builtin-postgresql" else f"sqlite:///{directory}/fleet.db"
        keys: Any = FileKeys(directory / "keys")
        if kind == "builtin-token":
            token = softhsm.make_token(directory / "hsm")
            request.getfixturevalue("monkeypatch").setenv("SOFTHSM2_CONF", token.environment["SOFTHSM2_CONF"])
            keys = TokenKeys(Path(token.library), softhsm.TOKEN, token.pin_file)
        database = Database(url)
        await database.migrate()
        ca = await open_authority("fleet", keys, database)
        root = x509.load_der_x509_certificate(ca.root).public_bytes(serialization.Encoding.PEM)
        yield Plug(ca, lambda: root, lambda: open_authority("fleet", keys, database))
        await database.close()
    elif kind == "command":
        make = lambda: CommandCa([sys.executable, ca_program.__file__, str(directory)], environment=_PATHS)  # noqa: E731
        yield Plug(make(), lambda: (directory / "authority.pem").read_bytes(), lambda: _soon(make()))
    else:
        pebble: Pebble = request.getfixturevalue("pebble")
        responder = request.getfixturevalue("responder") if kind == "acme-http" else Hook(DNS, pebble.dns_hook)
        make_acme = lambda: AcmeCa(pebble.url, directory / "account.pem", [responder], ca_file=str(pebble.ca_file))  # noqa: E731
        yield Plug(make_acme(), pebble.root, lambda: _soon(make_acme()))


_PATHS = {"PYTHONPATH": ":".join(sys.path)}


async def _soon(ca: Ca) -> Ca:
    return ca


def on(kind: str, request: pytest.FixtureRequest, story: Callable[[Plug], Awaitable[None]]) -> None:
    async def run() -> None:
        async with plug(kind, request) as made:
            try:
                await story(made)
            finally:
                await made.ca.close()

    asyncio.run(run())


def verified(chain: tuple[bytes, ...], root: bytes, host: str) -> None:
    """As a TLS client does it: the chain is complete up to the root."""
    found = [x509.load_der_x509_certificate(der) for der in chain]
    store = verification.Store(x509.load_pem_x509_certificates(root)[:1])
    verifier = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName(host))
    verifier.verify(found[0], found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate(kind: str, request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        for number, key_type in enumerate(("p256", "rsa2048")):
            key = new_key(key_type)
            chain = await made.issue(order(key, "web.example.net", "www.example.net", id=f"{key_type}"))
            leaf = x509.load_der_x509_certificate(chain[0])
            assert leaf.public_key() == key.public_key()
            told = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert set(names.of_extension(told)) == {names.dns("web.example.net"), names.dns("www.example.net")}, number
            if kind != "command":  # whose root says nothing of itself that a verifier likes
                verified(chain, made.root(), "www.example.net")
            for certificate, issuer in itertools.pairwise(chain):
                x509.load_der_x509_certificate(certificate).verify_directly_issued_by(x509.load_der_x509_certificate(issuer))

    on(kind, request, story)


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_is_issued_once(kind: str, request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        wanted = order(new_key("p256"))
        first = await made.issue(wanted)
        assert await made.issue(wanted) == first
        made.ca = await made.again()
        assert await made.issue(wanted) == first, "after a restart too"
        other = await made.issue(replace(wanted, id="2"))
        assert other[0] != first[0]

    on(kind, request, story)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_issued(kind: str, request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        good = order(new_key("p256"))
        broken = bytearray(good.csr)
        broken[-3] ^= 1
        for wrong in (
            replace(good, id="a", csr=bytes(broken)),
            replace(good, id="b", csr=b"no request"),
            order(new_key("p256"), "web.example.net", id="c", csr_names=("web.example.net", "bank.example.com")),
        ):
            with pytest.raises(Refused):
                await made.issue(wrong)
        await made.issue(good)

    on(kind, request, story)


@pytest.mark.parametrize("kind", KINDS)
def test_revocation(kind: str, request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        chain = await made.issue(order(new_key("p256")))
        await made.ca.revoke(chain[0], Reason.KEY_COMPROMISE)
        await made.ca.revoke(chain[0], Reason.SUPERSEDED)  # it is revoked already
        if kind.startswith("acme"):
            pebble: Pebble = request.getfixturevalue("pebble")
            assert pebble.status(x509.load_der_x509_certificate(chain[0]).serial_number) == "Revoked"
        await made.issue(order(new_key("p256"), id="next", replaces=chain[0]))
        assert await made.ca.window(chain[0]) is None, "none of these has renewal information"

    on(kind, request, story)


# ---- what one kind alone has --------------------------------------------------------------------------------------------


def test_a_wildcard_needs_dns(request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        chain = await made.issue(order(new_key("p256"), "*.example.net"))
        verified(chain, made.root(), "any.example.net")

    on("acme-dns", request, story)

    async def refused(made: Plug) -> None:
        with pytest.raises(Refused, match="dns-01; none of them is set up"):
            await made.issue(order(new_key("p256"), "*.other.example.net"))

    on("acme-http", request, refused)


def test_an_order_that_failed_is_begun_anew(request: pytest.FixtureRequest, responder: HttpServer) -> None:
    async def story(made: Plug) -> None:
        wanted = order(new_key("p256"), "mute.example.net")
        present, responder.present = responder.present, lambda *_: None  # type: ignore[method-assign]
        try:
            with pytest.raises(Later, match=r"does not believe it: mute\.example\.net"):
                await made.issue(wanted)
        finally:
            responder.present = present  # type: ignore[method-assign]
        assert made.kept["1"] == ""
        await made.issue(wanted)

    on("acme-http", request, story)


def test_a_manager_that_ends_in_the_middle_of_an_order(request: pytest.FixtureRequest) -> None:
    async def story(made: Plug) -> None:
        wanted = order(new_key("p256"), "slow.example.net")
        assert isinstance(made.ca, AcmeCa)

        class Ended(Exception): ...

        async def keep(url: str) -> None:
            made.kept["1"] = url
            raise Ended

        with pytest.raises(Ended):
            await made.ca.issue(wanted, keep)
        url = made.kept["1"]
        made.ca = await made.again()
        await made.issue(wanted)
        assert made.kept["1"] == url, "the same order was taken up again"

    on("acme-http", request, story)


def test_an_authority_that_is_away(tmp_path: Path) -> None:
    ca = AcmeCa("https://127.0.0.1:1/dir", tmp_path / "account.pem", [Hook(HTTP, ["false"])])
    with pytest.raises(Later, match="does not answer as it should"):
        asyncio.run(ca.revoke(b"", Reason.UNSPECIFIED))


@pytest.mark.parametrize(
    ("file", "content", "error", "said", "seconds"),
    [
        ("later", '{"seconds": 90}', Later, "the signer is away", 90),
        ("later", "", Later, "the signer is away", 0),
        ("refuse", "no such customer", Refused, "ended with 1: no such customer", 0),
    ],
)
def test_what_a_program_says(
    request: pytest.FixtureRequest, tmp_path: Path, file: str, content: str, error: type[Exception], said: str, seconds: float
) -> None:
    async def story(made: Plug) -> None:
        (tmp_path / file).write_text(content)
        with pytest.raises(error, match=said) as caught:
            await made.issue(order(new_key("p256")))
        assert getattr(caught.value, "seconds", 0) == seconds
        (tmp_path / file).unlink()
        await made.issue(order(new_key("p256")))

    on("command", request, story)


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("echo '{}'", Later, "has no .chain."),
        ("echo no json", Later, "answered with no JSON object"),
        ("""echo '{"chain": ["x"]}'""", Later, "cannot be read"),
        ("sleep 60", Later, "took longer than 1 second"),
        ("head -c 3000000 /dev/zero; exit 3", Refused, "ended with 3: it did not say why"),
        ("exec cat", Later, "has no .chain."),
    ],
)
def test_programs_that_say_nothing_useful(tmp_path: Path, script: str, error: type[Exception], said: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)

    async def keep(text: str) -> None:
        return

    with pytest.raises(error, match=said):
        asyncio.run(CommandCa([str(program)], seconds=1).issue(order(new_key("p256")), keep))
    with pytest.raises(Later, match="No such file"):
        asyncio.run(CommandCa([str(tmp_path / "nothing")]).issue(order(new_key("p256")), keep))
