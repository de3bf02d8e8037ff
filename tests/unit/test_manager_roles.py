"""The manager's role table, walked over every method that the server offers; and whose things a caller may touch."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hsmvisor.manager.access.callers import FleetCaller, host_of
from hsmvisor.manager.access.owners import demand_owner, for_whom, may_change, may_see, sees_only
from hsmvisor.manager.roles import CHANGING, GIVEN, METHODS, TABLE, Role
from hsmvisor.serving.access import Access
from hsmvisor.serving.errors import Forbidden, Invalid
from hsmvisor_rpc.v1 import manager_pb2

HOST_LINK = "/hsmvisor.manager.v1.HostLink/"


def descriptors() -> list[tuple[str, set[str]]]:
    """Returns each method and its request's fields."""
    return [
        (f"/{service.full_name}/{method.name}", set(method.input_type.fields_by_name))
        for file in (manager_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    ]


def who(*roles: Role, owner: str = "", known: bool = True) -> FleetCaller:
    return FleetCaller("somebody", frozenset(roles), known=known, owner=owner)


def test_every_method_has_its_row_and_every_row_its_method() -> None:
    assert set(METHODS) == {name for name, _ in descriptors()}


def test_what_carries_a_request_id_is_what_changes_something() -> None:
    assert {name for name, fields in descriptors() if "request_id" in fields} == CHANGING


def test_who_may_is_what_the_table_says() -> None:
    for method, _ in descriptors():
        row = METHODS[method]
        for role in Role:
            assert TABLE.may(method, who(role)) is (isinstance(row, Access) or role in row), (method, role)
        assert TABLE.may(method, who()) is isinstance(row, Access)
        assert TABLE.may(method, who(*Role, known=False)) is (row is Access.ANYBODY)


def test_hosts_call_what_is_theirs_and_nothing_else() -> None:
    for method, row in METHODS.items():
        if not isinstance(row, Access):
            assert (row == {Role.HOST}) is method.startswith(HOST_LINK), method
    assert METHODS[f"{HOST_LINK}Join"] is Access.ANYBODY
    assert Role.HOST not in GIVEN


def test_auditors_change_nothing_and_owners_nothing_of_the_fleet() -> None:
    for method in CHANGING:
        row = METHODS[method]
        assert isinstance(row, Access) or Role.AUDITOR not in row
    for name in ("CreateJoinToken", "UpdateHost", "RevokeHost", "RemoveHost"):
        assert METHODS[f"/hsmvisor.manager.v1.FleetService/{name}"] == {Role.OPERATOR}
    assert METHODS["/hsmvisor.manager.v1.PolicyService/Upload"] == {Role.OPERATOR}
    assert METHODS["/hsmvisor.manager.v1.HistoryService/ExportAudit"] == {Role.AUDITOR}


def test_owners_touch_what_is_their_own() -> None:
    ann = who(Role.OWNER, owner="ann")
    assert may_see(ann, "ann") and may_change(ann, "ann")
    assert not may_see(ann, "bob") and not may_change(ann, "bob") and not may_see(ann, "")
    assert sees_only(ann) == "ann" == for_whom(ann, "") == for_whom(ann, "ann")
    for refused in (lambda: sees_only(ann, "bob"), lambda: for_whom(ann, "bob"), lambda: demand_owner(ann, "bob")):
        with pytest.raises(Forbidden):
            refused()


def test_operators_touch_all_and_auditors_see_it() -> None:
    operator, auditor = who(Role.OPERATOR, owner="op"), who(Role.AUDITOR, owner="aud")
    assert may_change(operator, "bob") and for_whom(operator, "bob") == "bob" and for_whom(operator, "") == "op"
    assert sees_only(operator) == sees_only(auditor) == "" and sees_only(auditor, "bob") == "bob"
    assert may_see(auditor, "bob") and not may_change(auditor, "bob") and not may_change(auditor, "aud")
    with pytest.raises(Forbidden):
        for_whom(auditor, "")


def test_nobody_owns_nothing() -> None:
    nobody = who(Role.OWNER)
    assert not may_see(nobody, "") and not may_change(nobody, "")
    with pytest.raises(Invalid):
        for_whom(nobody, "")
    with pytest.raises(Forbidden):
        host_of(nobody)


@pytest.mark.parametrize("owner", ["x" * 129, "a\nb"])
def test_names_of_owners_are_bounded(owner: str) -> None:
    with pytest.raises(Invalid):
        for_whom(who(Role.OPERATOR), owner)
