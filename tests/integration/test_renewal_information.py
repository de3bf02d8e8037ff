"""Renewal information of an ACME authority (RFC 9773): windows, whatever the server says of them, and orders that replace."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca.acme.authority import AcmeCa
from hsmvisor.manager.ca.acme.challenges import HttpServer
from hsmvisor.manager.ca.interface import Later, Order
from support.certificates import new_key
from support.fleet import Clock, Fleet
from support.orders import order
from support.pebble import Pebble
from support.renewal_info import Answer, RenewalInfo, problem, rfc3339, suggestion
from support.scenarios import WEB, held, leaf, played

pytestmark = pytest.mark.slow
HOUR = 3600.0
LATER = suggestion(2_000_000_000, 2_000_003_600)


@pytest.fixture(scope="module")
def responder() -> Iterator[HttpServer]:
    with contextlib.closing(HttpServer("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory, responder: HttpServer) -> Iterator[Pebble]:
    with contextlib.closing(Pebble(tmp_path_factory.mktemp("pebble"), responder.port)) as server:
        yield server.start()


@pytest.fixture(scope="module")
def certificate(pebble: Pebble, responder: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    ca = AcmeCa(pebble.url, tmp_path_factory.mktemp("account") / "key.pem", [responder], ca_file=str(pebble.ca_file))
    return certified(ca)


@pytest.fixture
def server(pebble: Pebble, tmp_path: Path) -> Iterator[RenewalInfo]:
    with contextlib.closing(RenewalInfo(pebble, tmp_path)) as made:
        made.window = LATER
        yield made


@pytest.fixture
def ca(server: RenewalInfo, responder: HttpServer, tmp_path: Path) -> AcmeCa:
    return AcmeCa(server.url, tmp_path / "account.pem", [responder], ca_file=str(server.ca_file))


async def issue(ca: AcmeCa, wanted: Order) -> bytes:
    async def keep(text: str) -> None:
        return

    return (await ca.issue(wanted, keep)).chain[0]


def certified(ca: AcmeCa, **more: Any) -> bytes:
    return asyncio.run(issue(ca, order(new_key("p256"), **more)))


def identifier(certificate: bytes) -> str:
    """As RFC 9773, 4.1 tells it, from the bytes of the serial number's DER."""
    made = x509.load_der_x509_certificate(certificate)
    key = made.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b""
    serial = made.serial_number.to_bytes(32, "big").lstrip(b"\0")
    serial = b"\0" + serial if serial[0] & 0x80 else serial
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (key, serial))


# ---- windows ------------------------------------------------------------------------------------------------------------


def test_a_window(ca: AcmeCa, server: RenewalInfo, certificate: bytes) -> None:
    server.window = suggestion(2_000_000_000, 2_000_003_600, "https://ca.test/why", {"Retry-After": "1234"})
    window = asyncio.run(ca.window(certificate))
    assert window is not None and (window.start, window.end) == (2_000_000_000, 2_000_003_600)
    assert (window.ask_again, window.why) == (1234, "https://ca.test/why")
    assert server.asked == [identifier(certificate)]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 60),
        ("0", 60),
        ("86401", 86400),
        ("9" * 400, 86400),
        ("", 6 * HOUR),
        ("-5", 6 * HOUR),
        ("soon", 6 * HOUR),
        ("²", 6 * HOUR),
    ],
)
def test_when_it_is_asked_again(ca: AcmeCa, server: RenewalInfo, certificate: bytes, header: str, seconds: float) -> None:
    server.window = suggestion(2_000_000_000, 2_000_003_600, headers={"Retry-After": header})
    window = asyncio.run(ca.window(certificate))
    assert window is not None and window.ask_again == seconds


def test_a_server_without_renewal_information_is_not_asked(ca: AcmeCa, server: RenewalInfo) -> None:
    server.window = None
    certificate = certified(ca)
    assert asyncio.run(ca.window(certificate)) is None
    certified(ca, id="2", replaces=certificate)
    assert server.asked == [] and server.replaced == ["", ""]


def _told(**changes: Any) -> bytes:
    return json.dumps({"suggestedWindow": {"start": rfc3339(2e9), "end": rfc3339(2e9 + 60)} | changes}).encode()


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"no json", b"[]", b"5", b"null", b"{}", b'{"suggestedWindow": []}', b'{"suggestedWindow": "start, end"}',
        b"[" * 100_000, b"\xff\xfe", _told(start="tomorrow"), _told(start=""), _told(start=5), _told(end=None),
        _told(end=["2033-05-18T03:33:20Z"]), _told(end="2033-99-99T00:00:00Z"), _told(end="99999-01-01T00:00:00Z"),
        _told(end="2033-05-18T04:00:00"), _told(end=rfc3339(2e9)), _told(end=rfc3339(1.9e9)),
        suggestion(2e9, 2e9 + 60, "x" * 5_000_000).body,
    ],
    ids=lambda body: repr(body[:60]),
)  # fmt: skip
def test_an_answer_that_is_none(ca: AcmeCa, server: RenewalInfo, certificate: bytes, answer: bytes) -> None:
    server.window = Answer(answer)
    with pytest.raises(Later):
        asyncio.run(ca.window(certificate))
    server.window = LATER
    assert asyncio.run(ca.window(certificate)) is not None


@pytest.mark.parametrize("body", [b"", b"5", b'{"type": 5}', problem("serverInternal", 500).body])
@pytest.mark.parametrize("status", [404, 409, 429, 500])
def test_an_error_instead_of_a_window(ca: AcmeCa, server: RenewalInfo, certificate: bytes, status: int, body: bytes) -> None:
    server.window = Answer(body, status=status)
    with pytest.raises(Later):
        asyncio.run(ca.window(certificate))


def test_an_explanation_is_one_line_of_text(ca: AcmeCa, server: RenewalInfo, certificate: bytes) -> None:
    for url, shown in (("https://ca.test/\0\ud800\n", "https://ca.test/"), ("x" * 900, "x" * 500), (["x"], "")):
        server.window = suggestion(2e9, 2e9 + 60, url)  # type: ignore[arg-type]
        window = asyncio.run(ca.window(certificate))
        assert window is not None and window.why == shown


# ---- orders that replace ------------------------------------------------------------------------------------------------


def test_an_order_says_what_it_replaces(ca: AcmeCa, server: RenewalInfo) -> None:
    first = certified(ca)
    certified(ca, id="2", replaces=first)
    assert server.replaced == ["", identifier(first)]


@pytest.mark.parametrize(
    ("kind", "status"), [("alreadyReplaced", 409), ("alreadyReplaced", 400), ("malformed", 404), ("unauthorized", 403)]
)
def test_a_server_that_does_not_take_what_is_replaced(ca: AcmeCa, server: RenewalInfo, kind: str, status: int) -> None:
    first = certified(ca)
    server.refusal = problem(kind, status)
    second = certified(ca, id="2", replaces=first)
    assert second != first and server.replaced == ["", identifier(first), ""]


def test_a_server_that_takes_no_order_is_asked_once(ca: AcmeCa, server: RenewalInfo) -> None:
    first = certified(ca)
    server.refusal = problem("rateLimited", 429)
    with pytest.raises(Later, match="rateLimited"):
        certified(ca, id="2", replaces=first)
    assert server.replaced == ["", identifier(first)]


# ---- the manager --------------------------------------------------------------------------------------------------------


def test_a_certificate_is_renewed_when_its_authority_suggests_it(ca: AcmeCa, server: RenewalInfo, tmp_path: Path) -> None:
    """A suggestion in the past means at once, at the next look."""
    server.window = suggestion(time.time() + 3000, time.time() + 3001, headers={"Retry-After": "600"})

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1", env="prod")
        request = await fleet.ask(**WEB | {"lifetime": 0}, resources=("h1/web-1",))
        await fleet.settle()
        assert held(guest) == 1 and len(server.asked) == 1
        server.window = suggestion(time.time() - 60, time.time() - 30, "https://ca.test/incident")
        await fleet.pass_(500)
        assert held(guest) == 1 and len(server.asked) == 1, "not before it said"
        before = leaf(guest)
        await fleet.pass_(120)
        assert held(guest) == 2
        assert server.asked[1] == server.replaced[1] == identifier(before.public_bytes(Encoding.DER))
        renewed = (await fleet.generations(await fleet.line(request)))[-1]
        assert renewed.why == "the authority suggests it (https://ca.test/incident)"

    played(tmp_path, "", scenario, authorities={"acme": ca}, clock=Clock(time.time()))


def test_answers_that_are_none_do_not_keep_a_certificate_from_its_renewal(ca: AcmeCa, server: RenewalInfo, tmp_path: Path) -> None:
    server.window = Answer(_told(start=5))

    async def scenario(fleet: Fleet) -> None:
        guest = (await fleet.host("h1")).add("web-1", env="prod")
        await fleet.ask(**WEB | {"lifetime": 0}, resources=("h1/web-1",))
        await fleet.settle()
        await fleet.pass_(2000, step=60)
        assert held(guest) == 2

    played(tmp_path, "", scenario, authorities={"acme": ca}, clock=Clock(time.time()))
