"""Slot 0 with a PIN of the operator's, as pkcs11-tool meets it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, new_key
from support.guest import Guest, library
from support.host import Module
from support.host_process import new_id

pytestmark = pytest.mark.real


def set_pin(module: Module, pin: bytes) -> None:
    module.host.process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=pin))


def tool(guest: Guest, *words: str) -> str:
    """Its words, and the CK_RV of a call that failed."""
    said = guest.run("pkcs11-tool", "--module", guest.library.path, *words, check=False).stdout.decode()
    failed = re.search(r"rv = (CKR_\w+)", said)
    return failed[1] if failed else said


def private_keys(guest: Guest, *login: str) -> str:
    return tool(guest, "--list-objects", "--type", "privkey", *login)


def test_private_keys_are_hidden_until_login(guest: Guest, module: Module) -> None:
    key = new_key("p256")
    module.push("web", key, Authority().chain(key))
    assert "Private Key Object" in private_keys(guest), "without a PIN nobody needs a login"
    assert "Private Key Object" in private_keys(guest, "--login", "--pin", "what a URI carries")
    set_pin(module, b"482913")
    assert "login required" in tool(guest, "--list-token-slots")
    assert "Private Key Object" not in private_keys(guest)
    assert "Certificate Object" in tool(guest, "--list-objects")
    assert private_keys(guest, "--login", "--pin", "wrong!") == "CKR_PIN_INCORRECT"
    assert "user PIN count low" in tool(guest, "--list-token-slots")
    assert "Private Key Object" in private_keys(guest, "--login", "--pin", "482913")
    assert "user PIN count low" not in tool(guest, "--list-token-slots")


def test_wrong_pins_are_counted_and_slowed_across_a_restart_of_the_worker(module: Module, tmp_path: Path) -> None:
    guest = Guest(library("ours"), module.address, tmp_path)
    module.push("web", new_key("p256"))
    set_pin(module, b"482913")
    wrong, end = 0, time.monotonic() + 30
    while wrong < 5:  # from the third on each doubles the time in which none is taken
        assert time.monotonic() < end
        said = private_keys(guest, "--login", "--pin", "000000")
        assert said in ("CKR_PIN_INCORRECT", "CKR_PIN_LOCKED")
        wrong += said == "CKR_PIN_INCORRECT"
    before = module.pid
    os.kill(before, signal.SIGKILL)
    module.serving(not_pid=before)
    assert private_keys(guest, "--login", "--pin", "482913") == "CKR_PIN_LOCKED", "the right one waits as well"
    assert "user PIN locked" in tool(guest, "--list-token-slots")
    set_pin(module, b"715204")
    assert "Private Key Object" in private_keys(guest, "--login", "--pin", "715204")
