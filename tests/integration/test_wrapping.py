"""The attacks on wrapping through our library by python-pkcs11, and with a worker that is killed, on a real module.

All of them, with what stops each: control_domain/docs/wrapping.md and tests/unit/test_wrapping_attacks.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.guest import REPOSITORY, Guest, library
from support.host import Host, Module
from support.host_process import new_id
from support.native_client import NativeClient
from support.own_keys import RW, SLOT, SO, USER, template
from support.wire_client import Refused

pytestmark = pytest.mark.real
PROGRAM = REPOSITORY / "tests/integration/programs/attack_wrapping.py"


@pytest.fixture
def module(shared_host: Host) -> Iterator[Module]:
    module = shared_host.create("wrapping", guest_token=True)
    yield module
    module.destroy()


@pytest.fixture
def guest(module: Module, tmp_path: Path) -> Guest:
    guest = Guest(library("ours"), module.address, tmp_path)
    tool = ("pkcs11-tool", "--module", guest.library.path, "--slot", "1", "--so-pin", SO.decode())
    guest.run(*tool, "--init-token", "--label", "own")
    guest.run(*tool, "--login", "--login-type", "so", "--init-pin", "--new-pin", USER.decode())
    return guest


def test_attacks_by_a_program_of_the_guest(guest: Guest) -> None:
    said = guest.run(sys.executable, PROGRAM, guest.library.path, USER.decode(), SO.decode(), timeout=60)
    assert json.loads(said.stdout) == {
        "wrap_and_decrypt": "KeyNotWrappable",
        "decrypt_later": "AttributeReadOnly",
        "two_copies": "AttributeReadOnly",
        "re_import": "TemplateInconsistent",
        "known_key": "KeyNotWrappable",
        "trojan": "KeyNotWrappable",
        "chosen_iv": "KeyNotWrappable",
        "padding_oracle": "MechanismInvalid",
        "trusted_then_not": "TemplateInconsistent",
    }


def test_another_worker_remembers(guest: Guest, module: Module) -> None:
    """What a key ever could do: of session and token objects through a hand-over, of token objects through a kill."""
    keys: dict[bool, int] = {}
    client = _client(module)
    session = _user(client)
    for token in (False, True):
        values = {ck.CKA_VALUE_LEN: 32, ck.CKA_WRAP: True, ck.CKA_UNWRAP: True, ck.CKA_TOKEN: token}
        (key,) = client.call(Call.GENERATE_KEY, session, Mechanism(ck.CKM_AES_KEY_GEN), template(values))
        client.call(Call.SET_ATTRIBUTE_VALUE, session, key, template({ck.CKA_WRAP: False, ck.CKA_UNWRAP: False}))
        keys[token] = key
    request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
    done = module.host.process.modules.UpgradeModule(request, timeout=30)
    assert done.old_pid != done.pid
    for key in keys.values():
        _check_closed(client, session, key)
    os.kill(done.pid, signal.SIGKILL)
    module.serving(not_pid=done.pid)
    client = _client(module)
    _check_closed(client, _user(client), keys[True])


def _client(module: Module) -> NativeClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(module.address.removeprefix("unix:path="))
    client = NativeClient(sock)
    client.hello()
    return client


def _user(client: NativeClient) -> int:
    session = client.open_session(SLOT, RW)
    client.call(Call.LOGIN, session, ck.CKU_USER, USER)
    return session


def _check_closed(client: NativeClient, session: int, key: int) -> None:
    for kind in (ck.CKA_DECRYPT, ck.CKA_ENCRYPT, ck.CKA_SIGN):
        with pytest.raises(Refused) as caught:
            client.call(Call.SET_ATTRIBUTE_VALUE, session, key, template({kind: True}))
        assert caught.value.rv == ck.CKR_ATTRIBUTE_READ_ONLY
