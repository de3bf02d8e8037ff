"""The role table, walked over every method that the server offers."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hsmvisor.host.roles import METHODS, TABLE, Role
from hsmvisor.serving.access import Access, Caller
from hsmvisor_rpc.v1 import hsmvisor_pb2

NOBODY: frozenset[Role] = frozenset()


def may(method: str, roles: frozenset[Role], known: bool) -> bool:
    return TABLE.may(method, Caller("somebody", roles, known))


def methods() -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for file in (hsmvisor_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    ]


def test_every_method_has_its_row_and_every_row_its_method() -> None:
    assert set(METHODS) == set(methods())


def test_who_may_is_what_the_table_says() -> None:
    for method in methods():
        row = METHODS[method]
        for role in Role:
            wanted = True if isinstance(row, Access) else role in row
            assert may(method, frozenset({role}), known=True) is wanted, (method, role)


def test_a_caller_without_roles_may_only_what_needs_none() -> None:
    for method in methods():
        assert may(method, NOBODY, known=True) is isinstance(METHODS[method], Access)
        assert may(method, NOBODY, known=False) is (METHODS[method] is Access.ANYBODY)
        assert may(method, frozenset(Role), known=False) is (METHODS[method] is Access.ANYBODY)


def test_what_is_not_in_the_table_may_be_called_by_nobody() -> None:
    assert not may("/hsmvisor.v1.ModuleService/Format", frozenset(Role), known=True)


def test_who_changes_material_and_who_reads_the_audit_log() -> None:
    assert METHODS["/hsmvisor.v1.MaterialService/Execute"] == {Role.MANAGER}
    assert METHODS["/hsmvisor.v1.AuditService/ExportAudit"] == {Role.AUDITOR}
    assert METHODS["/hsmvisor.v1.ModuleService/DestroyModule"] == {Role.OPERATOR}
    assert METHODS["/hsmvisor.v1.HostService/Enrol"] is Access.ANYBODY
