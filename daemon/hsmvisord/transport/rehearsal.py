"""A module that lives for a moment in the launcher, before it forks: what its workers will do has been done once.

Lazily made tables of the interpreter and of OpenSSL then exist in pages that all workers share, and a worker's first signature
comes sooner (measured: 1.2 MB less for each worker).  Its key is thrown away and nobody ever trusts it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor_rpc.sealed import commands, envelope
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import Action, Command, Signer, Stage

from hsmvisord import ck
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.face import face
from hsmvisord.face.native import NEW
from hsmvisord.keystore import persistence
from hsmvisord.keystore.keystore import Cause, Keystore
from hsmvisord.keystore.persistence import SealedChange
from hsmvisord.keystore.vault import KEY_SIZE, Vault
from hsmvisord.token.token import Token
from hsmvisord.transport.connection import Connection, Ended
from hsmvisord.transport.parking import Parking
from hsmvisord.wire.calls import Attribute, Call, Request
from hsmvisord.wire.frames import HEADER

TIMES = 40  #: often enough for the interpreter to specialise what it runs (PEP 659): else each worker writes into the code's pages
DELIVERIES = 12  #: each destroys the one before: a search finds one key

_ID, _HOST = bytes(16), bytes(32)
_SIGN_ONCE = struct.Struct(">IIIIQQBQBI32sI")


class Rehearsal:
    def __init__(self) -> None:
        self._root = Ed25519PrivateKey.generate()
        self._provider, self._vault = SoftwareProvider(), Vault(_ID, bytes(KEY_SIZE))
        self._stored: dict[str, bytes] = {}
        self._keystore = Keystore.create(
            _ID, _HOST, commands.raw_public(self._root.public_key()), 0, self._vault, self._provider, time.time, self._persist
        )
        self._token = Token("rehearsal", self._keystore, self._provider, time.time, time.monotonic)

    def _persist(self, change: SealedChange, request_id: str, result: bytes) -> None:
        self._stored.update(change.put)
        for name in change.delete:
            self._stored.pop(name, None)

    def run(self) -> None:
        for generation in range(1, DELIVERIES + 1):
            self._deliver(generation)
        for _ in range(TIMES):
            persistence.load(self._stored, self._vault, self._provider, self._keystore.state.version)
        for _ in range(TIMES):
            self._greet()
        self._sign()
        assert [(cell.count, cell.errors) for cell in self._token.statistics().values()] == [(TIMES, 0)], "the rehearsal failed"

    def _deliver(self, generation: int) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        pkcs8 = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        until = int(time.time()) + 600
        recipient = self._keystore.recipient_public
        context = envelope.EnvelopeContext(_HOST, _ID, envelope.recipient_fingerprint(recipient), "key", generation, until)
        sealed = envelope.seal(envelope.KeyMaterial(pkcs8), recipient, context)
        self._execute(Action.STAGE, generation, until, Stage(public, (), sealed, "pin", "any", b"", 0, "extend", "keep", True))
        self._execute(Action.ACTIVATE, generation, until, None)
        if generation > 1:
            self._execute(Action.DESTROY, generation - 1, until, commands.Destroy(False))

    def _execute(self, action: Action, generation: int, until: int, body: Record | None) -> None:
        sequence = self._keystore.state.sequence + 1
        command = Command(action, _HOST, _ID, sequence, until - 600, until, "key", generation, body.encode() if body else b"")
        self._keystore.execute(Signer(self._root).sign(command), lambda command, signer: Cause())

    def _greet(self) -> None:
        """An application begins, opens a session and ends."""
        ours, theirs = socket.socketpair()
        connection = Connection(ours, "rehearsal", self._token, Parking(time.monotonic), False, lambda connection: None)
        with theirs:
            theirs.send(b"\x81")
            connection.receive()
            caller = connection.caller
            assert caller is not None
            for call, args in (
                (Call.HELLO, (8, NEW, b"", 0, b"rehearsal", 1)),
                (Call.OPEN_SESSION, (0, ck.CKF_SERIAL_SESSION)),
                (Call.FINALIZE, (0,)),
            ):
                face.handle(caller, Request(1, call, args), lambda request, ready: None)
        with contextlib.suppress(Ended):
            connection.receive()
        connection.end()

    def _sign(self) -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(ours, "rehearsal", self._token, Parking(time.monotonic), False, lambda connection: None)
        with theirs:
            theirs.send(b"\x81")
            connection.receive()
            caller = connection.caller
            assert caller is not None
            caller.application_or_none = self._token.new_application("rehearsal")
            session = caller.application.open_session(0, ck.CKF_SERIAL_SESSION)
            for _ in range(TIMES):
                (handle,) = self._find(connection, session)
                size = _SIGN_ONCE.size - HEADER.size
                theirs.send(_SIGN_ONCE.pack(1, 0, size, Call.SIGN_ONCE, session, ck.CKM_ECDSA, 0, handle, 1, 32, _HOST, 64))
                connection.receive()
                connection.alone = True  # however long it takes
                connection.work()
                self._sign_as_lanes_do(connection)
        with contextlib.suppress(Ended):
            connection.receive()
        connection.end()

    @staticmethod
    def _sign_as_lanes_do(connection: Connection) -> None:
        if connection.prepared is not None:
            connection.prepared.plan.key.sign(_HOST)
            connection.prepared = None

    def _find(self, connection: Connection, session: int) -> tuple[int, ...]:
        template = (Attribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), Attribute(ck.CKA_LABEL, b"key"))
        caller = connection.caller
        assert caller is not None
        for call, args in (
            (Call.FIND_OBJECTS_INIT, (session, template)),
            (Call.FIND_OBJECTS, (session, 8)),
            (Call.FIND_OBJECTS_FINAL, (session,)),
        ):
            face.handle(caller, Request(1, call, args), lambda request, ready: None)
        return tuple(o.handle for o in caller.application.view().find(template))
