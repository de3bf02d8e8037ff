"""libhsmvisor-pkcs11.so as a file: what it exports, its interfaces, its configuration, its diagnostics, fork."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from ctypes import POINTER, byref, c_ubyte, c_ulong, c_void_p, cast
from pathlib import Path

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import LIBRARY, REPOSITORY, CkInterface, Cryptoki
from support.scripted_module import ScriptedModule

NEW, JOIN, FORK, RESUME = range(4)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    yield module
    module.end()


PROLOGUE = """
import os, signal, sys, threading, time
from ctypes import byref, c_ulong
from hsmvisord import ck
from support.cryptoki import Cryptoki
from support.scripted_module import KEY, signature
p11 = Cryptoki()
"""


def client(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program of its own that has `p11` and `good` at hand."""
    program = PROLOGUE + textwrap.dedent(script)
    path = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY / "daemon"), str(REPOSITORY / "proto")])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HSMVISOR_PKCS11")}
    return subprocess.run(
        [sys.executable, "-c", program], env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def run(script: str, module: ScriptedModule) -> str:
    result = client(script, {"HSMVISOR_PKCS11_ADDRESS": module.address})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---- the file --------------------------------------------------------------------------------------------------------------


def test_only_functions_of_the_standard_are_exported() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    header = (REPOSITORY / "pkcs11_shim/include/pkcs11.h").read_text()
    assert names == set(re.findall(r"F\((C_\w+),", header))
    assert len(names) == 68 + 24 + 12


@pytest.mark.skipif("HSMVISOR_TEST_LIBRARY" in os.environ, reason="a sanitizer's build needs its library")
def test_needs_libc_alone_and_is_hardened() -> None:
    dynamic = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic)) == {"libc.so.6"}
    assert "BIND_NOW" in dynamic
    headers = subprocess.run(["readelf", "-lW", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "GNU_RELRO" in headers
    assert re.search(r"GNU_STACK.* RW ", headers)


# ---- interfaces ------------------------------------------------------------------------------------------------------------


def test_interfaces() -> None:
    p11 = Cryptoki()
    count = c_ulong()
    p11.good("C_GetInterfaceList", None, byref(count))
    assert count.value == 4
    interfaces, small = (CkInterface * 4)(), c_ulong(3)
    assert p11.call("C_GetInterfaceList", interfaces, byref(small)) == ck.CKR_BUFFER_TOO_SMALL
    p11.good("C_GetInterfaceList", interfaces, byref(count))
    assert [i.name for i in interfaces] == [b"PKCS 11", b"PKCS 11", b"PKCS 11", b"Vendor hsmvisor"]
    assert [tuple(cast(i.functions, POINTER(c_ubyte))[:2]) for i in interfaces] == [(3, 0), (3, 2), (2, 40), (1, 0)]
    standard, vendor = b"PKCS 11", b"Vendor hsmvisor"
    for name, version, wanted in (
        (None, None, 0),
        (standard, None, 0),
        (standard, b"\3\0", 0),
        (standard, b"\3\2", 1),
        (standard, b"\2\x28", 2),
        (vendor, None, 3),
    ):
        rv, found = p11.interface(name, version=version)
        assert (rv, found and found.functions) == (ck.CKR_OK, interfaces[wanted].functions)
    for name, version, flags in ((b"PKCS 11", b"\3\1", 0), (b"PKCS 11", None, 1), (b"Vendor other", None, 0)):
        assert p11.interface(name, flags, version)[0] == ck.CKR_FUNCTION_FAILED
    functions = c_void_p()
    p11.good("C_GetFunctionList", byref(functions))
    assert functions.value == interfaces[2].functions
    assert p11.call("C_GetFunctionList", None) == ck.CKR_ARGUMENTS_BAD


def test_the_lists_hold_the_functions_of_their_names() -> None:
    """One is the beginning of the next, in the order of the standard's header."""
    p11 = Cryptoki()
    names = re.findall(r"F\((C_\w+),", (REPOSITORY / "pkcs11_shim/include/pkcs11.h").read_text())
    for version, count in ((b"\2\x28", 68), (b"\3\0", 92), (b"\3\2", 104)):
        _, found = p11.interface(b"PKCS 11", version=version)
        assert found is not None
        pointers = cast(found.functions, POINTER(c_void_p))[1 : 1 + count]
        assert pointers == [cast(p11.library[name], c_void_p).value for name in names[:count]]
    assert names[67] == "C_WaitForSlotEvent" and names[91] == "C_MessageVerifyFinal" and names[103] == "C_UnwrapKeyAuthenticated"


# ---- configuration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("tcp:host=h;port=1", "an address begins with unix:, vsock: or usb:: tcp:host=h;port=1"),
        ("unix:path=relative", "has path=/absolute/path"),
        ("unix:path=/" + "x" * 120, "at most 107 bytes"),
        ("vsock:cid=2", "needs port=N"),
        ("vsock:cid=2;port=x", "has cid=N;port=N: port=x"),
        ("vsock:cid=2;port=1;path=/x", "has cid=N;port=N: path=/x"),
    ],
)
def test_wrong_addresses_are_explained(address: str, why: str) -> None:
    result = client("print(p11.call('C_Initialize', None))", {"HSMVISOR_PKCS11_ADDRESS": address, "HSMVISOR_PKCS11_DEBUG": "1"})
    assert result.stdout.strip() == str(ck.CKR_GENERAL_ERROR)
    assert why in result.stderr


@pytest.mark.parametrize("text", ["adress = unix:path=/x\n", "address\n", "deadline_ms = soon\n", "reconnect_ms = -1\n"])
def test_wrong_configuration_files_are_explained(tmp_path: Path, text: str) -> None:
    config = tmp_path / "pkcs11.conf"
    config.write_text(text)
    result = client("print(p11.call('C_Initialize', None))", {"HSMVISOR_PKCS11_CONFIG": str(config), "HSMVISOR_PKCS11_DEBUG": "1"})
    assert result.stdout.strip() == str(ck.CKR_GENERAL_ERROR)
    assert "the configuration " in result.stderr


def test_configuration_file_with_comments(tmp_path: Path, module: ScriptedModule) -> None:
    config = tmp_path / "pkcs11.conf"
    config.write_text(f"# where the module is\n\n  address =  {module.address}  # here\n")
    result = client("p11.initialize(); print(p11.slots()); p11.finalize()", {"HSMVISOR_PKCS11_CONFIG": str(config)})
    assert result.stdout.strip() == "[0]", result.stderr


def test_diagnostics_name_calls_and_errors_but_no_secrets(tmp_path: Path, module: ScriptedModule) -> None:
    log = tmp_path / "debug.log"
    script = """
        p11.initialize()
        session = p11.open_session()
        p11.call("C_Login", session, 1, b"hunter22", 8)
        p11.sign_init(session, 99)
        p11.finalize()
    """
    result = client(script, {"HSMVISOR_PKCS11_ADDRESS": module.address, "HSMVISOR_PKCS11_DEBUG": str(log)})
    assert result.returncode == 0, result.stderr
    text = log.read_text()
    assert f"connected to {module.address}" in text
    assert "C_SignInit: CKR_KEY_HANDLE_INVALID (0x60)" in text
    assert "hunter22" not in text + result.stderr
    assert log.stat().st_mode & 0o777 == 0o600


# ---- fork ------------------------------------------------------------------------------------------------------------------

CHILD = """
    p11.initialize()
    session = p11.open_session()
    assert p11.sign_init(session, KEY) == 0 and p11.sign(session, b"x")[0] == 0
    parent_fds = set(os.listdir("/proc/self/fd"))

    def child():
        assert p11.call("C_GetSlotList", 1, None, byref(c_ulong())) == ck.CKR_CRYPTOKI_NOT_INITIALIZED
        assert p11.sign_init(session, KEY) == ck.CKR_CRYPTOKI_NOT_INITIALIZED
        assert p11.call("C_FindObjectsInit", session, None, 0) == ck.CKR_CRYPTOKI_NOT_INITIALIZED
        if %(finalize)s:
            assert p11.finalize() == 0
            assert p11.finalize() == ck.CKR_CRYPTOKI_NOT_INITIALIZED
        p11.initialize()
        assert p11.call("C_Initialize", None) == ck.CKR_CRYPTOKI_ALREADY_INITIALIZED
        assert p11.sign_init(session, KEY) == ck.CKR_SESSION_HANDLE_INVALID
        own = p11.open_session()
        assert p11.sign_init(own, KEY) == 0 and p11.sign(own, b"child") == (0, signature(b"child"))
        assert len(os.listdir("/proc/self/fd")) <= len(parent_fds)
        assert p11.finalize() == 0

    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        try:
            child()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert p11.sign_init(session, KEY) == 0 and p11.sign(session, b"parent") == (0, signature(b"parent"))
    p11.finalize()
"""


@pytest.mark.parametrize("finalize", [False, True], ids=["C_Initialize", "C_Finalize and C_Initialize"])
def test_a_forked_child_begins_anew_and_leaves_its_parent_alone(module: ScriptedModule, finalize: bool) -> None:
    run(CHILD % {"finalize": finalize}, module)
    hellos = [r for r in module.requests if r.call is Call.HELLO]
    assert [r.args[1] for r in hellos] == [NEW, FORK]
    ticket = hellos[1].args[2]
    assert ticket is not None and len(ticket) == 16
    parent = [r.name for r in module.requests if r.connection == hellos[0].connection]
    assert parent == ["HELLO", "OPEN_SESSION", "SIGN_INIT", "SIGN", "SIGN_ONCE"]


def test_a_child_whose_first_greeting_fails_still_gets_an_application_of_its_own(module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        pid = os.fork()
        if pid == 0:
            os.environ["HSMVISOR_PKCS11_ADDRESS"] += ".moved"
            p11.initialize()
            assert p11.slots() == []
            os.rename(os.environ["HSMVISOR_PKCS11_ADDRESS"][10:-6], os.environ["HSMVISOR_PKCS11_ADDRESS"][10:])
            assert p11.slots() == [0]
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        p11.finalize()
    """
    run(script, module)
    assert [r.args[1] for r in module.requests if r.call is Call.HELLO] == [NEW, FORK]


def test_forks_while_other_threads_are_in_calls(module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        ended = []

        def work():
            session = p11.open_session()
            while not ended:
                assert p11.sign_init(session, KEY) == 0
                assert p11.sign(session, b"x") == (0, signature(b"x"))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
                p11.finalize()
                p11.initialize()
                good = p11.find(p11.open_session()) == [5, 6]
                p11.finalize()
                os._exit(0 if good else 1)
            assert os.waitpid(pid, 0)[1] == 0
        ended.append(True)
        for thread in threads:
            thread.join()
        p11.finalize()
        end = time.monotonic() + 5
        while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
            time.sleep(0.01)  # the joined threads' last steps
        print(len(os.listdir("/proc/self/task")))
    """
    assert run(script, module).strip() == "1"


def test_a_program_may_end_without_finalize_and_with_threads_in_calls(module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        def wait():
            p11.call("C_WaitForSlotEvent", 0, byref(c_ulong()), None)
        threading.Thread(target=wait, daemon=True).start()
        assert p11.slots() == [0]
    """
    run(script, module)


def test_unloaded_without_finalize_it_leaves_no_descriptor(module: ScriptedModule) -> None:
    script = """
        import ctypes
        before = set(os.listdir("/proc/self/fd"))
        p11.initialize()
        p11.open_session()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(p11.library._handle))
        assert "libhsmvisor" not in open("/proc/self/maps").read()
        assert len(os.listdir("/proc/self/fd")) == len(before)
    """
    run(script, module)
