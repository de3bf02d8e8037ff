"""What tests of the fleet's engine share: how a scenario is played, and what modules hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor.manager.ca.interface import Issued, Keep, Order, Reason, Window
from hsmvisor.manager.policy.questions import Source
from support.fleet import Fleet
from support.light_host import LightGuest

Scenario = Callable[[Fleet], Awaitable[None]]
Play = Callable[..., None]

WEB = {"material": "tls", "names": ("dns:{name}.example.net",), "lifetime": 3600}
SHARED = {"material": "tls", "names": ("dns:www.example.net",), "lifetime": 3600, "source": Source.ISSUER}


def played(directory: Path, url: str, scenario: Scenario, **options: Any) -> None:
    """`options`: of `Fleet.begin`."""

    async def whole() -> None:
        fleet = await Fleet.begin(directory, url, **options)
        try:
            await scenario(fleet)
        finally:
            await fleet.end()

    asyncio.run(whole())


def held(guest: LightGuest, material: str = "tls") -> int:
    current = guest.module.current(material)
    return current.number if current else 0


def leaf(guest: LightGuest, material: str = "tls") -> x509.Certificate:
    current = guest.module.current(material)
    assert current is not None
    return x509.load_der_x509_certificate(current.certificates[0])


def names_of(certificate: x509.Certificate) -> list[str]:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


class Client:
    """Connects to a guest: what it is shown has to be valid now, certified by the authority, and signed with the key of it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._issuer = x509.load_der_x509_certificate(fleet.ca.intermediate)
        self.connections, self.seen = 0, set[int]()

    def connect(self, guest: LightGuest) -> None:
        shown, now = leaf(guest), self._fleet.clock()
        assert shown.not_valid_before_utc.timestamp() <= now < shown.not_valid_after_utc.timestamp()
        shown.verify_directly_issued_by(self._issuer)
        assert names_of(shown) == [f"{guest.name}.example.net"]
        current = guest.module.current("tls")
        assert current is not None
        said = b"hello" + str(self.connections).encode()
        signed = guest.module.keys[current.public_key].sign(said, ec.ECDSA(hashes.SHA256()))
        shown.public_key().verify(signed, said, ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr, call-arg, arg-type]
        self.connections += 1
        self.seen.add(shown.serial_number)


class Moody:
    """An authority that fails when it is told to."""

    kind = "moody"

    def __init__(self) -> None:
        self.inner: Any = None
        self.wrong: Exception | None = None
        self.asked: list[float] = []
        self.revoked: list[tuple[int, Reason]] = []
        self.suggested: Window | None = None
        self.clock: Any = None

    async def issue(self, order: Order, keep: Keep) -> Issued:
        self.asked.append(self.clock())
        if self.wrong is not None:
            raise self.wrong
        return await self.inner.issue(order, keep)

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        if self.wrong is not None:
            raise self.wrong
        self.revoked.append((x509.load_der_x509_certificate(certificate).serial_number, reason))
        await self.inner.revoke(certificate, reason)

    async def window(self, certificate: bytes) -> Window | None:
        return self.suggested

    async def close(self) -> None:
        return


async def moody(fleet: Fleet) -> Moody:
    found = Moody()
    found.inner, found.clock = fleet.ca, fleet.clock
    fleet.authorities["builtin"] = found
    return found
