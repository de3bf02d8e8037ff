"""What anybody may ask of a built-in authority, asked by OpenSSL; and orders that come in thousands."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.authorities import Pace
from hsmvisor.manager.ca.interface import NotYet
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.fleet_processes import Manager
from support.guest import free_port
from support.host_process import new_id, wait_for
from support.light_fleet import LightFleet
from support.light_host import shared_recipient


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


def by_get(directory: Path, url: str) -> str:
    """What OpenSSL says of the answer to its request when that stands in the path (RFC 6960, A.1)."""
    ask = ("ocsp", "-issuer", directory / "issuer.pem", "-cert", directory / "leaf.pem", "-no_nonce")
    openssl(*ask, "-reqout", directory / "request.der")
    encoded = base64.b64encode((directory / "request.der").read_bytes()).decode()
    with urllib.request.urlopen(f"{url}/{urllib.parse.quote(encoded, safe='')}", timeout=10) as answer:
        (directory / "answer.der").write_bytes(answer.read())
    return openssl(*ask, "-respin", directory / "answer.der", "-VAfile", directory / "issuer.pem")


@pytest.mark.real
def test_openssl_asks_for_lists_and_answers(tmp_path: Path) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    settings = (
        f'[pki]\naddress = "127.0.0.1:{port}"\n[[authorities]]\nname = "builtin"\nkind = "builtin"\ndefault = true\n'
        f'crl_url = "{base}/builtin.crl"\nocsp_url = "{base}/builtin/ocsp"\n'
    )
    with Manager(settings) as manager:

        async def served() -> pb.MaterialRequest:
            fleet = LightFleet(manager.token, shared_recipient())
            await fleet.add("host-1", ["vm-0"], env="prod")
            asked = manager.apply(material="tls", names=["dns:www.example.net"], resources=["host-1/vm-0"])
            await asyncio.to_thread(wait_for, lambda: fleet.holding("tls", 1), 20, "the material")
            await fleet.close()
            return manager.request(asked.id)

        shown = asyncio.run(served())
        leaf, issuer = (x509.load_der_x509_certificate(der) for der in shown.lines[0].generations[0].certificates)
        for name, certificate in (("leaf", leaf), ("issuer", issuer)):
            (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        with urllib.request.urlopen(f"{base}/builtin.cer", timeout=10) as answer:
            assert answer.read() == issuer.public_bytes(Encoding.DER)
        ask = ("ocsp", "-issuer", tmp_path / "issuer.pem", "-cert", tmp_path / "leaf.pem", "-url", f"{base}/builtin/ocsp")
        ask = (*ask, "-VAfile", tmp_path / "issuer.pem")
        assert "Response verify OK" in (said := openssl(*ask)) and "leaf.pem: good" in said
        assert "leaf.pem: good" in openssl(*ask, "-no_nonce")
        assert "leaf.pem: good" in by_get(tmp_path, f"{base}/builtin/ocsp")
        revoke = pb.RevokeRequest(request_id=new_id(), id=shown.id, generation=1, reason="key_compromise")
        manager.requests.Revoke(revoke, timeout=20)
        wait_for(lambda: "leaf.pem: revoked" in openssl(*ask), 30, "the revocation")
        with urllib.request.urlopen(f"{base}/builtin.crl", timeout=10) as answer:
            (tmp_path / "list.crl").write_bytes(answer.read())
        text = openssl("crl", "-inform", "DER", "-in", tmp_path / "list.crl", "-noout", "-text", "-CAfile", tmp_path / "issuer.pem")
        assert "verify OK" in text and f"{leaf.serial_number:X}" in text.replace("Serial Number: 0", "Serial Number: ")
        for path in ("/other.crl", "/other/ocsp/MAAw", "/nothing"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(base + path, timeout=10)
            assert caught.value.code == 404
        too_much = urllib.request.Request(f"{base}/builtin/ocsp", data=b"x" * 4097)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(too_much, timeout=10)
        assert caught.value.code == 413


def test_ten_thousand_orders_at_once_are_spread() -> None:
    """Each is told when to come again, and none is told the same."""
    now = [0.0]
    pace = Pace(20, lambda: now[0])

    async def ask() -> float:
        try:
            task = asyncio.ensure_future(pace.wait())
            await asyncio.sleep(0)
            if task.done():
                task.result()
            task.cancel()
            return 0.0
        except NotYet as error:
            return error.seconds

    async def storm() -> list[float]:
        return [await ask() for _ in range(10_000)]

    told = [seconds for seconds in asyncio.run(storm()) if seconds]
    assert 9_700 < len(told) < 10_000
    assert len({round(seconds, 3) for seconds in told}) == len(told)
    assert 490 < max(told) < 520  # 10,000 at 20 a second
