"""A guest of slot 1 in this process: requests in the native dialect to the face of a token, no socket."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hsmvisord import ck
from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.token.token import Settings, Token
from hsmvisord.wire.calls import Attribute, Call, Mechanism, Needed
from hsmvisord.wire.frames import HEADER
from hsmvisord.wire.handshake import negotiate
from support.keystores import Bench
from support.native_client import NativeEncoding

SLOT = 1
SO, USER, LABEL = b"officer-1", b"user-1", b"own keys".ljust(32)
RW = ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION
SPOKEN = NativeEncoding(8)
SETTINGS = Settings(guest_token=True)


def template(values: dict[int, Any]) -> tuple[Attribute, ...]:
    return tuple(Attribute(kind, value) for kind, value in values.items())


class OwnGuest:
    """One application; `session` is open in slot 1, read-write, once `begin` was called."""

    def __init__(self, token: Token) -> None:
        self.token = token
        codec, _ = negotiate(0x81)
        self.caller = Caller(token, codec, "test")
        token.add_counters(self.caller.counters)
        self.call(Call.HELLO, 8, 0, None, 0, b"program", 1)
        self.session = 0

    def call(self, call: Call, *arguments: Any) -> tuple[Any, ...]:
        """Raises wire_client.Refused."""
        request = self.caller.codec.decode(7, b"", SPOKEN.request(call, *arguments))
        reply = face.handle(self.caller, request, lambda request, ready: None)
        assert reply is not None, "parked"
        return SPOKEN.reply(call, reply[HEADER.size :])

    def open(self, flags: int = RW, slot: int = SLOT) -> int:
        return int(self.call(Call.OPEN_SESSION, slot, flags)[0])

    def begin(self, user: int | None = ck.CKU_USER) -> OwnGuest:
        self.session = self.open()
        if user is not None:
            self.login(user)
        return self

    def login(self, user: int = ck.CKU_USER, attempt: bytes | None = None) -> None:
        right = SO if user == ck.CKU_SO else USER
        self.call(Call.LOGIN, self.session, user, right if attempt is None else attempt)

    # ---- objects --------------------------------------------------------------------------------------------------

    def create(self, values: dict[int, Any]) -> int:
        return int(self.call(Call.CREATE_OBJECT, self.session, template(values))[0])

    def generate(self, mechanism: int, values: dict[int, Any]) -> int:
        return int(self.call(Call.GENERATE_KEY, self.session, Mechanism(mechanism), template(values))[0])

    def pair(self, mechanism: int, public: dict[int, Any], private: dict[int, Any]) -> tuple[int, int]:
        handles = self.call(Call.GENERATE_KEY_PAIR, self.session, Mechanism(mechanism), template(public), template(private))
        return int(handles[0]), int(handles[1])

    def get(self, handle: int, *kinds: int) -> list[Any]:
        answer = self.call(Call.GET_ATTRIBUTE_VALUE, self.session, handle, tuple((kind, 8192) for kind in kinds))
        return [value for _, value in answer[0]]

    def set(self, handle: int, values: dict[int, Any]) -> None:
        self.call(Call.SET_ATTRIBUTE_VALUE, self.session, handle, template(values))

    def find(self, values: dict[int, Any], session: int = 0) -> list[int]:
        session = session or self.session
        self.call(Call.FIND_OBJECTS_INIT, session, template(values))
        (found,) = self.call(Call.FIND_OBJECTS, session, 4096)
        self.call(Call.FIND_OBJECTS_FINAL, session)
        return list(found)

    # ---- keys -----------------------------------------------------------------------------------------------------

    def sign(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.call(Call.SIGN_INIT, self.session, mechanism, key)
        return self._whole(self.call(Call.SIGN, self.session, data, 8192))

    def verify(self, mechanism: Mechanism, key: int, data: bytes, signature: bytes) -> None:
        self.call(Call.VERIFY_INIT, self.session, mechanism, key)
        self.call(Call.VERIFY, self.session, data, signature)

    def encrypt(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.call(Call.ENCRYPT_INIT, self.session, mechanism, key)
        return self._whole(self.call(Call.ENCRYPT, self.session, data, 65536))

    def decrypt(self, mechanism: Mechanism, key: int, data: bytes) -> bytes:
        self.call(Call.DECRYPT_INIT, self.session, mechanism, key)
        return self._whole(self.call(Call.DECRYPT, self.session, data, 65536))

    def wrap(self, mechanism: Mechanism, wrapping: int, key: int) -> bytes:
        return self._whole(self.call(Call.WRAP_KEY, self.session, mechanism, wrapping, key, 65536))

    def unwrap(self, mechanism: Mechanism, unwrapping: int, data: bytes, values: dict[int, Any]) -> int:
        return int(self.call(Call.UNWRAP_KEY, self.session, mechanism, unwrapping, data, template(values))[0])

    def derive(self, mechanism: Mechanism, key: int, values: dict[int, Any]) -> int:
        return int(self.call(Call.DERIVE_KEY, self.session, mechanism, key, template(values))[0])

    @staticmethod
    def _whole(answer: tuple[Any, ...]) -> bytes:
        assert isinstance(answer[0], bytes), answer
        return answer[0]


class OwnToken:
    """A module whose slot 1 is initialized, with the user's PIN set."""

    def __init__(self, initialized: bool = True, **settings: Any) -> None:
        self.bench = Bench()
        self.settings = replace(SETTINGS, **settings)
        self.token = self._token()
        if initialized:
            officer = OwnGuest(self.token)
            officer.call(Call.INIT_TOKEN, SLOT, SO, LABEL)
            officer.begin(ck.CKU_SO).call(Call.INIT_PIN, officer.session, USER)
            officer.call(Call.CLOSE_SESSION, officer.session)

    def _token(self) -> Token:
        token = Token("web-1", self.bench.keystore, self.bench.provider, lambda: self.bench.now, lambda: self.bench.now)
        token.settings = self.settings
        return token

    def restart(self) -> None:
        """Another worker opens what is stored."""
        self.bench.restart()
        self.token = self._token()

    def guest(self) -> OwnGuest:
        return OwnGuest(self.token)


__all__ = ["LABEL", "RW", "SLOT", "SO", "USER", "Attribute", "Needed", "OwnGuest", "OwnToken", "template"]
