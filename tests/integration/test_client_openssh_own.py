"""OpenSSH with keys of slot 1: ssh-keygen lists them, an agent holds them, and ssh logs in with the user's PIN."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.own_slot import USER, OwnSlot
from support.sshd import Sshd

pytestmark = pytest.mark.real
KINDS = {"p256": "EC:prime256v1", "p521": "EC:secp521r1", "rsa": "rsa:2048"}


def line(public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    """As in authorized_keys."""
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.fixture
def with_pin(own: OwnSlot) -> dict[str, str]:
    """The environment in which ssh asks a program for the PIN, as a desktop would."""
    program = own.guest.write("askpass", f"#!/bin/sh\necho {USER}\n")
    program.chmod(0o700)
    return {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force"}


@pytest.fixture
def agent(own: OwnSlot, with_pin: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of programs that reach an agent, which may load the guest's library."""
    said = own.guest.run("ssh-agent", "-P", own.guest.library.path.resolve(), more=with_pin).stdout.decode()
    values = dict(re.findall(r"(SSH_\w+)=([^;]+);", said))
    yield with_pin | values
    os.kill(int(values["SSH_AGENT_PID"]), signal.SIGTERM)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_logs_in(own: OwnSlot, with_pin: dict[str, str], kind: str) -> None:
    public = own.generate(KINDS[kind], "login", "01")
    listed = own.guest.run("ssh-keygen", "-D", own.guest.library.path, more=with_pin).stdout
    assert line(public) in listed and b"login" in listed
    sshd = Sshd(own.guest, line(public))
    try:
        own.guest.run(*sshd.command("true", asks=True), more=with_pin)
        assert "Accepted publickey" in sshd.log.read_text()
    finally:
        sshd.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_holds_it(own: OwnSlot, agent: dict[str, str], kind: str) -> None:
    """ssh logs in and ssh-keygen signs a file without the library and its PIN; what is taken away is gone."""
    public, guest = own.generate(KINDS[kind], "login", "01"), own.guest
    assert b"Card added" in guest.run("ssh-add", "-s", guest.library.path.resolve(), more=agent).stdout
    held = guest.run("ssh-add", "-L", more=agent).stdout
    assert line(public) in held
    sshd = Sshd(guest, line(public))
    try:
        guest.run(*sshd.command("true", agent=agent["SSH_AUTH_SOCK"]))
        assert "Accepted publickey" in sshd.log.read_text()
    finally:
        sshd.stop()
    signs(guest.write("login.pub", line(public)), own, agent)
    assert b"Card removed" in guest.run("ssh-add", "-e", guest.library.path.resolve(), more=agent).stdout
    assert b"no identities" in guest.run("ssh-add", "-l", more=agent, check=False).stdout


def signs(public: Path, own: OwnSlot, agent: dict[str, str]) -> None:
    message = own.guest.write("message", b"a message of the guest")
    own.guest.run("ssh-keygen", "-Y", "sign", "-n", "file", "-f", public, message, more=agent)
    signature, signers = own.guest.directory / "message.sig", own.guest.write("signers", b"me " + public.read_bytes())
    verify = ("ssh-keygen", "-Y", "verify", "-n", "file", "-f", signers, "-I", "me", "-s", signature)
    assert b'Good "file" signature' in own.guest.run(*verify, stdin=message.read_bytes()).stdout
