"""The issuer's process: what it makes, how much of it, what ends it, and what it may not be told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hsmvisor.environment import child_environment
from hsmvisor.manager.ca import names, requests
from hsmvisor.manager.issuer import keys, limits
from hsmvisor.manager.issuer.calls import Forget, Hello, Make, OverLimit, Ready, Targets, Trouble, portions
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, Issuer, IssuerAway
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.refusal import Refusal
from support.certificates import spki
from support.host_process import SOURCES, gone, wait_for
from support.issuing import Manager, Target, children_of, file_settings, many, pid_of, running, seal_to, targets, tell
from support.processes import status, unreaped

NAMES = names.parse_all(["dns:a.example", "ip:192.0.2.1"])


# ---- what it makes ------------------------------------------------------------------------------------------------------


def test_keys_fit_their_requests_and_open_in_their_modules_alone(tmp_path: Path) -> None:
    modules = targets(3)

    async def story(issuer: Issuer) -> None:
        for key_type in keys.KEY_TYPES:
            made = await issuer.make(key_type, NAMES, seal_to(modules), None)
            checked = requests.check(made.csr, NAMES)
            assert (checked.key_type, checked.names) == (key_type, NAMES)
            assert requests.spki(checked.public_key) == made.public_key
            opened = [one.opened(envelope) for one, envelope in zip(modules, made.envelopes, strict=True)]
            assert {spki(one) for one in opened} == {made.public_key}
            assert (made.wrapped, made.certificates) == (b"", ())
            for stranger in (modules[1], replace(modules[0], generation=2), replace(modules[0], material="other")):
                with pytest.raises(Refusal):
                    stranger.opened(made.envelopes[0])

    tell(tmp_path, story)


def test_a_fork_repeats_no_randomness(tmp_path: Path) -> None:
    """Each child begins with the same memory: keys, ephemeral keys and signatures of 40 are all different."""

    async def story(issuer: Issuer) -> None:
        for key_type in ("P-256", "Ed25519"):
            made = [await issuer.make(key_type, (), many(1), None) for _ in range(20)]
            assert len({one.public_key for one in made}) == len({one.envelopes[0][:1120] for one in made}) == 20
        modules = targets(2)
        made_one = await issuer.make("P-256", (), seal_to([modules[0], modules[0]]), None)
        assert made_one.envelopes[0] != made_one.envelopes[1]

    tell(tmp_path, story)


def test_a_bare_key_for_nobody_yet(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        made = await issuer.make("P-256", (), (), EscrowAs("line", 1))
        assert made.envelopes == () and made.wrapped and requests.check(made.csr, ()).names == ()

    tell(tmp_path, story)


def test_bad_calls_are_refused_with_a_sentence(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        with pytest.raises(BadKey, match="keys of type 'DSA' are not made; there are P-256"):
            await issuer.make("DSA", (), (), None)
        broken = replace(Target(1).seal_to, recipient=b"\xff" * 1216)
        with pytest.raises(BadKey, match="its recipient key cannot be sealed to"):
            await issuer.make("P-256", (), [broken], None)
        with pytest.raises(OverLimit):
            await issuer.make("P-256", (), [replace(Target(1).seal_to, host_id=b"")], None)
        assert issuer.restarts == 0

    tell(tmp_path, story)


# ---- how much ---------------------------------------------------------------------------------------------------------------


def test_as_many_modules_as_may_be_and_one_more(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        made = await issuer.make("P-256", NAMES, many(limits.MAX_TARGETS), None)
        assert len(set(made.envelopes)) == limits.MAX_TARGETS
        with pytest.raises(OverLimit, match="20001 modules"):
            await issuer.make("P-256", NAMES, many(limits.MAX_TARGETS + 1), None)

    tell(tmp_path, story)


def test_as_many_calls_as_may_be_and_one_more(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        waiting = [asyncio.create_task(issuer.make("P-256", NAMES, many(20), None)) for _ in range(limits.MAX_CALLS)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(IssuerAway, match="busy: 64 calls"):
            await issuer.make("P-256", NAMES, many(1), None)
        most = 0
        while not all(one.done() for one in waiting):
            most = max(most, len(children_of(pid_of(issuer))))
            await asyncio.sleep(0.001)
        assert len({(await one).public_key for one in waiting}) == limits.MAX_CALLS
        assert 1 <= most <= limits.children()
        assert (await issuer.make("P-256", NAMES, many(1), None)).csr

    tell(tmp_path, story)


def test_more_modules_at_once_than_may_be(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        half = many(limits.MAX_TARGETS)
        waiting = [asyncio.create_task(issuer.make("P-256", (), half, None)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(IssuerAway, match="for 40000 modules"):
            await issuer.make("P-256", (), many(1), None)
        assert [len((await one).envelopes) for one in waiting] == [limits.MAX_TARGETS] * 2

    tell(tmp_path, story)


def test_a_slow_key_keeps_no_other_waiting(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        slow = asyncio.create_task(issuer.make("P-256", (), many(limits.MAX_TARGETS), None))
        await asyncio.sleep(0.2)
        quick = [await issuer.make("P-256", NAMES, many(1), None) for _ in range(5)]
        assert len(quick) == 5 and not slow.done()
        assert (await slow).csr

    tell(tmp_path, story)


def test_a_call_that_nobody_waits_for_is_dropped(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        for _ in range(3):
            tasks = [asyncio.create_task(issuer.make("P-256", (), many(5000), None)) for _ in range(4)]
            await asyncio.sleep(0.3)
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        began = time.monotonic()
        assert (await issuer.make("P-256", NAMES, many(1), None)).csr
        assert time.monotonic() - began < 15 and issuer.restarts == 0

    tell(tmp_path, story)


def test_nothing_is_left_of_many_calls(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        def held() -> tuple[int, int]:
            return len(os.listdir(f"/proc/{pid_of(issuer)}/fd")), len(os.listdir(f"/proc/{pid_of(issuer)}/task"))

        def alone() -> bool:
            """A child that has answered ends a moment later."""
            return children_of(pid_of(issuer)) == [] == unreaped(pid_of(issuer))

        await issuer.make("P-256", NAMES, many(1), None)
        await asyncio.to_thread(wait_for, alone)
        before = held()
        for _ in range(50):
            await issuer.make("P-256", NAMES, many(3), None)
        await asyncio.to_thread(wait_for, alone)
        assert held() == before and before[1] == 1

    tell(tmp_path, story)


# ---- what ends ---------------------------------------------------------------------------------------------------------------


def test_a_child_that_is_killed_costs_its_call_alone(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        pid = pid_of(issuer)
        call = asyncio.create_task(issuer.make("P-256", (), many(limits.MAX_TARGETS), None))
        found = await asyncio.to_thread(wait_for, lambda: children_of(pid))
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(IssuerAway, match="ended \\(signal 9\\)"):
            await call
        assert (await issuer.make("P-256", NAMES, many(1), None)).csr
        await asyncio.to_thread(wait_for, lambda: children_of(pid) == [] == unreaped(pid))  # the second's ends a moment later
        assert pid_of(issuer) == pid and issuer.restarts == 0

    tell(tmp_path, story)


def test_a_killed_issuer_takes_its_children_along_and_is_started_again(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        pid, recipient = pid_of(issuer), issuer.recipient
        calls = [asyncio.create_task(issuer.make("P-256", (), many(5000), None)) for _ in range(3)]
        found = await asyncio.to_thread(wait_for, lambda: children_of(pid))
        os.kill(pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(IssuerAway, match="the issuer ended"):
                await call
        assert (await issuer.make("P-256", NAMES, many(1), None)).csr
        assert pid_of(issuer) not in (0, pid) and issuer.restarts == 1 and issuer.recipient == recipient
        assert all(map(gone, found))

    tell(tmp_path, story)


def test_it_ends_with_its_socket(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        issuer = manager.issuer
        manager.begin("make", [Target(1)] * 5000, key_type="P-256", names=["a.example"])
        child = wait_for(lambda: children_of(issuer))[0]
        os.kill(manager.pid, signal.SIGKILL)
        wait_for(lambda: gone(issuer) and gone(child))


def test_closing_ends_it_and_what_waits(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(file_settings(tmp_path)) as issuer:
            pid = pid_of(issuer)
            call = asyncio.create_task(issuer.make("P-256", (), many(5000), None))
            await asyncio.sleep(0.2)
        with pytest.raises(IssuerAway):
            await call
        with pytest.raises(IssuerAway, match="closed"):
            await issuer.make("P-256", (), (), None)
        assert gone(pid)
        await issuer.start()
        assert (await issuer.make("P-256", (), (), None)).csr
        await issuer.close()

    asyncio.run(run())


def test_one_that_cannot_start_says_why_and_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "issuer.key").write_bytes(bytes(95))
    (tmp_path / "issuer.key").chmod(0o600)
    monkeypatch.setattr(limits, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(limits, "LONGEST_PAUSE", 0.01)

    async def run() -> None:
        issuer = Issuer(file_settings(tmp_path))
        with pytest.raises(IssuerAway, match="has 95 bytes instead of 96: restore it"):
            await issuer.start()
        assert issuer._keeper is not None
        await issuer._keeper
        assert issuer.restarts == limits.MAX_DEATHS
        *told, last = [one.getMessage().rpartition("; ")[2] for one in caplog.records]
        assert [one.partition(" in ")[0] for one in told] == ["started again"] * (limits.MAX_DEATHS - 1)
        assert last == "it ended 8 times in a row: it is started again when it is asked for"
        (tmp_path / "issuer.key").unlink()
        assert (await issuer.make("P-256", (), (), None)).csr  # asked for, it is started again
        await issuer.close()

    asyncio.run(run())


@pytest.mark.parametrize("name", ["issuer.key", "escrow.key"])
def test_a_secret_that_others_may_read_is_not_used(tmp_path: Path, name: str) -> None:
    async def run() -> None:
        async with running(file_settings(tmp_path)):
            assert {entry.stat().st_mode & 0o777 for entry in os.scandir(tmp_path)} == {0o600}
        (tmp_path / name).chmod(0o640)
        issuer = Issuer(file_settings(tmp_path))
        with pytest.raises(IssuerAway, match="others may read"):
            await issuer.start()
        await issuer.close()

    asyncio.run(run())


# ---- a manager that is not ours ----------------------------------------------------------------------------------------------

MAKE = Make("P-256", (), "", 0, 1)


def frame(ident: int, record: Record, kind: Kind = Kind.REQUEST) -> bytes:
    return encode_frame(Frame(ident, kind, record.encode()))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\xff" * 64, "a frame of"),
        (frame(1, Hello(), Kind.REPLY), "asks nothing"),
        (frame(1, Hello(), Kind.NOTIFICATION), "expected a record"),
        (frame(1, Targets((b"x",))), "targets of no call"),
        (frame(1, MAKE) + frame(1, MAKE), "a issuer-make where none can be"),
        (frame(1, MAKE) + frame(1, Targets((b"x",) * 1001)), "portions that cannot be"),
        (frame(1, replace(MAKE, portions=21)), "portions: 21"),
        (frame(1, replace(MAKE, names=("x",) * 101)), "names: 101"),
        (b"".join(frame(n, MAKE) for n in range(1, 66)), "more than 64 calls"),
        (
            b"".join(
                frame(n, replace(MAKE, portions=20)) + b"".join(frame(n, one) for one in portions(many(limits.MAX_TARGETS)))
                for n in (1, 2)
            )
            + frame(3, MAKE)
            + frame(3, Targets((b"x",))),
            "more targets than",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_may_not_be_told_ends_it(tmp_path: Path, said: bytes, why: str) -> None:
    process, ours = bare(tmp_path)
    with ours:
        ours.settimeout(20)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.sendall(said)
        _, complaint = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"the manager broke the protocol: {why}" in complaint or why in complaint.splitlines()[-1], complaint


def test_a_manager_that_does_not_read_fills_no_memory(tmp_path: Path) -> None:
    """Children wait then, and end when their time is over; it still hears its end."""
    process, ours = bare(tmp_path)
    with ours:
        call = frame(1, replace(MAKE, portions=20)) + b"".join(frame(1, one) for one in portions(many(limits.MAX_TARGETS)))
        ours.sendall(call)
        child = wait_for(lambda: children_of(process.pid))[0]
        time.sleep(4)
        assert int(status(process.pid)["VmRSS"].split()[0]) < 220_000
        assert not gone(child)
    process.communicate(timeout=20)
    wait_for(lambda: gone(child))


def answer(ours: socket.socket) -> Frame:
    ours.settimeout(20)
    reader = FrameReader()
    answers: list[Frame] = []
    while not answers:
        answers += reader.feed(ours.recv(65536))
    return answers[0]


def test_a_target_that_is_none_is_the_calls_own_trouble(tmp_path: Path) -> None:
    process, ours = bare(tmp_path)
    with ours:
        ours.sendall(frame(1, MAKE) + frame(1, Targets((b"x",))) + frame(9, Forget(77), Kind.NOTIFICATION))
        said = answer(ours)
        assert said.kind is Kind.ERROR and "the call cannot be" in Trouble.decode(said.payload).detail
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_key_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    program = "from hsmvisor.manager.issuer import __main__, limits\nlimits.CHILD_SECONDS = 1\n__main__.main()"
    process, ours = bare(tmp_path, "-c", program)
    with ours:
        ours.sendall(frame(1, replace(MAKE, portions=5)) + b"".join(frame(1, one) for one in portions(many(5000))))
        child = wait_for(lambda: children_of(process.pid))[0]
        os.kill(child, signal.SIGSTOP)
        said = answer(ours)
        assert Trouble.decode(said.payload).detail == "the process that had the key took longer than 1 seconds"
        assert gone(child) and unreaped(process.pid) == []
    process.communicate(timeout=20)
    assert process.returncode == 0


def of_token(tmp_path: Path, probe: str) -> tuple[subprocess.Popen[str], socket.socket]:
    """An issuer that does `probe` where it would look for its escrow's key."""
    pin = tmp_path / "pin"
    pin.write_text("1234")
    pin.chmod(0o600)
    escrow = ["--escrow", "token", "--library", "none.so", "--token", "rack", "--label", "escrow", "--pin-file", str(pin)]
    program = "import os, sys, time, types\nfrom hsmvisor.manager.issuer import __main__, limits, work\n"
    program += f"sys.argv += {escrow}\nlimits.PROBE_SECONDS = 1\ndef probe(self, tell):\n    {probe}\nwork.Work.probe = probe\n"
    return bare(tmp_path, "-c", f"{program}__main__.main()")


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        ("tell(types.SimpleNamespace(encode=lambda: b'x'))", "the process that looked for the escrow's token said what it may not"),
        ("tell(work.Envelopes((b'x',)))", "the process that looked for the escrow's token said what it may not"),
        ("os._exit(3)", "the process that looked for the escrow's token ended (status 3)"),
        ("time.sleep(30)", "the escrow's token did not answer in 1 seconds"),
        ("raise work.ProviderFault('because')", "because"),
        ("tell(work.Answer(b'', b'', (), b''))", ""),
    ],
    ids=["garbage", "envelopes", "end", "silence", "fault", "there"],
)
def test_whatever_comes_of_the_look_for_the_escrows_key_it_serves(tmp_path: Path, probe: str, why: str) -> None:
    process, ours = of_token(tmp_path, probe)
    with ours:
        ours.sendall(frame(1, Hello()))
        assert Ready.decode(answer(ours).payload).trouble == why
        ours.sendall(frame(2, replace(MAKE, portions=0)))
        assert answer(ours).kind is Kind.REPLY, "what is not kept needs no token"
        wait_for(lambda: children_of(process.pid) == [] == unreaped(process.pid))
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_look_for_the_escrows_key_that_cannot_begin(tmp_path: Path) -> None:
    program = "import errno, os\nos.fork = lambda: (_ for _ in ()).throw(OSError(errno.EAGAIN, 'no more processes'))\n"
    process, ours = of_token(tmp_path, f"pass\n{program}")
    with ours:
        ours.sendall(frame(1, Hello()))
        assert Ready.decode(answer(ours).payload).trouble == "the issuer cannot fork: no more processes"
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_it_ends_with_its_socket_while_it_looks_for_the_escrows_key(tmp_path: Path) -> None:
    process, ours = of_token(tmp_path, "limits.PROBE_SECONDS = 60; time.sleep(60)")
    with ours:
        child = wait_for(lambda: children_of(process.pid))[0]
    process.communicate(timeout=20)
    assert process.returncode == 0
    wait_for(lambda: gone(child))


def bare(directory: Path, *program: str) -> tuple[subprocess.Popen[str], socket.socket]:
    """An issuer that is spoken to by its bytes."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, *(program or ("-m", "hsmvisor.manager.issuer")), "--control-fd", str(theirs.fileno())]
        process = subprocess.Popen(
            [*command, "--recipient-file", str(directory / "issuer.key")],
            pass_fds=[theirs.fileno()],
            env=child_environment() | {"PYTHONPATH": SOURCES},
            stderr=subprocess.PIPE,
            text=True,
        )
    return process, ours
