"""Keys that owners asked to keep: wrapped by a key in a file or in a token, bound to their line, and sealed again from there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hsmvisor.manager.issuer import limits
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, Issuer, IssuerAway, OverLimit
from hsmvisor.manager.issuer.escrow import WrappedKey
from hsmvisor.manager.issuer.settings import FileEscrow, Settings
from hsmvisor.manager.issuer.syscalls import REFUSED
from hsmvisor_rpc.sealed.refusal import Refusal
from support.certificates import spki
from support.host_process import wait_for
from support.issuing import Target, file_settings, many, measures_of, pid_of, ready_of, running, seal_to, targets, token_settings
from support.processes import status
from support.softhsm import PIN, TOKEN, Token, make_token

AS = EscrowAs("line", 3)


@pytest.fixture
def token(tmp_path: Path) -> Token:
    return make_token(tmp_path / "hsm")


@pytest.fixture(params=["file", "token"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "file":
        return file_settings(tmp_path)
    return token_settings(tmp_path, make_token(tmp_path / "hsm"))


def tell(settings: Settings, story: Callable[[Issuer], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running(settings) as issuer:
            await story(issuer)

    asyncio.run(run())


@pytest.mark.parametrize("key_type", ["P-256", "RSA-4096", "Ed25519"])
def test_a_kept_key_is_sealed_again_after_a_restart(settings: Settings, key_type: str) -> None:
    kept: list[bytes] = []
    module = Target(1)

    async def make(issuer: Issuer) -> None:
        assert ready_of(issuer).trouble == ""
        made = await issuer.make(key_type, (), seal_to([module]), AS)
        assert spki(module.opened(made.envelopes[0])) == made.public_key == WrappedKey.decode(made.wrapped).public_key
        kept.extend((made.wrapped, made.public_key))

    async def again(issuer: Issuer) -> None:
        later = targets(3)
        envelopes = await issuer.reseal(kept[0], AS, seal_to(later))
        assert [spki(one.opened(envelope)) for one, envelope in zip(later, envelopes, strict=True)] == [kept[1]] * 3
        with pytest.raises(Refusal):
            later[0].opened(envelopes[1])

    tell(settings, make)
    tell(settings, again)


def test_it_opens_for_its_line_and_generation_alone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(issuer: Issuer) -> None:
        made = await issuer.make("P-256", (), (), AS)
        other = await issuer.make("P-256", (), (), AS)
        wrapped = WrappedKey.decode(made.wrapped)
        for line in (EscrowAs("line", 4), EscrowAs("lines", 3)):
            with pytest.raises(BadKey, match="does not open: it was altered, or kept for another line or generation"):
                await issuer.reseal(made.wrapped, line, many(1))
        broken = [
            replace(wrapped, sealed=wrapped.sealed[:-1] + bytes([wrapped.sealed[-1] ^ 1])),
            replace(wrapped, sealed=wrapped.sealed[:8]),
            replace(wrapped, sealed=b""),
            replace(wrapped, nonce=bytes(12)),
            replace(wrapped, public_key=other.public_key),
            replace(WrappedKey.decode(other.wrapped), public_key=made.public_key),
        ]
        for one in broken:
            with pytest.raises(BadKey, match="does not open"):
                await issuer.reseal(one.encode(), AS, many(1))
        for garbage in (b"", made.wrapped[:-1], replace(wrapped, nonce=bytes(13)).encode()):
            with pytest.raises(BadKey, match="no wrapped key"):
                await issuer.reseal(garbage, AS, many(1))
        assert len(await issuer.reseal(made.wrapped, AS, many(1))) == 1
        monkeypatch.setattr(limits, "MAX_TARGETS", 2)
        assert len(await issuer.reseal(made.wrapped, AS, many(5))) == 5
        with pytest.raises(OverLimit, match="of a line"):
            await issuer.reseal(made.wrapped, EscrowAs("", 3), many(1))
        with pytest.raises(OverLimit, match="of a line"):
            await issuer.make("P-256", (), (), EscrowAs("", 3))
        assert issuer.restarts == 0

    tell(settings, story)


def test_another_escrow_key_is_told_from_a_broken_one(settings: Settings) -> None:
    """It may come back: so it is to be tried again."""
    wrapped: list[bytes] = []

    async def make(issuer: Issuer) -> None:
        wrapped.append((await issuer.make("P-256", (), (), AS)).wrapped)

    async def again(issuer: Issuer) -> None:
        with pytest.raises(IssuerAway, match="another"):
            await issuer.reseal(wrapped[0], AS, many(1))

    tell(settings, make)
    if isinstance(settings.escrow, FileEscrow):
        settings.escrow.path.unlink()
    else:
        rename_key(settings)
    tell(settings, again)


def test_another_kind_of_escrow_is_told(tmp_path: Path, token: Token) -> None:
    wrapped: list[bytes] = []

    async def make(issuer: Issuer) -> None:
        wrapped.append((await issuer.make("P-256", (), (), AS)).wrapped)

    async def again(issuer: Issuer) -> None:
        with pytest.raises(IssuerAway, match="was wrapped by a 'file', the escrow is a 'token' now"):
            await issuer.reseal(wrapped[0], AS, many(1))

    tell(file_settings(tmp_path), make)
    tell(token_settings(tmp_path, token), again)


def rename_key(settings: Settings) -> None:
    """Another key takes the label."""
    program = (
        "import sys, pkcs11\nfrom pkcs11 import Attribute as A, KeyType, ObjectClass\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])\n"
        "with token.open(rw=True, user_pin=sys.argv[3]) as session:\n"
        "    [key] = session.get_objects({A.CLASS: ObjectClass.SECRET_KEY})\n"
        "    assert key[A.SENSITIVE] and not key[A.EXTRACTABLE] and key[A.VALUE_LEN] == 32, 'it never leaves the token'\n"
        "    key.destroy()\n"
        "    session.generate_key(KeyType.AES, 256, id=b'x' * 16, label='hsmvisor-escrow', store=True)\n"
    )
    escrow = settings.escrow
    command = [sys.executable, "-c", program, str(escrow.library), TOKEN, PIN]  # type: ignore[union-attr]
    subprocess.run(command, check=True, env=dict(escrow.environment))  # type: ignore[union-attr]


def test_without_escrow_that_is_said(tmp_path: Path) -> None:
    async def story(issuer: Issuer) -> None:
        assert (ready_of(issuer).escrow, ready_of(issuer).trouble) == ("", "")
        for call in (issuer.make("P-256", (), (), AS), issuer.reseal(b"x", AS, ())):
            with pytest.raises(IssuerAway, match="configured without escrow"):
                await call
        assert (await issuer.make("P-256", (), many(1), None)).wrapped == b""

    tell(Settings(tmp_path / "issuer.key"), story)


def test_a_wrong_pin_is_tried_once(tmp_path: Path, token: Token) -> None:
    """Not again when calls come, nor when the issuer is started again: tokens count."""
    token.pin_file.write_text("000000\n")

    async def story(issuer: Issuer) -> None:
        for _ in range(2):
            assert "does not take the PIN (PinIncorrect); it is not tried again" in ready_of(issuer).trouble
            for _ in range(3):
                with pytest.raises(IssuerAway, match="does not take the PIN"):
                    await issuer.make("P-256", (), (), AS)
            assert (await issuer.make("P-256", (), many(1), None)).csr, "what is not kept needs no token"
            token.pin_file.write_text(PIN + "\n")  # it would succeed if it were tried
            before = issuer.restarts
            os.kill(pid_of(issuer), signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: issuer.restarts > before, 30, "that its death is noticed")  # noqa: B023
            await issuer.make("P-256", (), (), None)

    tell(token_settings(tmp_path, token), story)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"token": "elsewhere"}, "token 'elsewhere' in .* is not there"),
        ({"library": Path("/nonexistent.so")}, "cannot open shared object file"),
        ({"writes": ()}, "failed"),
    ],
    ids=str,
)
def test_a_token_that_cannot_be_used_is_said_and_tried_again(
    tmp_path: Path, token: Token, wrong: dict[str, object], why: str
) -> None:
    async def story(issuer: Issuer) -> None:
        assert re.search(why, ready_of(issuer).trouble), ready_of(issuer).trouble
        with pytest.raises(IssuerAway):
            await issuer.make("P-256", (), (), AS)
        assert (await issuer.make("P-256", (), many(1), None)).csr

    tell(token_settings(tmp_path, token, **wrong), story)


def test_a_pin_file_that_others_may_read(tmp_path: Path, token: Token) -> None:
    token.pin_file.chmod(0o644)

    async def run() -> None:
        issuer = Issuer(token_settings(tmp_path, token))
        with pytest.raises(IssuerAway, match="others may read the PIN"):
            await issuer.start()
        await issuer.close()

    asyncio.run(run())


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_its_one_key_stays_in_the_token(tmp_path: Path, token: Token) -> None:
    settings = token_settings(tmp_path, token)

    async def story(issuer: Issuer) -> None:
        await asyncio.gather(*(issuer.make("P-256", (), (), AS) for _ in range(6)))
        said = status(pid_of(issuer))
        assert (said["Seccomp"], said["NoNewPrivs"], said["CapEff"]) == ("2", "1", "0" * 16)
        told = {one.name: one for one in measures_of(issuer)}
        assert {name for name, one in told.items() if not one.applied} <= {"memory"}
        assert f"files are changed in {token.directory}/tokens alone" in told["landlock"].detail
        assert told["seccomp"].detail == f"{sum(map(len, REFUSED.values()))} system calls refused, and all sockets but unix ones"
        assert "softhsm" not in mapped(pid_of(issuer)), "the library is in children alone"

    tell(settings, story)
    tell(settings, story)
    rename_key(settings)  # there is one, and it may not leave
