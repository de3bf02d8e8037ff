"""The lanes' library: with sanitizers under clients that do everything at once, and what its binding refuses."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisord.lanes import lanes
from hsmvisord.lanes.lanes import Gate, Key, Lane, Plan, Pool
from hsmvisord.token.statistics import BOUNDS
from support.certificates import new_key, pkcs8
from support.cryptoki import REPOSITORY

SOURCES = REPOSITORY / "daemon/hsmvisord/lanes"
TURNS = 1000


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_with_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program, key = tmp_path / "stress", tmp_path / "key.der"
    key.write_bytes(pkcs8(new_key("p256")))
    build = [
        "gcc", "-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-o", program,
        REPOSITORY / "tests/support/lanes_stress.c", SOURCES / "lanes.c", SOURCES / "keys.c", "-lcrypto", "-pthread",
    ]  # fmt: skip
    for command in (build, [program, key, str(TURNS)]):
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stdout[-6000:]


@pytest.fixture(scope="module")
def pool() -> Pool:
    pool = Pool(100e-6, 8, BOUNDS)
    for _ in range(2):
        threading.Thread(target=pool.serve, daemon=True).start()
    return pool


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def key() -> Key:
    return Key(bytearray(pkcs8(new_key("p256"))), lanes.ECDSA, 64, range(1, 65))


def plan(*gates: Gate) -> Plan:
    return Plan(key(), (gates[0], gates[1]), b"head", 32, b"tail", b"reply", float("inf"))


REQUEST = b"\0\0\0\7head" + bytes(32) + b"tail"


def collected(pool: Pool) -> Lane:
    assert select.select([pool.descriptor], [], [], 10)[0], "no lane came back"
    os.eventfd_read(pool.descriptor)
    lane = pool.collect()
    assert lane is not None
    return lane


STRANGE = {
    "a byte": b"x",
    "short": REQUEST[:-1],
    "long": REQUEST + b"x",
    "two": REQUEST + REQUEST,
    "head": REQUEST.replace(b"head", b"hEad"),
    "tail": REQUEST.replace(b"tail", b"taiL"),
}


@pytest.mark.parametrize("received", STRANGE.values(), ids=STRANGE)
def test_what_is_not_planned_comes_back_whole(pool: Pool, pair: tuple[socket.socket, socket.socket], received: bytes) -> None:
    lane = Lane(pair[0].fileno(), plan(Gate(), Gate()))
    assert pool.enter(lane)
    pair[1].send(REQUEST)
    reply = pair[1].recv(200)
    assert reply[:9] == b"\0\0\0\7reply" and len(reply) == 73
    pair[1].send(received)
    assert collected(pool) is lane and lane.received() == received and lane.unsent() == b""
    assert (lane.counts().count, lane.counts().count) == (1, 0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_shut_gate_lets_nothing_pass(pool: Pool, pair: tuple[socket.socket, socket.socket], which: int) -> None:
    gates = Gate(), Gate()
    lane = Lane(pair[0].fileno(), plan(*gates))
    assert pool.enter(lane)
    gates[which].shut()
    pair[1].send(REQUEST)
    assert collected(pool) is lane and lane.received() == REQUEST
    assert not pool.enter(Lane(pair[0].fileno(), plan(*gates)))


def test_a_lane_is_over_at_its_keys_expiry(pool: Pool, pair: tuple[socket.socket, socket.socket]) -> None:
    past = Plan(key(), (Gate(), Gate()), b"head", 32, b"tail", b"reply", 1.0)
    lane = Lane(pair[0].fileno(), past)
    assert pool.enter(lane)
    pair[1].send(REQUEST)
    assert collected(pool) is lane and lane.received() == REQUEST


def test_recalled_lanes_come_back_untouched(pool: Pool, pair: tuple[socket.socket, socket.socket]) -> None:
    lane = Lane(pair[0].fileno(), plan(Gate(), Gate()))
    assert pool.enter(lane)
    pool.recall()
    assert collected(pool) is lane and lane.received() == b""
    pair[1].send(REQUEST)
    assert pair[0].recv(100) == REQUEST


def test_a_client_that_left_comes_back(pool: Pool, pair: tuple[socket.socket, socket.socket]) -> None:
    lane = Lane(pair[0].fileno(), plan(Gate(), Gate()))
    assert pool.enter(lane)
    pair[1].shutdown(socket.SHUT_RDWR)
    assert collected(pool) is lane and lane.received() == b""


def test_bytes_that_are_no_key() -> None:
    with pytest.raises(MemoryError):
        Key(bytearray(b"no key"), lanes.ECDSA, 64, range(1, 65))


def test_a_key_leaves_nothing_of_its_bytes() -> None:
    der = bytearray(pkcs8(new_key("rsa2048")))
    assert len(Key(der, lanes.RSA, 256, range(1, 246)).sign(b"digest")) == 256
    assert der == bytes(len(der))
