"""The whole dispatcher over a real token: several applications, in turn, say whatever the input says, while the operator acts.

An input is a row of steps, each begun by one byte: three bits say which caller, the rest what happens (`_STEPS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fuzz.harness import Input, block
from fuzz.samples import GCM, GCM_TAGGED, arguments, encoding, messages
from fuzz.world import PIN, shows_a_key, world
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisord import ck, limits
from hsmvisord import limits as token_limits
from hsmvisord.face import face, journal
from hsmvisord.face.caller import Caller
from hsmvisord.keystore.keystore import Cause
from hsmvisord.token.token import Token
from hsmvisord.wire.calls import MORE_FOLLOWS, Attribute, BadMessage, Call, Mechanism, Request
from hsmvisord.wire.frames import HEADER
from hsmvisord.wire.handshake import negotiate
from hsmvisord.wire.p11kit import P11KitCodec
from support.wire_client import Refused

INVARIANT = (
    "every request has one answer, which decodes by its own call's signature, is a known CK_RV other than CKR_GENERAL_ERROR or has "
    "the values of CKR_OK, fits one message and shows no 16 bytes of a private key; nothing else is raised; sessions, objects and "
    "journals stay within their limits, and all is given back when the callers leave"
)
MAX_LENGTH = 2000
STEPS = 64  #: of one input

#: The first byte of each caller; the first six have begun and hold one session, handle 1.
GREETINGS = (0x81, 0x81, 0x81, 0, 1, 2, 0x81, 2)
BEGUN = 6
SLOTS = (0, 1, 0, 0, 0, 1)  #: of their sessions; in slot 1 the user is logged in
TICKET = b"ticket of caller"  #: 16 bytes: stands for the ticket of the caller whose session handle 1 it would open
KNOWN = frozenset(value for name, value in vars(ck).items() if name.startswith("CKR_"))

FRAME, OPTIONS, TIME, OPERATE, LEAVE, WAKE = range(6)


@dataclass
class Guest:
    """The callers of one input, and what waits for them."""

    token: Token
    callers: dict[int, Caller] = field(default_factory=dict)
    parked: list[tuple[Caller, Request, Callable[[], tuple[Any, ...] | None]]] = field(default_factory=list)

    def caller(self, number: int) -> Caller:
        if number not in self.callers:
            codec, _ = negotiate(GREETINGS[number])
            caller = self.callers[number] = Caller(self.token, codec, "fuzz")
            self.token.add_counters(caller.counters)
            if number < BEGUN:
                self.begin(caller, GREETINGS[number], SLOTS[number])
        return self.callers[number]

    def begin(self, caller: Caller, first: int, slot: int) -> None:
        spoken = encoding(first)
        greeting = Call.HELLO if first >= 0x80 else Call.INITIALIZE
        self.say(caller, b"", spoken.request(greeting, *arguments(greeting)))
        self.say(caller, b"", spoken.request(Call.OPEN_SESSION, slot, ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION))
        caller.application.guest.role = ck.CKU_USER if slot else None

    def say(self, caller: Caller, options: bytes, message: bytes) -> None:
        frame = (7, options, message)
        try:
            request = caller.codec.decode(*frame)
        except BadMessage as error:
            self.check(caller, None, caller.codec.error(error.request_id, error.rv))
            return
        parked = len(self.parked)
        reply = face.handle(caller, request, lambda request, ready: self.parked.append((caller, request, ready)))
        if request.call in journal.NOTED:
            journal.note(caller, request, frame)
        if reply is None:
            assert len(self.parked) == parked + 1
        else:
            self.check(caller, request, reply)

    def check(self, caller: Caller, request: Request | None, reply: bytes) -> None:
        ident, options, size = HEADER.unpack_from(reply)
        assert (ident, options, size) == (7, 0, len(reply) - HEADER.size)
        assert size <= limits.MAX_MESSAGE, f"a reply of {size} bytes"
        assert not shows_a_key(reply), "a reply with a private key"
        first = caller.codec.client_version if isinstance(caller.codec, P11KitCodec) else 0x81
        call = request.call if request else Call.GET_INFO
        try:
            values = encoding(first, caller.codec.ulong_size).reply(call, reply[HEADER.size :])
        except Refused as refused:
            assert refused.rv in KNOWN, f"CK_RV 0x{refused.rv:x}"
            assert refused.rv != ck.CKR_OK
            # p11-kit's own answer to a C_Initialize without the magic; from a handler it would be a fault
            assert refused.rv != ck.CKR_GENERAL_ERROR or request is None
            return
        assert request is not None, "an answer to what could not be read"
        if request.call is Call.OPEN_SESSION:
            assert 0 < values[0] <= token_limits.LAST_HANDLE, f"session handle {values[0]}"

    def wake(self) -> None:
        """What the clock thread does after a change."""
        waiting, self.parked = self.parked, []
        for caller, request, ready in waiting:
            reply = face.finish(caller, request, ready)
            if reply is None:
                self.parked.append((caller, request, ready))
            else:
                self.check(caller, request, reply)

    def leave(self, number: int) -> None:
        caller = self.callers.pop(number, None)
        if caller is None:
            return
        self.parked = [waiter for waiter in self.parked if waiter[0] is not caller]
        if caller.application_or_none is not None:
            self.token.leave(caller.application_or_none)
        self.token.remove_counters(caller.counters)

    def ticket(self, message: bytes) -> bytes:
        """Puts the ticket of an application in the place of the words for it."""
        at = message.find(TICKET)
        if at < 0:
            return message
        number = message[at + len(TICKET)] % len(GREETINGS) if len(message) > at + len(TICKET) else 0
        application = self.callers[number].application_or_none if number in self.callers else None
        return message.replace(TICKET, application.ticket) if application else message

    def within_limits(self) -> None:
        token = self.token
        applications = token.applications()
        assert token.sessions == sum(len(a.sessions) for a in applications) <= token.settings.max_sessions
        for application in applications:
            assert len(application._objects) + len(application.guest.items) <= token_limits.MAX_SESSION_OBJECTS
            kept = sum(len(v) for o in application._objects.values() for v in o.attributes.values() if isinstance(v, bytes))
            assert kept <= len(application._objects) * token_limits.MAX_SECRET * 2, f"{kept} bytes of session objects"
            for operation in application.operations():
                size = sum(map(len, operation.journal.frames)) if operation.journal else 0
                assert size <= token_limits.MAX_JOURNAL
                assert operation.journal is None or operation.journal.size == size


def operate(what: int) -> None:
    """One act of the operator, from outside of the guest."""
    bench = world().bench
    bench.now += 1
    try:
        match what % 8:
            case 0:
                bench.execute("activate", "tls", 3)
            case 1:
                bench.execute("roll-back", "tls", 1)
            case 2:
                bench.execute("destroy", "tls", 1)
            case 3:
                bench.keystore.set_token_present(False)
            case 4:
                bench.keystore.set_token_present(True)
            case 5:
                bench.push(2, world().keys[0], "ed", profile="tls", mode="pin")
            case 6:
                bench.keystore.set_pin(b"", Cause())
            case 7:
                bench.keystore.tick()
    except Refusal:
        pass


def run(data: bytes) -> None:
    given = Input(data)
    with_pin = bool(given.byte() & 1)
    token = world().token(with_pin)
    faults: list[str] = []
    token.on_fault = lambda call, error: faults.append(f"{call}: {error!r}")
    guest = Guest(token)
    for _ in range(STEPS):
        if not given.more:
            break
        head = given.byte()
        number, what = head & 7, head >> 3
        if what == TIME:
            world().bench.monotonic += given.byte() / 8
            world().bench.now += given.byte()
        elif what == OPERATE:
            operate(given.byte())
        elif what == LEAVE:
            guest.leave(number)
        elif what == WAKE:
            guest.wake()
        else:
            options = given.take(given.byte()) if what == OPTIONS else b""
            guest.say(guest.caller(number), options, guest.ticket(given.block()))
        assert not faults, faults[0]
    guest.within_limits()
    for number in list(guest.callers):
        guest.leave(number)
    assert not token.applications()
    assert token.sessions == 0


# ---- seeds ------------------------------------------------------------------------------------------------------------


def step(number: int, what: int, *rest: bytes) -> bytes:
    return bytes((number | what << 3,)) + b"".join(rest)


def said(number: int, *calls: tuple[Any, ...]) -> bytes:
    """Requests of one caller, each a call and its arguments."""
    spoken = encoding(GREETINGS[number])
    return b"".join([step(number, FRAME, block(spoken.request(*call))) for call in calls])


def handle(label: str, kind: int) -> int:
    found = world().token().index.view(1 << 30).find(((ck.CKA_CLASS, kind), (ck.CKA_LABEL, label.encode())))
    return found[0].handle


def _operations() -> dict[str, tuple[tuple[Any, ...], ...]]:
    """Dialogues that reach the operations, by name."""
    tls, rsa, ed = (handle(label, ck.CKO_PRIVATE_KEY) for label in ("tls", "rsa", "ed"))
    public, certificate = handle("rsa", ck.CKO_PUBLIC_KEY), handle("tls", ck.CKO_CERTIFICATE)
    ecdsa, digest = Mechanism(ck.CKM_ECDSA), b"d" * 32
    pss = Mechanism(ck.CKM_RSA_PKCS_PSS, (ck.CKM_SHA256, 2, 32))
    oaep = Mechanism(ck.CKM_RSA_PKCS_OAEP, (ck.CKM_SHA256, 2, 1, b""))
    derive = Mechanism(ck.CKM_ECDH1_DERIVE, (1, b"", b"\4" + b"p" * 64))
    template = (Attribute(ck.CKA_CLASS, ck.CKO_SECRET_KEY), Attribute(ck.CKA_KEY_TYPE, ck.CKK_GENERIC_SECRET))
    everything = ((ck.CKA_CLASS, 8), (ck.CKA_VALUE, 4096), (ck.CKA_ID, 20), (ck.CKA_ALLOWED_MECHANISMS, 999), (ck.CKA_LABEL, None))
    return {
        "sign": ((Call.SIGN_INIT, 1, ecdsa, tls), (Call.SIGN, 1, digest, None), (Call.SIGN, 1, digest, 64)),
        "sign-parts": (
            (Call.SIGN_INIT, 1, Mechanism(ck.CKM_SHA256_RSA_PKCS), rsa),
            (Call.SIGN_UPDATE, 1, b"part"),
            (Call.SIGN_FINAL, 1, 256),
        ),
        "sign-pss": ((Call.SIGN_INIT, 1, pss, rsa), (Call.SIGN, 1, digest, 256)),
        "sign-ed": ((Call.SIGN_INIT, 1, Mechanism(ck.CKM_EDDSA), ed), (Call.SIGN, 1, b"text", 64)),
        "verify": ((Call.VERIFY_INIT, 1, Mechanism(ck.CKM_RSA_PKCS), public), (Call.VERIFY, 1, digest, b"s" * 256)),
        "encrypt": ((Call.ENCRYPT_INIT, 1, oaep, public), (Call.ENCRYPT, 1, b"plain", 256)),
        "decrypt": ((Call.DECRYPT_INIT, 1, oaep, rsa), (Call.DECRYPT, 1, b"c" * 256, 256)),
        "raw": ((Call.DECRYPT_INIT, 1, Mechanism(ck.CKM_RSA_X_509), rsa), (Call.DECRYPT, 1, b"\0" * 255 + b"\2", 256)),
        "derive": ((Call.DERIVE_KEY, 1, derive, tls, template),),
        "digest": ((Call.DIGEST_INIT, 1, Mechanism(ck.CKM_SHA256)), (Call.DIGEST_UPDATE, 1, b"a"), (Call.DIGEST_FINAL, 1, 32)),
        "find": ((Call.FIND_OBJECTS_INIT, 1, ()), (Call.FIND_OBJECTS, 1, 5), (Call.FIND_OBJECTS_FINAL, 1)),
        "read-private": ((Call.GET_ATTRIBUTE_VALUE, 1, tls, everything),),
        "read-rsa": ((Call.GET_ATTRIBUTE_VALUE, 1, rsa, ((ck.CKA_MODULUS, 256), (ck.CKA_PRIVATE_EXPONENT, 256))),),
        "read-certificate": ((Call.GET_ATTRIBUTE_VALUE, 1, certificate, everything), (Call.GET_OBJECT_SIZE, 1, certificate)),
        "read-much": ((Call.GET_ATTRIBUTE_VALUE, 1, handle("large", ck.CKO_CERTIFICATE), ((ck.CKA_VALUE, 1 << 16),) * 60),),
        "login": ((Call.LOGIN, 1, 1, PIN), (Call.LOGIN, 1, 1, b"wrong"), (Call.LOGOUT, 1)),
        "wait": ((Call.WAIT_FOR_SLOT_EVENT, 0),),
        "copy": ((Call.COPY_OBJECT, 1, tls, ()), (Call.DESTROY_OBJECT, 1, tls), (Call.WRAP_KEY, 1, ecdsa, tls, rsa, 100)),
    }


def _own() -> dict[str, tuple[tuple[Any, ...], ...]]:
    """Dialogues with the guest's own token, by name."""
    aes, wrapper, private, public = world().own[:4]
    token = (Attribute(ck.CKA_TOKEN, True),)
    new = (Attribute(ck.CKA_VALUE_LEN, 16), Attribute(ck.CKA_ENCRYPT, True), Attribute(ck.CKA_SENSITIVE, False))
    data = (Attribute(ck.CKA_CLASS, ck.CKO_DATA), Attribute(ck.CKA_VALUE, b"content"))
    curve = (Attribute(ck.CKA_EC_PARAMS, bytes.fromhex("06082a8648ce3d030107")), Attribute(ck.CKA_VERIFY, True))
    secret = (Attribute(ck.CKA_CLASS, ck.CKO_SECRET_KEY), Attribute(ck.CKA_KEY_TYPE, ck.CKK_AES))
    cbc, kw = Mechanism(ck.CKM_AES_CBC_PAD, b"i" * 16), Mechanism(ck.CKM_AES_KEY_WRAP)
    everything = tuple((kind, 64) for kind in (ck.CKA_CLASS, ck.CKA_VALUE, ck.CKA_PRIVATE_EXPONENT, ck.CKA_CHECK_VALUE))
    return {
        "generate": ((Call.GENERATE_KEY, 1, Mechanism(ck.CKM_AES_KEY_GEN), new), (Call.FIND_OBJECTS_INIT, 1, secret)),
        "generate-stored": ((Call.GENERATE_KEY, 1, Mechanism(ck.CKM_AES_KEY_GEN), new + token),),
        "pair": ((Call.GENERATE_KEY_PAIR, 1, Mechanism(ck.CKM_EC_KEY_PAIR_GEN), curve, (Attribute(ck.CKA_SIGN, True),)),),
        "create": ((Call.CREATE_OBJECT, 1, data + token), (Call.CREATE_OBJECT, 1, (*secret, Attribute(ck.CKA_VALUE, b"v" * 16)))),
        "change": ((Call.SET_ATTRIBUTE_VALUE, 1, aes, (Attribute(ck.CKA_LABEL, b"x"),)), (Call.DESTROY_OBJECT, 1, public)),
        "copy-own": ((Call.COPY_OBJECT, 1, aes, (Attribute(ck.CKA_TOKEN, False),)),),
        "read-own": ((Call.GET_ATTRIBUTE_VALUE, 1, aes, everything), (Call.GET_ATTRIBUTE_VALUE, 1, private, everything)),
        "crypt": ((Call.ENCRYPT_INIT, 1, cbc, aes), (Call.ENCRYPT_UPDATE, 1, b"x" * 20, 64), (Call.ENCRYPT_FINAL, 1, 64)),
        "open": ((Call.DECRYPT_INIT, 1, cbc, aes), (Call.DECRYPT, 1, b"c" * 32, 64)),
        "mac": ((Call.SIGN_INIT, 1, Mechanism(ck.CKM_AES_CMAC), aes), (Call.SIGN, 1, b"text", 16)),
        "sign-own": ((Call.SIGN_INIT, 1, Mechanism(ck.CKM_ECDSA), private), (Call.SIGN, 1, b"d" * 32, 64)),
        "verify-own": ((Call.VERIFY_INIT, 1, Mechanism(ck.CKM_ECDSA), public), (Call.VERIFY, 1, b"d" * 32, b"s" * 64)),
        "wrap": ((Call.WRAP_KEY, 1, kw, wrapper, aes, 64), (Call.WRAP_KEY, 1, kw, wrapper, private, None)),
        "unwrap": ((Call.UNWRAP_KEY, 1, kw, wrapper, b"w" * 40, secret),),
        "seed": ((Call.SEED_RANDOM, 1, b"seed"), (Call.GENERATE_RANDOM, 1, 16)),
        **_old(aes),
        "pins": ((Call.SET_PIN, 1, b"1234", b"5678"), (Call.INIT_PIN, 1, b"1234"), (Call.LOGOUT, 1)),
        "init": ((Call.CLOSE_ALL_SESSIONS, 1), (Call.INIT_TOKEN, 1, b"5678", b"label".ljust(32)), (Call.GET_TOKEN_INFO, 1)),
    }


def _old(aes: int) -> dict[str, tuple[tuple[Any, ...], ...]]:
    """Dialogues with what `legacy` has."""
    des = (Attribute(ck.CKA_CLASS, ck.CKO_SECRET_KEY), Attribute(ck.CKA_KEY_TYPE, ck.CKK_DES3))
    prime = b"\xff" * 128
    of_dsa = (Attribute(ck.CKA_KEY_TYPE, ck.CKK_DSA), Attribute(ck.CKA_PRIME, prime), Attribute(ck.CKA_SUBPRIME, b"\xff" * 20))
    dsa = (*of_dsa, Attribute(ck.CKA_BASE, b"\2"), Attribute(ck.CKA_VALUE, b"\5"))
    dh = (Attribute(ck.CKA_PRIME, prime), Attribute(ck.CKA_BASE, b"\2"))
    curve = bytes.fromhex("3041020101301806072a8648ce3d0101020d00ffffffffffffffffffffffff3006040102040103040104020105020101")
    ec = (Attribute(ck.CKA_CLASS, ck.CKO_PUBLIC_KEY), Attribute(ck.CKA_KEY_TYPE, ck.CKK_EC), Attribute(ck.CKA_EC_PARAMS, curve))
    encrypted = Mechanism(ck.CKM_AES_CBC_ENCRYPT_DATA, (b"i" * 16, b"d" * 32))
    private = Attribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY)
    return {
        "old-create": (
            (Call.CREATE_OBJECT, 1, (*des, Attribute(ck.CKA_VALUE, b"\1" * 24))),
            (Call.CREATE_OBJECT, 1, (private, *dsa)),
        ),
        "old-domain": ((Call.CREATE_OBJECT, 1, (Attribute(ck.CKA_CLASS, ck.CKO_DOMAIN_PARAMETERS), *dsa[:-1])),),
        "old-curve": ((Call.CREATE_OBJECT, 1, (*ec, Attribute(ck.CKA_EC_POINT, b"\4\1\4"))),),
        "old-pair": ((Call.GENERATE_KEY_PAIR, 1, Mechanism(ck.CKM_DH_PKCS_KEY_PAIR_GEN), dh, ()),),
        "old-derive": ((Call.DERIVE_KEY, 1, encrypted, aes, des), (Call.DERIVE_KEY, 1, encrypted, aes, des[:1])),
        "old-mac": ((Call.SIGN_INIT, 1, Mechanism(ck.CKM_AES_MAC), aes), (Call.SIGN, 1, b"text", 16)),
    }


def _newer() -> dict[str, tuple[tuple[Any, ...], ...]]:
    """Dialogues of 3.0 and 3.2 with the guest's own token, in the native dialect."""
    aes, wrapper, private, public, decapsulates, encapsulates, signs, recovers = world().own
    secret = (Attribute(ck.CKA_CLASS, ck.CKO_SECRET_KEY), Attribute(ck.CKA_KEY_TYPE, ck.CKK_AES), Attribute(ck.CKA_VALUE_LEN, 16))
    unwrapped = (*secret[:2], Attribute(ck.CKA_SENSITIVE, False))
    ccm = Mechanism(ck.CKM_AES_CCM, (4, b"n" * 12, 0, ck.CKG_GENERATE_RANDOM, b"", 16))
    usual, kem, rsa, cbc = (
        Mechanism(ck.CKM_AES_GCM),
        Mechanism(ck.CKM_ML_KEM),
        Mechanism(ck.CKM_RSA_PKCS),
        Mechanism(ck.CKM_AES_CBC, b"i" * 16),
    )
    ecdsa, sha256 = Mechanism(ck.CKM_ECDSA_SHA256), Mechanism(ck.CKM_SHA256)
    end = ck.CKF_END_OF_MESSAGE
    return {
        "messages-encrypt": (
            (Call.MESSAGE_ENCRYPT_INIT, 1, usual, aes),
            (Call.ENCRYPT_MESSAGE, 1, GCM, b"more", b"data", 64),
            (Call.ENCRYPT_MESSAGE_BEGIN, 1, GCM, b"more"),
            (Call.ENCRYPT_MESSAGE_NEXT, 1, GCM, b"first", 64, 0),
            (Call.ENCRYPT_MESSAGE_NEXT, 1, GCM, b"last", None, end),
            (Call.ENCRYPT_MESSAGE_NEXT, 1, GCM, b"last", 64, end),
            (Call.MESSAGE_ENCRYPT_FINAL, 1),
        ),
        "messages-ccm": ((Call.MESSAGE_ENCRYPT_INIT, 1, ccm, aes), (Call.ENCRYPT_MESSAGE, 1, ccm, b"", b"data", 4)),
        "messages-decrypt": (
            (Call.MESSAGE_DECRYPT_INIT, 1, usual, aes),
            (Call.DECRYPT_MESSAGE, 1, GCM_TAGGED, b"more", b"data", 64),
            (Call.DECRYPT_MESSAGE_BEGIN, 1, GCM_TAGGED, b"more"),
            (Call.DECRYPT_MESSAGE_NEXT, 1, GCM_TAGGED, b"data", 64, end),
            (Call.MESSAGE_DECRYPT_FINAL, 1),
        ),
        "messages-sign": (
            (Call.MESSAGE_SIGN_INIT, 1, ecdsa, private),
            (Call.SIGN_MESSAGE, 1, None, b"data", 64),
            (Call.SIGN_MESSAGE_BEGIN, 1, None),
            (Call.SIGN_MESSAGE_NEXT, 1, None, b"data", MORE_FOLLOWS),
            (Call.SIGN_MESSAGE_NEXT, 1, None, b"data", 64),
            (Call.MESSAGE_SIGN_FINAL, 1),
        ),
        "messages-verify": (
            (Call.MESSAGE_VERIFY_INIT, 1, ecdsa, public),
            (Call.VERIFY_MESSAGE, 1, None, b"data", b"s" * 64),
            (Call.VERIFY_MESSAGE_BEGIN, 1, None),
            (Call.VERIFY_MESSAGE_NEXT, 1, None, b"data", None),
            (Call.VERIFY_MESSAGE_NEXT, 1, None, b"data", b"s" * 64),
        ),
        "messages-cancel": ((Call.MESSAGE_SIGN_INIT, 1, ecdsa, private), (Call.SESSION_CANCEL, 1, ck.CKF_MESSAGE_SIGN)),
        "signature-first": (
            (Call.VERIFY_SIGNATURE_INIT, 1, ecdsa, public, b"s" * 64),
            (Call.VERIFY_SIGNATURE_UPDATE, 1, b"data"),
            (Call.VERIFY_SIGNATURE_FINAL, 1),
            (Call.VERIFY_SIGNATURE_INIT, 1, ecdsa, public, b"s" * 64),
            (Call.VERIFY_SIGNATURE, 1, b"data"),
        ),
        "encapsulate": ((Call.ENCAPSULATE_KEY, 1, kem, encapsulates, secret, 1088), (Call.FIND_OBJECTS_INIT, 1, secret)),
        "decapsulate": ((Call.DECAPSULATE_KEY, 1, kem, decapsulates, b"c" * 1088, secret),),
        "wrap-authenticated": (
            (Call.WRAP_KEY_AUTHENTICATED, 1, GCM, wrapper, aes, b"more", 64),
            (Call.UNWRAP_KEY_AUTHENTICATED, 1, GCM_TAGGED, wrapper, b"w" * 32, unwrapped, b"more"),
        ),
        "validation": ((Call.GET_SESSION_VALIDATION_FLAGS, 1, ck.CKS_LAST_VALIDATION_OK),),
        "recover": (
            (Call.SIGN_RECOVER_INIT, 1, rsa, signs),
            (Call.SIGN_RECOVER, 1, b"data", 128),
            (Call.VERIFY_RECOVER_INIT, 1, rsa, recovers),
            (Call.VERIFY_RECOVER, 1, b"\1" * 128, 128),
        ),
        "dual-encrypt": (
            (Call.DIGEST_INIT, 1, sha256),
            (Call.ENCRYPT_INIT, 1, cbc, aes),
            (Call.DIGEST_ENCRYPT_UPDATE, 1, b"d" * 32, 32),
            (Call.SIGN_INIT, 1, ecdsa, private),
            (Call.SIGN_ENCRYPT_UPDATE, 1, b"d" * 32, 32),
        ),
        "dual-decrypt": (
            (Call.VERIFY_INIT, 1, ecdsa, public),
            (Call.DECRYPT_INIT, 1, cbc, aes),
            (Call.DECRYPT_VERIFY_UPDATE, 1, b"d" * 32, 32),
            (Call.DIGEST_INIT, 1, sha256),
            (Call.DECRYPT_DIGEST_UPDATE, 1, b"d" * 32, 16),
        ),
    }


def seeds() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for number in (1, 5):
        for call, text in messages(GREETINGS[number]):
            made[f"own-{number}-{call.name}"] = b"\0" + step(number, FRAME, block(text))
        for name, calls in _own().items():
            if name != "old-derive" or number == 1:  # p11-kit has no such parameter
                made[f"own-{number}-{name}"] = b"\0" + said(number, *calls)
    for name, calls in _newer().items():
        made[f"own-1-{name}"] = b"\0" + said(1, *calls)
    for number in (0, 2, 3, 4):
        for call, text in messages(GREETINGS[number]):
            made[f"{number}-{call.name}"] = b"\0" + step(number, FRAME, block(text))
        for name, calls in _operations().items():
            derives = name == "derive" and number != 0  # p11-kit before 0.26 has no such parameter
            if not derives:
                made[f"{number}-{name}"] = b"\0" + said(number, *calls)
    once = [(Call.SIGN_ONCE, 1, Mechanism(ck.CKM_ECDSA), handle("tls", ck.CKO_PRIVATE_KEY), b"d" * 32, 64)]
    joined = (Call.HELLO, 4, 1, TICKET, 0, b"joined", 2)
    made["pin"] = b"\1" + said(0, *_operations()["login"], *once)
    made["rotate"] = b"\0" + said(0, *once) + step(0, OPERATE, b"\0") + said(0, *once) + step(0, TIME, b"\x30\3") + said(0, *once)
    made["detach"] = b"\0" + said(0, *_operations()["wait"]) + step(0, OPERATE, b"\3") + step(0, WAKE) + said(0, *once)
    made["join"] = b"\0" + said(0, *once) + said(6, joined, *once) + step(0, LEAVE) + said(6, *once)
    made["fork"] = b"\0" + said(0, *once) + said(6, (Call.HELLO, 8, 2, TICKET, 0, b"forked", 3), (Call.OPEN_SESSION, 0, 4), *once)
    made["restore"] = b"\0" + said(6, (Call.HELLO, 8, 0, None, 1, b"", 3), (Call.RESTORE_SESSIONS, (5, 0, 4, 9, 0, 6)), *once)
    last = (Call.RESTORE_SESSIONS, (token_limits.LAST_HANDLE, 0, 4))
    made["last-handle"] = b"\0" + said(6, (Call.HELLO, 4, 0, None, 1, b"", 3), last, (Call.OPEN_SESSION, 0, 4))
    made["watch"] = b"\0" + said(0, (Call.ROTATION_WAIT, 99)) + step(0, OPERATE, b"\0") + step(0, WAKE)
    return made
