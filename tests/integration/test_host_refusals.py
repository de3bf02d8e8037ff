"""Everything that sealed delivery refuses, through a real host: the precise reason for who asked, and a line in the audit log."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.commands import Action, Signer, SignerCertificate, Stage, certify, fingerprint, raw_public
from hsmvisor_rpc.sealed.identity import verify_identity
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.host_process import HostProcess, reason
from support.plane import Plane

C = grpc.StatusCode


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


@pytest.fixture
def plane(host: HostProcess, request: pytest.FixtureRequest) -> Plane:
    name = f"r{abs(hash(request.node.name)) % 10**9}"
    host.create(name)
    return Plane(host, name, host.host.GetHost(pb.GetHostRequest()).host_key)


def refused(plane: Plane, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Sends what must be refused; returns code and reason, which stand in the audit log with who sent which bytes."""
    before = plane.identity()[1]
    with pytest.raises(grpc.RpcError) as caught:
        plane.send(data)
    code, word = reason(caught.value)
    line = json.loads(plane.host.audit_lines()[-1])
    assert (line["kind"], line["module"], line["result"]) == ("material.execute", plane.name, "refused")
    assert line["reason"] == word and line["detail"] and line["who"].startswith("uid:") and len(line["command"]) == 64
    assert caught.value.details() == line["detail"]
    assert plane.identity()[1] == before, "nothing has changed"
    return code, word


def expired(plane: Plane) -> bytes:
    now = int(time.time())
    return plane.command(action=Action.ACTIVATE, issued_at=now - 600, expires_at=now - 300)


def unknown_manager(plane: Plane) -> bytes:
    plane.signer = Signer(Ed25519PrivateKey.generate())
    return plane.command(plane.body(new_key("p256")))


def signer_of_another_root(plane: Plane) -> bytes:
    key, now = Ed25519PrivateKey.generate(), int(time.time())
    certificate = SignerCertificate("stranger", raw_public(key.public_key()), now - 60, now + 600)
    plane.signer = Signer(key, certify(Ed25519PrivateKey.generate(), certificate))
    return plane.command(plane.body(new_key("p256")))


def expired_signer(plane: Plane) -> bytes:
    key, now = Ed25519PrivateKey.generate(), int(time.time())
    certificate = SignerCertificate("retired", raw_public(key.public_key()), now - 600, now - 60)
    plane.signer = Signer(key, certify(plane.host.root, certificate))
    return plane.command(plane.body(new_key("p256")))


def replay(plane: Plane) -> bytes:
    data = plane.command(plane.body(new_key("p256")))
    plane.send(data)
    return data


def lower_sequence(plane: Plane) -> bytes:
    data = replay(plane)
    plane.send(plane.command(action=Action.ACTIVATE))
    return data


def lower_generation(plane: Plane) -> bytes:
    plane.deliver(generation=5)
    return plane.command(plane.body(new_key("p256"), generation=4), generation=4)


def altered_command(plane: Plane) -> bytes:
    data = bytearray(plane.command(plane.body(new_key("p256"))))
    data[len(data) // 2] ^= 1
    return bytes(data)


def altered_envelope(plane: Plane) -> bytes:
    body = plane.body(new_key("p256"))
    blob = body.envelope[:-1] + bytes([body.envelope[-1] ^ 1])
    return plane.command(Stage(**{**vars(body), "envelope": blob}))


def foreign_envelope(plane: Plane) -> bytes:
    """Sealed for generation 1, delivered as 2."""
    return plane.command(plane.body(new_key("p256"), generation=1), generation=2)


def key_of_another_certificate(plane: Plane) -> bytes:
    key = new_key("p256")
    return plane.command(plane.body(key, plane.authority.chain(key), sealed=new_key("p256")))


def certificate_of_another_key(plane: Plane) -> bytes:
    return plane.command(plane.body(new_key("p256"), plane.authority.chain(new_key("p256"))))


def broken_chain(plane: Plane) -> bytes:
    """Root before intermediate."""
    key = new_key("p256")
    leaf, middle = plane.authority.chain(key)
    return plane.command(plane.body(key, (leaf, plane.authority.root, middle)))


def expired_certificate(plane: Plane) -> bytes:
    key = new_key("p256")
    return plane.command(plane.body(key, (plane.authority.issue(key, lifetime=dt.timedelta(minutes=-1)),)))


def small_rsa(plane: Plane) -> bytes:
    return plane.command(plane.body(rsa.generate_private_key(65537, 1024)))


def unknown_curve(plane: Plane) -> bytes:
    return plane.command(plane.body(ec.generate_private_key(ec.SECP256K1())))


def many_certificates(plane: Plane) -> bytes:
    key = new_key("p256")
    leaf, middle = plane.authority.chain(key)
    return plane.command(plane.body(key, (leaf, *[middle] * limits.MAX_CERTIFICATES)))


DENIED, CANNOT, NOT_NOW = C.PERMISSION_DENIED, C.INVALID_ARGUMENT, C.FAILED_PRECONDITION
CASES: list[tuple[Callable[[Plane], bytes], grpc.StatusCode, Reason]] = [
    (lambda plane: plane.command(action=Action.ACTIVATE, module_id=bytes(16)), DENIED, Reason.WRONG_MODULE),
    (lambda plane: plane.command(action=Action.ACTIVATE, host_id=fingerprint(bytes(32))), DENIED, Reason.WRONG_HOST),
    (unknown_manager, DENIED, Reason.UNKNOWN_MANAGER),
    (signer_of_another_root, DENIED, Reason.UNKNOWN_MANAGER),
    (expired_signer, NOT_NOW, Reason.EXPIRED),
    (expired, NOT_NOW, Reason.EXPIRED),
    (expired_certificate, NOT_NOW, Reason.EXPIRED),
    (replay, NOT_NOW, Reason.REPLAY),
    (lower_sequence, NOT_NOW, Reason.STALE_SEQUENCE),
    (lower_generation, NOT_NOW, Reason.STALE_GENERATION),
    (altered_envelope, DENIED, Reason.ALTERED),
    (foreign_envelope, DENIED, Reason.ALTERED),
    (key_of_another_certificate, CANNOT, Reason.KEY_MISMATCH),
    (certificate_of_another_key, CANNOT, Reason.KEY_MISMATCH),
    (broken_chain, CANNOT, Reason.BAD_CHAIN),
    (small_rsa, CANNOT, Reason.UNSUPPORTED_KEY),
    (unknown_curve, CANNOT, Reason.UNSUPPORTED_KEY),
    (many_certificates, CANNOT, Reason.TOO_LARGE),
    (lambda plane: bytes(limits.MAX_SIGNED + 1), CANNOT, Reason.TOO_LARGE),
    (lambda plane: b"nonsense", CANNOT, Reason.MALFORMED),
]
NAMES = ["wrong module", "wrong host", *[str(getattr(make, "__name__", "")) for make, _, _ in CASES[2:18]], "oversized", "nonsense"]


@pytest.mark.parametrize(("make", "code", "word"), CASES, ids=NAMES)
def test_refused_with_its_reason_and_audited(
    plane: Plane, make: Callable[[Plane], bytes], code: grpc.StatusCode, word: Reason
) -> None:
    assert refused(plane, make(plane)) == (code, word)


def test_one_altered_byte_anywhere_is_refused_and_audited(plane: Plane) -> None:
    data = plane.command(plane.body(new_key("p256")))
    told = {"ALTERED", "UNKNOWN_MANAGER", "MALFORMED"}
    for position in range(0, len(data), max(1, len(data) // 24)):
        changed = bytearray(data)
        changed[position] ^= 1
        assert refused(plane, bytes(changed))[1] in told, position
    plane.send(data)


def test_an_identity_that_the_pinned_host_did_not_sign_is_refused(plane: Plane) -> None:
    """The one refusal that no host can write down: it is the management plane that refuses the host."""
    answer = plane.host.modules.GetIdentity(pb.GetIdentityRequest(name=plane.name), timeout=10)
    other = raw_public(Ed25519PrivateKey.generate().public_key())
    altered = answer.signed_identity[:-1] + bytes([answer.signed_identity[-1] ^ 1])
    for signed, key in ((answer.signed_identity, other), (altered, plane.key)):
        with pytest.raises(Refusal) as caught:
            verify_identity(signed, key)
        assert caught.value.reason is Reason.WRONG_HOST


@pytest.mark.parametrize(
    ("request_id", "module", "word"), [("", "x", "REQUEST_ID"), ("1", "no such name!", "NAME"), ("2", "nobody", "MODULE")]
)
def test_what_never_reaches_a_module_is_audited_too(host: HostProcess, request_id: str, module: str, word: str) -> None:
    request = pb.ExecuteRequest(request_id=request_id, module=module, signed_command=b"x")
    with pytest.raises(grpc.RpcError) as caught:
        host.material.Execute(request, timeout=10)
    assert reason(caught.value)[1] == word

    def told() -> bool:
        line = json.loads(host.audit_lines()[-1])
        return line["result"] == "refused" and line["reason"] == word and line["who"].startswith("uid:")

    deadline = time.monotonic() + 5
    while not told():
        assert time.monotonic() < deadline, host.audit_lines()[-1]
        time.sleep(0.01)
