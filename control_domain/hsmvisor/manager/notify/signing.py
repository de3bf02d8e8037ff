"""What a webhook says, and its signature (https://www.standardwebhooks.com, version 1.0.0)."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
from collections.abc import Sequence

from hsmvisor.manager.history.happened import Event


def message_id(*events: Event) -> str:
    """The same for the same events, however often they are sent; of another database's events another one."""
    digest = hashlib.sha256("\n".join(f"{e.id} {e.at!r} {e.kind} {e.resource_id} {e.material}" for e in events).encode())
    return f"msg_{events[0].id}_{digest.hexdigest()[:24]}"


def body(event: Event) -> bytes:
    at = datetime.datetime.fromtimestamp(event.at, datetime.UTC)
    told = {
        "type": f"hsmvisor.{event.kind}",
        "timestamp": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "data": {
            "id": event.id,
            "owner": event.owner,
            "request": event.request_id,
            "material": event.material,
            "resource": event.resource_id,
            "host": event.host_id,
            "detail": event.detail,
        },
    }
    return json.dumps(told, separators=(",", ":")).encode()


def headers(keys: Sequence[bytes], name: str, seconds: int, content: bytes) -> dict[str, str]:
    """One signature for each key: a receiver knows one of them."""
    signed = f"{name}.{seconds}.".encode() + content
    signatures = (base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys)
    return {
        "webhook-id": name,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
