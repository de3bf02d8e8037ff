"""What the kinds of events are called in mails."""

from __future__ import annotations

from hsmvisor.manager.history.happened import Kind

SUBJECTS: dict[str, str] = {
    Kind.REQUESTED: "a key was requested",
    Kind.CHANGED: "a request was changed",
    Kind.CANCELLED: "a request was cancelled",
    Kind.IMPORTED: "a key was imported",
    Kind.DENIED: "refused by policy",
    Kind.ISSUED: "a certificate was issued",
    Kind.DELIVERED: "delivered",
    Kind.ROTATED: "a new generation is in service",
    Kind.ROLLED_BACK: "the generation before is in service again",
    Kind.REVOKED: "a certificate was revoked",
    Kind.TAKEN_AWAY: "taken away",
    Kind.FAILED: "failed, and is tried again",
    Kind.NOT_MEASURED: "a guest's boot is not what it has to be",
    Kind.HEALTH_FAILED: "a health check failed",
    Kind.RECOVERED: "works again",
    Kind.EXPIRING: "a certificate expires soon",
    Kind.EXPIRED: "a certificate has expired",
    Kind.HOST_JOINED: "a host has joined",
    Kind.HOST_REFUSED: "a host was refused",
    Kind.HOST_REVOKED: "a host was revoked",
    Kind.HOST_REMOVED: "a host was removed",
    Kind.HOST_AWAY: "a host is away",
    Kind.HOST_BACK: "a host is back",
    Kind.RESOURCE_APPEARED: "a resource has appeared",
    Kind.RESOURCE_CHANGED: "a resource has changed",
    Kind.RESOURCE_GONE: "a resource is gone",
    Kind.RESOURCE_REFUSED: "a resource was refused",
    Kind.POLICY_UPLOADED: "the policy was changed",
    Kind.TOKEN_CREATED: "an access token was created",
    Kind.TOKEN_REVOKED: "an access token was revoked",
    Kind.NOTICE_LOST: "notices could not be delivered",
    Kind.CHANNEL_OFF: "a channel of notices is off",
}
