"""The kinds of events, and the two forms of one: to be written, and as it was written."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Kind(enum.StrEnum):
    """All that can happen.  A new one needs a subject for its mail (hsmvisor.manager.notify.subjects)."""

    # a material's life
    REQUESTED = "requested"
    CHANGED = "changed"
    CANCELLED = "cancelled"
    IMPORTED = "imported"
    DENIED = "denied"
    ISSUED = "issued"
    DELIVERED = "delivered"
    ROTATED = "rotated"
    ROLLED_BACK = "rolled_back"
    REVOKED = "revoked"
    TAKEN_AWAY = "taken_away"
    FAILED = "failed"
    NOT_MEASURED = "not_measured"
    HEALTH_FAILED = "health_failed"
    RECOVERED = "recovered"
    EXPIRING = "expiring"
    EXPIRED = "expired"
    # hosts
    HOST_JOINED = "host_joined"
    HOST_REFUSED = "host_refused"
    HOST_REVOKED = "host_revoked"
    HOST_REMOVED = "host_removed"
    HOST_AWAY = "host_away"
    HOST_BACK = "host_back"
    # their guests
    RESOURCE_APPEARED = "resource_appeared"
    RESOURCE_CHANGED = "resource_changed"
    RESOURCE_GONE = "resource_gone"
    RESOURCE_REFUSED = "resource_refused"
    # who may do what
    POLICY_UPLOADED = "policy_uploaded"
    TOKEN_CREATED = "token_created"
    TOKEN_REVOKED = "token_revoked"
    # notices of all that
    NOTICE_LOST = "notice_lost"
    CHANNEL_OFF = "channel_off"


@dataclass(frozen=True)
class Happened:
    """What is to be written.  Texts that are too long are cut, what looks like a secret is left out (cleaning.py)."""

    kind: Kind
    owner: str = ""
    request_id: str = ""
    material: str = ""
    resource_id: str = ""
    host_id: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What was written.  `kind` may be one that only a later release knows."""

    id: int
    at: float
    kind: str
    owner: str
    request_id: str
    material: str
    resource_id: str
    host_id: str
    detail_text: str  #: JSON object

    @property
    def detail(self) -> dict[str, Any]:
        try:
            told = json.loads(self.detail_text)
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}
