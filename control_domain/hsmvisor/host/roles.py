"""Who may call what of a host."""

from __future__ import annotations

import enum

from hsmvisor.serving.access import Access, Table


class Role(enum.StrEnum):
    OPERATOR = "operator"  #: runs modules on this host
    MANAGER = "manager"  #: delivers material
    AUDITOR = "auditor"  #: reads what happened


_ALL = frozenset(Role)
_OPERATOR = frozenset({Role.OPERATOR})
_MANAGER = frozenset({Role.MANAGER})
_RUNNING = frozenset({Role.OPERATOR, Role.MANAGER})
_AUDITOR = frozenset({Role.AUDITOR})

METHODS: dict[str, frozenset[Role] | Access] = {
    "/hsmvisor.v1.ModuleService/CreateModule": _RUNNING,
    "/hsmvisor.v1.ModuleService/GetModule": _ALL,
    "/hsmvisor.v1.ModuleService/ListModules": _ALL,
    "/hsmvisor.v1.ModuleService/UpdateModule": _OPERATOR,
    "/hsmvisor.v1.ModuleService/DestroyModule": _OPERATOR,
    "/hsmvisor.v1.ModuleService/GetIdentity": _ALL,
    "/hsmvisor.v1.ModuleService/SetPin": _OPERATOR,
    "/hsmvisor.v1.ModuleService/SetTokenPresent": _OPERATOR,
    "/hsmvisor.v1.ModuleService/GetStatistics": _ALL,
    "/hsmvisor.v1.ModuleService/WatchModules": _ALL,
    "/hsmvisor.v1.ModuleService/UpgradeModule": _OPERATOR,
    "/hsmvisor.v1.ModuleService/AttachModule": _OPERATOR,
    "/hsmvisor.v1.ModuleService/DetachModule": _OPERATOR,
    "/hsmvisor.v1.ModuleService/DescribeDevice": _ALL,
    "/hsmvisor.v1.ModuleService/AttestTpm": _ALL,
    "/hsmvisor.v1.ModuleService/GetTpmIdentity": _ALL,
    "/hsmvisor.v1.ModuleService/BreakGlass": _OPERATOR,  # and on the host itself: services/modules.py
    "/hsmvisor.v1.MaterialService/Execute": _MANAGER,
    "/hsmvisor.v1.MaterialService/GetMaterial": _ALL,
    "/hsmvisor.v1.MaterialService/ListMaterials": _ALL,
    "/hsmvisor.v1.GuestService/RegisterGuest": _RUNNING,
    "/hsmvisor.v1.GuestService/UpdateGuest": _RUNNING,
    "/hsmvisor.v1.GuestService/RemoveGuest": _RUNNING,
    "/hsmvisor.v1.GuestService/GetGuest": _ALL,
    "/hsmvisor.v1.GuestService/ListGuests": _ALL,
    "/hsmvisor.v1.HostService/GetHost": Access.KNOWN,
    "/hsmvisor.v1.HostService/Enrol": Access.ANYBODY,
    "/hsmvisor.v1.HostService/CreateEnrolment": _OPERATOR,
    "/hsmvisor.v1.HostService/GetMetrics": _ALL,
    "/hsmvisor.v1.HostService/JoinManager": _OPERATOR,  # and on the host itself: services/host.py
    "/hsmvisor.v1.HostService/LeaveManager": _OPERATOR,  # as well
    "/hsmvisor.v1.HostService/Backup": _OPERATOR,
    "/hsmvisor.v1.EventService/StreamEvents": _ALL,
    "/hsmvisor.v1.AuditService/ExportAudit": _AUDITOR,
    "/grpc.health.v1.Health/Check": Access.ANYBODY,
    "/grpc.health.v1.Health/Watch": Access.ANYBODY,
    "/grpc.health.v1.Health/List": Access.ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.KNOWN,
}


#: Methods that change something: each of them carries a request id, and each refusal of one stands in the audit log.
CHANGING: frozenset[str] = frozenset(
    f"/hsmvisor.v1.{name}"
    for name in (
        "ModuleService/CreateModule",
        "ModuleService/UpdateModule",
        "ModuleService/DestroyModule",
        "ModuleService/SetPin",
        "ModuleService/SetTokenPresent",
        "ModuleService/UpgradeModule",
        "ModuleService/AttachModule",
        "ModuleService/DetachModule",
        "ModuleService/BreakGlass",
        "MaterialService/Execute",
        "GuestService/RegisterGuest",
        "GuestService/UpdateGuest",
        "GuestService/RemoveGuest",
        "HostService/Enrol",
        "HostService/CreateEnrolment",
        "HostService/JoinManager",
        "HostService/LeaveManager",
    )
)

TABLE = Table("host", METHODS, CHANGING)
