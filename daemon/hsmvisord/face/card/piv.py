"""The PIV application (NIST SP 800-73-4, part 2): commands in, answers out.

What would change the card is refused: it is the operator's.
"""

from __future__ import annotations

from collections.abc import Callable

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.face.card import objects, yubikey
from hsmvisord.face.card.generations import Generations
from hsmvisord.face.card.holdings import ED25519, P_256, P_384, RSA_2048, RSA_3072, X25519, Holdings, SlotKey
from hsmvisord.face.card.slots import CARD_AUTHENTICATION, SIGNATURE, CardSettings
from hsmvisord.keystore import pin
from hsmvisord.wire import tlv
from hsmvisord.wire.apdu import SW, BadApdu, CommandApdu

SELECT, VERIFY = 0xA4, 0x20
GENERATE_ASYMMETRIC_KEY_PAIR, GENERAL_AUTHENTICATE, GET_DATA, PUT_DATA = 0x47, 0x87, 0xCB, 0xDB
_BY_NAME, _FIRST = 0x04, 0x00  #: P1 and P2 of SELECT
_LEAST_AID = 5  #: bytes: the registered provider's
CARD_PIN = 0x80  #: key reference of the application's PIN (part 1, table 4a)
_PIN_SIZE = 8  #: bytes, padded with FF (part 2, 2.4.3)

_TAG_LIST = 0x5C
_TEMPLATE, _CHALLENGE, _RESPONSE, _EXPONENTIATION = 0x7C, 0x81, 0x82, 0x85  #: of GENERAL AUTHENTICATE (part 2, table 7)

_RSA, _EC = (RSA_2048, RSA_3072), (P_256, P_384)
_UNCOMPRESSED = 0x04  #: the first byte of a point (SEC 1, 2.3.3)

#: How a key's refusal reads on a card.
_REFUSALS = {
    ck.CKR_KEY_FUNCTION_NOT_PERMITTED: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_MECHANISM_INVALID: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_FUNCTION_REJECTED: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_HANDLE_INVALID: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_SIZE_RANGE: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_TYPE_INCONSISTENT: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_DATA_LEN_RANGE: SW.WRONG_DATA,
    ck.CKR_DATA_INVALID: SW.WRONG_DATA,
    ck.CKR_ENCRYPTED_DATA_INVALID: SW.WRONG_DATA,
    ck.CKR_ENCRYPTED_DATA_LEN_RANGE: SW.WRONG_DATA,
    ck.CKR_MECHANISM_PARAM_INVALID: SW.WRONG_DATA,
    ck.CKR_DEVICE_ERROR: SW.MEMORY_FAILURE,  # a try that could not be stored, an HSM that does not answer
}


class Piv:
    """There is no other application, so it is selected always, and what it knows of the PIN ends with the card's power alone."""

    def __init__(self, holdings: Holdings, generations: Generations, serial: str) -> None:
        self._holdings, self._generations, self._serial = holdings, generations, serial
        self.settings = CardSettings()
        #: The slot whose certificate the newest answer tells.  Who reads a key's metadata may still hold an older certificate.
        self.reading: int | None = None
        self._verified: bytes | None = None  #: the mark of the PIN that was given
        self._fresh = False  #: it was given since a key was used last

    def reset(self) -> None:
        """Nobody is verified any more."""
        self._verified, self._fresh = None, False

    def handle(self, command: CommandApdu) -> bytes:
        """Returns the answer's data.  Raises BadApdu."""
        self.reading = None
        if command.head[0]:
            raise BadApdu(SW.CLA_NOT_SUPPORTED)
        handler = _COMMANDS.get(command.ins)
        if handler is None and self.settings.yubikey:
            handler = _OF_YUBIKEY.get(command.ins)
        if handler is None:
            raise BadApdu(SW.INS_NOT_SUPPORTED)
        try:
            return handler(self, command)
        except CkError as error:
            raise BadApdu(_REFUSALS.get(error.rv, SW.FAILED)) from None

    def _select(self, command: CommandApdu) -> bytes:
        """Security statuses stay as they are, whether this application is named or one that there is not (3.1.1)."""
        if (command.p1, command.p2) != (_BY_NAME, _FIRST):
            raise BadApdu(SW.WRONG_P1_P2)
        if len(command.data) < _LEAST_AID or not objects.AID.startswith(command.data):
            raise BadApdu(SW.NOT_FOUND)
        return objects.APPLICATION_PROPERTY_TEMPLATE

    # ---- objects ------------------------------------------------------------------------------------------------

    def _get_data(self, command: CommandApdu) -> bytes:
        if (command.p1, command.p2) != (0x3F, 0xFF):
            raise BadApdu(SW.WRONG_P1_P2)
        wanted = _one(command.data, _TAG_LIST)
        tag, contents = int.from_bytes(wanted, "big"), self._generations.contents
        if tag == objects.DISCOVERY:
            return objects.DISCOVERY_OBJECT
        if tag == objects.CHUID:
            return objects.chuid(objects.guid(self._serial, contents))
        if tag == objects.CCC:
            return objects.capability_container(objects.guid(self._serial, contents))
        if tag == objects.KEY_HISTORY:
            return objects.key_history(contents)
        slot = objects.CERTIFICATES.get(tag)
        if slot is None or slot not in contents:
            raise BadApdu(SW.NOT_FOUND)
        if not contents[slot].certificate:
            self._generations.was_read(slot)  # who held one knows now that it is none of this key
            raise BadApdu(SW.NOT_FOUND)
        self.reading = slot
        return objects.certificate(contents[slot].certificate)

    # ---- the PIN ------------------------------------------------------------------------------------------------

    @property
    def _is_verified(self) -> bool:
        return not self._holdings.pin_set or self._verified == self._holdings.pin_mark

    def _verify(self, command: CommandApdu) -> bytes:
        """VERIFY (3.2.1): with a PIN, without one (is it needed?), or the end of what was verified."""
        if command.p2 != CARD_PIN:
            raise BadApdu(SW.REFERENCE_NOT_FOUND)
        if command.p1 not in (0x00, 0xFF):
            raise BadApdu(SW.WRONG_P1_P2)
        if command.p1 == 0xFF:
            if command.data:
                raise BadApdu(SW.WRONG_DATA)
            self.reset()
        elif command.data:
            self._try(command.data)
        elif not self._is_verified:
            left = self._holdings.tries_left
            raise BadApdu(SW.WRONG_PIN | left if left else SW.BLOCKED)
        return b""

    def _try(self, data: bytes) -> None:
        attempt = data.rstrip(b"\xff")
        if len(data) != _PIN_SIZE or len(attempt) < pin.MIN_PIN:
            raise BadApdu(SW.WRONG_DATA)  # it is compared with nothing, and counts for nothing (3.2.1.1)
        if self._holdings.pin_set:
            mark = self._holdings.pin_mark
            try:
                self._holdings.try_pin(attempt)
            except CkError as error:
                raise self._refused_pin(error) from None
            self._verified = mark
        self._fresh = True

    def _refused_pin(self, error: CkError) -> BadApdu:
        if error.rv == ck.CKR_PIN_LOCKED:  # nothing was compared, so what was verified stays so
            return BadApdu(SW.BLOCKED)
        if error.rv != ck.CKR_PIN_INCORRECT:
            return BadApdu(_REFUSALS.get(error.rv, SW.FAILED))
        self.reset()
        return BadApdu(SW.WRONG_PIN | self._holdings.tries_left)

    # ---- keys ---------------------------------------------------------------------------------------------------

    def _general_authenticate(self, command: CommandApdu) -> bytes:
        """One operation of one key (3.2.4).  The standard keeps exponentiation from 9A, 9C and 9E; here a key's profile says what
        it is for, in whichever slot it is."""
        fresh, self._fresh = self._fresh, False
        key = self._generations.contents.get(command.p2)
        if key is None or command.p1 != key.algorithm:
            raise BadApdu(SW.WRONG_P1_P2)
        parts = _objects(_one(command.data, _TEMPLATE))
        asked = [part for part in parts if part != (_RESPONSE, b"")]
        if len(asked) != 1 or len(parts) != 2:
            raise BadApdu(SW.WRONG_DATA)
        act = self._operation(key, *asked[0])
        self._demand_pin(command.p2, fresh)
        if not self._generations.may_use(command.p2):
            raise BadApdu(SW.CONDITIONS_NOT_SATISFIED)
        return tlv.encode(_TEMPLATE, tlv.encode(_RESPONSE, act()))

    def _demand_pin(self, slot: int, fresh: bool) -> None:
        """9E is used without a PIN, 9C with one that was given for this use (part 1, table 4b: "PIN Always")."""
        if slot == CARD_AUTHENTICATION or not self._holdings.pin_set:
            return
        if not self._is_verified or (slot == SIGNATURE and not fresh):
            raise BadApdu(SW.SECURITY_STATUS_NOT_SATISFIED)

    def _operation(self, key: SlotKey, tag: int, value: bytes) -> Callable[[], bytes]:
        """Returns what does what a key is asked for.  Raises BadApdu for what keys of its algorithm cannot do."""
        holdings, size = self._holdings, (key.kind.bits + 7) // 8
        if tag == _CHALLENGE and value:
            if key.algorithm in _RSA and len(value) == size:
                return lambda: holdings.rsa(key, value)
            if key.algorithm in _EC:
                return lambda: holdings.ecdsa(key, value)
            if key.algorithm == ED25519:
                return lambda: holdings.eddsa(key, value)
        if tag == _EXPONENTIATION:
            is_point = key.algorithm in _EC and len(value) == 1 + 2 * size and value[0] == _UNCOMPRESSED
            if is_point or (key.algorithm == X25519 and len(value) == size):
                return lambda: holdings.agree(key, value)
        raise BadApdu(SW.WRONG_DATA)

    # ---- the administrator's, who is not here -------------------------------------------------------------------

    def _refused(self, command: CommandApdu) -> bytes:
        raise BadApdu(SW.SECURITY_STATUS_NOT_SATISFIED)

    # ---- as a YubiKey -------------------------------------------------------------------------------------------

    def _version(self, command: CommandApdu) -> bytes:
        return yubikey.VERSION

    def _serial_number(self, command: CommandApdu) -> bytes:
        return yubikey.serial_number(self._serial)

    def _metadata(self, command: CommandApdu) -> bytes:
        if command.p1:
            raise BadApdu(SW.WRONG_P1_P2)
        found = yubikey.metadata(command.p2, self._holdings.tries_left, self._generations.contents)
        if found is None:
            raise BadApdu(SW.REFERENCE_NOT_FOUND)
        return found


#: What is missing here is answered with 6D00: of CHANGE REFERENCE DATA, RESET RETRY COUNTER and what YubiKeys have beside them
#: (keys that are moved, imported, attested; retries, management key, reset) clients then say that this card does not have it.
_COMMANDS: dict[int, Callable[[Piv, CommandApdu], bytes]] = {
    SELECT: Piv._select,
    GET_DATA: Piv._get_data,
    VERIFY: Piv._verify,
    GENERAL_AUTHENTICATE: Piv._general_authenticate,
    GENERATE_ASYMMETRIC_KEY_PAIR: Piv._refused,
    PUT_DATA: Piv._refused,
}
_OF_YUBIKEY: dict[int, Callable[[Piv, CommandApdu], bytes]] = {
    yubikey.GET_VERSION: Piv._version,
    yubikey.GET_SERIAL: Piv._serial_number,
    yubikey.GET_METADATA: Piv._metadata,
}


def _objects(data: bytes) -> list[tuple[int, bytes]]:
    try:
        return tlv.decode(data)
    except tlv.BadTlv:
        raise BadApdu(SW.WRONG_DATA) from None


def _one(data: bytes, tag: int) -> bytes:
    """Returns the value of the one object that there is."""
    found = _objects(data)
    if len(found) != 1 or found[0][0] != tag:
        raise BadApdu(SW.WRONG_DATA)
    return found[0][1]
