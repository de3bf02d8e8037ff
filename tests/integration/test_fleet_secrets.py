"""Where private keys of a fleet are not: the manager's memory, during and after a delivery, its database, its logs and other files.

The keys are taken out of a real module, which has them all: one that it made itself, one that the issuer made for several modules,
one that is kept (escrow), and one that its owner imported.  Each search is shown to find what must be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key
from hsmvisor.bundle import Bundle
from hsmvisor.client.importing import seal_import
from hsmvisor.manager.issuer import escrow
from hsmvisor.manager.issuer.escrow import FileWrapper
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.tables import escrows
from hsmvisor_rpc.v1 import manager_pb2 as pb
from sqlalchemy import select
from support.certificates import Authority, PrivateKey, chain_pem, new_key, pkcs8, spki
from support.fleet_processes import Manager, Member
from support.host_process import new_id, wait_for
from support.leaks import Needles
from support.postgres import Postgres
from support.processes import descendants, dumped, memory, titled
from support.unsealing import private_keys

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root"),
]

SNAPSHOTS = 6  #: of the manager's memory at work that are kept, at most


@dataclass
class Place:
    manager: Manager
    host: Member
    url: str  #: of its database,
    database: tuple[Path, ...]  #: and where its files are
    at_work: list[Snapshot]  #: the manager's memory during the deliveries
    delivering: tuple[float, float]  #: from when the first was asked for until all was done
    requests: dict[str, pb.MaterialRequest]
    keys: dict[str, PrivateKey]  #: by material

    @property
    def pid(self) -> int:
        assert self.manager.process is not None
        return self.manager.process.pid

    @property
    def worker(self) -> int:
        return self.host.get("web-1").pid


@dataclass
class Snapshot:
    began: float
    ended: float
    regions: list[bytes]  #: what it may write to: a key is nowhere else


class Snapshots:
    """Copies a process's memory again and again while one is inside; of many, those that are kept lie all over that time."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self.taken: list[Snapshot] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number, stride = 0, 1
        while not self._over.is_set():
            began = time.monotonic()
            regions = list(memory(self._pid, written=True))
            if number % stride == 0:
                self.taken.append(Snapshot(began, time.monotonic(), regions))
            if len(self.taken) > SNAPSHOTS:  # each second one goes
                del self.taken[1::2]
                stride *= 2
            number += 1
            time.sleep(0.02)

    def __enter__(self) -> list[Snapshot]:
        self._thread.start()
        return self.taken

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def bring(manager: Manager, request: pb.MaterialRequest, key: PrivateKey) -> None:
    """Seals a key to the issuer and imports it."""
    authority = Authority()
    bundle = Bundle.make(pkcs8(key), chain_pem(authority.chain(key)))
    issuer = manager.requests.GetIssuer(pb.GetIssuerRequest(), timeout=10)
    told = pb.ImportRequest(
        request_id=new_id(),
        id=request.id,
        envelope=seal_import(bundle, issuer.recipient, request.id),
        certificates=bundle.certificates,
        public_key=bundle.public_key,
    )
    manager.requests.Import(told, timeout=30)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        url, directories = "", ()
        if request.param == "postgresql":
            postgres = stack.enter_context(contextlib.closing(Postgres()))
            url, directories = postgres.database(), (postgres.directory,)
        manager = stack.enter_context(Manager('[issuer]\nescrow = "file"\n', url))
        host = stack.enter_context(Member(manager))
        host.join("rack", manager.token("rack"))
        for name in ("web-1", "web-2"):
            host.register(name)
        wait_for(lambda: len(manager.events("resource_appeared")) == 2, 20, "the guests")
        assert manager.process is not None
        own = new_key("p256")
        sources = {"made": "module", "shared": "issuer", "kept": "issuer", "brought": "imported"}
        asked = {}
        with Snapshots(manager.process.pid) as at_work:
            began = time.monotonic()
            for material, source in sources.items():
                names = ["dns:www.example.net"] if source != "imported" else []
                spec = {"material": material, "source": source, "names": names, "escrow": material == "kept"}
                asked[material] = manager.apply(**spec, resources=["rack/web-1", "rack/web-2"])
            bring(manager, asked["brought"], own)
            wait_for(lambda: all(manager.request(one.id).summary == "done" for one in asked.values()), 60, "the deliveries")
            delivering = (began, time.monotonic())
        module = host.get("web-1")
        found = {spki(key): key for key in private_keys(host.state, module.module_id)}
        keys = {material: found[public_key(manager.request(one.id))] for material, one in asked.items()}
        assert keys["brought"].private_numbers() == own.private_numbers()  # type: ignore[union-attr]
        url = url or f"sqlite:///{manager.state}/manager.db"
        yield Place(manager, host, url, (manager.state, *directories), at_work, delivering, asked, keys)


def public_key(request: pb.MaterialRequest) -> bytes:
    """Of what serves on web-1."""
    line = next(line for line in request.lines if line.resource in ("", "rack/web-1"))
    generation = next(row for row in line.generations if row.number == line.generation)
    return spki(x509.load_der_x509_certificate(generation.certificates[0]))


@pytest.fixture(scope="module")
def needles(place: Place) -> Needles:
    return Needles(place.keys.values())


@pytest.fixture(scope="module")
def control(place: Place) -> Needles:
    """What the manager itself has to have: of which its tokens are made."""
    made = Needles([])
    made.add("token key", (place.manager.state / "fleet" / "token.key").read_bytes())
    return made


def test_the_search_finds_each_key_where_it_must_be(place: Place, needles: Needles) -> None:
    inside = needles.in_process(place.worker)
    for number, material in enumerate(place.keys):
        assert any(hit.startswith(f"key {number} ") for hit in inside), material


def test_no_process_of_the_manager_has_one_afterwards(place: Place, needles: Needles, control: Needles) -> None:
    assert needles.in_process(place.pid) == set()
    assert control.in_process(place.pid), "what is in its memory is found"
    issuer = titled(place.pid, "issuer")
    assert issuer and needles.in_process(issuer) == set()
    assert {pid for pid in descendants(place.pid) if pid != issuer} == set(), "whoever had a key is no more"


def test_the_manager_has_none_while_it_delivers(place: Place, needles: Needles, control: Needles) -> None:
    began, ended = place.delivering
    assert any(began <= one.began and one.ended <= ended for one in place.at_work), "none of them was taken meanwhile"
    for one in place.at_work:
        assert [hit for region in one.regions for hit in needles.found_in(region)] == []
        assert any(control.found_in(region) for region in one.regions)


def test_no_file_of_the_manager_has_one(place: Place, needles: Needles) -> None:
    """Database, what it writes ahead, logs, the audit log, and whatever lies beside them."""
    assert needles.in_files(*place.database, place.manager.directory) == {}
    public = Needles([])
    public.add("public key", spki(place.keys["shared"])[-64:])
    assert public.in_files(*place.database), "what is in its database is found"


async def escrowed(url: str) -> list[tuple[str, int, bytes]]:
    database = Database(url)
    async with database.reading() as connection:
        rows = (await connection.execute(select(escrows))).all()
    await database.close()
    return [(row.line_id, row.generation, bytes(row.wrapped)) for row in rows]


def test_one_is_at_rest_where_that_was_asked_for_and_is_wrapped(place: Place) -> None:
    rows = asyncio.run(escrowed(place.url))
    (kept,) = place.requests["kept"].lines
    assert [(line, number) for line, number, _ in rows] == [(kept.id, 1)]
    wrapper = FileWrapper(place.manager.state / "fleet" / "issuer" / "escrow.key")
    plain, _ = escrow.unwrap(wrapper, rows[0][2], kept.id, 1)
    assert spki(load_der_private_key(plain, None)) == spki(place.keys["kept"])  # type: ignore[arg-type]


def test_events_and_audit_say_nothing_of_keys(place: Place) -> None:
    told = " ".join(event.detail for event in place.manager.events()) + (place.manager.state / "audit.log").read_text()
    assert "PRIVATE KEY" not in told
    for key in place.keys.values():
        number = key.private_numbers().private_value  # type: ignore[union-attr]
        assert f"{number:x}" not in told.lower() and str(number) not in told


def test_nothing_of_it_is_left_in_a_core(place: Place, tmp_path: Path) -> None:
    """Neither when one dies, nor when another process of the same user asks for one."""
    pids = {"manager": place.pid, "issuer": titled(place.pid, "issuer")}
    for pid in pids.values():
        assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
    assert dumped(tmp_path, **pids) == {"ordinary"}
