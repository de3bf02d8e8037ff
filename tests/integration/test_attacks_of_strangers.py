"""Strangers who would join, and whoever writes the database, and it alone.

Each test is the attack, with the real engine, store, policies and issuer; what it took, and from whom, is in its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hsmvisor.manager.access.tokens import PREFIX
from hsmvisor.manager.inventory.identities import Identities
from hsmvisor.manager.inventory.joining import Joining
from hsmvisor.manager.store import tables
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.sealed.commands import fingerprint, sign
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, RecipientKey, recipient_fingerprint
from hsmvisor_rpc.sealed.fleet import JoinStatement
from hsmvisor_rpc.sealed.identity import ModuleIdentity
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisor_rpc.v1 import manager_pb2 as pb
from sqlalchemy import select, update
from support.attacks import rotate
from support.fleet import Fleet
from support.host_process import refused
from support.light_host import LightHost
from support.manager_process import JoiningHost, ManagerProcess
from support.scenarios import SHARED, Play, held

C = grpc.StatusCode


@pytest.fixture(scope="module")
def manager() -> Iterator[ManagerProcess]:
    """A real one."""
    with ManagerProcess() as manager:
        yield manager


def rows_of(manager: ManagerProcess, table: str) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{manager.state}/manager.db?mode=ro", uri=True)) as database:
        return int(database.execute(f"select count(*) from {table}").fetchone()[0])


def test_who_proves_no_secret_has_nothing_made_written_or_told(manager: ManagerProcess) -> None:
    """Each attempt had a certificate made and stored, an event written and a line in the audit log."""
    manager.join_token()
    before = {table: rows_of(manager, table) for table in ("ca_certificates", "events", "answers")}
    lines, began = len(manager.audit().splitlines()), time.monotonic()
    stranger = JoiningHost("stranger")
    link = manager.stranger().link
    for _ in range(300):
        request = stranger.request()
        request.proof = bytes(32)
        assert refused(lambda request=request: link.Join(request, timeout=10)) == (C.PERMISSION_DENIED, "JOIN")  # type: ignore[misc]
    assert {table: rows_of(manager, table) for table in before} == before
    noted, took = len(manager.audit().splitlines()) - lines, time.monotonic() - began
    assert noted < 210 + 20 * took  # refusals are noted, as many as a disk bears: some at once, and so many a second


def large(stranger: JoiningHost) -> tuple[JoinStatement, bytes]:
    """Returns it with its signature."""
    statement = JoinStatement("stranger", stranger.public, bytes(3_000_000), bytes(32))
    return statement, stranger.identity.sign(statement.encode())


def test_a_strangers_large_request_is_refused(manager: ManagerProcess) -> None:
    stranger = JoiningHost("stranger")
    (statement, signature), request = large(stranger), stranger.request()
    request.csr, request.nonce, request.proof, request.signature = statement.csr, statement.nonce, bytes(32), signature
    assert refused(lambda: manager.stranger().link.Join(request, timeout=10)) == (C.INVALID_ARGUMENT, "CSR")


def test_a_strangers_large_request_is_compared_with_no_secret(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was authenticated with the secret of each token there is."""

    async def scenario(fleet: Fleet) -> None:
        identities, pins = Identities(fleet.ca), fleet.parts.pins
        joining = Joining(fleet.database, fleet.history, identities, pins, bytes(32), fleet.root_public, (), fleet.clock)
        tried: list[JoinStatement] = []

        async def fitting(connection: object, statement: JoinStatement, proof: bytes) -> None:
            tried.append(statement)

        monkeypatch.setattr(joining, "_fitting", fitting)
        stranger = JoiningHost("stranger")
        with pytest.raises(Invalid, match="certificate request"):
            await joining.admit(*large(stranger), bytes(32), None)
        assert not tried
        small = JoinStatement("stranger", stranger.public, bytes(300), bytes(32))
        await joining.admit(small, stranger.identity.sign(small.encode()), bytes(32), None)
        assert tried == [small]

    play(scenario)


def test_a_used_token_has_no_certificate_made_and_a_lost_answer_is_given_again(manager: ManagerProcess) -> None:
    token, link = manager.join_token(), manager.stranger().link
    first, thief = JoiningHost("first-one"), JoiningHost("thief")
    asked = first.request(token)
    answer = link.Join(asked, timeout=10)
    before = rows_of(manager, "ca_certificates")
    for other in (thief.request(token), first.request(token)):
        assert refused(lambda other=other: link.Join(other, timeout=10)) == (C.PERMISSION_DENIED, "JOIN_TWICE")  # type: ignore[misc]
    assert link.Join(asked, timeout=10) == answer
    assert rows_of(manager, "ca_certificates") == before
    told = manager.local.history.ListEvents(pb.ListFleetEventsRequest(kind="host_refused"), timeout=10).events
    assert thief.id in {event.host for event in told}  # whoever knows a secret that was used is told of


# ---- whoever writes the database, and it alone ------------------------------------------------------------------------------


async def written(fleet: Fleet, statement: Any) -> None:
    async with fleet.database.transaction() as connection:
        await connection.execute(statement)


async def envelopes_of(fleet: Fleet) -> list[Any]:
    async with fleet.database.transaction() as connection:
        return list((await connection.execute(select(tables.envelopes))).all())


def opens(recipient: RecipientKey, row: Any, host: LightHost, generation: int) -> bool:
    module_id, fingerprint = bytes.fromhex(row.module_id), recipient_fingerprint(recipient.public)
    context = EnvelopeContext(host.id, module_id, fingerprint, "tls", generation, row.expires_at)
    try:
        return bool(recipient.open(row.envelope, context).pkcs8)
    except Refusal:
        return False


@pytest.mark.parametrize("as_well", [False, True])
def test_no_key_is_sealed_to_a_recipient_that_stands_in_the_database_alone(play: Play, as_well: bool) -> None:
    """It was read from the same database then.  `as_well`: with an identity and a host of the thief's own."""

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        victim, other = host.add("victim"), host.add("other")
        request = await fleet.ask(**SHARED, selector={"kind": "VM"})
        await fleet.settle()
        thief, resources, forger = RecipientKey(), tables.resources, LightHost("h1", fleet.root_public, fleet.clock)
        told: dict[str, Any] = {"recipient": thief.public}
        if as_well:
            root = fingerprint(fleet.root_public)
            identity = ModuleIdentity(host.id, victim.module.module_id, "victim", thief.public, root, 0)
            told["identity"] = sign(identity, forger.key).encode()
            await written(fleet, update(tables.hosts).values(host_key=forger.public))
        await written(fleet, update(resources).where(resources.c.id == "h1/victim").values(told))
        if as_well:
            fleet.hosts.clear()  # its exchanges would tell the truth
        sealed: list[Any] = []
        make = fleet.issuer.make

        async def watched(key_type: str, wanted: Any, targets: Any, escrow: Any) -> Any:
            sealed.extend(targets)
            return await make(key_type, wanted, targets, escrow)

        fleet.issuer.make = watched  # type: ignore[method-assign]
        await rotate(fleet, request)
        assert thief.public not in {target.recipient for target in sealed}
        assert not any(opens(thief, row, host, 2) for row in await envelopes_of(fleet))
        if not as_well:
            assert (held(victim), held(other)) == (1, 2)
            host.restart()  # what the host itself says counts
            await fleet.settle()
            await rotate(fleet, request)
            assert held(victim) == held(other) > 2

    play(scenario)


def changed(manager: ManagerProcess, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(manager.state / "manager.db")) as database, database:
        assert database.execute(statement, values).rowcount == 1


def test_who_changes_a_tokens_rights_has_another_token(manager: ManagerProcess) -> None:
    """Or makes one up: what stands in the database of a token is its hash, and that is anybody's to make."""
    token = manager.token("ann")
    id = token.removeprefix(PREFIX).partition(".")[0]
    stubs = manager.bearing(token)
    assert set(stubs.who().roles) == {"owner"}
    for column, value in (("roles", "operator"), ("owner", "bob"), ("groups", "wheel"), ("expires_at", 2**40)):
        with contextlib.closing(sqlite3.connect(manager.state / "manager.db")) as database:
            before = database.execute(f"select {column} from tokens where id = ?", (id,)).fetchone()[0]
        changed(manager, f"update tokens set {column} = ? where id = ?", value, id)
        assert refused(stubs.who) == (C.UNAUTHENTICATED, "TOKEN")
        changed(manager, f"update tokens set {column} = ? where id = ?", before, id)
        assert stubs.who().owner == "ann"
    own = f"{PREFIX}{'ab' * 16}.{'A' * 43}"
    row = ("ab" * 16, hashlib.sha256(own.encode()).digest(), "eve", "", "operator", 1, "uid:0", 2**40, 0)
    changed(manager, "insert into tokens values (?, ?, ?, ?, ?, ?, ?, ?, ?)", *row)
    assert refused(manager.bearing(own).who) == (C.UNAUTHENTICATED, "TOKEN")


def test_who_changes_what_a_join_token_is_for_has_another_one(manager: ManagerProcess) -> None:
    manager.join("target")
    token = manager.join_token("elsewhere", owners=["ann"])
    thief = JoiningHost("target")
    changed(manager, "update join_tokens set host = 'target', owners = '', replaces = 1 where host = 'elsewhere'")
    assert refused(lambda: manager.stranger().link.Join(thief.request(token), timeout=10)) == (C.PERMISSION_DENIED, "JOIN")
