"""Who calls a real manager, and what it may: the local socket, certificates of owners and of hosts, access tokens."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.access.tokens import PREFIX
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinToken
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support import other_user
from support.certificates import Authority, new_key, private_pem
from support.host_process import new_id, reason, refused, wait_for
from support.manager_process import JoiningHost, ManagerProcess, Stubs, exchange, guest

C = grpc.StatusCode


@pytest.fixture(scope="module")
def manager() -> Iterator[ManagerProcess]:
    settings = '[control]\nsocket_mode = 0o666\n[[control.allow]]\nuid = 65534\nroles = ["owner"]\nowner = "nina"\ngroups = ["web"]'
    with ManagerProcess(settings) as manager:
        manager.directory.chmod(0o755)
        yield manager


@pytest.fixture(scope="module")
def host(manager: ManagerProcess) -> JoiningHost:
    """Has a guest of ann's and one of bob's."""
    host = manager.join("alpha")
    exchange(host.stubs(manager), guests=[guest("a", "ann", env="prod"), guest("b", "bob")])
    return host


def roles(stubs: Stubs) -> tuple[str, str, set[str], set[str]]:
    told = stubs.who()
    return told.name.split()[0].partition(":")[0], told.owner, set(told.groups), set(told.roles)


# ---- who ----------------------------------------------------------------------------------------------------------------


def test_the_services_own_user_is_operator_and_owner_of_anything(manager: ManagerProcess) -> None:
    assert roles(manager.local)[3] == {"operator", "owner", "auditor"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_local_user_is_what_the_configuration_says(manager: ManagerProcess) -> None:
    python, path = other_user.python()
    program = """
import sys
from hsmvisor.client import connect
from hsmvisor_rpc.v1 import manager_pb2 as pb, manager_pb2_grpc as rpc
with connect("unix:" + sys.argv[1]) as channel:
    told = rpc.FleetServiceStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=10)
print(told.owner, *told.groups, *told.roles)
"""
    command = [python, "-c", program, str(manager.socket)]
    done = subprocess.run(
        command, env={"PYTHONPATH": path}, user=65534, group=65534, extra_groups=[], capture_output=True, text=True
    )
    assert done.stdout.split() == ["nina", "web", "owner"], done.stderr


def test_owners_operators_and_auditors_come_with_certificates(manager: ManagerProcess) -> None:
    assert roles(manager.certified("ann.test")) == ("cert", "ann", {"web"}, {"owner"})
    assert roles(manager.certified("operator.test")) == ("cert", "otto", set(), {"operator"})
    assert roles(manager.certified("auditor.test")) == ("cert", "audrey", set(), {"auditor"})


def test_a_certificate_that_is_not_configured_is_nobodys(manager: ManagerProcess) -> None:
    nobody = manager.certified("nobody.test")
    assert roles(nobody) == ("cert", "", set(), set())
    assert refused(lambda: nobody.fleet.ListResources(pb.ListResourcesRequest(), timeout=10)) == (C.PERMISSION_DENIED, "ROLE")


def test_a_certificate_of_another_authority_does_not_come_in(manager: ManagerProcess) -> None:
    stranger = manager.certified("operator.test", trustme.CA())
    with pytest.raises(grpc.RpcError) as caught:
        stranger.who()
    assert caught.value.code() is C.UNAVAILABLE


def test_who_shows_nothing_may_nothing(manager: ManagerProcess) -> None:
    stranger = manager.stranger()
    assert refused(stranger.who) == (C.UNAUTHENTICATED, "CALLER")
    assert refused(lambda: exchange(stranger)) == (C.UNAUTHENTICATED, "CALLER")


# ---- hosts --------------------------------------------------------------------------------------------------------------


def test_a_host_exchanges_and_may_nothing_else(manager: ManagerProcess, host: JoiningHost) -> None:
    stubs = host.stubs(manager)
    assert roles(stubs) == ("host", "", set(), {"host"})
    for call in (
        lambda: stubs.fleet.ListHosts(pb.ListHostsRequest(), timeout=10),
        lambda: stubs.fleet.ListResources(pb.ListResourcesRequest(), timeout=10),
        lambda: stubs.requests.List(pb.ListRequestsRequest(), timeout=10),
        lambda: stubs.policies.Get(pb.GetPolicyRequest(), timeout=10),
    ):
        assert refused(call) == (C.PERMISSION_DENIED, "ROLE")


def test_owners_are_no_hosts(manager: ManagerProcess) -> None:
    for stubs in (manager.certified("ann.test"), manager.certified("operator.test"), manager.local):
        assert refused(lambda stubs=stubs: exchange(stubs)) == (C.PERMISSION_DENIED, "ROLE")


def test_a_hosts_name_in_another_authoritys_certificate_is_nobody(manager: ManagerProcess, host: JoiningHost) -> None:
    """Owners' authority makes a certificate with the very URI of a host: it comes in, and is no host."""
    mine = Authority()
    with open(manager.directory / "owners.pem", "ab") as file:  # read again at each handshake
        file.write(mine.root_pem)
    key = new_key("p256")
    template = mine.issue(key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(template.subject)
        .issuer_name(mine.intermediate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(HOST_URI + host.id)]), False)
        .add_extension(template.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value, False)
    )
    forged = builder.sign(mine.key, template.signature_hash_algorithm)  # type: ignore[arg-type]
    chain = forged.public_bytes(Encoding.PEM) + mine.intermediate.public_bytes(Encoding.PEM)
    stubs = manager.shown(chain, private_pem(key))
    assert roles(stubs) == ("cert", "", set(), set())
    assert refused(lambda: exchange(stubs)) == (C.PERMISSION_DENIED, "ROLE")


def test_a_renewed_certificate_ends_the_one_before_when_it_is_used(manager: ManagerProcess) -> None:
    host = manager.join("renewing")
    before = replace_key(host)
    host.renew(manager)
    assert roles(before.stubs(manager))[3] == {"host"}  # the new one may be lost on its way
    assert roles(host.stubs(manager))[3] == {"host"}
    assert refused(before.stubs(manager).who) == (C.UNAUTHENTICATED, "HOST")
    assert roles(host.stubs(manager))[3] == {"host"}


def replace_key(host: JoiningHost) -> JoiningHost:
    """Returns the host as it is now."""
    found = replace(host)
    found.identity, found.public, found.id, found.key, found.chain = host.identity, host.public, host.id, host.key, host.chain
    return found


def test_a_revoked_host_is_nobody_at_once_on_an_open_connection_too(manager: ManagerProcess) -> None:
    host = manager.join("stolen")
    stubs = host.stubs(manager)
    exchange(stubs)
    request = pb.RevokeHostRequest(request_id=new_id(), name="stolen", why="it was stolen")
    assert manager.local.fleet.RevokeHost(request, timeout=10).state == "revoked"
    assert refused(lambda: exchange(stubs)) == (C.UNAUTHENTICATED, "HOST")
    manager.local.fleet.RemoveHost(pb.RemoveHostRequest(request_id=new_id(), name="stolen"), timeout=10)
    assert refused(stubs.who) == (C.UNAUTHENTICATED, "HOST")
    host.join(manager)
    assert roles(host.stubs(manager))[3] == {"host"}


def test_a_join_token_is_used_once(manager: ManagerProcess) -> None:
    token = manager.join_token()
    first, second = JoiningHost("first"), JoiningHost("second")
    answer = first.joined(manager.stranger().link.Join(first.request(token), timeout=10))
    assert answer.host == first.id and len(answer.root) == 32 and answer.authorities
    assert list(answer.addresses) == [f"127.0.0.1:{manager.tls_port}"]
    assert refused(lambda: manager.stranger().link.Join(second.request(token), timeout=10)) == (C.PERMISSION_DENIED, "JOIN_TWICE")


def test_a_host_joins_with_a_configured_certificate_under_its_name_alone(manager: ManagerProcess) -> None:
    rack = manager.certified("rack.test")
    assert refused(lambda: rack.link.Join(JoiningHost("other").request(), timeout=10)) == (C.PERMISSION_DENIED, "HOST")
    host = JoiningHost("rack")
    host.joined(rack.link.Join(host.request(), timeout=10))
    assert roles(host.stubs(manager))[3] == {"host"}
    other = JoiningHost("rack-2")
    assert refused(lambda: manager.certified("ann.test").link.Join(other.request(), timeout=10))[0] is C.PERMISSION_DENIED


# ---- whose --------------------------------------------------------------------------------------------------------------


def test_owners_see_their_own_resources_others_all(manager: ManagerProcess, host: JoiningHost) -> None:
    def listed(stubs: Stubs, **more: str) -> set[str]:
        found = stubs.fleet.ListResources(pb.ListResourcesRequest(**more), timeout=10).resources
        return {row.id for row in found if row.host == "alpha"}

    ann = manager.certified("ann.test")
    assert listed(ann) == {"alpha/a"} == listed(ann, owner="ann")
    for name in ("operator.test", "auditor.test"):
        assert listed(manager.certified(name)) == {"alpha/a", "alpha/b"}
    assert refused(lambda: listed(ann, owner="bob")) == (C.PERMISSION_DENIED, "OWNER")
    assert ann.fleet.GetResource(pb.GetResourceRequest(id="a"), timeout=10).attributes == {"env": "prod"}
    assert refused(lambda: ann.fleet.GetResource(pb.GetResourceRequest(id="alpha/b"), timeout=10)) == (C.NOT_FOUND, "RESOURCE")
    assert listed(manager.local, owner="bob") == {"alpha/b"}


def test_another_owners_request_id_shows_nothing_of_its_request(manager: ManagerProcess, host: JoiningHost) -> None:
    """One who knows the ids of a call is not answered with what was answered then."""
    ann, bob = manager.certified("ann.test"), manager.bearing(manager.token("bob"))
    spec = pb.RequestSpec(material="tls", names=["web.example.net"], resources=["alpha/a"])
    made = ann.requests.Apply(pb.ApplyRequest(request_id=new_id(), spec=spec), timeout=10)
    assert made.owner == "ann"
    assert refused(lambda: bob.requests.Get(pb.GetRequest(id=made.id), timeout=10)) == (C.NOT_FOUND, "REQUEST")
    cancel = pb.CancelRequest(request_id=new_id(), id=made.id)
    assert refused(lambda: bob.requests.Cancel(cancel, timeout=10)) == (C.NOT_FOUND, "REQUEST")
    assert ann.requests.Cancel(cancel, timeout=10).state == "cancelled"
    assert refused(lambda: bob.requests.Cancel(cancel, timeout=10)) == (C.ABORTED, "REQUEST_ID_REUSED")


def test_owners_do_not_run_the_fleet_and_auditors_change_nothing(manager: ManagerProcess) -> None:
    for name in ("ann.test", "auditor.test"):
        stubs = manager.certified(name)
        for call in (
            lambda stubs=stubs: stubs.fleet.CreateJoinToken(pb.CreateJoinTokenRequest(request_id=new_id()), timeout=10),
            lambda stubs=stubs: stubs.fleet.RevokeHost(pb.RevokeHostRequest(request_id=new_id(), name="alpha"), timeout=10),
            lambda stubs=stubs: stubs.policies.Upload(pb.UploadPolicyRequest(request_id=new_id(), text=""), timeout=10),
        ):
            assert refused(call) == (C.PERMISSION_DENIED, "ROLE")
    assert manager.certified("auditor.test").fleet.GetFleet(pb.GetFleetRequest(), timeout=10).hosts
    assert '"kind":"call.refused"' in manager.audit()


def test_owners_are_told_of_their_own_events(manager: ManagerProcess, host: JoiningHost) -> None:
    events = manager.certified("ann.test").history.ListEvents(pb.ListFleetEventsRequest(), timeout=10).events
    assert {event.owner for event in events} == {"ann"}
    all_of_them = manager.local.history.ListEvents(pb.ListFleetEventsRequest(page_size=1000), timeout=10).events
    assert {"ann", "bob", ""} <= {event.owner for event in all_of_them}


def test_the_audit_log_is_for_auditors(manager: ManagerProcess) -> None:
    lines = list(manager.certified("auditor.test").history.ExportAudit(pb.ExportFleetAuditRequest(limit=2), timeout=10))
    assert [line.sequence for line in lines] == [1, 2] and '"kind":"manager.start"' in lines[0].line
    call = manager.certified("operator.test").history.ExportAudit
    assert refused(lambda: list(call(pb.ExportFleetAuditRequest(), timeout=10))) == (C.PERMISSION_DENIED, "ROLE")


# ---- access tokens --------------------------------------------------------------------------------------------------------


def test_a_token_bears_owner_groups_and_roles(manager: ManagerProcess) -> None:
    token = manager.token("ann", "owner", groups=["web", "db"])
    assert token.startswith(PREFIX)
    assert roles(manager.bearing(token)) == ("token", "ann", {"web", "db"}, {"owner"})
    assert roles(manager.bearing(manager.token("bob"))) == ("token", "bob", set(), {"owner"})


def test_a_wrong_token_is_refused_and_a_certificate_does_not_help(manager: ManagerProcess) -> None:
    token = manager.token("ann")
    for wrong in (token[:-1] + ("A" if token[-1] != "A" else "B"), token[:-2], PREFIX + "0" * 32 + "." + "A" * 43, "x"):
        assert refused(manager.bearing(wrong).who) == (C.UNAUTHENTICATED, "TOKEN"), wrong
    ann = manager.certified("ann.test")
    with pytest.raises(grpc.RpcError) as caught:
        ann.fleet.WhoAmI(pb.WhoAmIRequest(), timeout=10, metadata=(("authorization", "Basic eDp5"),))
    assert reason(caught.value) == (C.UNAUTHENTICATED, "TOKEN")


def test_a_token_ends(manager: ManagerProcess) -> None:
    stubs = manager.bearing(manager.token("ann", lifetime_seconds=5))
    assert stubs.who().owner == "ann"
    time.sleep(5)
    assert refused(stubs.who) == (C.UNAUTHENTICATED, "TOKEN_EXPIRED")


def test_a_token_is_revoked_with_those_that_were_made_with_it(manager: ManagerProcess) -> None:
    parent = manager.bearing(manager.token("ann", lifetime_seconds=600))
    made = parent.fleet.CreateToken(pb.CreateTokenRequest(request_id=new_id(), lifetime_seconds=86400), timeout=10)
    assert made.expires_at.seconds <= time.time() + 600
    child = manager.bearing(made.token)
    assert child.who().owner == "ann"
    id = parent.who().name.removeprefix("token:")
    revoke = pb.RevokeTokenRequest(request_id=new_id(), id=id)
    assert refused(lambda: manager.bearing(manager.token("bob")).fleet.RevokeToken(revoke, timeout=10)) == (C.NOT_FOUND, "TOKEN")
    manager.certified("ann.test").fleet.RevokeToken(revoke, timeout=10)
    for stubs in (parent, child):
        assert refused(stubs.who) == (C.UNAUTHENTICATED, "TOKEN_REVOKED")
    listed = manager.certified("ann.test").fleet.ListTokens(pb.ListTokensRequest(page_size=1000), timeout=10).tokens
    assert {row.owner for row in listed} == {"ann"}
    assert {row.id: row.revoked for row in listed}[id]


def test_nobody_gives_more_than_it_has(manager: ManagerProcess) -> None:
    def create(stubs: Stubs, **more: object) -> pb.CreateTokenResponse:
        return stubs.fleet.CreateToken(pb.CreateTokenRequest(request_id=new_id(), **more), timeout=10)  # type: ignore[arg-type]

    ann, operator = manager.certified("ann.test"), manager.certified("operator.test")
    assert create(ann, groups=["web"]).token
    assert refused(lambda: create(ann, owner="bob")) == (C.PERMISSION_DENIED, "OWNER")
    assert refused(lambda: create(ann, roles=["operator"])) == (C.PERMISSION_DENIED, "ROLES")
    assert refused(lambda: create(ann, groups=["root"])) == (C.PERMISSION_DENIED, "GROUPS")
    assert refused(lambda: create(operator, owner="x", roles=["host"])) == (C.INVALID_ARGUMENT, "ROLES")
    assert refused(lambda: create(operator, owner="x", roles=["auditor"])) == (C.PERMISSION_DENIED, "ROLES")
    assert roles(manager.bearing(create(operator, owner="bob", groups=["any"]).token))[:3] == ("token", "bob", {"any"})
    assert refused(lambda: create(operator, owner="x", lifetime_seconds=10**9)) == (C.INVALID_ARGUMENT, "LIFETIME")


def test_no_token_stands_in_database_log_or_audit(manager: ManagerProcess) -> None:
    secret = manager.token("ann").rpartition(".")[2].encode()
    joining = JoinToken.parse(manager.join_token()).secret
    decoded = base64.urlsafe_b64decode(secret + b"=" * (-len(secret) % 4))
    secrets = {form for raw in (decoded, joining) for form in (raw, raw.hex().encode(), base64.urlsafe_b64encode(raw).rstrip(b"="))}
    assert secret in secrets and len(joining) == 32
    for path in (*manager.state.glob("manager.db*"), manager.state / "audit.log", manager.log):
        content = path.read_bytes()
        assert not [form for form in secrets if form in content], path


# ---- the configuration is read again --------------------------------------------------------------------------------------


def test_who_may_call_is_read_again_on_hangup(manager: ManagerProcess) -> None:
    stubs = manager.certified("nobody.test")
    assert stubs.who().owner == ""
    manager.configure('[[clients]]\nsan = "nobody.test"\nowner = "now"')
    assert manager.process is not None
    manager.process.send_signal(1)
    wait_for(lambda: stubs.who().owner == "now", 10, "the new owner")
    manager.configure('[[clients]]\nsan = "x"\nowner = ""')
    manager.process.send_signal(1)
    wait_for(lambda: "the old configuration stays: " in manager.log.read_text(), 10, "the complaint")
    assert stubs.who().owner == "now"
    manager.configure()
    manager.process.send_signal(1)
    wait_for(lambda: stubs.who().owner == "", 10, "the old owner")
