"""The PIV application (NIST SP 800-73-4, part 2): commands in, answers out.

What would change the card is refused: it is the operator's.
"""

from __future__ import annotations

from collections.abc import Callable

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.face.card import objects, yubikey
from hsmvisord.face.card.generations import Generations
from hsmvisord.face.card.holdings import EC, RSA, Holdings, SlotKey
from hsmvisord.face.card.slots import CARD_AUTHENTICATION, SIGNATURE, CardSettings
from hsmvisord.wire import tlv
from hsmvisord.wire.apdu import SW, BadApdu, CommandApdu, ResponseApdu

VERIFY, CHANGE_REFERENCE_DATA, RESET_RETRY_COUNTER = 0x20, 0x24, 0x2C
GENERATE_ASYMMETRIC_KEY_PAIR, GENERAL_AUTHENTICATE, GET_DATA, PUT_DATA = 0x47, 0x87, 0xCB, 0xDB
CARD_PIN = 0x80  #: key reference of the application's PIN (part 1, table 4a)
_PIN_SIZE = 8  #: bytes, padded with FF (part 2, 2.4.3)

_TEMPLATE, _CHALLENGE, _RESPONSE, _EXPONENTIATION = 0x7C, 0x81, 0x82, 0x85  #: of GENERAL AUTHENTICATE (part 2, table 7)

#: How a key's refusal reads on a card.
_REFUSALS = {
    ck.CKR_KEY_FUNCTION_NOT_PERMITTED: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_MECHANISM_INVALID: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_FUNCTION_REJECTED: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_HANDLE_INVALID: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_SIZE_RANGE: SW.CONDITIONS_NOT_SATISFIED,
    ck.CKR_KEY_TYPE_INCONSISTENT: SW.WRONG_P1_P2,
    ck.CKR_DATA_LEN_RANGE: SW.WRONG_DATA,
    ck.CKR_DATA_INVALID: SW.WRONG_DATA,
    ck.CKR_ENCRYPTED_DATA_INVALID: SW.WRONG_DATA,
    ck.CKR_ENCRYPTED_DATA_LEN_RANGE: SW.WRONG_DATA,
    ck.CKR_MECHANISM_PARAM_INVALID: SW.WRONG_DATA,
    ck.CKR_ARGUMENTS_BAD: SW.WRONG_DATA,
}


class Piv:
    def __init__(self, holdings: Holdings, generations: Generations, serial: str) -> None:
        self._holdings, self._generations, self._serial = holdings, generations, serial
        self.settings = CardSettings()
        self._verified: bytes | None = None  #: the mark of the PIN that was given
        self._fresh = False  #: it was given since the signature key was used last

    def reset(self) -> None:
        """The card was powered down, or another application was selected: nobody is verified."""
        self._verified, self._fresh = None, False

    def select(self) -> bytes:
        return objects.application_property_template()

    def handle(self, command: CommandApdu) -> ResponseApdu:
        """Raises BadApdu."""
        if command.cla:
            raise BadApdu(SW.CLA_NOT_SUPPORTED)
        handler = _COMMANDS.get(command.ins)
        if handler is None and self.settings.yubikey:
            handler = _OF_YUBIKEY.get(command.ins)
        if handler is None:
            raise BadApdu(SW.INS_NOT_SUPPORTED)
        try:
            return ResponseApdu(handler(self, command), SW.OK)
        except CkError as error:
            raise BadApdu(_REFUSALS.get(error.rv, SW.FAILED)) from None

    # ---- objects ------------------------------------------------------------------------------------------------

    def _get_data(self, command: CommandApdu) -> bytes:
        if (command.p1, command.p2) != (0x3F, 0xFF):
            raise BadApdu(SW.WRONG_P1_P2)
        wanted = _one(command.data, 0x5C)
        if not 1 <= len(wanted) <= 3:
            raise BadApdu(SW.WRONG_DATA)
        tag, contents = int.from_bytes(wanted, "big"), self._generations.contents
        if tag == objects.DISCOVERY:
            return objects.discovery()
        if tag == objects.CHUID:
            return objects.chuid(objects.guid(self._serial, contents))
        if tag == objects.CCC:
            return objects.capability_container(objects.guid(self._serial, contents))
        if tag == objects.KEY_HISTORY:
            return objects.key_history(contents)
        slot = objects.CERTIFICATES.get(tag)
        if slot is None or slot not in contents:
            raise BadApdu(SW.NOT_FOUND)
        self._generations.was_read(slot)  # also that there is none
        if not contents[slot].certificate:
            raise BadApdu(SW.NOT_FOUND)
        return objects.certificate(contents[slot].certificate)

    # ---- the PIN ------------------------------------------------------------------------------------------------

    @property
    def _is_verified(self) -> bool:
        return not self._holdings.pin_set or self._verified == self._holdings.pin_mark

    def _verify(self, command: CommandApdu) -> bytes:
        if command.p2 != CARD_PIN:
            raise BadApdu(SW.REFERENCE_NOT_FOUND)
        if command.p1 == 0xFF and not command.data:
            self.reset()
            return b""
        if command.p1:
            raise BadApdu(SW.WRONG_P1_P2)
        if not command.data:
            if not self._is_verified:
                raise _tries(self._holdings.tries_left)
            return b""
        if len(command.data) != _PIN_SIZE:
            raise BadApdu(SW.WRONG_DATA)
        if self._holdings.pin_set:
            mark = self._holdings.pin_mark
            right = self._holdings.try_pin(command.data.rstrip(b"\xff"))
            if not right:
                self.reset()
                raise _tries(0 if right is None else self._holdings.tries_left)
            self._verified = mark
        self._fresh = True
        return b""

    # ---- keys ---------------------------------------------------------------------------------------------------

    def _general_authenticate(self, command: CommandApdu) -> bytes:
        key = self._generations.contents.get(command.p2)
        if key is None or command.p1 != key.algorithm:
            raise BadApdu(SW.WRONG_P1_P2)
        self._demand_pin(command.p2)
        if not self._generations.may_use(command.p2):
            raise BadApdu(SW.CONDITIONS_NOT_SATISFIED)
        parts = dict(_objects(_one(command.data, _TEMPLATE)))
        if parts.pop(_RESPONSE, b"") or len(parts) != 1:
            raise BadApdu(SW.WRONG_DATA)
        ((tag, value),) = parts.items()
        act = _operation(self._holdings, key, tag, value)
        if command.p2 == SIGNATURE:
            self._fresh = False
        return tlv.encode(_TEMPLATE, tlv.encode(_RESPONSE, act()))

    def _demand_pin(self, slot: int) -> None:
        if slot == CARD_AUTHENTICATION or not self._holdings.pin_set:
            return
        if not self._is_verified or (slot == SIGNATURE and not self._fresh):
            raise BadApdu(SW.SECURITY_STATUS_NOT_SATISFIED)

    def _refused(self, command: CommandApdu) -> bytes:
        raise BadApdu(SW.SECURITY_STATUS_NOT_SATISFIED)

    # ---- as a YubiKey -------------------------------------------------------------------------------------------

    def _version(self, command: CommandApdu) -> bytes:
        return yubikey.VERSION

    def _serial_number(self, command: CommandApdu) -> bytes:
        return yubikey.serial_number(self._serial)

    def _metadata(self, command: CommandApdu) -> bytes:
        found = yubikey.metadata(command.p2, self._holdings, self._generations.contents)
        if found is None:
            raise BadApdu(SW.REFERENCE_NOT_FOUND)
        return found


_COMMANDS: dict[int, Callable[[Piv, CommandApdu], bytes]] = {
    GET_DATA: Piv._get_data,
    VERIFY: Piv._verify,
    GENERAL_AUTHENTICATE: Piv._general_authenticate,
    CHANGE_REFERENCE_DATA: Piv._refused,
    RESET_RETRY_COUNTER: Piv._refused,
    GENERATE_ASYMMETRIC_KEY_PAIR: Piv._refused,
    PUT_DATA: Piv._refused,
}
_OF_YUBIKEY: dict[int, Callable[[Piv, CommandApdu], bytes]] = {
    yubikey.GET_VERSION: Piv._version,
    yubikey.GET_SERIAL: Piv._serial_number,
    yubikey.GET_METADATA: Piv._metadata,
}


def _tries(left: int) -> BadApdu:
    """Of a PIN that is wrong or missing."""
    return BadApdu(SW.BLOCKED) if not left else WrongPin(left)


class WrongPin(BadApdu):
    def __init__(self, left: int) -> None:
        super().__init__(SW.WRONG_PIN)
        self.status = SW.WRONG_PIN | min(left, 15)


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


def _operation(holdings: Holdings, key: SlotKey, tag: int, value: bytes) -> Callable[[], bytes]:
    """Returns what a key is asked for (part 2, 3.2.4)."""
    if tag == _CHALLENGE and key.algorithm in RSA and len(value) == key.bits // 8:
        return lambda: holdings.sign_rsa(key, value)
    if tag == _CHALLENGE and key.algorithm in EC and 1 <= len(value) <= EC[key.algorithm]:
        return lambda: holdings.sign_ecdsa(key, value)
    if tag == _EXPONENTIATION and key.algorithm in EC and len(value) == 1 + 2 * EC[key.algorithm]:
        return lambda: holdings.agree(key, value)
    if tag == _CHALLENGE and key.algorithm == 0xE0 and value:
        return lambda: holdings.sign_eddsa(key, value)
    if tag == _EXPONENTIATION and key.algorithm == 0xE1 and len(value) == 32:
        return lambda: holdings.agree(key, value)
    raise BadApdu(SW.WRONG_DATA)
