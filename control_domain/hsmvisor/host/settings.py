"""What an operator may set for a module; the worker checks it again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from hsmvisor.host import limits
from hsmvisor.host.config import SOFTWARE
from hsmvisor.host.usb_ids import UsbId, chosen
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.internal import mechanisms, tpm


@dataclass(frozen=True)
class Policy:
    """What the guest may do with keys; 0 and () are no limit."""

    mechanisms: tuple[str, ...] = ()
    min_rsa_bits: int = 0
    min_ec_bits: int = 0
    rate: int = 0  #: operations a second
    burst: int = 0  #: 0 = as many as `rate`
    forbidden: tuple[str, ...] = ()  #: of slot 1
    min_pin: int = 0  #: bytes; 0 = the default
    legacy: bool = False  #: slot 1 has what is old or weak

    def check(self) -> Policy:
        """Returns it with the mechanisms' names as they are written, sorted.  Raises Invalid."""
        for name in ("min_rsa_bits", "min_ec_bits", "rate", "burst"):
            if not 0 <= getattr(self, name) <= limits.MOST_IN_POLICY:
                raise Invalid("SETTINGS", f"{name} is at most {limits.MOST_IN_POLICY}; 0 is no limit")
        if self.burst and not self.rate:
            raise Invalid("SETTINGS", "a burst needs a rate", "set rate, or leave burst out")
        if self.min_pin and self.min_pin not in limits.OWN_PINS:
            raise Invalid("SETTINGS", f"min_pin is {limits.OWN_PINS.start} to {limits.OWN_PINS.stop - 1} bytes; 0 is the default")
        if wrong := set(self.forbidden) - set(mechanisms.FORBIDDABLE):
            known = ", ".join(mechanisms.FORBIDDABLE)
            raise Invalid("SETTINGS", f"{min(wrong)!r:.40} is nothing that a policy forbids", f"it forbids {known}")
        if len(self.mechanisms) > len(mechanisms.NAMES):
            raise Invalid("SETTINGS", f"there are {len(mechanisms.NAMES)} mechanisms", "name each once")
        try:
            names = sorted({mechanisms.named(name) for name in self.mechanisms})
        except ValueError as error:
            raise Invalid("SETTINGS", str(error), f"known are {', '.join(mechanisms.NAMES)}") from None
        if not self.legacy and (old := set(names) & set(mechanisms.LEGACY)):
            raise Invalid("SETTINGS", f"{min(old)} is a mechanism of legacy", "set legacy, or leave the mechanism out")
        return dataclasses.replace(self, mechanisms=tuple(names), forbidden=tuple(sorted(set(self.forbidden))))


EVERYTHING = Policy()

CARD_SLOTS = ("9a", "9c", "9d", "9e", *(f"{slot:02x}" for slot in range(0x82, 0x96)))  #: NIST SP 800-73-4, part 1, table 4b


@dataclass(frozen=True)
class Card:
    """The module as a smart card (PIV) on USB."""

    slots: tuple[tuple[str, str], ...] = ()  #: slot and material; none: materials fill 9a, then 82 to 95, as they come
    yubikey: bool = False  #: answers what ykcs11 and ykman ask of a YubiKey
    usb_id: str = ""  #: VVVV:PPPP; "" = the default (usb_ids.py)
    replug: bool = False  #: with another key the USB device goes, and comes back under another serial number

    def usb_ids(self) -> UsbId:
        return chosen(self.usb_id, self.yubikey)

    def check(self) -> Card:
        """Returns it with its slots sorted.  Raises Invalid."""
        self.usb_ids()
        slots = [(slot.lower(), material) for slot, material in self.slots]
        for slot, material in slots:
            if slot not in CARD_SLOTS:
                raise Invalid("CARD_SLOT", f"{slot!r:.20} is no slot of a card", f"slots are {', '.join(CARD_SLOTS)}")
            limits.material_name(material)
        if len(dict(slots)) != len(slots):
            raise Invalid("CARD_SLOT", "a slot of the card has one material", "name each slot once")
        if len({material for _, material in slots}) != len(slots):
            raise Invalid("CARD_SLOT", "a material is in one slot of the card", "name each material once")
        return dataclasses.replace(self, slots=tuple(sorted(slots)))


@dataclass(frozen=True)
class Tpm:
    """The module as a TPM 2.0."""

    enabled: bool = False
    keys: tuple[tuple[str, str], ...] = ()  #: persistent handle (0x81800001) and material
    no_firmware: bool = False  #: the guest's kernel is booted without one: nobody gets the platform hierarchy

    def check(self) -> Tpm:
        """Returns it with its handles as they are written, sorted.  Raises Invalid."""
        if (self.keys or self.no_firmware) and not self.enabled:
            raise Invalid("TPM", "keys of a TPM need a TPM", "enable it (--tpm), or leave its keys out")
        if len(self.keys) > tpm.MAX_KEYS:
            raise Invalid("TPM_KEY", f"a TPM has at most {tpm.MAX_KEYS} keys of its module")
        keys = [(_tpm_handle(handle), limits.material_name(material)) for handle, material in self.keys]
        if len(dict(keys)) != len(keys):
            raise Invalid("TPM_KEY", "a handle of the TPM has one material", "name each handle once")
        return dataclasses.replace(self, keys=tuple(sorted(keys)))


def _tpm_handle(text: str) -> str:
    try:
        handle = int(text, 16)
    except ValueError:
        handle = 0
    if handle not in tpm.OWNER_HANDLES and handle not in tpm.PLATFORM_HANDLES:
        hint = "handles are 0x81800000 to 0x8180ffff; or the owner's, who may take the key away, 0x81000000 to 0x8100ffff"
        raise Invalid("TPM_KEY", f"{text!r:.20} is no persistent handle for a key", hint)
    return f"0x{handle:08x}"


@dataclass(frozen=True)
class Settings:
    log_signatures: bool = False  #: an audit line for each signature
    max_sessions: int = 0  #: 0 = the worker's default
    max_connections: int = 0
    policy: Policy = EVERYTHING
    guest_token: bool = False  #: slot 1
    cryptoprocessor: str = ""  #: the HSM where its keys live, "" = software; the same for good
    card: Card = Card()
    tpm: Tpm = Tpm()

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def for_worker(self) -> str:
        """Returns what a worker is told: the USB ids come with each importer."""
        values = dataclasses.asdict(self)
        values["card"] = {"slots": dict(self.card.slots), "yubikey": self.card.yubikey, "replug": self.card.replug}
        values["tpm"] = {"keys": dict(self.tpm.keys)}
        return json.dumps(values)

    @classmethod
    def decode(cls, text: str) -> Settings:
        values = json.loads(text)
        policy = values.pop("policy", {})
        card = values.pop("card", {})
        card = Card(**card | {"slots": tuple((slot, material) for slot, material in card.get("slots", ()))})
        by_tpm = values.pop("tpm", {})
        by_tpm = Tpm(**by_tpm | {"keys": tuple((handle, material) for handle, material in by_tpm.get("keys", ()))})
        lists = {name: tuple(policy.get(name, ())) for name in ("mechanisms", "forbidden")}
        return cls(**values, policy=Policy(**policy | lists), card=card, tpm=by_tpm)

    def beginning(self) -> Settings:
        """Returns those of a new module, which may name its cryptoprocessor as people do."""
        return dataclasses.replace(self, cryptoprocessor="" if self.cryptoprocessor == SOFTWARE else self.cryptoprocessor)

    def beside(self, before: Settings) -> Settings:
        """Returns those that take the place of `before`; one that names no cryptoprocessor has the same.  Raises Invalid."""
        now = before.cryptoprocessor
        if self.cryptoprocessor not in ("", now or SOFTWARE):
            raise Invalid(
                "CRYPTOPROCESSOR",
                f"the module's cryptoprocessor is {now or SOFTWARE} for good, not {self.cryptoprocessor}",
                "make another module with that one, and deliver the keys there",
            )
        return dataclasses.replace(self, cryptoprocessor=now)

    def check(self) -> Settings:
        """Raises Invalid."""
        if self.cryptoprocessor and not limits.NAME.fullmatch(self.cryptoprocessor):
            raise Invalid("CRYPTOPROCESSOR", f"a cryptoprocessor is {SOFTWARE}, or an HSM by its name in the host's configuration")
        for name, most in (("max_sessions", limits.MAX_SESSIONS), ("max_connections", limits.MAX_CONNECTIONS)):
            if not 0 <= getattr(self, name) <= most:
                raise Invalid("SETTINGS", f"{name} is at most {most}; 0 is the default")
        return dataclasses.replace(self, policy=self.policy.check(), card=self.card.check(), tpm=self.tpm.check())
