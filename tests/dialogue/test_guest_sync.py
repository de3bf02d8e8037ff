"""hsmvisor-guest against a scripted module: which files it writes, when, and what it says."""

from __future__ import annotations

import base64
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import REPOSITORY
from support.scripted_module import Request, ScriptedModule

GUEST = REPOSITORY / "pkcs11_shim/build/hsmvisor-guest"


@dataclass(frozen=True)
class Certificate:
    label: str
    subject: bytes
    issuer: bytes
    authority: bool = False

    @property
    def value(self) -> bytes:
        return f"certificate {self.label} {self.subject.decode()}".encode() * 4

    def attribute(self, kind: int) -> bytes:
        number = (2 if self.authority else 1).to_bytes(8, "little")
        return {
            ck.CKA_CLASS: ck.CKO_CERTIFICATE.to_bytes(8, "little"), ck.CKA_LABEL: self.label.encode(), ck.CKA_VALUE: self.value,
            ck.CKA_SUBJECT: self.subject, ck.CKA_ISSUER: self.issuer, ck.CKA_CERTIFICATE_CATEGORY: number,
        }[kind]  # fmt: skip


LEAF = Certificate("web", b"leaf 1", b"inner")
CHAIN = {
    1: LEAF,
    2: Certificate("root", b"root", b"root", authority=True),
    3: Certificate("outer", b"outer", b"root", authority=True),
    4: Certificate("inner", b"inner", b"outer", authority=True),
    5: Certificate("no authority", b"inner", b"elsewhere"),
}


def attribute_value(certificate: Certificate, kind: int, room: int | None) -> bytes:
    value = certificate.attribute(kind)
    fits = room is not None and len(value) <= room
    return (b"\1" if fits else b"\3") + len(value).to_bytes(4, "big") + (value if fits else b"")


@pytest.fixture
def certificates() -> dict[int, Certificate]:
    return dict(CHAIN)


@pytest.fixture
def module(tmp_path: Path, certificates: dict[int, Certificate]) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")

    def find(module: ScriptedModule, application: Any, request: Request) -> Any:
        wanted = request.args[1]
        return [h for h, c in certificates.items() if all(c.attribute(k) == v for k, v in wanted)], 0, module.watermark

    def get(module: ScriptedModule, application: Any, request: Request) -> Any:
        _, handle, wanted = request.args
        return [(kind, attribute_value(certificates[handle], kind, room)) for kind, room in wanted], ck.CKR_OK

    module.answers = {Call.FIND_ONCE: find, Call.GET_ATTRIBUTE_VALUE: get}
    yield module
    module.end()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(module: ScriptedModule, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [GUEST, *arguments], cwd=tmp_path, env={"HSMVISOR_PKCS11_ADDRESS": module.address} | more,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def pem(*certificates: Certificate) -> str:
    lines: list[str] = []
    for certificate in certificates:
        body = textwrap.wrap(base64.b64encode(certificate.value).decode(), 64)
        lines += ["-----BEGIN CERTIFICATE-----", *body, "-----END CERTIFICATE-----"]
    return "".join(f"{line}\n" for line in lines)


def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def run(start: Start, *arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=10)
    return process.returncode, out, err


def test_once_writes_the_certificate(start: Start, tmp_path: Path) -> None:
    assert run(start, "sync", "--label", "web", "--out", "web.pem", "--once") == (0, "web.pem: written\n", "")
    assert (tmp_path / "web.pem").read_text() == pem(LEAF)
    assert (tmp_path / "web.pem").stat().st_mode & 0o777 == 0o644
    assert run(start, "sync", "--label", "web", "--out", "web.pem", "--once") == (0, "", "")


def test_chain_is_ordered_and_has_no_root(start: Start, tmp_path: Path) -> None:
    assert run(start, "sync", "--label", "web", "--out", "web.pem", "--chain", "--once")[0] == 0
    assert (tmp_path / "web.pem").read_text() == pem(CHAIN[1], CHAIN[4], CHAIN[3])


def test_an_old_file_keeps_its_mode_and_a_link_its_target(start: Start, tmp_path: Path) -> None:
    real, link = tmp_path / "real.pem", tmp_path / "web.pem"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    assert run(start, "sync", "--label", "web", "--out", str(link), "--once")[0] == 0
    assert link.is_symlink() and real.read_text() == pem(LEAF)
    assert real.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.glob("*.hsmvisor-new")] == []


def test_several_files_one_of_which_has_no_certificate(start: Start, tmp_path: Path) -> None:
    files = ["--label", "other", "--out", "a.pem", "--label", "web", "--out", "b.pem"]
    code, out, err = run(start, "sync", *files, "--once", "--reload", "touch reloaded")
    assert (code, out) == (1, "b.pem: written\n")
    assert err == "hsmvisor-guest: a.pem: the token has no certificate with the label other\n"
    assert (tmp_path / "reloaded").exists()  # what could be written is put to use


def test_a_directory_that_is_not_there(start: Start) -> None:
    code, _, err = run(start, "sync", "--label", "web", "--out", "none/web.pem", "--once")
    assert code == 1
    assert err == "hsmvisor-guest: none/web.pem: cannot be written: No such file or directory\n"


def test_follows_rotations_and_reloads_once_for_each(
    start: Start, tmp_path: Path, module: ScriptedModule, certificates: dict[int, Certificate]
) -> None:
    file, log = tmp_path / "web.pem", tmp_path / "reloads"
    command = "cat web.pem >> reloads; echo >> reloads"
    process = start("sync", "--label", "web", "--out", "web.pem", "--reload", command, "--settle", "1")
    eventually(file.exists)
    for number in (2, 3):
        renewed = Certificate("web", b"leaf %d" % number, b"inner")
        del certificates[next(h for h, c in certificates.items() if c.label == "web")]
        certificates[10 + number] = renewed
        began = time.monotonic()
        module.rotate()
        eventually(lambda renewed=renewed: file.read_text() == pem(renewed))  # type: ignore[misc]
        assert 0.9 < time.monotonic() - began < 2.5, "replaced when it has settled"
    module.rotate()  # of another material
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=2)
    assert (process.returncode, out, err) == (0, "web.pem: written\n" * 3, "")
    expected = [pem(Certificate("web", b"leaf %d" % n, b"inner")) for n in (1, 2, 3)]
    assert log.read_text() == "".join(f"{text}\n" for text in expected)


def test_rotations_without_a_pause_do_not_keep_the_file_old(
    start: Start, tmp_path: Path, module: ScriptedModule, certificates: dict[int, Certificate]
) -> None:
    file = tmp_path / "web.pem"
    process = start("sync", "--label", "web", "--out", "web.pem", "--settle", "1")
    eventually(file.exists)
    for number in range(2, 12):
        certificates[1] = Certificate("web", b"leaf %d" % number, b"inner")
        module.rotate()
        time.sleep(0.35)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=3)
    assert 3 <= out.count("written") <= 5


def test_waits_for_a_module_that_is_not_there_yet(start: Start, tmp_path: Path, module: ScriptedModule) -> None:
    module.stop()
    process = start("sync", "--label", "web", "--out", "web.pem")
    time.sleep(0.8)
    module.start()
    eventually((tmp_path / "web.pem").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=3)
    assert (process.returncode, out) == (0, "web.pem: written\n")
    assert err.count("\n") == 1 and "web.pem: the module does not answer" in err


@pytest.mark.parametrize("slots", ["1", "1,5", "all", None])
def test_slots_that_are_hidden_from_others(start: Start, tmp_path: Path, slots: str | None) -> None:
    """It finds its certificates in any case, and its reload command has the setting as it was."""
    arguments = ("sync", "--label", "web", "--out", "web.pem", "--once", "--reload", "env > environment")
    process = start(*arguments, **({"HSMVISOR_PKCS11_SLOTS": slots} if slots else {}))
    assert process.communicate(timeout=10) == ("web.pem: written\n", "") and process.returncode == 0
    lines = (tmp_path / "environment").read_text().splitlines()
    assert [line for line in lines if "SLOTS" in line] == ([f"HSMVISOR_PKCS11_SLOTS={slots}"] if slots else [])


def test_a_failing_reload_command_is_told(start: Start) -> None:
    _, _, err = run(start, "sync", "--label", "web", "--out", "web.pem", "--once", "--reload", "exit 3")
    assert err == "hsmvisor-guest: the reload command ended with 3: exit 3\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "the one command is sync"),
        (("sync",), "--label NAME --out FILE is needed"),
        (("sync", "--out", "x"), "each --out follows its --label"),
        (("sync", "--label", "a", "--label", "b"), "each --label is followed by its --out"),
        (("sync", "--label", "a", "--out", "x", "--interval", "0"), "--interval is 1 to 86400 seconds"),
        (("sync", "--label", "a", "--out", "x", "--settle", "soon"), "--settle is 0 to 86400 seconds"),
    ],
)
def test_wrong_usage(start: Start, arguments: tuple[str, ...], why: str) -> None:
    code, out, err = run(start, *arguments)
    assert (code, out) == (2, "")
    assert err == f"hsmvisor-guest: {why} (see hsmvisor-guest --help)\n"


def test_a_library_that_is_none(start: Start) -> None:
    code, _, err = run(start, "sync", "--label", "a", "--out", "x", "--module", "/no/such.so")
    assert code == 1 and "--module names the PKCS#11 library" in err


def test_help(start: Start) -> None:
    code, out, _ = run(start, "--help")
    assert code == 0 and "Example:" in out
