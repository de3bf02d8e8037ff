"""A host's modules as TPMs: what QEMU and the TSS find at their sockets, and what becomes of it when something dies."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from grpc import StatusCode
from hsmvisor.host import limits
from hsmvisor_rpc.internal import tpm
from hsmvisor_rpc.sealed.attestation import Attested, verify_attestation
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.tpm.platform import Platform, PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import PLATFORM, Code, sized
from support.certificates import Authority, new_key
from support.host import Host, Module, wait_for
from support.host_process import gone, new_id, refused
from support.tpm_guest import ECDSA, OWNER, PCR_EXTEND, RSASSA, Guest, verify
from support.tpm_host import FIRST, create, machine, plugged, serving, tool, tpm_settings, update

P256, OTHER, RSA, P384 = new_key("p256"), new_key("p256"), new_key("rsa2048"), new_key("p384")
DIGEST = hashlib.sha256(b"message").digest()
NUMBERS = itertools.count()
NV_DEFINE_SPACE, HIERARCHY_CHANGE_AUTH = 0x12A, 0x129
INVALID, WRONG_STATE = StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def module(host: Host) -> Iterator[Module]:
    module = create(host, f"tpm-{next(NUMBERS)}", h0="web", h1="other")
    yield module
    module.destroy()


def at(guest: Guest, handle: int = FIRST) -> bool:
    return handle in guest.handles(FIRST)


def signs_with(guest: Guest, key: ec.EllipticCurvePrivateKey, handle: int = FIRST) -> bool:
    result, signature = guest.sign(handle, DIGEST)
    if result != 0:
        return False
    try:
        verify(key, DIGEST, signature)
    except Exception:
        return False
    return True


def test_a_delivered_key(module: Module) -> None:
    with machine(module) as (_, guest):
        assert not at(guest)
        module.push("web", P256)
        wait_for(lambda: at(guest), what="the key")
        assert signs_with(guest, P256)
        module.push("web", OTHER)
        wait_for(lambda: signs_with(guest, OTHER), what="the other key")
        module.push("other", RSA)
        wait_for(lambda: at(guest, FIRST + 1), what="the RSA key")
        result, signature = guest.sign(FIRST + 1, DIGEST, RSASSA)
        assert result == 0
        verify(RSA, DIGEST, signature)
    assert module.status().tpm.keys_failure == ""


def has(guest: Guest, handle: int, key: PrivateKey) -> bool:
    return handle in guest.handles(0x81000000) and guest.public(handle) == Platform.public(handle, key.public_key(), False)


def test_each_kind_of_key_at_handles_of_both_owners(host: Host) -> None:
    """Delivered to the worker, used by the guest, another one then."""
    kinds, ends = ("rsa2048", "rsa3072", "p256", "p384", "p521"), (FIRST + 0xFFFF, 0x81000000, 0x8100FFFF)
    handles = {handle: kinds[at % len(kinds)] for at, handle in enumerate((*range(FIRST, FIRST + 5), *ends))}
    module = host.create(f"tpm-{next(NUMBERS)}", tpm=pb.Tpm(enabled=True, keys={hex(at): f"m{at:x}" for at in handles}))
    serving(module)
    with machine(module) as (_, guest):
        for _ in range(2):
            for handle, kind in handles.items():
                key = new_key(kind)
                module.push(f"m{handle:x}", key)
                wait_for(partial(has, guest, handle, key), what=f"{kind} at {handle:#x}")
                result, signature = guest.sign(handle, DIGEST, RSASSA if kind.startswith("rsa") else ECDSA)
                assert result == 0, (hex(handle), kind)
                verify(key, DIGEST, signature)
        assert sorted(guest.handles(0x81000000)) == sorted(handles)
        assert module.status().tpm.keys_failure == ""
    module.destroy()


def test_swaps_while_the_guest_signs(module: Module) -> None:
    """A hundred deliveries; each signature is that of the key that the guest saw at that time."""
    keys = [new_key("p256") for _ in range(100)]
    with machine(module) as (_, guest):
        module.push("web", keys[0])
        wait_for(lambda: at(guest), what="the key")
        failures: list[str] = []
        signed: list[tuple[int, bytes, bytes]] = []
        over, counts = threading.Event(), itertools.count()

        def sign() -> None:
            while not over.is_set():
                number = next(counts)
                public = guest.public(FIRST)
                result, signature = guest.sign(FIRST, hashlib.sha256(str(number).encode()).digest())
                if result != 0:
                    failures.append(f"{number}: {result:#x}")
                    continue
                signed.append((number, public, signature))

        thread = threading.Thread(target=sign)
        thread.start()
        for key in keys[1:]:
            module.destroy_generation("web", module.push("web", key) - 1)
        wait_for(lambda: signed and signed[-1][1] == _public(keys[-1]), 20, "the last key")
        over.set()
        thread.join(20)
        assert not failures
        known = {_public(key): key for key in keys}
        seen = set()
        for number, public, signature in signed:
            _verify_one_of(known, public, number, signature)
            seen.add(public)
        assert len(seen) > 20 and len(signed) > len(keys)


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return Platform.public(FIRST, key.public_key(), False)


def _verify_one_of(known: dict[bytes, ec.EllipticCurvePrivateKey], public: bytes, number: int, signature: bytes) -> None:
    """It is the key's that was read before, or the next one's, which came between reading and signing."""
    digest = hashlib.sha256(str(number).encode()).digest()
    order = list(known)
    for candidate in order[order.index(public) :]:
        try:
            verify(known[candidate], digest, signature)
            return
        except Exception:
            continue
    raise AssertionError(f"signature {number} is no key's")


def test_a_key_that_is_destroyed(module: Module) -> None:
    with machine(module) as (_, guest):
        first = module.push("web", P256)
        wait_for(lambda: at(guest), what="the key")
        module.push("web", OTHER)
        module.destroy_generation("web", first)
        wait_for(lambda: signs_with(guest, OTHER), what="the other key")
        asked = pb.SetTokenPresentRequest(request_id=new_id(), name=module.name, present=False)
        module.host.process.modules.SetTokenPresent(asked, timeout=10)
        wait_for(lambda: not at(guest), what="the end of the key")
        asked.request_id, asked.present = new_id(), True
        module.host.process.modules.SetTokenPresent(asked, timeout=10)
        wait_for(lambda: signs_with(guest, OTHER), what="the key again")


def test_a_key_that_tpms_do_not_have(module: Module) -> None:
    module.push("web", new_key("ed25519"))
    wait_for(lambda: "Ed25519" in module.status().tpm.keys_failure, what="the failure")
    module.push("other", P384)
    with machine(module) as (_, guest):
        wait_for(lambda: at(guest, FIRST + 1), what="the key")
        assert not at(guest)


def test_only_one_machine(module: Module) -> None:
    with machine(module) as (_, guest):
        second = plugged(module)
        assert second.control.recv(1) == b"", "it is closed without a word"
        assert tool(module, "tpm2_getrandom", "8", check=False).returncode != 0, "a machine's TPM is the machine's alone"
        assert guest.handles(FIRST) == []
    with machine(module) as (_, guest):
        assert guest.handles(FIRST) == []


def test_a_machine_that_ends_without_a_word(module: Module) -> None:
    """Its TPM loses its power with it: nobody goes on with what it has measured."""
    with machine(module) as (_, guest):
        extend(guest, 7, DIGEST)
        assert verified(module).pcrs[7] != bytes(32)
    assert refused(attested, module) == (WRONG_STATE, "TPM")
    with machine(module):
        assert verified(module).pcrs[7] == bytes(32)


@pytest.mark.timeout(120)
def test_a_guest_that_fills_its_tpm(module: Module) -> None:
    """It has all the room that libtpms has, is told when that ends, and keeps no key by it, nor over its next start."""
    first = module.push("web", P256, Authority().chain(P256))
    chain = Authority().chain(RSA)  # it is larger
    with machine(module) as (qemu, guest):
        wait_for(lambda: signs_with(guest, P256), what="the key")
        guest.fill()
        assert len([at for at in guest.handles(0x01800000) if at < 0x01801000]) > 60
        assert guest.nv_define(0x01900000, 16) == 0x14B, "TPM_RC_NV_SPACE"
        module.push("web", RSA, chain)
        module.destroy_generation("web", first)
        wait_for(lambda: guest.sign(FIRST, DIGEST, RSASSA)[0] == 0, what="the other key")
        wait_for(lambda: "no room for its certificate" in module.status().tpm.keys_failure, what="why it has no certificate")
        qemu.start()
        assert guest.startup() == 0
        verify(RSA, DIGEST, guest.sign(FIRST, DIGEST, RSASSA)[1])
        assert guest.nv(0x01400000) is None
        guest.nv_empty()
        qemu.start()
        assert guest.startup() == 0
        assert guest.nv(0x01400000) == chain[0].public_bytes(Encoding.DER)


# ---- without a machine ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_tools_without_a_machine(module: Module, tmp_path: Path) -> None:
    chain = Authority().chain(P256)
    module.push("web", P256, chain)
    wait_for(lambda: tool(module, "tpm2_readpublic", "-c", hex(FIRST), check=False).returncode == 0, what="the key")
    tool(module, "tpm2_readpublic", "-c", hex(FIRST), "-f", "pem", "-o", "public.pem", cwd=tmp_path)
    public = load_pem_public_key((tmp_path / "public.pem").read_bytes())
    assert public == P256.public_key()
    (tmp_path / "data").write_bytes(b"message")
    words = ("-c", hex(FIRST), "-g", "sha256", "-f", "plain", "-o", "signature", "data")
    tool(module, "tpm2_sign", *words, cwd=tmp_path)
    P256.public_key().verify((tmp_path / "signature").read_bytes(), b"message", ec.ECDSA(hashes.SHA256()))
    assert b"sha256" in tool(module, "tpm2_getcap", "pcrs").stdout
    tool(module, "tpm2_nvread", "0x1400000", "-o", "certificate", cwd=tmp_path)
    assert (tmp_path / "certificate").read_bytes() == chain[0].public_bytes(Encoding.DER)


@pytest.mark.real
def test_tools_without_a_machine_have_no_platform_hierarchy(module: Module, tmp_path: Path) -> None:
    module.push("web", P256)
    wait_for(lambda: tool(module, "tpm2_readpublic", "-c", hex(FIRST), check=False).returncode == 0, what="the key")
    (tmp_path / "policy").write_bytes(bytes(32))
    for words in (
        ("tpm2_setprimarypolicy", "-C", "p", "-L", "policy", "-g", "sha256"),
        ("tpm2_changeauth", "-c", "p", "mine"),
        ("tpm2_evictcontrol", "-C", "p", "-c", hex(FIRST)),
        ("tpm2_nvundefine", "-C", "p", "0x1c00002"),
    ):
        assert tool(module, *words, cwd=tmp_path, check=False).returncode != 0
    asked = pb.SetTokenPresentRequest(request_id=new_id(), name=module.name, present=False)
    module.host.process.modules.SetTokenPresent(asked, timeout=10)
    wait_for(lambda: tool(module, "tpm2_readpublic", "-c", hex(FIRST), check=False).returncode != 0, what="the end of the key")


@pytest.mark.real
def test_endorsement_certificates(module: Module, tmp_path: Path) -> None:
    """They are in the TPM, are those that the host tells, and certify the keys that tpm2_createek makes."""
    answer = identity(module)
    for index, kind, der in zip(("0x1c00002", "0x1c0000a"), ("rsa", "ecc"), answer.endorsement_certificates, strict=True):
        tool(module, "tpm2_nvread", index, "-o", "certificate", cwd=tmp_path)
        assert (tmp_path / "certificate").read_bytes() == der
        tool(module, "tpm2_createek", "-c", "ek.ctx", "-G", kind, "-u", "ek.pem", "-f", "pem", cwd=tmp_path)
        tool(module, "tpm2_flushcontext", "-t")
        certificate = x509.load_der_x509_certificate(der)
        assert certificate.public_key() == load_pem_public_key((tmp_path / "ek.pem").read_bytes())
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(answer.ca_certificate))


def identity(module: Module) -> pb.TpmIdentity:
    return module.host.process.modules.GetTpmIdentity(pb.GetTpmIdentityRequest(name=module.name), timeout=10)


def attested(module: Module, nonce: bytes = bytes(32), *pcrs: int) -> pb.AttestTpmResponse:
    asked = pb.AttestTpmRequest(name=module.name, nonce=nonce, pcrs=pcrs)
    return module.host.process.modules.AttestTpm(asked, timeout=20)


def test_attestation(module: Module) -> None:
    assert refused(attested, module) == (WRONG_STATE, "TPM"), "nothing was measured yet"
    with machine(module) as (_, guest):
        extend(guest, 7, DIGEST)
        nonce = os.urandom(32)
        answer = attested(module, nonce)
        module_id = module.status().module_id
        found = verify_attestation(answer.attestation, module.host.key, module_id, nonce)
        assert found.pcrs[7] == hashlib.sha256(bytes(32) + DIGEST).digest()
        assert sorted(found.pcrs) == list(limits.DEFAULT_PCRS)
        assert found.identity.name == module.name
        keys = [x509.load_der_x509_certificate(der).public_key() for der in identity(module).endorsement_certificates]
        assert tuple(map(public_der, keys)) == found.identity.endorsement_keys
        assert refused(attested, module, b"short") == (INVALID, "NONCE")
        assert refused(attested, module, bytes(65)) == (INVALID, "NONCE")
        assert refused(attested, module, nonce, 24) == (INVALID, "PCRS")
        assert refused(attested, module, nonce, *range(24), 0) == (INVALID, "PCRS")
        assert list(verify_attestation(attested(module, nonce, 7).attestation, module.host.key, module_id, nonce).pcrs) == [7]


def verified(module: Module) -> Attested:
    nonce = os.urandom(32)
    return verify_attestation(attested(module, nonce).attestation, module.host.key, module.status().module_id, nonce)


def public_der(key: Any) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def extend(guest: Guest, pcr: int, digest: bytes) -> None:
    values = (1).to_bytes(4, "big") + tpm2.SHA256.to_bytes(2, "big") + digest
    guest.good(PCR_EXTEND, (pcr,), values, tpm2.EMPTY_PASSWORD)


# ---- when something dies ----------------------------------------------------------------------------------------------------


def test_the_worker_dies(module: Module) -> None:
    with machine(module) as (_, guest):
        module.push("web", P256)
        wait_for(lambda: at(guest), what="the key")
        before = module.pid
        os.kill(before, signal.SIGKILL)
        assert signs_with(guest, P256), "the TPM does not need it"
        module.serving(not_pid=before)
        module.push("web", OTHER)
        wait_for(lambda: signs_with(guest, OTHER), what="the other key")


def test_the_tpm_dies(module: Module) -> None:
    """The machine's connections go to the next process; until the guest resets, it is a TPM that lost its power."""
    module.push("web", P256)
    with machine(module) as (qemu, guest):
        wait_for(lambda: at(guest), what="the key")
        assert define(guest) == 0
        before = serving(module).pid
        os.kill(before, signal.SIGKILL)
        serving(module, not_pid=before)
        assert guest.sign(FIRST, DIGEST)[0] == 0x101, "TPM_RC_FAILURE"
        qemu.start()
        assert guest.startup() == 0
        assert signs_with(guest, P256)
        assert 0x01500001 in guest.handles(0x01000000)


def test_one_that_does_not_take_its_certificates(host: Host) -> None:
    """Its guest has other endorsement keys, and sleeps: it serves all the same, whoever is replaced, and what is destroyed goes."""
    module = create(host, f"tpm-{next(NUMBERS)}", h0="web")
    first = module.push("web", P256)
    with machine(module) as (qemu, guest):
        wait_for(lambda: at(guest), what="the key")
        guest.good(Code.CHANGE_EPS, (PLATFORM,), b"", tpm2.EMPTY_PASSWORD)
        guest.shutdown(tpm2.STATE)
        module.push("web", OTHER)
        module.destroy_generation("web", first)
        pid = serving(module).pid
        host.process.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=new_id(), name=module.name), timeout=30)
        pid = serving(module, not_pid=pid).pid
        wait_for(lambda: signs_with(guest, OTHER), what="the other key, and nothing else")
        host.process.restart()
        host.meet()
        wait_for(lambda: module.status().tpm.peer, what="the machine")
        assert serving(module).pid == pid, "it is adopted"
        guest.shutdown(tpm2.STATE)
        os.kill(pid, signal.SIGKILL)
        serving(module, not_pid=pid)
        qemu.start()
        assert guest.startup() == 0
        wait_for(lambda: signs_with(guest, OTHER), what="the key")
        assert verified(module).identity.endorsement_keys == tuple(
            public_der(x509.load_der_x509_certificate(der).public_key()) for der in identity(module).endorsement_certificates
        )
    module.destroy()


def define(guest: Guest) -> int:
    """Has the guest make an NV index of its own; returns the response's code."""
    public = (0x01500001).to_bytes(4, "big") + tpm2.SHA256.to_bytes(2, "big") + (0x00020002).to_bytes(4, "big")
    parameters = sized(b"") + sized(public + sized(b"") + (8).to_bytes(2, "big"))
    return guest.say(NV_DEFINE_SPACE, (OWNER,), parameters, tpm2.EMPTY_PASSWORD)[0]


def test_the_host_service_dies(host: Host) -> None:
    module = create(host, f"tpm-{next(NUMBERS)}", h0="web")
    module.push("web", P256)
    with machine(module) as (qemu, guest):
        wait_for(lambda: at(guest), what="the key")
        extend(guest, 7, DIGEST)
        pid = serving(module).pid
        host.stop(signal.SIGKILL)
        assert signs_with(guest, P256), "what needs no disk goes on"
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(define(guest)))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive(), "what is to be kept waits for the next service"
        host.start()
        waiting.join(20)
        assert answers == [0]
        assert serving(module).pid == pid
        wait_for(lambda: module.status().tpm.peer, what="the machine")
        module.push("web", OTHER)
        wait_for(lambda: signs_with(guest, OTHER), what="the other key")
        os.kill(pid, signal.SIGKILL)
        serving(module, not_pid=pid)
        qemu.start()
        assert guest.startup() == 0
        assert 0x01500001 in guest.handles(0x01000000)
        assert signs_with(guest, OTHER)
    module.destroy()


def test_replaced_in_service(module: Module) -> None:
    """PCRs, loaded objects, sessions and handles go along, and so does the machine's connection."""
    module.push("web", P256)
    with machine(module) as (_, guest):
        wait_for(lambda: at(guest), what="the key")
        extend(guest, 7, DIGEST)
        primary, session = guest.primary(), guest.session()
        name = guest.public(primary)
        before = serving(module).pid
        failures: list[int] = []
        over = threading.Event()

        def sign() -> None:
            while not over.is_set():
                failures.extend(result for result, _ in [guest.sign(FIRST, DIGEST)] if result)

        thread = threading.Thread(target=sign)
        thread.start()
        asked = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name, renew_launcher=True)
        module.host.process.modules.UpgradeModule(asked, timeout=30)
        after = serving(module, not_pid=before)
        over.set()
        thread.join(20)
        assert gone(before) and after.pid and not failures
        assert guest.public(primary) == name
        guest.flush(primary)
        guest.flush(session)
        assert verified(module).pcrs[7] == hashlib.sha256(bytes(32) + DIGEST).digest()
        module.push("web", OTHER)
        wait_for(lambda: signs_with(guest, OTHER), what="the other key")


# ---- settings and the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tpm",
    [
        pb.Tpm(keys={"0x81800000": "web"}),
        pb.Tpm(no_firmware=True),
        pb.Tpm(enabled=True, keys={"0x817fffff": "web"}),
        pb.Tpm(enabled=True, keys={"0x81810000": "web"}),
        pb.Tpm(enabled=True, keys={"0x80ffffff": "web"}),
        pb.Tpm(enabled=True, keys={"0x81010000": "web"}),
        pb.Tpm(enabled=True, keys={"web": "0x81800000"}),
        pb.Tpm(enabled=True, keys={"": "web"}),
        pb.Tpm(enabled=True, keys={"0x81800000": ""}),
        pb.Tpm(enabled=True, keys={"0x81800000": "x" * 65}),
        pb.Tpm(enabled=True, keys={"0x81800000": "a", "81800000": "b"}),
        pb.Tpm(enabled=True, keys={f"0x{FIRST + n:x}": "web" for n in range(tpm.MAX_KEYS + 1)}),
    ],
    ids=range(12),
)
def test_settings_that_cannot_be(host: Host, tpm: pb.Tpm) -> None:
    code, _ = refused(host.process.create, f"tpm-{next(NUMBERS)}", tpm=tpm)
    assert code == INVALID


def test_it_comes_and_goes_by_settings(host: Host) -> None:
    module = host.create(f"tpm-{next(NUMBERS)}")
    assert not module.status().HasField("tpm")
    assert refused(attested, module) == (WRONG_STATE, "TPM")
    describe = pb.DescribeDeviceRequest(name=module.name, face=pb.TPM)
    assert refused(host.process.modules.DescribeDevice, describe, timeout=10) == (WRONG_STATE, "TPM")
    update(module, tpm_settings(h0="web"))
    state = serving(module)
    arguments = host.process.modules.DescribeDevice(describe, timeout=10).qemu_arguments
    assert state.socket in arguments[1] and arguments[3].startswith("emulator,") and arguments[5].startswith("tpm-crb,")
    describe.tpm_driver = "tpm-spapr"
    assert refused(host.process.modules.DescribeDevice, describe, timeout=10) == (INVALID, "TPM_DRIVER")
    with machine(module) as (_, guest):
        module.push("web", P256)
        wait_for(lambda: at(guest), what="the key")
        update(module, tpm_settings(h3="web"))
        wait_for(lambda: guest.handles(FIRST) == [FIRST + 3], what="the other handle")
        public = guest.public(FIRST + 3)
        assert refused(update, module, pb.Tpm()) == (WRONG_STATE, "TPM"), "the machine runs"
        assert guest.handles(FIRST) == [FIRST + 3] and serving(module).pid == state.pid
    update(module, pb.Tpm())
    wait_for(lambda: gone(state.pid), what="the end of the TPM")
    assert not Path(state.socket).exists()
    update(module, tpm_settings(h3="web"))
    serving(module)
    with machine(module) as (_, guest):
        wait_for(lambda: guest.handles(FIRST) == [FIRST + 3], what="the same TPM")
        assert guest.public(FIRST + 3) == public
    pid = serving(module).pid
    module.destroy()
    assert gone(pid) and not Path(state.socket).exists()


def test_a_guest_without_firmware(module: Module) -> None:
    """Said while the machine runs: the process is another one, the machine goes on, and from its next start on nobody has the
    platform's password."""
    with machine(module) as (qemu, guest):
        before = serving(module).pid
        assert guest.say(HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b""), tpm2.EMPTY_PASSWORD)[0] == 0
        changed = tpm_settings(h0="web", h1="other")
        changed.no_firmware = True
        update(module, changed)
        assert serving(module).pid != before
        assert guest.handles(FIRST) == []
        qemu.start()
        assert guest.startup() == 0
        assert guest.say(HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b""), tpm2.EMPTY_PASSWORD)[0] == 0x9A2


def test_it_is_not_plugged_in(module: Module) -> None:
    attach = pb.AttachModuleRequest(request_id=new_id(), name=module.name, face=pb.TPM, qmp_path="/nowhere")
    assert refused(module.host.process.modules.AttachModule, attach, timeout=10) == (INVALID, "FACE")
    detach = pb.DetachModuleRequest(request_id=new_id(), name=module.name, face=pb.TPM)
    assert refused(module.host.process.modules.DetachModule, detach, timeout=10) == (INVALID, "FACE")


def test_what_it_has_given_up(module: Module) -> None:
    measures = {m.name.removeprefix("tpm: "): m for m in module.status().measures if m.name.startswith("tpm: ")}
    assert {"seccomp", "landlock", "own-user", "capabilities", "not-dumpable"} <= measures.keys()
    lacking = {name for name, m in measures.items() if not m.applied}
    assert not lacking
    uids = [line for line in Path(f"/proc/{serving(module).pid}/status").read_text().splitlines() if line.startswith("Uid:")]
    workers = [line for line in Path(f"/proc/{module.pid}/status").read_text().splitlines() if line.startswith("Uid:")]
    assert uids != workers, "no signal passes between them"


def test_two_beside_each_other(host: Host) -> None:
    first, second = create(host, f"tpm-{next(NUMBERS)}", h0="web"), create(host, f"tpm-{next(NUMBERS)}", h0="web")
    first.push("web", P256)
    second.push("web", OTHER)
    with machine(first) as (_, one), machine(second) as (_, two):
        wait_for(lambda: at(one) and at(two), what="the keys")
        assert signs_with(one, P256) and signs_with(two, OTHER)
        extend(one, 7, DIGEST)
        keys = [
            verify_attestation(attested(m, bytes(32)).attestation, host.key, m.status().module_id, bytes(32))
            for m in (first, second)
        ]
        assert keys[0].identity.attestation_key != keys[1].identity.attestation_key
        assert keys[0].pcrs[7] != keys[1].pcrs[7] == bytes(32)
    first.destroy()
    second.destroy()


def test_no_libtpms() -> None:
    """The module serves, and its TPM says what to install."""
    host = Host()
    host.process.module = "support.host_without_libtpms"
    with host:
        module = host.create("bare", tpm=pb.Tpm(enabled=True))
        wait_for(lambda: module.status().tpm.state == "failed", 20, "the failure")
        assert "apt-get install libtpms0" in module.status().tpm.failure
        assert module.status().state == "serving"
        assert refused(attested, module) == (StatusCode.UNAVAILABLE, "TPM")


def test_public_keys_are_of_these(module: Module) -> None:
    module.push("web", P256)
    with machine(module) as (_, guest):
        wait_for(lambda: at(guest), what="the key")
        assert guest.public(FIRST) == _public(P256)
