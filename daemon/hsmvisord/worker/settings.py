"""The operator's settings of a module, from JSON: each checked, an unknown one refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hsmvisor_rpc.internal.mechanisms import FORBIDDABLE
from hsmvisor_rpc.internal.mechanisms import named as mechanism_named

from hsmvisord import ck, limits
from hsmvisord.crypto.mechanisms import GUEST_TABLE
from hsmvisord.face.card.slots import CardSettings, card_settings
from hsmvisord.keystore import pin
from hsmvisord.token.policy import EVERYTHING, Policy
from hsmvisord.token.token import Settings
from hsmvisord.worker.tpm_keys import TpmSettings, tpm_settings


def parse_settings(text: str) -> Settings:
    """Raises ValueError that names the setting.  0 or a missing one is the default."""
    values = json.loads(text or "{}")
    if not isinstance(values, dict):
        raise ValueError("settings are a JSON object")
    known = {f.name for f in dataclasses.fields(Settings)} | {"card", "tpm"}
    if unknown := set(values) - known:
        raise ValueError(f"unknown setting {min(unknown)!r}")
    settings = Settings(
        log_signatures=bool(values.get("log_signatures", False)),
        max_sessions=int(values.get("max_sessions") or limits.MAX_SESSIONS),
        max_connections=int(values.get("max_connections") or limits.MAX_CONNECTIONS),
        policy=_policy(values.get("policy") or {}),
        guest_token=bool(values.get("guest_token", False)),
        cryptoprocessor=str(values.get("cryptoprocessor") or ""),
    )
    if not 1 <= settings.max_sessions <= limits.MOST_SESSIONS:
        raise ValueError(f"max_sessions is 1 to {limits.MOST_SESSIONS}")
    if not 1 <= settings.max_connections <= limits.MOST_CONNECTIONS:
        raise ValueError(f"max_connections is 1 to {limits.MOST_CONNECTIONS}")
    return settings


def parse_card(text: str) -> CardSettings:
    """Returns what the settings say of the card.  Raises ValueError that names the setting."""
    values = json.loads(text or "{}")
    return card_settings(values.get("card") or {})


def parse_tpm(text: str) -> TpmSettings:
    """As parse_card, of the TPM."""
    values = json.loads(text or "{}")
    return tpm_settings(values.get("tpm") or {})


def _policy(values: Any) -> Policy:
    known = {f.name for f in dataclasses.fields(Policy)}
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"a policy is of {', '.join(sorted(known))}")
    if not any(values.values()):
        return EVERYTHING  # without a look at each mechanism, which would copy the pages that they stand in
    numbers = {name: int(values.get(name) or 0) for name in known - {"mechanisms", "forbidden", "legacy"}}
    if bad := [name for name, value in numbers.items() if not 0 <= value <= limits.MOST_IN_POLICY]:
        raise ValueError(f"{min(bad)} is 0 to {limits.MOST_IN_POLICY}")
    if numbers["burst"] and not numbers["rate"]:
        raise ValueError("a burst needs a rate")
    with_keys = [mechanism for mechanism, row in GUEST_TABLE.items() if row.key_types]
    by_name = {ck.mechanism_name(mechanism).removeprefix("CKM_"): mechanism for mechanism in with_keys}
    mechanisms = frozenset(by_name[mechanism_named(name)] for name in values.get("mechanisms") or ())
    forbidden = frozenset(map(str, values.get("forbidden") or ()))
    if unknown := forbidden - set(FORBIDDABLE):
        raise ValueError(f"{min(unknown)!r} is nothing that a policy forbids")
    if numbers["min_pin"] and not pin.MIN_PIN <= numbers["min_pin"] <= pin.MAX_PIN:
        raise ValueError(f"min_pin is {pin.MIN_PIN} to {pin.MAX_PIN}")
    return Policy(mechanisms=mechanisms, forbidden=forbidden, legacy=bool(values.get("legacy", False)), **numbers)
