"""Signed commands and envelopes: what anybody on the way can hand to a module, and what its manager may have signed.

The first byte says how much of the way is real: nothing (raw bytes), the signature, the address, or the envelope too.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from fuzz.harness import Input, block, blocks
from fuzz.world import EPOCH, RECIPIENT, ROOT, world
from hsmvisor_rpc.sealed import envelope, identity
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.commands import (
    Certify,
    ChangeRoot,
    Command,
    Destroy,
    Generate,
    Retire,
    Signed,
    SignedCommand,
    Signer,
    SignerCertificate,
    Stage,
)
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, KeyMaterial
from hsmvisor_rpc.sealed.identity import EnrolTranscript, ModuleIdentity
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisord import ck
from hsmvisord.keystore import persistence
from hsmvisord.keystore.keystore import Cause, Keystore
from hsmvisord.token.token import Token
from support.certificates import pkcs8, spki
from support.keystores import HOST, MODULE

INVARIANT = (
    "a command is carried out, or refused with a Refusal and then nothing has changed or was stored; what was carried out raised "
    "the sequence number, a restart finds the same state, and what was staged or made can be activated; a record has one encoding"
)
MAX_LENGTH = 6000

RECORDS: tuple[type[Record], ...] = (
    Command, Stage, Generate, Certify, Retire, Destroy, ChangeRoot, Signed, SignedCommand, SignerCertificate, EnvelopeContext,
    KeyMaterial, ModuleIdentity, EnrolTranscript,
)  # fmt: skip
ACTIONS = ("stage", "activate", "roll-back", "retire", "destroy", "change-root", "strange", "generate", "certify")

RAW, PAYLOAD, BODY, STAGE, KEY, IDENTITY = range(6)
BY_ROOT = 0x80  #: signed by the root itself


def run(data: bytes) -> None:
    given = Input(data)
    head = given.byte()
    signer = Signer(ROOT) if head & BY_ROOT else world().bench.signer
    match head % 8:
        case 0:
            rest = given.rest()
            one_encoding(rest)
            execute(rest)
        case 1:
            payload = given.rest()
            execute(SignedCommand(payload, signer.certificate, signer.key.sign(payload)).encode())
        case 2:
            execute(signed(signer, ACTIONS[given.byte() % len(ACTIONS)], given.rest()))
        case 3:
            execute(signed(signer, "stage", stage(given)))
        case 4:
            execute(signed(signer, "stage", sealed(given)))
        case 5:
            refuses_identity(given.rest())


def one_encoding(data: bytes) -> None:
    for record in RECORDS:
        try:
            found = record.decode(data)
        except MalformedRecord:
            continue
        assert found.encode() == data


def refuses_identity(data: bytes) -> None:
    try:
        identity.verify_identity(data, b"k" * 32)
    except Refusal:
        return
    raise AssertionError("an identity that the host did not sign")


def execute(message: bytes) -> None:
    token = world().token()
    keystore = token.keystore
    before = keystore.state
    try:
        command, _ = keystore.execute(message, lambda command, signer: Cause())
    except Refusal:
        assert keystore.state is before
        assert not world().changes
        return
    after = keystore.state
    assert (after.version, after.sequence) == (before.version + 1, command.sequence)
    assert command.sequence > before.sequence
    assert len(world().changes) == 1
    opens_again(keystore)
    if command.action in ("stage", "generate"):
        serves(token, command)


def serves(token: Token, command: Command) -> None:
    """What was staged can be activated and found."""
    world().bench.execute("activate", command.material, command.generation)
    view = token.index.view(token.watermark)
    assert view.find(((ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, command.material.encode())))


def opens_again(keystore: Keystore) -> None:
    change = world().changes[0]
    stored = {name: blob for name, blob in (world().stored | change.put).items() if name not in change.delete}
    bench = world().bench
    state, _, manifest = persistence.load(stored, bench.vault, bench.provider, change.version)
    assert manifest == keystore._manifest
    assert replace(state, keys={}, objects={}) == replace(keystore.state, keys={}, objects={})
    ours, theirs = ({h: (o.attributes, o.size) for h, o in one.objects.items()} for one in (state, keystore.state))
    assert ours == theirs
    assert state.keys.keys() == keystore.state.keys.keys()


def signed(signer: Signer, action: str, body: bytes) -> bytes:
    """A command with the right address, time and sequence number; material and generation come first in `body` (see `named`)."""
    material, generation, body = named(body)
    bench = world().bench
    world().fresh()
    return signer.sign(bench.command(action, material, generation, body))


def named(body: bytes) -> tuple[str, int, bytes]:
    """The input's words for a material and a generation, and the rest."""
    given = Input(body)
    material = given.take(given.byte() % 80).decode("utf-8", "replace")
    return material, given.byte(), given.rest()


def stage(given: Input) -> bytes:
    """Names, then the fields of a Stage in their order; its envelope is real where the input has none."""
    name = given.take(given.byte() % 80)
    generation = given.take(1)
    public, certificates = given.block(), tuple([given.block() for _ in range(given.byte() % 12)])
    wrapped = given.block()
    texts = [given.block().decode("utf-8", "replace") for _ in range(4)]
    alias, drain, flag = given.block(), int.from_bytes(given.take(8), "big"), bool(given.byte() & 1)
    body = Stage(public, certificates, wrapped, texts[0], texts[1], alias, drain, texts[2], texts[3], flag)
    return bytes((len(name),)) + name + generation.rjust(1, b"\0") + body.encode()


@cache
def good_body() -> Stage:
    key = world().keys[0]
    return world().bench.body(key, (), "new", 1)


def sealed(given: Input) -> bytes:
    """The input is the plaintext of an envelope that opens: `u8` says whether it is a record or the PKCS#8 inside one."""
    inner = given.byte() & 1
    plain = given.rest()
    context = EnvelopeContext(HOST, MODULE, fingerprint(), "new", 1, EPOCH + 600)
    material = KeyMaterial(plain) if inner else Bare(plain)
    body = replace(good_body(), envelope=envelope.seal(material, world().recipient.public, context))  # type: ignore[arg-type]
    return b"\3new\1" + body.encode()


class Bare:
    """Bytes in the place of an encoded record."""

    def __init__(self, data: bytes) -> None:
        self.encode = lambda: data


@cache
def fingerprint() -> bytes:
    return hashlib.sha256(world().recipient.public).digest()


def seeds() -> dict[str, bytes]:
    bench = world().bench
    world().fresh()
    assert len(RECIPIENT) == envelope.PRIVATE_SIZE
    key, chain = world().keys[0], bench.authority.chain(world().keys[0])
    ders = [c.public_bytes(Encoding.DER) for c in chain]
    bodies: dict[str, tuple[str, int, Any]] = {
        "activate": ("tls", 3, b""),
        "roll-back": ("tls", 1, b""),
        "retire": ("tls", 2, Retire(60, "refuse").encode()),
        "destroy": ("tls", 1, Destroy(True).encode()),
        "change-root": ("", 0, ChangeRoot(b"n" * 32).encode()),
        "stage": ("new", 1, good_body().encode()),
        "generate": ("new", 1, bench.to_make(names=("dns:www.example.net", "ip:192.0.2.7")).encode()),
        "certify": ("tls", 3, Certify(tuple(ders)).encode()),
    }
    made = {}
    for action, (material, generation, body) in bodies.items():
        command = bench.command(action, material, generation, body)
        words = bytes((len(material),)) + material.encode() + bytes((generation,))
        by = BY_ROOT if action == "change-root" else 0
        made[f"raw-{action}"] = bytes((RAW,)) + (Signer(ROOT) if by else bench.signer).sign(command)
        made[f"payload-{action}"] = bytes((PAYLOAD | by,)) + command.encode()
        made[f"body-{action}"] = bytes((BODY | by, ACTIONS.index(action))) + words + body
    for name, certificates in (("chain", ders), ("bare", [])):
        fields = block(spki(key)) + bytes((len(certificates),)) + blocks(certificates) + block(good_body().envelope)
        words = blocks([b"pin", b"tls", b"extend", b"keep"])
        made[f"stage-{name}"] = bytes((STAGE,)) + b"\3new\1" + fields + words + block(b"alias") + bytes(8) + b"\1"
    for number, delivered in enumerate(world().keys[2:]):
        made[f"key-{number}"] = bytes((KEY, 1)) + pkcs8(delivered)
    made["key-record"] = bytes((KEY, 0)) + KeyMaterial(pkcs8(key)).encode()
    made["identity"] = bytes((IDENTITY,)) + Signed(ModuleIdentity(HOST, MODULE, "m", b"", b"", 1).encode(), b"s" * 64).encode()
    return made
