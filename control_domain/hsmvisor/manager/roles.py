"""Who may call what of a manager.  Whose things a caller then may see or change is access/owners.py's to say."""

from __future__ import annotations

import enum

from hsmvisor.serving.access import Access, Table


class Role(enum.StrEnum):
    OPERATOR = "operator"  #: runs the fleet: hosts, policies; may do for any owner what that owner may
    OWNER = "owner"  #: asks for material on resources
    AUDITOR = "auditor"  #: reads what there is and what happened, of all owners
    HOST = "host"  #: a host that has joined; comes with its certificate, and is given to nobody else


#: What a configuration or an access token may give.
GIVEN = frozenset({Role.OPERATOR, Role.OWNER, Role.AUDITOR})

_HOST = frozenset({Role.HOST})
_OPERATOR = frozenset({Role.OPERATOR})
_READING = frozenset({Role.OPERATOR, Role.AUDITOR})
_ASKING = frozenset({Role.OPERATOR, Role.OWNER})
_PEOPLE = GIVEN

_FLEET, _REQUESTS = "/hsmvisor.manager.v1.FleetService", "/hsmvisor.manager.v1.RequestService"

METHODS: dict[str, frozenset[Role] | Access] = {
    "/hsmvisor.manager.v1.HostLink/Join": Access.ANYBODY,  # it proves a one-time secret, or its certificate is configured
    "/hsmvisor.manager.v1.HostLink/RenewIdentity": _HOST,
    "/hsmvisor.manager.v1.HostLink/Exchange": _HOST,
    f"{_FLEET}/WhoAmI": Access.KNOWN,
    f"{_FLEET}/GetFleet": _READING,
    f"{_FLEET}/GetMetrics": _READING,
    f"{_FLEET}/CreateJoinToken": _OPERATOR,
    f"{_FLEET}/ListHosts": _READING,
    f"{_FLEET}/GetHost": _READING,
    f"{_FLEET}/UpdateHost": _OPERATOR,
    f"{_FLEET}/RevokeHost": _OPERATOR,
    f"{_FLEET}/RemoveHost": _OPERATOR,
    f"{_FLEET}/ListResources": _PEOPLE,
    f"{_FLEET}/GetResource": _PEOPLE,
    f"{_FLEET}/RekeyResource": _ASKING,
    f"{_FLEET}/MeasureResource": _ASKING,
    f"{_FLEET}/CreateToken": _ASKING,
    f"{_FLEET}/ListTokens": _PEOPLE,
    f"{_FLEET}/RevokeToken": _ASKING,
    f"{_REQUESTS}/Apply": _ASKING,
    f"{_REQUESTS}/Explain": _ASKING,
    f"{_REQUESTS}/Get": _PEOPLE,
    f"{_REQUESTS}/List": _PEOPLE,
    f"{_REQUESTS}/Cancel": _ASKING,
    f"{_REQUESTS}/Rotate": _ASKING,
    f"{_REQUESTS}/Activate": _ASKING,
    f"{_REQUESTS}/RollBack": _ASKING,
    f"{_REQUESTS}/Revoke": _ASKING,
    f"{_REQUESTS}/SetRenewal": _ASKING,
    f"{_REQUESTS}/GetIssuer": _PEOPLE,
    f"{_REQUESTS}/Import": _ASKING,
    "/hsmvisor.manager.v1.PolicyService/Upload": _OPERATOR,
    "/hsmvisor.manager.v1.PolicyService/Get": _READING,
    "/hsmvisor.manager.v1.PolicyService/List": _READING,
    "/hsmvisor.manager.v1.AuthorityService/ListAuthorities": _PEOPLE,
    "/hsmvisor.manager.v1.HistoryService/StreamEvents": _PEOPLE,
    "/hsmvisor.manager.v1.HistoryService/ListEvents": _PEOPLE,
    "/hsmvisor.manager.v1.HistoryService/ExportAudit": frozenset({Role.AUDITOR}),
    "/grpc.health.v1.Health/Check": Access.ANYBODY,
    "/grpc.health.v1.Health/Watch": Access.ANYBODY,
    "/grpc.health.v1.Health/List": Access.ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.KNOWN,
}

#: Methods that change something: each carries a request id, and each refusal of one stands in the audit log.
CHANGING: frozenset[str] = frozenset(
    f"/hsmvisor.manager.v1.{name}"
    for name in (
        "HostLink/Join",
        "HostLink/RenewIdentity",
        "FleetService/CreateJoinToken",
        "FleetService/UpdateHost",
        "FleetService/RevokeHost",
        "FleetService/RemoveHost",
        "FleetService/RekeyResource",
        "FleetService/CreateToken",
        "FleetService/RevokeToken",
        "RequestService/Apply",
        "RequestService/Cancel",
        "RequestService/Rotate",
        "RequestService/Activate",
        "RequestService/RollBack",
        "RequestService/Revoke",
        "RequestService/SetRenewal",
        "RequestService/Import",
        "PolicyService/Upload",
    )
)

TABLE = Table("manager", METHODS, CHANGING)
