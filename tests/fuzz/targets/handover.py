"""What a worker takes from the one that it replaces, which its guest may have taken over: records, descriptors, requests.

An input is a row of records, each begun by one byte: which one (`_GOOD`), and what is wrong with it.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
import struct
from functools import cache

from fuzz.harness import Input, block
from fuzz.records import varied
from fuzz.samples import GCM, encoding
from fuzz.world import shows_a_key, world
from hsmvisor_rpc.internal import handover as h
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisord import ck, limits
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.face.journal import CARRIED, raw
from hsmvisord.keystore.pages import GuestObject
from hsmvisord.keystore.persistence import object_record
from hsmvisord.token import making
from hsmvisord.token.secrets import secret_attributes
from hsmvisord.token.token import Token
from hsmvisord.transport.connection import Connection, Ended
from hsmvisord.transport.listener import Listener
from hsmvisord.transport.parking import Parking
from hsmvisord.wire.calls import Call, Mechanism
from hsmvisord.worker.plug import Plug
from hsmvisord.worker.succession import Arrival, Stream, SuccessionFailed, _value

INVARIANT = (
    "what cannot be is refused with SuccessionFailed, nothing else is raised; sessions and objects stay within their limits and "
    "are counted right; a connection that came answers as one that was accepted, and no answer shows 16 bytes of a private key"
)
MAX_LENGTH = 3000
TICKET = b"t" * 16
PROVIDER = SoftwareProvider()

MODULE, APPLICATION, CONNECTION, PAUSE, OBJECT, OPERATION, OWN_OBJECT, MESSAGES = range(8)
VARIED, RAW, BARE, STRANGE = 0x08, 0x10, 0x20, 0x40  #: one field; the payload; no descriptor; a descriptor of no socket


@cache
@cache
def made_of_aes() -> making.Made:
    template = [(ck.CKA_CLASS, ck.CKO_SECRET_KEY), (ck.CKA_KEY_TYPE, ck.CKK_AES), (ck.CKA_VALUE, b"v" * 16)]
    return making.created(template, False, PROVIDER)


def _messages() -> tuple[bytes, ...]:
    """A message-based encryption in the middle of a message, with what it leaves behind."""
    spoken = encoding(0x81)
    state = b"\x0c" + b"i" * 12 + struct.pack(">BBHQ", ck.CKG_GENERATE_COUNTER, 12, 32, 3) + b"i" * 12 + bytes(12)
    option = struct.pack(">HH", CARRIED, len(state)) + state
    return (
        raw(7, option, spoken.request(Call.MESSAGE_ENCRYPT_INIT, 2, Mechanism(ck.CKM_AES_GCM), world().own[0])),
        raw(8, b"", spoken.request(Call.ENCRYPT_MESSAGE_BEGIN, 2, GCM, b"more")),
        raw(9, b"", spoken.request(Call.ENCRYPT_MESSAGE_NEXT, 2, GCM, b"data", 64, 0)),
    )


def good() -> dict[int, Record]:
    spoken = encoding(0x81)
    init = raw(7, b"", spoken.request(Call.SIGN_INIT, 1, Mechanism(ck.CKM_ECDSA), 1))
    sign = raw(8, b"", spoken.request(Call.SIGN, 1, b"d" * 32, 64))
    wait = raw(9, b"", spoken.request(Call.ROTATION_WAIT, 99))
    operation = h.SavedOperation((init,))
    messages = h.SavedOperation(_messages())
    template = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET, ck.CKA_LABEL: b"derived"}
    attributes = secret_attributes(template, b"secret" * 6, ck.CKM_ECDH1_DERIVE)
    values = tuple(map(_value, attributes.values()))
    item = h.SavedObject(1, limits.FIRST_SESSION_OBJECT, tuple(attributes), values)
    aes = made_of_aes()
    own = h.SavedGuestObject(2, object_record(GuestObject(limits.FIRST_SESSION_OBJECT + 1, aes.attributes, aes.key, 0)).encode())
    sessions = (1, 0, ck.CKF_SERIAL_SESSION, 2, 1, ck.CKF_SERIAL_SESSION)
    application = h.SavedApplication(
        ticket=TICKET,
        program="program",
        watermark=2,
        logged_in=False,
        seen_slot_events=0,
        next_session=3,
        next_object=limits.FIRST_SESSION_OBJECT + 2,
        connections=1,
        sessions=sessions,
        objects=(item.encode(),),
        operations=(operation.encode(),),
        guest_role=2,
        guest_objects=(own.encode(),),
    )
    used = json.dumps([["sign", ck.CKM_ECDSA, ["tls", 2]]])
    connection = h.SavedConnection(TICKET, 5, 0x81, 8, "peer", "program", 1, False, used, sign, b"", (wait,), (1000,))
    return {
        MODULE: h.SavedModule(7, 0), APPLICATION: application, CONNECTION: connection, PAUSE: h.Pause(0), OBJECT: item,
        OPERATION: operation, OWN_OBJECT: own, MESSAGES: messages,
    }  # fmt: skip


def record(which: int, head: int, given: Input) -> bytes:
    """The encoding of one record of the stream."""
    made = good()[which]
    try:
        if head & VARIED:
            made = varied(made, given)
        application = good()[APPLICATION]
        assert isinstance(application, h.SavedApplication)
        if which == OBJECT:
            made = h.SavedApplication(**(vars(application) | {"objects": (made.encode(),)}))
        elif which == OWN_OBJECT:
            made = h.SavedApplication(**(vars(application) | {"guest_objects": (made.encode(),)}))
        elif which in (OPERATION, MESSAGES):
            made = h.SavedApplication(**(vars(application) | {"operations": (made.encode(),)}))
        return made.encode()
    except (OverflowError, MalformedRecord):
        return b""


@cache
def listener() -> tuple[Listener, Parking]:
    """Its reactor's threads are not started: what they would be told is done here."""
    parking = Parking(lambda: 0.0)
    here, _ = socket.socketpair()
    return Listener(here, world().token(), parking, lambda c: None, lambda c: None), parking


def run(data: bytes) -> None:
    given = Input(data)
    token = world().token()
    old, new = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    old.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    peers: list[socket.socket] = []
    while given.more and len(peers) < 8:
        head = given.byte()
        which = (head & 7) % len(good())
        payload = given.block() if head & RAW else record(which, head, given)
        rights = []
        if which == CONNECTION and not head & BARE:
            here, there = socket.socketpair()
            there.setblocking(False)
            peers.append(there)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1 if head & STRANGE else here.fileno()]))]
        old.sendmsg([struct.pack(">I", len(payload)) + payload], rights)
        if which == CONNECTION and not head & BARE:
            here.close()
    old.close()
    made: list[Connection] = []
    try:
        arrive(token, new, made)
        serve(token, made)
    finally:
        listener()[0].reactor._inbox.clear()
        for connection in made:
            connection.end()
        for peer in peers:
            with contextlib.suppress(OSError):
                assert not shows_a_key(peer.recv(1 << 20))
            peer.close()
        new.close()


def arrive(token: Token, sock: socket.socket, made: list[Connection]) -> None:
    shared, parking = listener()

    def make(sock: socket.socket, peer: str, refused: bool) -> Connection:
        made.append(Connection(sock, peer, token, parking, refused, lambda c: None))
        return made[-1]

    stream = Stream(sock)
    with contextlib.suppress(SuccessionFailed):
        arrival = Arrival(token, shared, stream, make, Plug(lambda sock, peer: None, lambda record, descriptors: None))
        while arrival.take():
            pass
    for descriptor in stream._descriptors:
        socket.close(descriptor)
    inbox = shared.reactor._inbox
    while inbox:
        inbox.popleft()()
    for connection in made:
        if connection in shared.all():
            shared.forget(connection)


def serve(token: Token, made: list[Connection]) -> None:
    """The reactor's leader."""
    for connection in made:
        assert connection.caller is None or connection.caller.codec.ulong_size in (4, 8)
        with contextlib.suppress(Ended):
            for _ in range(20):
                if not connection.work():
                    break
                if connection.pending:
                    connection.work_pending()
    applications = token.applications()
    assert token.sessions == sum(len(a.sessions) for a in applications) <= token.settings.max_sessions
    for application in applications:
        assert len(application._objects) <= limits.MAX_SESSION_OBJECTS
        assert all(0 < handle <= limits.LAST_HANDLE for handle in application.sessions)
        assert all(limits.FIRST_SESSION_OBJECT <= handle <= limits.LAST_HANDLE for handle in application._objects)


def seeds() -> dict[str, bytes]:
    begin, end = bytes((MODULE, APPLICATION, CONNECTION)), bytes((PAUSE,))
    made = {"whole": begin + end, "bare": begin + bytes((CONNECTION | BARE,)), "strange": begin + bytes((CONNECTION | STRANGE,))}
    for which, one in good().items():
        for field in range(len(vars(one))):
            change = bytes((field,)) + b"\0\0\0\0\0\0\1\2" + block(b"[[1]]")
            made[f"{which}-{field}"] = bytes((MODULE, which | VARIED)) + change + bytes((APPLICATION, CONNECTION)) + end
        made[f"{which}-raw"] = begin + bytes((which | RAW,)) + block(one.encode() if which < OBJECT else b"text")
    return made
