"""What fuzzing found, one test for each, so that it stays found (control_domain/docs/fuzzing.md)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from fuzz.samples import encoding
from fuzz.targets import database as database_target
from fuzz.targets import dispatcher, handover, state
from fuzz.targets.dispatcher import Guest, handle
from fuzz.world import world
from hsmvisor.host import reports
from hsmvisor.host.database import Database
from hsmvisor.serving.errors import Broken
from hsmvisor_rpc.internal import handover as h
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.keystore import persistence
from hsmvisord.keystore.chain import parse_chain
from hsmvisord.keystore.records import CertificateRecord
from hsmvisord.keystore.vault import UnsealError
from hsmvisord.token.catalogue import Index
from hsmvisord.token.secrets import secret_attributes
from hsmvisord.token.token import Token
from hsmvisord.transport.connection import Connection
from hsmvisord.wire.calls import Attribute, Call
from hsmvisord.worker.plug import Plug
from hsmvisord.worker.succession import Arrival, Stream, SuccessionFailed
from support.certificates import Authority, new_key, spki
from support.keystores import Bench
from support.wire_client import Refused


def begun() -> tuple[Guest, Caller]:
    guest = Guest(world().token())
    return guest, guest.caller(0)


def asked(caller: Caller, call: Call, *args: object) -> tuple[object, ...]:
    spoken = encoding(0x81, caller.codec.ulong_size)
    request = caller.codec.decode(7, b"", spoken.request(call, *args))
    reply = face.handle(caller, request, lambda request, ready: None)
    assert reply is not None
    return spoken.reply(call, reply[12:])


# ---- the guest's side -------------------------------------------------------------------------------------------------


def test_a_reply_never_exceeds_a_message() -> None:
    """256 times the value of one large certificate made an answer of 16 MiB."""
    _, caller = begun()
    certificate = handle("large", ck.CKO_CERTIFICATE)
    few = ((ck.CKA_VALUE, 1 << 16),) * 40
    assert len(asked(caller, Call.GET_ATTRIBUTE_VALUE, 1, certificate, few)[0]) == 40  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        asked(caller, Call.GET_ATTRIBUTE_VALUE, 1, certificate, few * 2)
    assert refused.value.rv == ck.CKR_HOST_MEMORY
    assert asked(caller, Call.GET_SESSION_INFO, 1)


def test_a_large_search_is_not_remembered() -> None:
    """The values of nested templates did not count: 128 remembered searches could hold 128 MiB."""
    guest, caller = begun()
    view = guest.token.index.view(guest.token.watermark)
    for byte in range(4):
        nested = (Attribute(ck.CKA_LABEL, bytes((byte,)) * 200_000),)
        asked(caller, Call.FIND_ONCE, 1, (Attribute(ck.CKA_WRAP_TEMPLATE, nested),), 5)
    assert not view._answers
    asked(caller, Call.FIND_ONCE, 1, (Attribute(ck.CKA_LABEL, b"tls"),), 5)
    assert len(view._answers) == 1


def test_a_derived_secrets_texts_are_bounded() -> None:
    """1024 session objects with labels of 1 MiB each."""
    template = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET}
    secret_attributes(template | {ck.CKA_LABEL: b"l" * limits.MAX_VALUE}, b"s" * 32, 1)
    with pytest.raises(CkError) as refused:
        secret_attributes(template | {ck.CKA_LABEL: b"l" * (limits.MAX_VALUE + 1)}, b"s" * 32, 1)
    assert refused.value.rv == ck.CKR_ATTRIBUTE_VALUE_INVALID


def test_session_handles_fit_32_bits() -> None:
    """Restoring a session with the last handle made the next one 2^31."""
    guest = Guest(world().token())
    caller = guest.caller(6)
    asked(caller, Call.HELLO, 4, 0, None, 1, b"", 3)
    asked(caller, Call.RESTORE_SESSIONS, (limits.LAST_HANDLE, 0, 4))
    with pytest.raises(Refused) as refused:
        asked(caller, Call.OPEN_SESSION, 0, 4)
    assert refused.value.rv == ck.CKR_SESSION_COUNT
    assert guest.token.sessions == 1
    dispatcher.run(dispatcher.seeds()["last-handle"])


# ---- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["state", "profile", "mode", "key", "activations"])
def test_a_sealed_record_that_this_release_cannot_serve_is_named_so(field: str) -> None:
    """A word of another release ended the start with a KeyError or a ValueError, or only at the first search."""
    bench = world().bench
    record = state.MaterialRecord.decode(bench.vault.open("material/tls", world().stored["material/tls"]))
    generation = state.GenerationRecord.decode(record.generations[-1])
    if field in vars(generation):
        changed = state.replace(generation, **{field: "new" if field == "state" else 999})
        record = state.replace(record, generations=(changed.encode(),))
    else:
        record = state.replace(record, **{field: (1, 2, 3) if field == "activations" else "new"})
    version = int.from_bytes(world().stored["material/tls"][:8], "big")
    stored = world().stored | {"material/tls": bench.vault.seal("material/tls", version, record.encode())}
    with pytest.raises(UnsealError, match="another"):
        persistence.load(stored, bench.vault, bench.provider, world().version)


def test_an_issuer_whose_name_cannot_be_read_is_not_taken() -> None:
    """The parser looks at a name only when it is asked for: such a certificate was taken, and ended the worker when it came into
    service."""
    bench, key = Bench(), new_key("p256")
    leaf, issuer = Authority().chain(key)
    der = issuer.public_bytes(Encoding.DER)
    at = der.rindex(b"hsmvisor test intermediate")
    broken = der[:at] + b"\xff" + der[at + 1 :]
    with pytest.raises(Refusal) as refused:
        parse_chain((leaf.public_bytes(Encoding.DER), broken), spki(key), bench.now)
    assert refused.value.reason is Reason.MALFORMED
    record = CertificateRecord(9, True, broken)
    stored = dict(world().stored)
    name = next(name for name in stored if name.startswith("certificate/"))
    stored[name] = world().bench.vault.seal(name, int.from_bytes(stored[name][:8]), record.encode())
    with pytest.raises(UnsealError, match="another"):
        persistence.load(stored, world().bench.vault, world().bench.provider, world().version)


def test_an_issuer_whose_key_nobody_here_knows_is_still_found() -> None:
    """A certificate that another release had taken, with a key of an unknown algorithm, ended the start."""
    bench = world().bench
    known = bytes.fromhex("06072a8648ce3d0201")  # id-ecPublicKey
    stored = dict(world().stored)
    for name in [name for name in stored if name.startswith("certificate/")]:
        record = CertificateRecord.decode(bench.vault.open(name, stored[name]))
        if record.authority:
            at = record.der.rindex(known)
            der = record.der[:at] + known[:-1] + b"\x7f" + record.der[at + len(known) :]
            version = int.from_bytes(stored[name][:8], "big")
            stored[name] = bench.vault.seal(name, version, state.replace(record, der=der).encode())
    assert stored != world().stored
    opened = persistence.load(stored, bench.vault, bench.provider, world().version)[0]
    issuers = [
        o
        for o in Index(opened).by_handle.values()
        if o.attributes.get(ck.CKA_CERTIFICATE_CATEGORY) == ck.CK_CERTIFICATE_CATEGORY_AUTHORITY
    ]
    assert len(issuers) == 1 and len(issuers[0].attributes[ck.CKA_ID]) == 20


@pytest.mark.parametrize("version", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_a_damaged_schema_number_is_not_the_directorys_fault(version: bytes, tmp_path: Path) -> None:
    """0 was told as a fault of the directory's owner or disk; a negative one ended in an IndexError."""
    path = tmp_path / "state.db"
    good = database_target.good()
    path.write_bytes(good[:60] + version + good[64:])
    before = path.read_bytes()
    with pytest.raises(Broken) as broken:
        Database(path)
    assert broken.value.reason == "STATE_CORRUPT"
    assert path.read_bytes() == before


def test_damaged_text_in_the_state_file_is_damage() -> None:
    """A UnicodeDecodeError, where SQLite quoted the file."""
    database_target.run(bytes.fromhex("eff87f000165081302ce1bec7b5d28"))


@pytest.mark.parametrize("at", [18, 19])
def test_a_damaged_format_is_not_the_directorys_fault(at: int, tmp_path: Path) -> None:
    """SQLite takes a file of a format to come for one that may be read alone."""
    content = bytearray(database_target.good())
    content[at] = 3
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(Broken) as broken:
        Database(tmp_path / "state.db")
    assert broken.value.reason == "STATE_CORRUPT"
    assert (tmp_path / "state.db").read_bytes() == content


# ---- a worker that was taken over -------------------------------------------------------------------------------------


def test_the_names_in_a_workers_report_are_cleaned() -> None:
    """Values were; names stood in events and the audit log as they came."""
    assert reports.plain('{"a\\u0007\\n\\ud800": 1}') == {"a???": 1}


def test_frames_before_a_broken_one_are_given_however_they_come() -> None:
    """They were lost when they came together with it."""
    good = encode_frame(Frame(1, Kind.REPLY, m.Done().encode()))
    for pieces in ([good + b"\0\0\0\0" * 3], [good, b"\0\0\0\0" * 3]):
        reader, found = FrameReader(), []
        with pytest.raises(MalformedRecord):
            for piece in pieces:
                found += reader.feed(piece)
        assert len(found) == 1


def succeeded(*records: Record, descriptor: int = -1) -> Token:
    """A successor that is given these; raises SuccessionFailed."""
    token = world().token()
    old, new = socket.socketpair()
    here, _there = socket.socketpair()
    shared, parking = handover.listener()
    with old, new, here, _there:
        giving = Stream(old)
        for record in records:
            rights = [here.fileno() if descriptor < 0 else descriptor] if isinstance(record, h.SavedConnection) else []
            giving.send(record, rights)
        old.shutdown(socket.SHUT_WR)

        def make(sock: socket.socket, peer: str, refused: bool) -> Connection:
            return Connection(sock, peer, token, parking, refused, lambda c: None)

        Arrival(token, shared, Stream(new), make, Plug(lambda sock, peer: None, lambda record, descriptors: None)).take()
        shared.reactor._inbox.clear()
        return token


APPLICATION, CONNECTION = handover.good()[handover.APPLICATION], handover.good()[handover.CONNECTION]


def with_changes(record: Record, **changes: object) -> Record:
    return state.replace(record, **changes)  # type: ignore[type-var]


def test_what_a_successor_takes() -> None:
    assert succeeded(APPLICATION, CONNECTION).sessions == 2


@pytest.mark.parametrize(
    "records",
    [
        (with_changes(CONNECTION, application=b"", used="[" * 5000),),
        (with_changes(CONNECTION, application=b"", used='[["sign", Infinity, null]]'),),
        (with_changes(CONNECTION, application=b"", used='[["sign", 1, {"a": 1}]]'),),
        (with_changes(CONNECTION, application=b"", ulong_size=1 << 60),),
        (with_changes(CONNECTION, application=b"", greeting=999),),
        (APPLICATION, with_changes(CONNECTION, greeting=h.NOT_GREETED)),
        (APPLICATION, APPLICATION),
        (with_changes(APPLICATION, sessions=(1, 0, 4, 1, 0, 4)),),
        (with_changes(APPLICATION, sessions=(1 << 40, 0, 4)),),
        (with_changes(APPLICATION, next_object=1 << 40),),
        (with_changes(APPLICATION, guest_role=9),),
        (with_changes(APPLICATION, guest_objects=(h.SavedGuestObject(2, b"no record").encode(),)),),
        (with_changes(APPLICATION, objects=(h.SavedObject(1, limits.FIRST_SESSION_OBJECT, (0x40000211,), (b"ytext",)).encode(),)),),
    ],
    ids=[
        "deep",
        "infinite",
        "no-pair",
        "ulong",
        "greeting",
        "not-greeted",
        "twice",
        "handle-twice",
        "handle",
        "next",
        "role",
        "own-object",
        "object",
    ],
)
def test_a_successor_refuses_what_cannot_be(records: tuple[Record, ...]) -> None:
    """These raised other errors, lost count of sessions, or were believed."""
    with pytest.raises(SuccessionFailed):
        succeeded(*records)


def test_a_successor_refuses_what_is_no_socket(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file, pytest.raises(SuccessionFailed):
        succeeded(APPLICATION, CONNECTION, descriptor=file.fileno())
