"""Requests that a host passes on from its modules: another one in their place is noticed, as far as it can be."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.authority import AuthorityError
from hsmvisor.authority.csr import CertificateRequest, spelled
from hsmvisor_rpc.sealed.commands import KEY_TYPES
from support.certificates import PrivateKey, new_key, spki
from support.keystores import Bench

NAMES = ("dns:www.example.net", "ip:192.0.2.7")


def made(key: PrivateKey, *names: x509.GeneralName) -> bytes:
    builder: Any = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))


@pytest.mark.parametrize("key_type", [t for t in KEY_TYPES if not t.startswith("RSA")] + ["RSA-2048"])
def test_what_a_module_gives_is_what_was_asked_for(key_type: str) -> None:
    bench = Bench()
    der = bench.generate(key_type=key_type, names=NAMES).public_bytes(Encoding.DER)
    (key,) = bench.keystore.state.keys.values()
    request = CertificateRequest.read(der)
    request.demand(key.private.public.spki, key_type, NAMES)
    assert x509.load_pem_x509_csr(request.pem).public_bytes(Encoding.DER) == der


def test_another_one_in_its_place() -> None:
    key, other = new_key("p256"), new_key("p256")
    www = x509.DNSName("www.example.net")
    CertificateRequest.read(made(key, www)).demand(spki(key), "P-256", NAMES[:1])
    for der, key_type in (
        (made(other, www), "P-256"),
        (made(key, www), "P-384"),
        (made(key), "P-256"),
        (made(key, www, x509.DNSName("evil.example")), "P-256"),
        (made(key, x509.DNSName("evil.example")), "P-256"),
    ):
        with pytest.raises(AuthorityError, match="not the one that was asked for"):
            CertificateRequest.read(der).demand(spki(key), key_type, NAMES[:1])


def test_what_is_no_request() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    der = made(key, x509.DNSName("www.example.net"))
    broken = der[:-1] + bytes((der[-1] ^ 1,))
    for wrong in (
        b"",
        b"no request",
        der[:-1],
        broken,
        made(key, x509.DirectoryName(x509.Name([]))),
        made(key, x509.DNSName("a_b")),
        der.replace(b"\x82\x0fwww.example.net", b"\xa3\x0fwww.example.net"),  # [3]: x400Address
    ):
        with pytest.raises(AuthorityError):
            CertificateRequest.read(wrong)


def test_names_are_spelled_as_commands_have_them() -> None:
    assert spelled(["dns:WWW.example.net.", "dns:www.example.net", "ip:2001:DB8::0:1"]) == ("dns:www.example.net", "ip:2001:db8::1")
    with pytest.raises(AuthorityError, match="is no host name"):
        spelled(["dns:no name"])
