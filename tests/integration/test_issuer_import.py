"""Keys of owners' own: sealed to the issuer where they are, from files and from a PKCS #11 token, and checked by it."""

from __future__ import annotations

import asyncio
import datetime as dt
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_der_private_key,
    pkcs12,
)
from hsmvisor.bundle import Bundle, BundleError
from hsmvisor.client.importing import checked_issuer, seal_import
from hsmvisor.client.key_stores import StoredKey
from hsmvisor.manager.ca import requests
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, Issuer, Made
from hsmvisor.manager.issuer.limits import MAX_ENVELOPE, MAX_GIVEN
from hsmvisor.manager.policy.questions import Source
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.sealed.commands import raw_public, sign
from hsmvisor_rpc.sealed.envelope import RecipientKey
from hsmvisor_rpc.sealed.fleet import IssuerStatement
from hsmvisor_rpc.sealed.refusal import Refusal
from support.certificates import Authority, chain_der, chain_pem, new_key, pkcs8, private_pem, spki
from support.fleet import Clock, Fleet
from support.importing import importing_of
from support.issuing import Target, seal_to, targets, tell
from support.softhsm import PIN, TOKEN, Token, make_key, make_token

ONE = Target(1)


async def taken(issuer: Issuer, bundle: Bundle, request: str = "request", told: str = "request", **others: object) -> Made:
    """`others` in the place of what goes with it."""
    envelope = seal_import(bundle, issuer.recipient, request)
    beside = {"public_key": bundle.public_key, "certificates": bundle.certificates, "envelope": envelope} | others
    return await issuer.take(told, targets=seal_to([ONE]), escrow=None, **beside)  # type: ignore[arg-type]


def of_file(form: str, kind: str, authority: Authority, directory: Path) -> tuple[Bundle, bytes, int]:
    """A key in a file; its public key; how many certificates come with it."""
    key = new_key(kind)
    chain = authority.chain(key)
    match form:
        case "pem":
            return Bundle.make(private_pem(key), chain_pem(chain)), spki(key), len(chain)
        case "pkcs8":
            return Bundle.make(pkcs8(key)), spki(key), 0
        case "encrypted":
            data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
            return Bundle.make(data, chain_pem(chain), b"word"), spki(key), len(chain)
    data = pkcs12.serialize_key_and_certificates(b"web", key, chain[0], chain[1:], BestAvailableEncryption(b"word"))  # type: ignore[arg-type]
    return Bundle.make(data, b"", b"word"), spki(key), len(chain)


@pytest.mark.parametrize("form", ["pem", "pkcs8", "encrypted", "pkcs12"])
@pytest.mark.parametrize("kind", ["p256", "rsa3072", "ed25519", "ed448"])
def test_keys_in_files(tmp_path: Path, form: str, kind: str) -> None:
    bundle, public_key, count = of_file(form, kind, Authority(), tmp_path)

    async def story(issuer: Issuer) -> None:
        made = await taken(issuer, bundle, certificates=bundle.certificates[::-1])
        assert made.public_key == public_key == spki(ONE.opened(made.envelopes[0]))
        assert made.certificates == bundle.certificates and len(made.certificates) <= count
        checked = requests.check(made.csr, ())  # so that the same key can be certified again
        assert requests.spki(checked.public_key) == public_key and checked.names == ()

    tell(tmp_path, story)


def test_an_imported_key_is_kept_too(tmp_path: Path) -> None:
    key = new_key("p256")

    async def story(issuer: Issuer) -> None:
        envelope = seal_import(Bundle.make(pkcs8(key)), issuer.recipient, "request")
        made = await issuer.take("request", envelope, spki(key), (), (), EscrowAs("line", 1))
        later = targets(2)
        envelopes = await issuer.reseal(made.wrapped, EscrowAs("line", 1), seal_to(later))
        assert [spki(one.opened(envelope)) for one, envelope in zip(later, envelopes, strict=True)] == [spki(key)] * 2

    tell(tmp_path, story)


def refused(tmp_path: Path, attempt: Callable[[Issuer], Awaitable[Made]], why: str) -> None:
    async def story(issuer: Issuer) -> None:
        with pytest.raises(BadKey, match=why) as caught:
            await attempt(issuer)
        assert len(str(caught.value)) < 300
        assert (await issuer.make("P-256", (), (), None)).csr and issuer.restarts == 0

    tell(tmp_path, story)


KEY, OTHER = new_key("p256"), new_key("p256")
DOES_NOT_OPEN = "envelope does not open: it was altered, or sealed for another issuer, request or public key"


def test_an_envelope_is_of_one_request_and_key(tmp_path: Path) -> None:
    bundle = Bundle.make(pkcs8(KEY))
    other = replace(bundle, public_key=spki(OTHER))
    refused(tmp_path, lambda issuer: taken(issuer, bundle, told="another"), DOES_NOT_OPEN)
    refused(tmp_path, lambda issuer: taken(issuer, bundle, public_key=spki(OTHER)), DOES_NOT_OPEN)
    refused(tmp_path, lambda issuer: taken(issuer, bundle, envelope=b""), DOES_NOT_OPEN)
    refused(tmp_path, lambda issuer: taken(issuer, bundle, envelope=bytes(5000)), DOES_NOT_OPEN)
    elsewhere = seal_import(bundle, RecipientKey().public, "request")
    refused(tmp_path, lambda issuer: taken(issuer, bundle, envelope=elsewhere), DOES_NOT_OPEN)
    refused(tmp_path, lambda issuer: taken(issuer, other), "is not the one of the public key that was told with it")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a private key"),
        (b"x" * 500, "not a private key"),
        (pkcs8(KEY)[:-3], "not a private key"),
        (private_pem(KEY), "not a private key"),
        (spki(KEY), "not a private key"),
        (pkcs8(new_key("rsa1024")), "RSA key of 1024 bits"),
        (pkcs8(new_key("mldsa44")), "of a type that is not taken"),
        (pkcs8(ec.generate_private_key(ec.SECP256K1())), "on the curve secp256k1"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_key_that_is_taken(tmp_path: Path, content: bytes, why: str) -> None:
    bundle = replace(Bundle.make(pkcs8(KEY)), pkcs8=content)
    refused(tmp_path, lambda issuer: taken(issuer, bundle), why)


def test_a_key_whose_public_part_is_anothers(tmp_path: Path) -> None:
    """PKCS #8 with the private key of one and the public key of another."""
    mixed = pkcs8(KEY).replace(spki(KEY)[-65:], spki(OTHER)[-65:])
    assert mixed != pkcs8(KEY)
    bundle = replace(Bundle.make(pkcs8(KEY)), pkcs8=mixed, public_key=spki(OTHER))
    refused(tmp_path, lambda issuer: taken(issuer, bundle), "not a private key|not the one")


def test_certificates_that_do_not_fit(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority()
    bundle = Bundle.make(pkcs8(KEY))
    fitting, foreign = chain_der(authority.chain(KEY)), chain_der(authority.chain(OTHER))

    def given(*certificates: bytes) -> Callable[[Issuer], Awaitable[Made]]:
        return lambda issuer: taken(issuer, bundle, certificates=certificates)

    refused(tmp_path, given(*foreign), "no certificate is of this private key")
    refused(tmp_path, given(fitting[0], *chain_der(stranger.chain(OTHER))[1:]), "the issuer of .* is not among the certificates")
    refused(tmp_path, given(fitting[0], b"x"), "is not an X.509 certificate in DER")
    unknown = fitting[1].replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03017f"))  # no curve that there is
    refused(tmp_path, given(fitting[0], unknown), "something that is not an X.509 certificate")
    expired = authority.issue(KEY, lifetime=dt.timedelta(seconds=-60)).public_bytes(Encoding.DER)
    refused(tmp_path, given(expired), "the certificate expired at")


def test_the_issuer_is_the_fleets() -> None:
    root, recipient = Ed25519PrivateKey.generate(), RecipientKey().public
    signed = sign(IssuerStatement(recipient), root)
    assert checked_issuer(recipient, signed.signature, raw_public(root.public_key())) == recipient
    for wrong in (RecipientKey().public, recipient[:-1]):
        with pytest.raises(Refusal):
            checked_issuer(wrong, signed.signature, raw_public(root.public_key()))


def test_what_cannot_be_sealed_is_said_before_it_travels() -> None:
    chain = chain_pem(Authority().chain(KEY))
    with pytest.raises(BundleError, match="to import is to give the private key"):
        seal_import(Bundle.make(None, chain), RecipientKey().public, "request")
    with pytest.raises(BundleError, match="cannot be sealed to"):
        seal_import(Bundle.make(pkcs8(KEY)), b"short", "request")
    with pytest.raises(BundleError, match="at most 32768"):
        seal_import(replace(Bundle.make(pkcs8(KEY)), pkcs8=bytes(32769)), RecipientKey().public, "request")


# ---- through the manager -----------------------------------------------------------------------------------------------------


def test_what_an_owner_imports_is_bounded_and_refused_with_a_sentence(tmp_path: Path) -> None:
    """One certificate too many, an envelope too large, a certificate with two extensions of one kind: errors inside the manager."""

    async def scenario(fleet: Fleet) -> None:
        (await fleet.host("h1")).add("web")
        await fleet.settle()
        request = await fleet.ask(material="own", source=Source.IMPORTED, resources=("h1/web",))
        importing = importing_of(fleet)
        key, authority = new_key("p256"), Authority()
        leaf, *above = chain_der((*authority.chain(key, name="www.example.net"), authority.root))
        others = tuple(authority.issue(new_key("p256")).public_bytes(Encoding.DER) for _ in range(MAX_GIVEN - 3))
        envelope = seal_import(Bundle.make(pkcs8(key)), fleet.issuer.recipient, request.id)
        most = (leaf, *above, *others)
        assert len((await importing.take(request, envelope, spki(key), most)).made.certificates) == 2
        twice = leaf.replace(b"\x55\x1d\x25", b"\x55\x1d\x11")  # extKeyUsage becomes another subjectAltName
        strange = leaf.replace(b"\x82\x0fwww.example.net", b"\xa3\x0fwww.example.net")  # [3]: x400Address
        later = leaf.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07")  # X.509 version 8
        assert leaf not in (twice, strange, later)
        for told, given, why in (
            (envelope, (*most, others[0]), f"certificates: {MAX_GIVEN + 1}, at most {MAX_GIVEN}"),
            (bytes(MAX_ENVELOPE + 1), most, "bytes of the envelope"),
            (envelope, (twice, *above), "cannot be read"),
            (envelope, (strange, *above), "cannot be read"),
            (envelope, (later, *above), "cannot be read"),
        ):
            with pytest.raises(Invalid, match=why):
                await importing.take(request, told, spki(key), given)

    async def whole() -> None:
        fleet = await Fleet.begin(tmp_path, clock=Clock(time.time()))
        try:
            await scenario(fleet)
        finally:
            await fleet.end()

    asyncio.run(whole())


# ---- from a token ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Token:
    made = make_token(tmp_path / "hsm")
    monkeypatch.setenv("SOFTHSM2_CONF", made.environment["SOFTHSM2_CONF"])
    return made


def in_token(token: Token, kind: str, label: str, sensitive: bool, extractable: bool) -> StoredKey:
    make_key(token, kind, label, sensitive, extractable)
    return StoredKey(Path(token.library), TOKEN, PIN, label)


#: The library is loaded in a process of its own: SoftHSM2 reads its configuration once.
TAKES_OUT = """
import sys
from pathlib import Path
from hsmvisor.bundle import BundleError
from hsmvisor.client.key_stores import StoredKey, take_out
library, token, pin, label, id = sys.argv[1:6]
try: bundle = take_out(StoredKey(Path(library), token, pin, label, bytes.fromhex(id)), sys.stdin.buffer.read())
except BundleError as error: sys.exit(f"REFUSED {error}")
print(bundle.pkcs8.hex(), bundle.public_key.hex(), *(one.hex() for one in bundle.certificates))
"""


def out_of(stored: StoredKey, certificates: bytes = b"") -> Bundle:
    arguments = [str(stored.library), stored.token, stored.pin, stored.label, stored.id.hex()]
    done = subprocess.run([sys.executable, "-c", TAKES_OUT, *arguments], input=certificates, capture_output=True, check=False)
    if done.returncode:
        raise BundleError(done.stderr.decode().partition("REFUSED ")[2].strip() or done.stderr.decode())
    key, public, *chain = map(bytes.fromhex, done.stdout.decode().split())
    return Bundle(public, tuple(chain), key)


@pytest.mark.parametrize(
    ("kind", "sensitive"),
    [(kind, sensitive) for kind in ("RSA", "secp256r1", "secp384r1", "secp521r1") for sensitive in (False, True)]
    + [("Ed25519", False)],
)
def test_a_key_that_may_leave_its_token(tmp_path: Path, token: Token, kind: str, sensitive: bool) -> None:
    stored = in_token(token, kind, "mine", sensitive, extractable=True)
    in_token(token, kind, "other", sensitive, extractable=True)
    bundle = out_of(stored)
    assert out_of(replace(stored, label="", id=b"mine")).public_key == bundle.public_key

    async def story(issuer: Issuer) -> None:
        made = await taken(issuer, bundle)
        assert spki(ONE.opened(made.envelopes[0])) == bundle.public_key == made.public_key

    tell(tmp_path, story)


def test_a_token_that_does_not_wrap_it(token: Token) -> None:
    """SoftHSM2 wraps no Edwards keys."""
    stored = in_token(token, "Ed25519", "mine", True, extractable=True)
    with pytest.raises(
        BundleError, match=r"'mine' is extractable, but token 'rack-7' does not wrap it with AES \(.*KeyNotWrappable"
    ):
        out_of(stored)


@pytest.mark.parametrize("sensitive", [False, True])
def test_a_key_that_may_not_leave(token: Token, sensitive: bool) -> None:
    stored = in_token(token, "secp256r1", "mine", sensitive, extractable=False)
    with pytest.raises(BundleError, match=r"'mine' may not leave token 'rack-7': it was made not to be extractable \(CKA_EXTRACT"):
        out_of(stored)


def test_certificates_in_the_token_come_along(token: Token, tmp_path: Path) -> None:
    stored = in_token(token, "secp256r1", "mine", True, extractable=True)
    pkcs8_of = out_of(stored).pkcs8
    assert pkcs8_of is not None
    chain = Authority().chain(load_der_private_key(pkcs8_of, None))  # type: ignore[arg-type]
    leaf = tmp_path / "leaf.der"
    leaf.write_bytes(chain[0].public_bytes(Encoding.DER))
    command = ["pkcs11-tool", "--module", str(token.library), "--login", "--pin", PIN, "--token-label", TOKEN]
    subprocess.run(
        [*command, "--write-object", str(leaf), "--type", "cert", "--id", b"mine".hex(), "--label", "mine"],
        check=True,
        capture_output=True,
    )
    assert out_of(stored).certificates == (leaf.read_bytes(),)
    assert out_of(stored, chain_pem(chain[1:])).certificates == chain_der(chain)


def test_what_is_not_in_the_token(token: Token) -> None:
    stored = in_token(token, "secp256r1", "mine", True, extractable=True)
    for wrong, why in (
        (replace(stored, label="none"), "has 0 private keys 'none'"),
        (replace(stored, token="none"), "token 'none' in .* is not there"),
        (replace(stored, pin="000000"), r"does not take the PIN \(PinIncorrect\)"),
        (replace(stored, library=Path("/nonexistent.so")), "cannot open shared object file"),
    ):
        with pytest.raises(BundleError, match=why):
            out_of(wrong)
    in_token(token, "secp256r1", "mine", True, extractable=True)
    with pytest.raises(BundleError, match="has 2 private keys 'mine': name one by its label, its id, or both"):
        out_of(stored)
    assert PIN not in repr(stored)
