"""A real manager on both databases: policies, repeated calls, restarts, kills; several managers of one fleet."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor_rpc.sealed.fleet import JoinToken
from hsmvisor_rpc.v1 import manager_pb2 as pb
from support.host_process import new_id, reason, refused, wait_for
from support.manager_process import ManagerProcess, exchange, guest
from support.postgres import Postgres

C = grpc.StatusCode
POLICY = '@id("all")\npermit (principal, action, resource);\n'


@pytest.fixture(params=["sqlite", "postgresql"])
def manager(request: pytest.FixtureRequest) -> Iterator[ManagerProcess]:
    url = request.getfixturevalue("postgres").database() if request.param == "postgresql" else ""
    with ManagerProcess(url=url) as manager:
        yield manager


def upload(manager: ManagerProcess, text: str = POLICY, request_id: str = "", **more: object) -> pb.Policies:
    request = pb.UploadPolicyRequest(request_id=request_id or new_id(), text=text, **more)  # type: ignore[arg-type]
    return manager.local.policies.Upload(request, timeout=10)


# ---- policies -----------------------------------------------------------------------------------------------------------


def test_policies_are_versions(manager: ManagerProcess) -> None:
    get, listing = manager.local.policies.Get, manager.local.policies.List
    first = get(pb.GetPolicyRequest(), timeout=10)
    assert (first.version, first.uploaded_by) == (1, "manager") and '@id("own-resources")' in first.text
    id = new_id()
    second = upload(manager, comment="for all", instead_of=1, request_id=id)
    assert (second.version, second.text, second.comment) == (2, POLICY, "for all")
    assert upload(manager, comment="for all", instead_of=1, request_id=id) == second  # carried out once
    assert refused(lambda: upload(manager, request_id=id)) == (C.ABORTED, "REQUEST_ID_REUSED")
    assert refused(lambda: upload(manager, instead_of=1)) == (C.FAILED_PRECONDITION, "POLICY_VERSION")
    assert manager.local.fleet.GetFleet(pb.GetFleetRequest(), timeout=10).policy_version == 2
    page = listing(pb.ListPoliciesRequest(page_size=1), timeout=10)
    rest = listing(pb.ListPoliciesRequest(page_size=1, page_token=page.next_page_token), timeout=10)
    assert [row.version for row in (*page.policies, *rest.policies)] == [2, 1] and not rest.next_page_token
    assert not any(row.text for row in page.policies)
    assert get(pb.GetPolicyRequest(version=1), timeout=10) == first
    assert refused(lambda: get(pb.GetPolicyRequest(version=9), timeout=10)) == (C.NOT_FOUND, "POLICY_VERSION")
    events = manager.local.history.ListEvents(pb.ListFleetEventsRequest(kind="policy_uploaded"), timeout=10).events
    assert len(events) == 1 and '"version":2' in events[0].detail.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "not Cedar policies"),
        ("permit (principal, action, resource);", "@id"),
        ('@id("a") forbid (principal, action, resource);', "@reason"),
        ('@id("a") permit (principal, action, resource) when { resource.colour == "red" };', "colour"),
    ],
)
def test_bad_policies_are_refused_with_what_is_wrong(sqlite: ManagerProcess, text: str, said: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        upload(sqlite, text)
    assert reason(caught.value) == (C.INVALID_ARGUMENT, "POLICIES")
    assert said in (caught.value.details() or "")
    assert sqlite.local.policies.Get(pb.GetPolicyRequest(), timeout=10).version == 1


@pytest.fixture(scope="module")
def sqlite() -> Iterator[ManagerProcess]:
    with ManagerProcess() as manager:
        yield manager


# ---- what lasts -----------------------------------------------------------------------------------------------------------


def test_a_restart_keeps_all(manager: ManagerProcess) -> None:
    host = manager.join("alpha")
    exchange(host.stubs(manager), guests=[guest("web-1", env="prod"), guest("web-2")])
    upload(manager)
    token, join = manager.token("ann"), manager.join_token("beta", request_id="the-same")
    manager.restart()
    assert manager.bearing(token).who().owner == "ann"
    assert manager.join_token("beta", request_id="the-same") == join
    assert host.stubs(manager).who().name == "host:alpha"
    assert manager.local.policies.Get(pb.GetPolicyRequest(), timeout=10).text == POLICY
    found = manager.local.fleet.ListResources(pb.ListResourcesRequest(selector={"env": "prod"}), timeout=10).resources
    assert [row.id for row in found] == ["alpha/web-1"]
    shown = manager.local.fleet.GetHost(pb.GetFleetHostRequest(name="alpha"), timeout=10)
    assert (shown.state, shown.resources, shown.trusted, shown.version) == ("joined", 2, True, "test")
    managers = wait_for(lambda: manager.local.fleet.GetFleet(pb.GetFleetRequest(), timeout=10).managers, 10, "the manager's name")
    assert list(managers) == ["one"]


def test_hosts_are_updated_and_removed(manager: ManagerProcess) -> None:
    host = manager.join("alpha")
    exchange(host.stubs(manager), guests=[guest("a", "ann"), guest("b", "bob")])
    update = pb.UpdateHostRequest(request_id=new_id(), name="alpha", trusted=False, owners=["ann"])
    shown = manager.local.fleet.UpdateHost(update, timeout=10)
    assert (shown.trusted, list(shown.owners)) == (False, ["ann"])
    assert exchange(host.stubs(manager), all=False).tell_all
    told = exchange(host.stubs(manager), guests=[guest("a", "ann"), guest("b", "bob")])
    assert [(row.name, row.reason) for row in told.refused] == [("b", "OWNER")]
    page = manager.local.fleet.ListHosts(pb.ListHostsRequest(page_size=1), timeout=10)
    assert [row.name for row in page.hosts] == ["alpha"] and not page.next_page_token
    request = pb.RemoveHostRequest(request_id=new_id(), name="alpha", revoke_certificates=True)
    answer = manager.local.fleet.RemoveHost(request, timeout=10)
    assert manager.local.fleet.RemoveHost(request, timeout=10) == answer
    assert answer.resources == 2  # the refused one had been there before, and stayed as it was
    assert not manager.local.fleet.ListResources(pb.ListResourcesRequest(), timeout=10).resources
    gone = pb.GetFleetHostRequest(name="alpha")
    assert refused(lambda: manager.local.fleet.GetHost(gone, timeout=10)) == (C.NOT_FOUND, "HOST")


def test_a_call_that_a_kill_interrupts_is_carried_out_once(manager: ManagerProcess) -> None:
    """Calls run all the time; the manager is killed several times; each is repeated until it is answered."""
    ids = [f"call-{n:03d}" for n in range(60)]
    answers: dict[str, str] = {}
    end = threading.Event()

    def call() -> None:
        for id in ids:
            while not end.is_set():
                request = pb.CreateTokenRequest(request_id=id, owner="ann", lifetime_seconds=600)
                with contextlib.suppress(grpc.RpcError, ValueError):
                    answers[id] = manager.local.fleet.CreateToken(request, timeout=5).token
                    break
                time.sleep(0.02)

    worker = threading.Thread(target=call)
    worker.start()
    try:
        for number in range(3):
            wait_for(lambda number=number: len(answers) >= 8 * (number + 1), 30, "some answers")
            manager.restart(signal.SIGKILL)
        worker.join(60)
    finally:
        end.set()
        worker.join()
    assert len(answers) == len(ids)
    for id in ids:
        request = pb.CreateTokenRequest(request_id=id, owner="ann", lifetime_seconds=600)
        assert manager.local.fleet.CreateToken(request, timeout=5).token == answers[id]
    listed = manager.local.fleet.ListTokens(pb.ListTokensRequest(page_size=1000), timeout=10).tokens
    assert len(listed) == len(ids) == len(set(answers.values()))


def test_another_owners_request_id_is_another_request(sqlite: ManagerProcess) -> None:
    """Nobody is answered with what another one was, whatever it knows."""
    request = pb.CreateTokenRequest(request_id="shared-id")
    ann, bob = sqlite.bearing(sqlite.token("ann")), sqlite.bearing(sqlite.token("bob"))
    token = ann.fleet.CreateToken(request, timeout=10).token
    assert refused(lambda: bob.fleet.CreateToken(request, timeout=10)) == (C.ABORTED, "REQUEST_ID_REUSED")
    assert ann.fleet.CreateToken(request, timeout=10).token == token


def test_events_are_followed_and_taken_up_again(sqlite: ManagerProcess) -> None:
    ann = sqlite.bearing(sqlite.token("ann"))
    last = sqlite.local.history.ListEvents(pb.ListFleetEventsRequest(page_size=1), timeout=10).events[0].id
    stream = ann.history.StreamEvents(pb.StreamFleetEventsRequest(after_id=last), timeout=20)
    sqlite.token("bob")
    sqlite.token("ann")
    event = next(stream)
    assert (event.kind, event.owner) == ("token_created", "ann")
    stream.cancel()
    wrong = pb.StreamFleetEventsRequest(kind="weather")
    assert refused(lambda: list(ann.history.StreamEvents(wrong, timeout=10))) == (C.INVALID_ARGUMENT, "EVENTS")


def test_authorities_are_listed(sqlite: ManagerProcess) -> None:
    (row,) = sqlite.local.authorities.ListAuthorities(pb.ListAuthoritiesRequest(), timeout=10).authorities
    assert (row.name, row.kind, row.default, row.issued, len(row.roots)) == ("builtin", "builtin", True, 0, 1)


def test_files_may_lie_elsewhere(tmp_path: Path) -> None:
    """In directories that are not there before the first start, after which the manager is confined to those it has."""
    settings = f"""
        [[authorities]]
        name = "own"
        default = true
        keys = "{tmp_path}/keys/own"
        [[authorities]]
        name = "public"
        kind = "acme"
        directory = "https://127.0.0.1:1/directory"
        http_hook = ["/bin/true"]
        account_key = "{tmp_path}/account/key"
        [audit]
        file = "{tmp_path}/audit/log"
    """
    with ManagerProcess(settings) as manager:
        assert {path.name for path in (tmp_path / "keys" / "own").iterdir()} >= {"root.key", "intermediate.key"}
        assert (tmp_path / "account").is_dir() and (tmp_path / "audit" / "log").stat().st_size
        manager.restart()


# ---- what does not start --------------------------------------------------------------------------------------------------


def test_a_second_one_with_the_same_state_does_not_start(sqlite: ManagerProcess) -> None:
    assert "another hsmvisor-manager (pid" in sqlite.refuses_to_start()


def test_sqlite_is_for_one_manager(sqlite: ManagerProcess) -> None:
    second = ManagerProcess(url=f"sqlite:///{sqlite.state / 'manager.db'}", name="two", fleet=sqlite.state / "fleet")
    try:
        assert "SQLite is for one; several need PostgreSQL" in second.refuses_to_start()
    finally:
        shutil.rmtree(second.directory)


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ("[log]\nlevel = 1", 78, "log.level is of type str"),
        ('[[authorities]]\nname = "a"\nlibrary = "/no.so"\ntoken = "t"\npin_file = "/no"', 1, "authority a: the PIN's file /no"),
    ],
)
def test_what_keeps_it_from_starting_is_said(settings: str, code: int, said: str) -> None:
    manager = ManagerProcess(settings)
    try:
        assert said in manager.refuses_to_start(code)
    finally:
        shutil.rmtree(manager.directory)


def test_a_database_that_is_away_is_said_without_its_password() -> None:
    manager = ManagerProcess(url="postgresql://me:hunter2@127.0.0.1:1/x")
    try:
        said = manager.refuses_to_start()
        assert "postgresql://me:***@127.0.0.1:1/x" in said and "hunter2" not in said
    finally:
        shutil.rmtree(manager.directory)


def test_lost_keys_and_a_lost_database_are_no_beginning() -> None:
    with ManagerProcess() as manager:
        manager.stop()
        for lost, said in (
            ("fleet/token.key", "token.key is missing"),
            ("fleet/root/root.pub", "there is no authority in"),
            ("fleet/ca/intermediate.key", "intermediate.key is missing"),
            ("manager.key", "manager.key is missing"),
            ("manager.db", "is empty, but"),
        ):
            path = manager.state / lost
            aside = [p.rename(p.with_name(f"{p.name}.aside")) for p in path.parent.glob(f"{path.name}*") if p.suffix != ".lock"]
            assert said in manager.refuses_to_start(), lost
            for p in path.parent.glob(f"{path.name}*"):
                if p.suffix not in (".aside", ".lock"):
                    p.unlink()
            for p in aside:
                p.rename(p.with_name(p.name.removesuffix(".aside")))
        manager.start()


# ---- several of them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(postgres: Postgres) -> Iterator[tuple[ManagerProcess, ManagerProcess]]:
    url = postgres.database()
    with ManagerProcess(url=url) as one, ManagerProcess(url=url, name="two", fleet=one.state / "fleet") as other:
        yield one, other


def test_several_managers_are_one(two: tuple[ManagerProcess, ManagerProcess]) -> None:
    one, other = two
    host = one.join("alpha")
    assert host.stubs(other).who().name == "host:alpha"
    assert other.bearing(one.token("ann")).who().owner == "ann"
    made = [JoinToken.parse(manager.join_token("beta", request_id="same")) for manager in two]
    assert made[0].secret == made[1].secret and made[0].addresses != made[1].addresses
    upload(other)
    wait_for(lambda: one.local.fleet.GetFleet(pb.GetFleetRequest(), timeout=10).policy_version == 2, 30, "the other one's policies")
    wait_for(lambda: set(one.local.fleet.GetFleet(pb.GetFleetRequest(), timeout=10).managers) == {"one", "two"}, 30, "both names")


def test_a_request_is_carried_out_once_by_two_managers_together(two: tuple[ManagerProcess, ManagerProcess]) -> None:
    one, other = two
    for n in range(20):
        request = pb.CreateTokenRequest(request_id=f"both-{n}", owner="ann")
        first, second = (m.local.fleet.CreateToken.future(request, timeout=10) for m in (one, other))
        assert first.result().token == second.result().token
    assert len(one.local.fleet.ListTokens(pb.ListTokensRequest(page_size=1000), timeout=10).tokens) == 20


@pytest.mark.parametrize("copied", [False, True])
def test_a_manager_of_another_fleet_does_not_start(postgres: Postgres, sqlite: ManagerProcess, copied: bool) -> None:
    """`copied`: with another fleet's files; otherwise without any."""
    url = postgres.database()
    with ManagerProcess(url=url):
        stranger = ManagerProcess(url=url, name="two", fleet=sqlite.state / "fleet" if copied else None)
        try:
            said = stranger.refuses_to_start()
            assert "copy that directory from another manager" in said
            assert ("another root" if copied else "is missing") in said
            assert (stranger.state / "fleet" / "token.key").exists() is copied
        finally:
            shutil.rmtree(stranger.directory)
