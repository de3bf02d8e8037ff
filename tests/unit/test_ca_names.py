"""Names in certificates, and requests: what is taken, in which spelling, and what is refused."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca import names, requests
from hsmvisor.manager.ca.interface import Refused
from hsmvisor.manager.ca.names import BadName, Name
from hsmvisor_rpc.sealed import limits


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("web.example.net", Name("dns", "web.example.net")),
        ("WEB.Example.net.", Name("dns", "web.example.net")),
        ("*.example.net", Name("dns", "*.example.net")),
        ("dns:xn--bcher-kva.example", Name("dns", "xn--bcher-kva.example")),
        ("localhost", Name("dns", "localhost")),
        ("a" * 63 + ".example", Name("dns", "a" * 63 + ".example")),
        ("192.0.2.7", Name("ip", "192.0.2.7")),
        ("2001:DB8::0:1", Name("ip", "2001:db8::1")),
        ("ip:2001:db8::1", Name("ip", "2001:db8::1")),
        ("uri:spiffe://fleet/host/1", Name("uri", "spiffe://fleet/host/1")),
        ("email:a.b+c@Example.net", Name("email", "a.b+c@example.net")),
    ],
)
def test_names(text: str, name: Name) -> None:
    assert names.parse(text) == name
    assert names.parse(str(name)) == name
    assert names.of_extension(x509.SubjectAlternativeName([names.general(name)])) == (name,)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "a..b", "-a.example", "a-.example", "a_b.example", "a b.example", "bücher.example", "*.net", "*", "a.*.example",
        "**.example.net", "www.*", "a" * 64 + ".example", ".".join(["a" * 49] * 6), "web.example.net:443", "web.example.net/x",
        "web.example.net\0.evil.example", "web.example.net\n", "1.2.3", "300.1.1.1", "ip:web", "ip:10.0.0.0/8", "ip:fe80::1%eth0",
        "uri:no-scheme", "uri:", "uri:http://a b", "uri:http://x\n", "uri:http://[", "email:nobody", "email:@example.net",
        "email:a@*.example.net", "email:a b@example.net", "uri:x:" + "a" * 2050,
    ],
)  # fmt: skip
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(BadName):
        names.parse(text)


def test_as_many_names_as_there_may_be() -> None:
    most = [f"n{n}.example.net" for n in range(limits.MAX_NAMES)]
    assert len(names.parse_all([*most, "N0.example.net"])) == limits.MAX_NAMES, "each counts once"
    with pytest.raises(BadName, match="101 names"):
        names.parse_all([*most, "one-more.example.net"])
    with pytest.raises(BadName, match="one name at least"):
        names.parse_all([])
    longest = ".".join(["a" * 49] * 5 + ["abc"])
    assert len(longest) == limits.MAX_DNS_NAME and names.parse(longest).value == longest
    with pytest.raises(BadName):
        names.parse(longest + "d")


# ---- requests -----------------------------------------------------------------------------------------------------------


def csr(key: object, *entries: x509.GeneralName) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if entries:
        builder = builder.add_extension(x509.SubjectAlternativeName(entries), False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)  # type: ignore[arg-type]


WEB = names.parse_all(["web.example.net", "www.example.net"])


def test_a_request_may_leave_the_names_to_the_order() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert requests.check(csr(key), WEB).names == ()
    checked = requests.check(csr(key, x509.DNSName("www.example.net")), WEB)
    assert checked.names == (names.dns("www.example.net"),) and checked.key_type == "P-256"


@pytest.mark.parametrize(
    "entry",
    [
        x509.DNSName("bank.example.com"),
        x509.DNSName("web.example.net\0.evil.example"),
        x509.RFC822Name("web@example.net"),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        x509.DirectoryName(x509.Name([])),
    ],
)
def test_a_request_for_names_that_were_not_ordered(entry: x509.GeneralName) -> None:
    with pytest.raises(Refused, match="asks for"):
        requests.check(csr(ec.generate_private_key(ec.SECP256R1()), x509.DNSName("web.example.net"), entry), WEB)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        rsa.generate_private_key(3, 2048),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP224R1()),
        dsa.generate_private_key(2048),
    ],
)
def test_keys_that_are_not_certified(key: object) -> None:
    with pytest.raises(Refused):
        requests.check(csr(key), WEB)


def test_a_request_of_a_key_that_nobody_has_proved_to_have() -> None:
    good = bytearray(csr(ec.generate_private_key(ec.SECP256R1())))
    good[-5] ^= 1
    with pytest.raises(Refused, match="signature is not its key's"):
        requests.check(bytes(good), WEB)


@pytest.mark.parametrize("bad", [b"", b"0", b"\x30\x03\x02\x01\x00", b"-----BEGIN CERTIFICATE REQUEST-----\n"])
def test_what_is_no_request(bad: bytes) -> None:
    with pytest.raises(Refused, match="not a certificate request"):
        requests.check(bad, WEB)


def test_a_request_whose_extensions_cannot_be_read() -> None:
    good = csr(ec.generate_private_key(ec.SECP256R1()), x509.DNSName("web.example.net"))
    strange = good.replace(b"\x82\x0fweb.example.net", b"\xa3\x0fweb.example.net")  # [3]: x400Address
    assert strange != good
    with pytest.raises(Refused, match="not a certificate request"):
        requests.check(strange, WEB)


def test_a_request_that_is_too_large() -> None:
    with pytest.raises(Refused, match="at most 65536"):
        requests.check(bytes(requests.MAX_CSR + 1), WEB)
    with pytest.raises(Refused, match="not a certificate request"):
        requests.check(bytes(requests.MAX_CSR), WEB)
